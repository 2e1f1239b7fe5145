"""What foreign files of a model may cost: a few lines of JSON can ask for hours or for all memory, and are found out before.

Regular expressions and normalisers are tried in a process of their own, which gets some seconds of work and so much memory
and no more. Sizes in config.json are compared with the weights that lie beside it.

Such a process, like any that runs a module of this package as it is here, imports nothing from the working directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switchkd.base.errors import ModelError

try:
    import resource
except ImportError:  # Windows: a trial has seconds by the clock, and no limit of memory
    resource = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from torch import Tensor, nn


SECONDS = 10  # of work for a trial, however busy the machine is; usual ones take less than one, of large tokenizers two
START_SECONDS = 20  # more, for the process to start, where work cannot be told from waiting
MEMORY = 4 * 2**30  # bytes of address space of a trial
MOST_COUNTED = 10_000  # what a config's class makes a list of, such as layers
# Long runs of one character, and every character beside every other kind: where patterns go back and forth, and normalisers grow.
TEXTS = (*(character * 2000 for character in "aA1 \n.-é東"), "aA1 .\n-é東" * 200)
# Numbers beside weights of so many bytes: 16 of each byte, as no format packs more, and what little has no weights, such as masks.
_NUMBERS_PER_BYTE, _FREE_NUMBERS = 16, 2**28


def check_patterns(patterns: Sequence[str], names: Sequence[str], source: str) -> None:
    """Raise ModelError unless each regular expression is one, and answers for each of these names of modules in time."""
    if any(re.search(r"[^\w.]", pattern) for pattern in patterns):
        _try({"patterns": list(patterns), "names": list(names)}, f"{source}: its regular expressions")


def check_tokenizer(file: Path) -> None:
    """Raise ModelError unless a tokenizer.json can be opened and cuts texts into tokens, in time and memory."""
    content = file.read_bytes()
    _check_tokenizer(hashlib.sha256(content).hexdigest(), str(file))


@cache
def _check_tokenizer(_: str, file: str) -> None:
    _try({"tokenizer": file}, f"{file}: it")


def check_counts(settings: Mapping[str, Any], source: str) -> None:
    """Raise ModelError if config.json asks for lists that have no end."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            check_counts(value, source)
        elif isinstance(value, int) and value > MOST_COUNTED and re.search(r"layer|num_labels|dense_replace", name):
            raise ModelError(f"{source}: {name} is {value:,} in config.json, and at most {MOST_COUNTED:,} are taken")


@contextmanager
def no_larger_than(weights: int, source: str) -> Iterator[None]:
    """Raise ModelError in the block for a model that is far larger than the files of its weights, of so many bytes."""
    from torch.nn.modules import module as modules

    left = _NUMBERS_PER_BYTE * weights + _FREE_NUMBERS

    def count(_: nn.Module, __: str, tensor: Tensor | None) -> None:
        nonlocal left
        left -= 0 if tensor is None else tensor.numel() + 1
        if left < 0:
            raise ModelError(
                f"{source}: config.json describes a model that is far larger than its weights, of {weights:,} bytes"
            )

    with ExitStack() as stack:
        stack.callback(modules.register_module_parameter_registration_hook(count).remove)
        stack.callback(modules.register_module_buffer_registration_hook(count).remove)
        yield


def _try(work: dict[str, Any], what: str) -> None:
    too_long = f"{what} took more than {SECONDS} s on short texts and was stopped; take another one"
    try:
        done = subprocess.run(
            command("switchkd.base.limits"),
            input=json.dumps(work | {"seconds": SECONDS, "memory": MEMORY}),
            text=True,
            capture_output=True,
            env=environment(OMP_NUM_THREADS="1", RAYON_NUM_THREADS="1"),  # every thread takes address space
            timeout=None if resource else SECONDS + START_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise ModelError(too_long) from error
    if resource and done.returncode == -signal.SIGXCPU:
        raise ModelError(too_long)
    if done.returncode < 0:
        raise ModelError(
            f"{what} took more than {MEMORY:,} bytes of memory on short texts and was stopped; take another one"
        )
    if done.returncode:
        raise ModelError(f"{what} cannot be used: {done.stderr.strip().rpartition(chr(10))[2][:300]}; take another one")


# --- in the process -----------------------------------------------------------------------------------------------


def _serve() -> None:
    work = json.load(sys.stdin)
    if resource:
        for limit, most in (
            (resource.RLIMIT_CPU, work["seconds"]),
            (resource.RLIMIT_AS, work["memory"]),
            (resource.RLIMIT_CORE, 0),
        ):
            resource.setrlimit(limit, (most, most + (limit == resource.RLIMIT_CPU)))  # at the harder one it is killed
    for pattern in work.get("patterns", ()):
        for name in work["names"]:
            re.match(rf"(?:^|.*?\.)(?:{pattern})$", name)  # in the ways that peft asks
            re.fullmatch(pattern, name)
    if file := work.get("tokenizer"):
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(file)
        for text in TEXTS:
            tokenizer.encode(text)


def command(module: str, *arguments: str) -> list[str]:
    """What starts the process; it needs ``environment``."""
    return [sys.executable, "-P", "-m", module, *arguments]


def environment(**more: str) -> dict[str, str]:
    """This process's environment and ``more``; where the package is not installed, the process finds it all the same."""
    root = str(Path(__file__).resolve().parents[2])
    paths = [os.environ.get("PYTHONPATH", ""), root if root != sysconfig.get_path("purelib") else ""]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **more}


if __name__ == "__main__":
    _serve()
