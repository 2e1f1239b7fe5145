"""What the teacher says about fixed text, computed once: training on data then needs no forward of the teacher.

manifest.json               what the cache was made from, its layout, where every example lies
shard-00000.safetensors     ``hidden``, or ``ids`` and ``log_probs``, of consecutive examples; with checksums

Letters in shapes: H hidden size, V vocabulary, n completion tokens of an example, N tokens of a batch.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from switchkd.base import signals
from switchkd.base.errors import CheckpointError, ConfigError, DataError, NonFiniteError, nearest
from switchkd.base.lock import Check
from switchkd.base.manifest import file_sha256, json_sha256
from switchkd.base.storage import staged_file, tidy, write_file
from switchkd.data.texts import TokenizedExample, collate
from switchkd.forward.head import Head, response_hidden, sizes_on
from switchkd.forward.modes import evaluating
from switchkd.models.pair import Pair
from switchkd.models.settings import dtype_name
from switchkd.teachers.store import (
    Header,
    Progress,
    alone,
    fingerprint,
    read_json,
    refuse_foreign,
    refuse_other,
    tensors_sha256,
)

Kind = Literal["hidden", "top_k"]

MANIFEST = "manifest.json"
_FORMAT = "switchkd teacher cache 1"
# Of one file: little is lost in a kill, and a large cache is still not thousands of files.
SHARD_BYTES = 2**26
# Of one forward, padding included.
BATCH_TOKENS = 2**13


@dataclass(frozen=True)
class TeacherCache:
    """What the teacher says at every completion position of every example, read from the disk when it is asked for.

    Two kinds. ``hidden``: what entered the teacher's output layer, in its dtype; the loss is that of the live teacher.
    ``top_k``: the k largest log-probabilities; all other mass is one bucket (``divergences.coarsened``), the loss a lower bound.
    """

    folder: Path
    kind: Kind
    lengths: tuple[int, ...]
    shards: tuple[int, ...]
    offsets: tuple[int, ...]

    @staticmethod
    def build(
        pair: Pair,
        examples: Sequence[TokenizedExample],
        folder: Path,
        kind: Kind,
        *,
        top_k: int = 64,
        batch_size: int = 32,
        progress: Progress = lambda _: None,
    ) -> "TeacherCache":
        """Write what is missing in ``folder``, shard by shard, and open it; where all is there, the teacher is not called.

        One process at a time builds in a folder: a second waits for it, and then finds the work done.

        Args:
            pair: its teacher reads the examples.
            examples: prompts and completions; a completion may be empty.
            kind, top_k: what is kept; of how many ids concerns the kind ``top_k`` alone.
            batch_size: most rows in a forward; fewer where they are long.
            progress: told how many examples are done after every shard.

        Raises:
            CheckpointError: the folder holds a cache of something else (all that differs is named), or damage.
            NonFiniteError: the teacher's output is not finite; the example is named. ConfigError: for settings out of range.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        folder, header = Path(folder), _header(pair, examples, kind, top_k)
        with alone(folder, whole=_is_whole(folder)) as check:
            layout = _fill(pair, examples, folder, header, batch_size, progress, check)
        return _opened(folder, kind, layout, examples)

    @staticmethod
    def open(
        pair: Pair,
        examples: Sequence[TokenizedExample],
        folder: Path,
        kind: Kind,
        *,
        top_k: int = 64,
    ) -> "TeacherCache":
        """Open a whole cache after checking it: that it is of this teacher, tokenizer, examples and kind, and every byte.

        Raises:
            CheckpointError: it is of something else (all that differs is named), unfinished or damaged.
        """
        folder, header = Path(folder), _header(pair, examples, kind, top_k)
        if not (folder / MANIFEST).exists():
            raise CheckpointError(f"{folder} holds no teacher cache ({MANIFEST} is missing); build it first")
        layout, digest = _open_manifest(folder, header, examples)
        for number in range(len(layout.firsts)):
            _check_shard(_shard_file(folder, number), digest)
        return _opened(folder, kind, layout, examples)

    def hidden(self, index: int) -> Tensor:
        """What entered the teacher's output layer for the completion of example ``index``: ``[n, H]`` on the host."""
        return self._read(index, "hidden")

    def top_k(self, index: int) -> tuple[Tensor, Tensor]:
        """Ids and log-probabilities of the teacher's likeliest tokens for the completion of example ``index``, ``[n, k]`` each on
        the host, the likeliest first."""
        return self._read(index, "ids"), self._read(index, "log_probs")

    def attached(self, example: TokenizedExample, index: int) -> TokenizedExample:
        """Example ``index`` with what is kept of it."""
        return dataclasses.replace(example, said=self.hidden(index) if self.kind == "hidden" else self.top_k(index))

    def _read(self, index: int, name: str) -> Tensor:
        start, length = self.offsets[index], self.lengths[index]
        # Opening maps the file; only the pages of the slice are read. The copy is aligned as torch aligns: where a tensor lies
        # in the file moves the last bits of a product.
        with safe_open(_shard_file(self.folder, self.shards[index]), "pt") as shard:
            return shard.get_slice(name)[start : start + length].clone()


