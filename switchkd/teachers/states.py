"""What the teacher says about fixed text, computed once and kept: training on data then needs no forward of the teacher.

Two kinds of work in a ``store``, hidden states and top-k log-probabilities. A part is a safetensors file of consecutive examples:
``hidden``, or ``ids`` and ``log_probs``, of their completion positions end to end.

Letters in shapes: H hidden size, V vocabulary, n completion tokens of an example, N tokens of a batch.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from switchkd.base import signals
from switchkd.base.errors import ConfigError, NonFiniteError, nearest
from switchkd.data.texts import TokenizedExample
from switchkd.forward.head import Head, sizes_on
from switchkd.forward.parallel import Together
from switchkd.models.pair import Pair
from switchkd.models.settings import dtype_name
from switchkd.teachers.asked import TextReader, side_reader
from switchkd.teachers.store import Header, Part, Progress, Store, fingerprint

Kind = Literal["hidden", "top_k"]

# Of a part: little is lost in a kill, and a large cache is still not thousands of files.
PART_BYTES = 2**26
# Of one forward, padding included.
BATCH_TOKENS = 2**13


class _Place(NamedTuple):
    """Where an example's tokens lie: in ``file`` from ``start`` up to ``stop``."""

    file: Path
    start: int
    stop: int


@dataclass(frozen=True)
class TeacherCache:
    """What the teacher says at every completion position of every example, read from the disk when it is asked for.

    Two kinds. ``hidden``: what entered the teacher's output layer, in its dtype; the loss is that of the live teacher.
    ``top_k``: the k largest log-probabilities; all other mass is one bucket (``divergences.coarsened``), the loss a lower bound.
    """

    kind: Kind
    places: tuple[_Place, ...]

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
        """Make what is missing in ``folder``, as ``Store.fill`` says, and open it; where all is there, the teacher is not called.

        Args:
            pair: its teacher reads the examples.
            examples: prompts and completions; a completion may be empty.
            kind, top_k: what is kept; of how many ids concerns the kind ``top_k`` alone.
            batch_size: most rows in a forward; fewer where they are long.
            progress: told how many examples are done, part by part.

        Raises:
            CheckpointError, DiskError, Stopped: ``Store.fill``'s; also Stopped for a signal that comes between two batches.
            NonFiniteError: the teacher's output is not finite; the example is named. ConfigError: for settings out of range.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")

        @cache  # asked for when the first part is made
        def reader() -> TextReader:
            return side_reader(pair.teacher, pair.side_of(""))

        def made(places: range) -> bytes:
            part, record = examples[places.start : places.stop], _recorder(reader(), kind, top_k)
            return save(_read_teacher(reader(), part, record, batch_size))

        parts = _store(pair, examples, folder, kind, top_k).fill(made, progress, Together.of(pair.teacher))
        return _opened(kind, examples, parts)

    @staticmethod
    def open(
        pair: Pair, examples: Sequence[TokenizedExample], folder: Path, kind: Kind, *, top_k: int = 64
    ) -> "TeacherCache":
        """Open a whole cache after checking it: that it is of this teacher, tokenizer, examples and kind, and every byte.

        Raises:
            CheckpointError: it is of something else (all that differs is named), unfinished or damaged.
        """
        return _opened(kind, examples, _store(pair, examples, folder, kind, top_k).opened())

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
        place = self.places[index]
        # Opening maps the file; only the pages of the slice are read. The copy is aligned as torch aligns: where a tensor lies
        # in the file moves the last bits of a product.
        with safe_open(place.file, "pt") as part:
            return part.get_slice(name)[place.start : place.stop].clone()


# --- what is kept -------------------------------------------------------------------------------------------------


def _store(pair: Pair, examples: Sequence[TokenizedExample], folder: Path, kind: Kind, top_k: int) -> Store:
    header = _header(pair, examples, kind, top_k)
    size = getattr(torch, header["dtype"]).itemsize
    token_bytes = header["hidden_size"] * size if kind == "hidden" else top_k * (size + 4)
    firsts, used = [0], 0
    for index, example in enumerate(examples):
        taken = len(example.teacher_completion) * token_bytes
        if used and used + taken > PART_BYTES:
            firsts.append(index)
            used = 0
        used += taken
    return Store(Path(folder), header, firsts, len(examples), "safetensors")


def _opened(kind: Kind, examples: Sequence[TokenizedExample], parts: Sequence[Part]) -> TeacherCache:
    places = []
    for part in parts:
        stop = 0
        for example in examples[part.examples.start : part.examples.stop]:
            start, stop = stop, stop + len(example.teacher_completion)
            places.append(_Place(part.file, start, stop))
    return TeacherCache(kind, tuple(places))


def _header(pair: Pair, examples: Sequence[TokenizedExample], kind: Kind, top_k: int) -> Header:
    """All that what is kept depends on."""
    if kind not in get_args(Kind):
        raise ConfigError(f"unknown kind of teacher cache {kind!r}{nearest(kind, get_args(Kind))}")
    if others := sorted({example.teacher for example in examples} - {""}):
        raise ConfigError(f"a teacher cache keeps the words of one teacher, and examples name {others[0]!r}; use none")
    weight = pair.teacher.get_output_embeddings().weight
    header: Header = {"kind": kind, "vocab_size": pair.vocab_size}
    if kind == "hidden":
        header |= {"dtype": dtype_name(weight.dtype), "hidden_size": weight.shape[1]}
    elif pair.bridges:
        raise ConfigError(
            "a teacher cache of the kind 'top_k' keeps token ids of the teacher, whose tokenizer is not the student's; use 'hidden'"
        )
    elif not 1 <= top_k <= pair.vocab_size:
        raise ConfigError(f"top_k must lie in 1..{pair.vocab_size} (the vocabulary), got {top_k}")
    else:
        wide = torch.promote_types(weight.dtype, torch.float32)
        header |= {"dtype": dtype_name(wide), "top_k": top_k}
        if pair.ends.merged_into is not None:
            header |= {"merged_eos_token_ids": [pair.ends.merged_into, *pair.ends.ids]}
    return header | fingerprint(pair, examples, completions=True)


# --- what the teacher says ----------------------------------------------------------------------------------------


def _recorder(reader: TextReader, kind: Kind, top_k: int) -> Callable[[Tensor], dict[str, Tensor]]:
    """What is kept of hidden states ``[N, H]``: tensors ``[N, …]`` on the host, by name."""
    if kind == "hidden":
        dtype = reader.head.linear.weight.dtype
        return lambda hidden: {"hidden": hidden.to(dtype).cpu()}
    return partial(_largest, reader.head, top_k)


def _largest(head: Head, k: int, hidden: Tensor) -> dict[str, Tensor]:
    """The k largest log-probabilities with their ids, a chunk of tokens at a time: ``[N, V]`` never exists."""
    tokens = max(1, sizes_on(hidden.device).chunk // (4 * head.vocab_size))
    parts = [head.log_probs(head(h)).topk(k) for h in hidden.split(tokens)]
    values, ids = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    return {"ids": ids.int(), "log_probs": values}


@torch.no_grad()
def _read_teacher(
    reader: TextReader,
    examples: Sequence[TokenizedExample],
    record: Callable[[Tensor], dict[str, Tensor]],
    batch_size: int,
) -> dict[str, Tensor]:
    """The tensors of one part: what is kept of all examples' completion positions, end to end."""
    nothing = record(reader.head.linear.weight[:0])  # no tokens: of the right dtypes and shapes
    kept = [nothing] * len(examples)
    for places in _batches(examples, batch_size):
        signals.check()
        rows = [(examples[place].teacher_reads, examples[place].teacher_completion) for place in places]
        tensors = record(reader.hidden(rows))
        lengths = [len(completion) for _, completion in rows]
        by_row = zip(*(tensor.split(lengths) for tensor in tensors.values()), strict=True)
        for place, parts in zip(places, by_row, strict=True):
            kept[place] = dict(zip(tensors, parts, strict=True))
            _check_finite(kept[place], examples[place])
    return {name: torch.cat([part[name] for part in kept]) for name in nothing}


def _batches(examples: Sequence[TokenizedExample], batch_size: int) -> Iterator[list[int]]:
    """Places of the examples that have a completion, the longest first: rows of nearly equal length, little padding."""
    sizes = [len(example.teacher_reads) + len(example.teacher_completion) for example in examples]
    places = [place for place, example in enumerate(examples) if example.teacher_completion]
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
