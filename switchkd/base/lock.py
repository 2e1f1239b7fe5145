"""One writer to a folder: a second process is refused, or waits, and is told who the first one is.

The lock is the system's own on a small file (``flock``; on Windows ``LockFileEx``), which is taken back when its process ends,
however that happens. Where a file system has none, the file itself is the lock: one whose process ended on this machine is taken
over, any other is explained.
"""

import json
import os
import socket
import stat
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import psutil
from filelock import lock_descriptor

from switchkd.base import signals
from switchkd.base.errors import DiskError, InUseError, SwitchKDWarning
from switchkd.base.storage import written

LOCK = "lock.json"
_BEGIN = '{"pid": '  # of what stands in a lock, of which a killed process may have written a part
_POLL_SECONDS = 0.2
_WINDOWS = sys.platform == "win32"
Check = Callable[[], None]


@contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[Check]:
    """Be the only process that works in ``folder`` while the block runs. It is made if it is not there; an empty one is removed.

    With ``wait`` a second process waits until the first one is done, and says so in a warning. What is yielded is to be called
    before something is written: it raises DiskError if the folder is not there any more, or is another one.

    Raises:
        InUseError: another process works there; it is named by pid, host and start.
        DiskError: there can be no such folder, or what has the lock's name in it is no lock.
        Stopped: a signal came while waiting.
    """
    path = folder / LOCK
    file = _awaited(path) if wait else _taken(path)

    def check() -> None:
        if not _is_at(file, path):
            raise DiskError(
                f"{folder} is not the folder that the work began in: it was moved, deleted or replaced, or its {LOCK} was. Nothing "
                "is written any more; what had been written lies where the folder is now"
            )

    try:
        yield check
    finally:
        _let_go(file, path)
        with suppress(OSError):
            folder.rmdir()


def _let_go(file: IO[str], path: Path) -> None:
    """Remove the lock while it is held, since the next process's may lie there a moment later; Windows removes no open file."""
    with file:
        ours = _is_at(file, path)
        if ours and not _WINDOWS:
            path.unlink(missing_ok=True)
    if ours and _WINDOWS:
        with suppress(OSError):  # the next process has it open
            path.unlink()


def _is_at(file: IO[str], path: Path) -> bool:
    """Whether the open file lies at ``path``."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except OSError:
        return False


def _awaited(path: Path) -> IO[str]:
    """``_taken`` as soon as nobody else has it."""
    said = False
    while True:
        try:
            return _taken(path)
        except InUseError as error:
            if not said:
                warnings.warn(f"waiting: {error}", SwitchKDWarning, stacklevel=4)
            said = True
        if number := signals.received():  # not ``check``, which is silent where others wait for this process
            raise signals.Stopped(number)
        time.sleep(_POLL_SECONDS)


def _taken(path: Path) -> IO[str]:
    """The open file at ``path``, locked, with this process in it."""
    while True:
        _refuse_dangling(path.parent)
        with suppress(FileExistsError):  # a file by that name fails below
            path.parent.mkdir(parents=True)
        # The process before may remove folder or file between any two lines here.
        with suppress(FileNotFoundError):
            file = _opened(path)
            try:
                _lock(file, path)
                if _is_at(file, path):
                    _refuse_other(file, path)
                    with written(path):
                        file.truncate(0)
                        json.dump(_me(), file)
                        file.flush()
                    return file
            except BaseException:
                file.close()
                raise
            file.close()


def _opened(path: Path) -> IO[str]:
    """The file at ``path``, made where there is none; raises DiskError for what is no plain file of this one name."""
    if path.is_symlink():
        raise _no_lock(path, f"a link to {os.readlink(path)}")
    no_link = getattr(os, "O_NOFOLLOW", 0)  # nor one that was made just now; Windows has no such flag
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | no_link, 0o666)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(descriptor)
        raise _no_lock(path, "a device, a pipe, or a file that has another name too")
    return os.fdopen(descriptor, "a+", encoding="utf-8")


def _refuse_other(file: IO[str], path: Path) -> None:
    """Raise DiskError for other contents than a lock's, which are about to be written over and deleted."""
    file.seek(0)
    if (text := file.read(len(_BEGIN))) and not _BEGIN.startswith(text):
        raise _no_lock(path, "a file of other contents")


def _no_lock(path: Path, what: str) -> DiskError:
    return DiskError(f"{path} is {what}, and no lock that switchkd wrote: move it away, or choose another folder")


def _refuse_dangling(folder: Path) -> None:
    """Raise DiskError if ``folder`` is, or lies behind, a link to what is not there: no folder can be made there."""
    for link in (folder, *folder.parents):
        if link.is_symlink() and not link.exists():
            raise DiskError(
                f"{link} is a link to {os.readlink(link)}, which is not there: make that folder, or remove the link"
            )


def _lock(file: IO[str], path: Path) -> None:
    """Lock the open file, which is the one at ``path``; raises InUseError if it is another process's."""
    try:
        if lock_descriptor(file.fileno(), blocking=False):
            return
        owner, rest = _owner(path), "; wait for it, or choose another folder"
    except OSError as error:
        owner = _owner(path)
        if not owner or _ended(owner):
            return
        rest = (
            f", as far as can be told: its file system has no locks ({error}). If that process has ended, delete {path}"
        )
    raise InUseError(f"{path.parent} is in use by {_words(owner)}{rest}")


def _me() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": psutil.Process().create_time()}


def _owner(path: Path) -> dict[str, Any]:
    """Who wrote the file; {} if that cannot be read (yet)."""
    try:
        with path.open(encoding="utf-8") as file:
            file.seek(1)  # what is locked on Windows is the first byte, and nobody else can read it there
            owner = json.loads(_BEGIN[0] + file.read())
        return owner if owner.keys() == _me().keys() else {}
    except (OSError, ValueError, AttributeError):
        return {}


def worker(folder: Path) -> dict[str, Any]:
    """Who works in ``folder`` (``pid``, ``host``, ``started``), as far as its lock says, which is not taken; {} for nobody.

    A process of another machine is believed to live, since nothing is known of it here.
    """
    owner = _owner(folder / LOCK)
    return {} if not owner or _ended(owner) else owner


def _words(owner: dict[str, Any]) -> str:
    if not owner:
        return "another process"
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner["started"]))
    return f"process {owner['pid']} on {owner['host']}, started {since}"


def _ended(owner: dict[str, Any]) -> bool:
    """Whether the owner is known to have ended: it was of this machine, and its pid is nobody's or another's now."""
    if owner["host"] != socket.gethostname():
        return False
    try:
        return abs(psutil.Process(owner["pid"]).create_time() - owner["started"]) > 1
    except psutil.NoSuchProcess:
        return True