# --- what a folder must hold --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """The first example of every shard, and where each example's tokens begin in its shard."""

    firsts: list[int]
    offsets: list[int]

    @staticmethod
    def of(lengths: Sequence[int], token_bytes: int) -> "_Layout":
        firsts, offsets, used = [0], [], 0
        for index, length in enumerate(lengths):
            if used and (used + length) * token_bytes > SHARD_BYTES:
                firsts.append(index)
                used = 0
            offsets.append(used)
            used += length
        return _Layout(firsts, offsets)

    def holds(self, lengths: Sequence[int]) -> bool:
        """Whether the examples lie end to end, from the first shard to the last."""
        starts = [0, *itertools.accumulate(lengths)]
        ascending = self.firsts[:1] == [0] and all(a < b for a, b in pairwise([*self.firsts, len(lengths)]))
        shards = pairwise([*self.firsts, len(lengths)]) if ascending else ()
        return self.offsets == [starts[i] - starts[a] for a, b in shards for i in range(a, b)]


def _header(pair: Pair, examples: Sequence[TokenizedExample], kind: Kind, top_k: int) -> Header:
    if not examples:
        raise DataError("no examples to keep the teacher's output of; give a train_file with at least one usable row")
    if kind not in get_args(Kind):
        raise ConfigError(f"unknown kind of teacher cache {kind!r}{nearest(kind, get_args(Kind))}")
    if others := sorted({example.teacher for example in examples} - {""}):
        raise ConfigError(f"a teacher cache keeps the words of one teacher, and examples name {others[0]!r}; use none")
    weight = pair.teacher.get_output_embeddings().weight
    header = {"format": _FORMAT, "kind": kind, "vocab_size": pair.vocab_size}
    if kind == "hidden":
        header |= {"dtype": dtype_name(weight.dtype), "hidden_size": weight.shape[1]}
    elif not 1 <= top_k <= pair.vocab_size:
        raise ConfigError(f"top_k must lie in 1..{pair.vocab_size} (the vocabulary), got {top_k}")
    else:
        wide = torch.promote_types(weight.dtype, torch.float32)
        header |= {"dtype": dtype_name(wide), "top_k": top_k}
        if pair.ends.merged_into is not None:
            header |= {"merged_eos_token_ids": [pair.ends.merged_into, *pair.ends.ids]}
    return header | fingerprint(pair, examples, completions=True)


def _token_bytes(header: Header) -> int:
    size = getattr(torch, header["dtype"]).itemsize
    return header["hidden_size"] * size if header["kind"] == "hidden" else header["top_k"] * (size + 4)


def _open_manifest(folder: Path, header: Header, examples: Sequence[TokenizedExample]) -> tuple[_Layout, str]:
    """The layout of the cache and the checksum of its manifest, which is written if there is none."""
    file = folder / MANIFEST
    if not file.exists():
        refuse_foreign(folder)
        folder.mkdir(parents=True, exist_ok=True)
        layout = _Layout.of([len(example.completion_ids) for example in examples], _token_bytes(header))
        write_file(file, json.dumps({"made_from": header, "firsts": layout.firsts, "offsets": layout.offsets}))
    manifest = _read_manifest(folder)
    refuse_other(folder, manifest["made_from"], header)
    layout = _Layout(manifest["firsts"], manifest["offsets"])
    if not layout.holds([len(example.completion_ids) for example in examples]):
        raise CheckpointError(
            f"{file} is damaged: its shards and offsets are not those of these examples; delete {folder} and build the cache again"
        )
    return layout, file_sha256(file)


class _Manifest(TypedDict):
    made_from: dict[str, Any]
    firsts: list[int]
    offsets: list[int]


def _read_manifest(folder: Path) -> dict[str, Any]:
    return read_json(folder / MANIFEST, _Manifest)


def _is_whole(folder: Path) -> bool:
    """Whether nothing is missing, as far as names tell."""
    if not (folder / MANIFEST).exists():
        return False
    return all(_shard_file(folder, number).exists() for number in range(len(_read_manifest(folder)["firsts"])))


def _fill(
    pair: Pair,
    examples: Sequence[TokenizedExample],
    folder: Path,
    header: Header,
    batch_size: int,
    progress: Progress,
    check: Check,
) -> _Layout:
    """Check what is there, write what is missing, and return where everything lies."""
    layout, digest = _open_manifest(folder, header, examples)
    if folder.is_dir():
        tidy(folder)
    record: Callable[[Tensor], dict[str, Tensor]] | None = None
    for number, (start, end) in enumerate(pairwise([*layout.firsts, len(examples)])):
        file = _shard_file(folder, number)
        if file.exists():
            _check_shard(file, digest)
        else:
            record = record or _recorder(pair, header["kind"], header.get("top_k", 0))
            tensors = _read_teacher(pair, examples[start:end], record, batch_size)
            check()
            with staged_file(file) as staging:
                save_file(tensors, staging, _seal(file, digest, tensors))
        progress(end - start)
    return layout


