"""What a teacher does once, kept in a folder: in parts, each of them whole or absent, and bound to all that they were made from.

manifest.json           what the work was made from, and the first example of every part; with a checksum of these
part-00000-<sha256>.…   the work on consecutive examples; the checksum is of its bytes, its place, and what the manifest says

A kind of work says what it is made from, where its parts begin and how one is made: ``states``, ``writing.teacher_texts``.
"""

import ctypes
import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel

from switchkd.base.errors import CheckpointError, DataError
from switchkd.base.lock import LOCK, locked
from switchkd.base.manifest import MANIFEST, json_sha256, read_record
from switchkd.base.storage import staged_file, tidy, write_file
from switchkd.data.texts import TokenizedExample
from switchkd.forward.parallel import Together
from switchkd.forward.served import ServedModel
from switchkd.forward.sharding import full, state_of
from switchkd.models.pair import Pair

Header = dict[str, Any]  # flat and JSON-ready
Progress = Callable[[int], None]  # told how many examples are done, part by part
_FORMAT = "switchkd teacher store 1"
# Of the layout before this one, which had two kinds of folders: this file in the one, a manifest without a format in the other.
_OLD_HEADER = "header.json"
_PART = re.compile(r"part-(\d{5,})-([0-9a-f]{64})\.\w+")
# They name a place and a release, not what the model computes.
_CONFIG_NOISE = ("_name_or_path", "transformers_version", "distributed_config")


class Part(NamedTuple):
    """The work on the examples of these places."""

    examples: range
    file: Path


