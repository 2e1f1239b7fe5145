"""SIGTERM, SIGINT and SIGHUP: the first one asks for an end at the next whole point, a second one ends the process where it stands.

Inside ``deferred()`` a signal is only noted. Whoever works in blocks (a decoding round, a micro-batch, a batch of evaluation)
calls ``check`` between two of them, which raises ``Stopped``. Signals belong to the process, so what has been noted does too.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

HANGUP = getattr(signal, "SIGHUP", None)  # the terminal was closed; Windows has no such signal
STOPPING = tuple(number for number in (signal.SIGTERM, signal.SIGINT, HANGUP) if number is not None)
# A terminal tells all of its processes, and a launcher passes on what it was told: that is one signal, not two.
ONE_SIGNAL_SECONDS = 1.0
_SIGNAL_AT_PARENTS_END = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>


class Interrupted(KeyboardInterrupt):
    """A signal that is answered at once. ``signal`` is its number; the exit code is 128 more."""

    def __init__(self, number: int):
        self.signal = signal.Signals(number)
        super().__init__(f"stopped by {self.signal.name}")


class Stopped(Interrupted):
    """A signal that is answered between two blocks: what there is of the work is whole and can be saved."""


_received = 0  # the signal that came, 0 for none
_polled = False  # whether ``check`` may raise


def received() -> int:
    """The number of the signal that came in this ``deferred`` block; 0 for none."""
    return _received


def check() -> None:
    """Raise Stopped if a signal came and blocks may end here."""
    if _received and _polled:
        raise Stopped(_received)


@contextmanager
def deferred(polled: bool = True) -> Iterator[None]:
    """Note the first signal of STOPPING instead of obeying it; a later one does what it did before this block.

    ``polled`` False keeps ``check`` silent, for processes that can only stop together. In another thread than the main one
    nothing changes, since Python handles signals there only.
    """
    global _received, _polled
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _heard()}
    first = 0.0

    def note(number: int, frame: FrameType | None) -> None:
        global _received
        nonlocal first
        if not _received:
            _received, first = number, time.monotonic()
            _say("stopping at the next whole point; once more to leave at once\n")
        elif time.monotonic() - first > ONE_SIGNAL_SECONDS:
            _restore(before)
            signal.raise_signal(number)

    _received, _polled = 0, polled
    try:
        for number in before:
            signal.signal(number, note)
        yield
    finally:
        _restore(before)
        _received, _polled = 0, False


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM and SIGHUP raise Interrupted where the process stands, as Ctrl-C does, so that what is half made is taken away."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[signal.Signals, Callable[..., Any] | int | None] = {}
    for number in set(_heard()) - {signal.SIGINT}:
        before[number] = signal.signal(number, _interrupt)
    try:
        yield
    finally:
        _restore(before)


def tied_to_this_process() -> Callable[[], None]:
    """What a child process does first (``preexec_fn``), so that the system ends it at once when the thread that starts it ends,
    however that happens; where a system cannot (all but Linux), nothing of the kind. The child hears Ctrl-C also if this process
    does not, as workers of Ray do not.
    """
    parent = os.getpid()
    control = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def tie() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
        if control is not None:
            control(_SIGNAL_AT_PARENTS_END, signal.SIGKILL)
            if os.getppid() != parent:  # it ended before that
                os._exit(128 + signal.SIGKILL)

    return tie


def _heard() -> list[signal.Signals]:
    """What is listened to: all of STOPPING, but for a SIGHUP that `nohup` has this process ignore."""
    return [n for n in STOPPING if n != HANGUP or signal.getsignal(n) != signal.SIG_IGN]


def _say(text: str) -> None:
    """On stderr, past all buffers: a signal may come while something else writes there. Nobody may be there to read it."""
    with suppress(OSError, ValueError):
        if sys.stderr is not None:
            os.write(sys.stderr.fileno(), text.encode())


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)


def _restore(handlers: dict[signal.Signals, Callable[..., Any] | int | None]) -> None:
    for number, handler in handlers.items():
        # None is a handler that was not set from Python, and cannot be put back from here.
        signal.signal(number, signal.SIG_DFL if handler is None else handler)