def _opened(folder: Path, kind: Kind, layout: _Layout, examples: Sequence[TokenizedExample]) -> TeacherCache:
    shards = [
        number
        for number, (start, end) in enumerate(pairwise([*layout.firsts, len(examples)]))
        for _ in range(start, end)
    ]
    lengths = (len(example.completion_ids) for example in examples)
    return TeacherCache(folder, kind, tuple(lengths), tuple(shards), tuple(layout.offsets))


def _shard_file(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def _seal(file: Path, digest: str, tensors: dict[str, Tensor]) -> dict[str, str]:
    """A checksum of a shard's place, of the manifest it belongs to, and of its tensors.

    One entry: safetensors writes several in an order that changes from run to run.
    """
    return {"sha256": json_sha256([file.name, digest, tensors_sha256(tensors)])}


def _check_shard(file: Path, digest: str) -> None:
    way_out = f"delete it and build the cache in {file.parent} again; only what is missing is made anew"
    if not file.exists():
        raise CheckpointError(
            f"{file} is missing; build the cache in {file.parent} again; only what is missing is made"
        )
    try:
        with safe_open(file, "pt") as shard:
            seal, tensors = shard.metadata(), {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); {way_out}") from error
    if seal != _seal(file, digest, tensors):
        raise CheckpointError(f"{file} is damaged, or of another cache; {way_out}")


# --- what the teacher says ----------------------------------------------------------------------------------------


def _recorder(pair: Pair, kind: Kind, top_k: int) -> Callable[[Tensor], dict[str, Tensor]]:
    """What is kept of hidden states ``[N, H]``: tensors ``[N, …]`` on the host, by name."""
    if kind == "hidden":
        dtype = pair.teacher.get_output_embeddings().weight.dtype
        return lambda hidden: {"hidden": hidden.to(dtype).cpu()}
    return partial(_largest, Head.of(pair.teacher, pair.vocab_size, pair.ends), top_k)


def _largest(head: Head, k: int, hidden: Tensor) -> dict[str, Tensor]:
    """The k largest log-probabilities with their ids, a chunk of tokens at a time: ``[N, V]`` never exists."""
    tokens = max(1, sizes_on(hidden.device).chunk // (4 * head.vocab_size))
    parts = [head.log_probs(head(h)).topk(k) for h in hidden.split(tokens)]
    values, ids = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    return {"ids": ids.int(), "log_probs": values}


@torch.no_grad()
def _read_teacher(
    pair: Pair, examples: Sequence[TokenizedExample], record: Callable[[Tensor], dict[str, Tensor]], batch_size: int
) -> dict[str, Tensor]:
    """The tensors of one shard: what is kept of all examples' completion positions, end to end."""
    teacher = pair.teacher
    nothing = record(teacher.get_output_embeddings().weight[:0])  # no tokens: of the right dtypes and shapes
    kept = [nothing] * len(examples)
    with evaluating(teacher):
        for places in _batches(examples, batch_size):
            signals.check()
            rows = [(examples[place].teacher_reads, examples[place].completion_ids) for place in places]
            tensors = record(response_hidden(teacher, collate(rows).to(teacher.device)))
            lengths = [len(completion) for _, completion in rows]
            by_row = zip(*(tensor.split(lengths) for tensor in tensors.values()), strict=True)
            for place, parts in zip(places, by_row, strict=True):
                kept[place] = dict(zip(tensors, parts, strict=True))
                _check_finite(kept[place], examples[place])
    return {name: torch.cat([part[name] for part in kept]) for name in nothing}


def _batches(examples: Sequence[TokenizedExample], batch_size: int) -> Iterator[list[int]]:
    """Places of the examples that have a completion, the longest first: rows of nearly equal length, little padding."""
    sizes = [len(example.teacher_reads) + len(example.completion_ids) for example in examples]
    places = [place for place, example in enumerate(examples) if example.completion_ids]
    places.sort(key=lambda place: -sizes[place])
    while places:
        rows = min(batch_size, max(1, BATCH_TOKENS // sizes[places[0]]))
        yield places[:rows]
        places = places[rows:]


def _check_finite(part: dict[str, Tensor], example: TokenizedExample) -> None:
    """Log-softmax spreads one NaN or +inf over its row; a log-probability of −inf is a masked token."""
    broken = ~part["hidden"].isfinite() if "hidden" in part else part["log_probs"].isnan()
    if broken.any():
        raise NonFiniteError(
            f"{example.source}: what the teacher computes for it is not finite; check its weights and dtype"
        )