@dataclass(frozen=True)
class Store:
    """The work on ``count`` examples that lies in ``folder``, or is to.

    ``header`` says what it is made from, ``firsts`` the first example of each part (a store that is there keeps its own), and
    ``ending`` how the names of its parts end.

    Raises:
        DataError: there are no examples.
    """

    folder: Path
    header: Header
    firsts: Sequence[int]
    count: int
    ending: str

    def __post_init__(self) -> None:
        if not self.count:
            raise DataError("no examples for the teacher to work on; give a train_file with at least one usable row")

    def fill(self, make: Callable[[range], bytes], progress: Progress, together: Together) -> list[Part]:
        """All parts, in order; those that are missing are made and written one by one, so that a kill costs one of them.

        One process at a time fills a folder: a second waits for it, and then finds the work done. Where all is there, nothing is
        written, the lock neither.

        Args:
            make: what the part on the examples of these places holds. What it raises ends the work; the parts before it are kept.
            progress: told of the examples of each part that is found whole, or made.
            together: the processes that run the teacher; all of them make a part, and the first one writes it.

        Raises:
            CheckpointError: the folder holds something else (all that differs is named), or damage.
            DiskError: nothing can be written there, or the folder went away.
            Stopped: a signal came while this process waited for another one.
        """
        together.led(lambda making: self._fill(making, progress), make)
        return self._stored()._parts() if together.rank == 0 else self.opened()

    def _fill(self, make: Callable[[range], bytes], progress: Progress) -> None:
        missing = self._stored()._missing()
        with locked(self.folder, wait=True) if missing else nullcontext(lambda: None) as check:
            store = self._stored()  # which another process may have filled meanwhile
            if missing:
                tidy(self.folder)
            store._verify(progress)
            for number in store._missing():
                examples = store._examples(number)
                contents = make(examples)
                check()
                store._write(number, contents)
                progress(len(examples))

    def opened(self) -> list[Part]:
        """All parts, in order, after the same checks; raises CheckpointError where one is missing, too."""
        store = self._stored()
        if missing := store._missing():
            raise CheckpointError(f"part-{missing[0]:05d} is missing in {self.folder}; build it: the others are kept")
        store._verify(lambda _: None)
        return store._parts()

    # --- what is there --------------------------------------------------------------------------------------------

    def _stored(self) -> "Store":
        """This store as it stands in the folder, which may be empty. Raises CheckpointError where that holds anything else."""
        names = sorted(path.name for path in self.folder.glob("*") if not path.name.startswith("."))
        if (self.folder / MANIFEST).exists():  # asked after the list is made: another process may be about to begin
            return replace(self, firsts=self._read_manifest())
        if _OLD_HEADER in names:
            raise self._of_another_version("an older")
        if foreign := [name for name in names if name != LOCK]:
            raise CheckpointError(
                f"{self.folder} is no store of the teacher's work, but holds {foreign[0]}; name an empty folder"
            )
        return self

    def _read_manifest(self) -> list[int]:
        """The first examples of the parts, as the manifest has them, if it is whole and of this work."""
        try:
            found = read_record(self.folder / MANIFEST, Header)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {self._way_out}") from error
        if found.get("format") != _FORMAT:
            raise self._of_another_version("another" if "format" in found else "an older")
        if found.pop("sha256", None) != json_sha256(found):
            raise CheckpointError(f"{self.folder / MANIFEST} is damaged: not as it was written; {self._way_out}")
        self._refuse_other(found["made_from"])
        return found["firsts"]

    def _refuse_other(self, stored: Header) -> None:
        keys = sorted(stored.keys() | self.header.keys())
        pairs = {key: (stored.get(key), self.header.get(key)) for key in keys}
        differing = [_difference(key, *pair) for key, pair in pairs.items() if pair[0] != pair[1]]
        if differing:
            raise CheckpointError(
                f"{self.folder} holds the teacher's work for something else: {'; '.join(differing)}. Go back to what it was made "
                f"with, name another folder, or {self._way_out}"
            )

    def _of_another_version(self, which: str) -> CheckpointError:
        return CheckpointError(
            f"{self.folder} holds the teacher's work as {which} version of switchkd kept it, which this one does not read; name "
            f"another folder, or {self._way_out}"
        )

    @property
    def _way_out(self) -> str:
        return f"delete {self.folder} to have the work done again"

    # --- its parts ------------------------------------------------------------------------------------------------

    def _examples(self, number: int) -> range:
        """The places of a part's examples."""
        last = number + 1 == len(self.firsts)
        return range(self.firsts[number], self.count if last else self.firsts[number + 1])

    def _files(self) -> dict[int, tuple[Path, str]]:
        """The parts that are there: where each lies, and its checksum."""
        found = ((path, _PART.fullmatch(path.name)) for path in self.folder.glob("part-*"))
        return {int(name[1]): (path, name[2]) for path, name in found if name and int(name[1]) < len(self.firsts)}

    def _missing(self) -> list[int]:
        there = self._files()
        return [number for number in range(len(self.firsts)) if number not in there]

    def _parts(self) -> list[Part]:
        return [Part(self._examples(number), file) for number, (file, _) in sorted(self._files().items())]

    def _verify(self, progress: Progress) -> None:
        """Read every part that is there; raises CheckpointError for the first that is not as it was written here."""
        for number, (file, checksum) in sorted(self._files().items()):
            try:
                with file.open("rb") as contents:
                    words = "" if self._checksum(number, contents) == checksum else "is damaged, or of another store"
            except OSError as error:
                words = f"cannot be read ({error})"
            if words:
                raise CheckpointError(f"{file} {words}; delete it to have this part made again: the others are kept")
            progress(len(self._examples(number)))

    def _checksum(self, number: int, contents: io.BytesIO | io.BufferedReader) -> str:
        bound_to = f"{self._manifest['sha256']} {number} ".encode()
        return hashlib.file_digest(contents, lambda: hashlib.sha256(bound_to)).hexdigest()

    @cached_property
    def _manifest(self) -> dict[str, Any]:
        said = {"format": _FORMAT, "made_from": self.header, "firsts": list(self.firsts)}
        return said | {"sha256": json_sha256(said)}

    def _write(self, number: int, contents: bytes) -> None:
        """Put a part on the disk, and the manifest before the first one: work of which nothing could be made binds nobody."""
        if not (self.folder / MANIFEST).exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_file(self.folder / MANIFEST, json.dumps(self._manifest))
        name = f"part-{number:05d}-{self._checksum(number, io.BytesIO(contents))}.{self.ending}"
        with staged_file(self.folder / name, len(contents)) as staging:
            staging.write_bytes(contents)


