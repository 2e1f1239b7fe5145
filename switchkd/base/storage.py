"""Files and folders that are whole or absent: the one module that moves them into place, and takes them away.

What is being written lies beside its place under a hidden name, is pushed to the disk, and then renamed. What is taken away gets
such a name first. Whatever a killed process left under one is nobody's, and ``tidy`` removes it.
"""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from switchkd.base.errors import DiskError, SwitchKDError


@contextmanager
def staged_folder(target: Path, replace: bool = False, needs: int | None = None) -> Iterator[Path]:
    """An empty sibling of ``target`` that takes its place if the block ends well, and is removed otherwise.

    An empty ``target`` is replaced; DiskError if something else is there by then, unless ``replace`` says to take it away.
    ``needs`` is for the message if the disk is full: the bytes that will be written.
    """
    staging, old = _hidden(target), _hidden(target)
    with written(target, needs):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            staging.mkdir()
            yield staging
            for path in staging.rglob("*"):
                if path.is_file():
                    path.chmod(staging.stat().st_mode & _FILE_MODE)
                sync(path)
            sync(staging)
            if replace and os.path.lexists(target):
                os.replace(target, old)
            os.replace(staging, target)
            sync(target.parent)
        except BaseException:
            if old.exists() and not target.exists():
                os.replace(old, target)
            raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            if old.is_symlink():
                old.unlink()
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """An empty folder in ``parent`` that is taken away at the end of the block, and by ``tidy`` where that does not come."""
    folder = _hidden(parent / "scratch")
    with written(folder):
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def staged_file(target: Path, needs: int | None = None) -> Iterator[Path]:
    """A path beside ``target`` for a file that takes its place if the block ends well, and is removed otherwise.

    A file that it replaces hands its mode on.
    """
    staging = _hidden(target)
    with written(target, needs):
        try:
            staging.touch()
            mode = (target if target.is_file() and not target.is_symlink() else staging).stat().st_mode
            yield staging
            staging.chmod(mode & _FILE_MODE)
            sync(staging)
            os.replace(staging, target)
            sync(target.parent)
        finally:
            staging.unlink(missing_ok=True)


def write_file(path: Path, text: str) -> None:
    """Write a small file of ours whole or not at all."""
    with staged_file(path, len(text)) as staging:
        staging.write_text(text, encoding="utf-8")


def write_output(path: Path, contents: str | bytes) -> None:
    """Write a file that a person named: through a link and into what is there, which keeps its mode and owner, be it a file, a
    pipe or a device. Where nothing is, whole or not at all, its folder made for it.
    """
    data = contents.encode() if isinstance(contents, str) else contents
    if path.exists():
        with written(path, len(data)):
            path.write_bytes(data)
        return
    target = Path(os.path.realpath(path))  # which a link may name
    with written(target):
        if target.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        target.parent.mkdir(parents=True, exist_ok=True)
    with staged_file(target, len(data)) as staging:
        staging.write_bytes(data)


def append_lines(path: Path, records: Sequence[dict[str, Any]], durable: bool = False) -> None:
    """Add records to a file of JSON lines, which is made for the first; ``durable`` ones are on the disk when this returns.

    Where that fails, the last line may be cut short.
    """
    if records:
        text = "".join(json.dumps(record) + "\n" for record in records)
        with written(path, len(text)):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(text)
            if durable:
                sync(path)


def discard(path: Path) -> None:
    """Take a folder away: at once as far as its name goes, so that no half of it is ever seen. Of a link, the link alone goes."""
    hidden = _hidden(path)
    with written(path):
        os.replace(path, hidden)
        _remove(hidden)


def set_aside(path: Path, aside: Path) -> Path:
    """Give a file or folder the name ``aside``, under which nothing looks for it, and return that."""
    with written(path):
        os.replace(path, aside)
    return aside


def tidy(folder: Path, name: str = "*") -> None:
    """Remove what killed processes left half written in ``folder``, in which nobody else may work; ``name``: of that one alone."""
    for path in folder.glob(f".{name}.*"):
        if is_leftover(path):
            with written(path):
                _remove(path)


def is_leftover(path: Path) -> bool:
    """Whether a path has a name that only something half written has."""
    return bool(_HIDDEN.fullmatch(path.name))


@contextmanager
def written(path: Path, needs: int | None = None) -> Iterator[None]:
    """Raise DiskError for a write in this block that fails, with path, room and the ``needs`` bytes that it would have taken."""
    try:
        yield
    except SwitchKDError:
        raise
    except Exception as error:
        # safetensors and tokenizers write in Rust, which has no OSError: it says `(os error 28)`.
        if not isinstance(error, OSError) and "(os error " not in str(error):
            raise
        wanted = "" if needs is None else f"it takes about {needs:,} bytes, and "
        raise DiskError(
            f"{path} cannot be written: {error}; {wanted}{free_bytes(path):,} bytes are free there"
        ) from error


def free_bytes(path: Path) -> int:
    """Room on the disk of ``path``, which need not be there yet."""
    there = next(folder for folder in path.absolute().parents if folder.is_dir())
    return shutil.disk_usage(there).free


def sync(path: Path) -> None:
    """Push a file or folder to the disk: a rename may otherwise survive a power cut that the contents do not.

    Some file systems cannot do that, for folders or at all; what is written there is as safe as they make it. So it is on Windows,
    which does not do it for folders, nor for what is open for reading.
    """
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


# Of a mode, what a file may have: others write files that nobody else can read, whatever the process's umask allows.
_FILE_MODE = 0o666
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
# Names that nobody else gives: whatever has one may be deleted.
_HIDDEN = re.compile(r"\..+\.switchkd-[0-9a-f]{32}")


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}.switchkd-{uuid4().hex}")


# --- paths in settings --------------------------------------------------------------------------------------------

_ENDINGS = ("_file", "_dir", "_path")  # of the names of settings that are paths
_NAMES = ("runs", "plan", "resume_from", "teachers")


def unused_folder(folder: str) -> Path:
    """``folder``, or the first of folder-2, folder-3, … that is not there yet."""
    names = itertools.chain([folder], (f"{folder}-{number}" for number in itertools.count(2)))
    return next(Path(name) for name in names if not Path(name).exists())


def expanded(path: str | os.PathLike[str]) -> str:
    """``path`` with a ``~`` or ``~user`` at its beginning replaced; as it is where there is no such user."""
    return os.path.expanduser(os.fspath(path))


def expand_settings(config: Any) -> None:
    """Replace ``~`` in the paths among a frozen dataclass's settings, which are known by their names."""
    for field in dataclasses.fields(config):
        if field.name.endswith(_ENDINGS) or field.name in _NAMES:
            object.__setattr__(config, field.name, _expanded(getattr(config, field.name)))


def _expanded(value: Any) -> Any:
    if isinstance(value, str):
        return expanded(value)
    if isinstance(value, tuple):
        return tuple(map(_expanded, value))
    return {name: _expanded(one) for name, one in value.items()} if isinstance(value, dict) else value


def cache_folder() -> Path:
    """``$SWITCHKD_CACHE``, else ``$XDG_CACHE_HOME/switchkd``, else ``~/.cache/switchkd``."""
    if own := os.environ.get("SWITCHKD_CACHE"):
        return Path(expanded(own))
    return Path(expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "switchkd"
