"""What the teacher does once: its own text for every prompt, and the checksums that bind stored work to what made it.

header.json      what the text depends on: checksums of teacher, tokenizer and prompts, and the settings
texts.jsonl      a line for every example, in order: id, token ids, whether the budget ran out
complete.json    number of lines and checksum, once all are there
"""

import ctypes
import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel

from switchkd.base.errors import CheckpointError, DataError
from switchkd.base.lock import LOCK, Check, locked
from switchkd.base.manifest import json_sha256
from switchkd.base.plain import check_type, json_object
from switchkd.data.texts import TokenizedExample
from switchkd.forward.sharding import full, state_of
from switchkd.models.pair import Pair

Header = dict[str, Any]  # flat and JSON-ready
Progress = Callable[[int], None]  # told of every example that is done
_FORMAT = "switchkd teacher texts 1"
# Batches decoded between two writes: enough to keep a batch full while rows finish, few enough to lose little.
_CHUNK_BATCHES = 4
# They name a place and a release, not what the model computes.
_CONFIG_NOISE = ("_name_or_path", "transformers_version")


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
        "examples": examples_sha256(examples, completions),
    }
    if pair.teachers:
        named = {name: [weights_sha256(model), _config_sha256(model)] for name, model in pair.teachers.items()}
        parts |= {"teachers": json_sha256(named), "teacher_of_example": json_sha256([e.teacher for e in examples])}
    return parts


def _config_sha256(model: PreTrainedModel) -> str:
    return json_sha256({k: v for k, v in model.config.to_dict().items() if k not in _CONFIG_NOISE})


def weights_sha256(model: nn.Module) -> str:
    """One checksum of all parameters and saved buffers; tied ones are read once."""
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


def refuse_other(folder: Path, stored: Header, wanted: Header) -> None:
    """Raise CheckpointError, naming all that differs, unless the work in ``folder`` was done under ``wanted``."""
    differing = [key for key in sorted(stored.keys() | wanted.keys()) if stored.get(key) != wanted.get(key)]
    if differing:
        words = "; ".join(_difference(key, stored.get(key), wanted.get(key)) for key in differing)
        raise CheckpointError(
            f"{folder} holds the teacher's work for something else: {words}. Go back to what it was made with, name "
            "another folder, or delete this one to have the work done again"
        )


def alone(folder: Path, whole: bool) -> AbstractContextManager[Check]:
    """Be the only process that fills a store, after any that does; where all is there, nothing is written, the lock neither.

    As of ``locked``, what it gives is to be called before something is written.
    """
    return nullcontext(lambda: None) if whole else locked(folder, wait=True)


def refuse_foreign(folder: Path) -> None:
    """Raise CheckpointError if a folder that is no store yet holds visible files: they are someone else's."""
    visible = sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) if folder.exists() else []
    if foreign := [name for name in visible if name != LOCK]:
        raise CheckpointError(
            f"{folder} is no store of the teacher's work, but holds {foreign[0]}; name an empty folder"
        )


def read_json(file: Path, kind: Any = dict[str, Any]) -> Header:
    """A stored JSON object of this ``kind``; raises CheckpointError if it cannot be read."""
    try:
        found = json_object(file.read_bytes())
        check_type(found, kind)
        return found
    except (OSError, DataError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); {_anew(file.parent)}") from error


def _difference(key: str, stored: Any, wanted: Any) -> str:
    if all(isinstance(value, str) and len(value) == 64 for value in (stored, wanted)):
        return f"{key} differs (checksum {stored[:8]}… there, {wanted[:8]}… now)"
    return f"{key} is {stored!r} there and {wanted!r} now"


def _anew(folder: Path) -> str:
    return f"delete {folder} to have the work done again"


def _bytes_sha256(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous()  # no copy of what lies in the host's memory in order
    # A numpy view would do as well, but for ever keep the memory from being freed, as weights that were gathered are.
    raw = (ctypes.c_ubyte * (flat.numel() * flat.element_size())).from_address(flat.data_ptr()) if flat.numel() else b""
    return hashlib.sha256(raw).hexdigest()


def examples_sha256(examples: Sequence[TokenizedExample], completions: bool) -> str:
    digest = hashlib.sha256()
    for example in examples:
        parts = [example.prompt_ids, example.completion_ids if completions else []]
        mark = []  # no id is below 0, so that a teacher's prompt cannot be taken for anything else
        if example.teacher_prompt_ids is not None:
            mark, parts = [-1], [*parts, example.teacher_prompt_ids]
        numbers = [*mark, example.id, *map(len, parts), *chain.from_iterable(parts)]
        digest.update(np.array(numbers, dtype="<i8").tobytes())
    return digest.hexdigest()