def _difference(key: str, stored: Any, wanted: Any) -> str:
    if all(isinstance(value, str) and len(value) == 64 for value in (stored, wanted)):
        return f"{key} differs (checksum {stored[:8]}… there, {wanted[:8]}… now)"
    return f"{key} is {stored!r} there and {wanted!r} now"


# --- checksums ----------------------------------------------------------------------------------------------------


def fingerprint(pair: Pair, examples: Sequence[TokenizedExample], *, completions: bool) -> dict[str, str]:
    """SHA-256 of everything that the teacher's work on ``examples`` depends on beside settings, part by part.

    ``teacher_weights``: names, dtypes, shapes and bytes of its parameters and buffers, the same on any device ·
    ``teacher_config`` · ``tokenizer``: its vocabulary · ``examples``: ids and prompt tokens (the teacher's too, where it has
    its own) in order, and the completion tokens if ``completions`` says that they matter · where there are several teachers,
    ``teachers``: names, weights and configs of the named ones, and ``teacher_of_example``.
    """
    parts = {
        "teacher_weights": weights_sha256(pair.teacher),
        "teacher_config": _config_sha256(pair.teacher),
        "tokenizer": json_sha256(pair.tokenizer.get_vocab()),
        "examples": _examples_sha256(examples, completions),
    }
    if pair.bridges:
        parts["teacher_tokenizers"] = json_sha256(
            {
                name: [bridge.teacher.tokenizer.get_vocab(), list(bridge.teacher.ends.ids)]
                for name, bridge in pair.bridges.items()
            }
        )
        parts["teacher_readings"] = json_sha256([e.teacher_completion for e in examples] if completions else [])
    if pair.teachers:
        named = {name: [weights_sha256(model), _config_sha256(model)] for name, model in pair.teachers.items()}
        parts |= {"teachers": json_sha256(named), "teacher_of_example": json_sha256([e.teacher for e in examples])}
    return parts


def _config_sha256(model: PreTrainedModel) -> str:
    return json_sha256({k: v for k, v in model.config.to_dict().items() if k not in _CONFIG_NOISE})


def weights_sha256(model: nn.Module) -> str:
    """One checksum of all parameters and saved buffers, tied ones read once; of a model behind a server, what stands for it."""
    if isinstance(model, ServedModel):
        return model.sha256
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, tensor in state_of(model).items():
        names.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    return tensors_sha256({" = ".join(names[key]): tensor for key, tensor in tensors.items()})


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Checksum of names, dtypes, shapes and bytes, in the order of the names. Of tensors in shards, all ranks must ask for it."""
    ordered = sorted(tensors)
    with ThreadPoolExecutor(4) as pool:  # hashing leaves the interpreter free; few tensors of a GPU are here at a time
        # Shards are gathered here, by all ranks in one order: a sharded tensor itself has no bytes at an address.
        digests = pool.map(_bytes_sha256, (full(tensors[name]) for name in ordered))
        parts = [
            [name, str(tensors[name].dtype), list(tensors[name].shape), digest]
            for name, digest in zip(ordered, digests, strict=True)
        ]
    return json_sha256(parts)


def _bytes_sha256(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous()  # no copy of what lies in the host's memory in order
    # A numpy view would do as well, but for ever keep the memory from being freed, as weights that were gathered are.
    raw = (ctypes.c_ubyte * (flat.numel() * flat.element_size())).from_address(flat.data_ptr()) if flat.numel() else b""
    return hashlib.sha256(raw).hexdigest()


def _examples_sha256(examples: Sequence[TokenizedExample], completions: bool) -> str:
    digest = hashlib.sha256()
    for example in examples:
        parts = [example.prompt_ids, example.completion_ids if completions else []]
        mark = []  # no id is below 0, so that a teacher's prompt cannot be taken for anything else
        if example.teacher_prompt_ids is not None:
            mark, parts = [-1], [*parts, example.teacher_prompt_ids]
        numbers = [*mark, example.id, *map(len, parts), *chain.from_iterable(parts)]
        digest.update(np.array(numbers, dtype="<i8").tobytes())
    return digest.hexdigest()
