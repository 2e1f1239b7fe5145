"""File operations that fail on purpose: one of them as a disk fails, or one and all that follow, as if the process were killed."""

import builtins
import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerFast

KILL = "kill"
HOWS = (KILL, "ENOSPC", "EIO", "EACCES")
CALLS = ("mkdir", "replace", "rename", "unlink", "rmdir", "truncate", "fsync", "open")


class Killed(BaseException):
    """The process has ended. Nothing that it would still do reaches the disk."""


class Faults:
    """Counts the file operations of a block, and fails that numbered ``at`` from 1, or all whose path ends in ``path``."""

    def __init__(self, at: int = -1, how: str = "ENOSPC", path: str = "\0"):
        self.at, self.how, self.path = at, how, path
        self.count, self.dead = 0, False

    def hit(self, path: Any, error: Callable[..., Exception] = OSError, named: bool = False) -> None:
        """An operation on ``path`` begins; raises what is to happen to it, ``named`` where the system would say of what."""
        if self.dead:
            raise Killed
        self.count += 1
        if self.count == self.at or str(path).endswith(self.path):
            self.dead = self.how == KILL
            if self.dead:
                raise Killed
            number = getattr(errno, self.how)
            raise error(number, os.strerror(number), *([str(path)] if named else []))

    @contextmanager
    def written(self, path: Any, error: Callable[[int, str], Exception] = OSError) -> Iterator[None]:
        """A file is written in this block; where that is to fail, half of it is there."""
        self.hit(path, error)  # it cannot be made
        yield
        try:
            self.hit(path, error)
        except BaseException:
            with _open(path, "rb+") as file:
                file.truncate(file.seek(0, os.SEEK_END) // 2)
            raise

    @contextmanager
    def installed(self) -> Iterator["Faults"]:
        """Stand before all that this process uses to change files."""
        with pytest.MonkeyPatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, self._before(getattr(os, name)))
            for module in (builtins, io):
                patch.setattr(module, "open", self._opened)
            serialize, save = safetensors.torch.serialize_file, PreTrainedTokenizerFast._save_pretrained
            patch.setattr(
                safetensors.torch, "serialize_file", self._writing(serialize, lambda _, path, *__, **___: path)
            )
            patch.setattr(
                PreTrainedTokenizerFast,
                "_save_pretrained",
                self._writing(save, lambda _, save_directory, *__, **___: Path(save_directory, "tokenizer.json")),
            )
            yield self

    def _before(self, call: Callable) -> Callable:
        def failing(path: Any, *args: Any, **named: Any) -> Any:
            self.hit(path, named=not isinstance(path, int))
            return call(path, *args, **named)

        return failing

    def _opened(self, file: Any, mode: str = "r", *args: Any, **named: Any) -> Any:
        if not set(mode) & set("wax+") or isinstance(file, int):
            return _open(file, mode, *args, **named)
        self.hit(file, named=True)
        try:
            self.hit(file)
        except BaseException:  # the first half of a write is there
            with _open(file, mode, *args, **named) as half:
                half.write(b"{" if "b" in mode else "{")
            raise
        return _open(file, mode, *args, **named)

    def _writing(self, call: Callable, path_of: Callable) -> Callable:
        def failing(*args: Any, **named: Any) -> Any:
            with self.written(path_of(*args, **named), _in_rust):
                return call(*args, **named)

        return failing


_open = io.open


def _in_rust(number: int, words: str) -> Exception:
    return SafetensorError(f"Error while serializing: I/O error: {words} (os error {number})")
