"""As many threads as there are processors that nobody else uses.

A forward of a small model is thousands of short products, and torch's threads wait for each other behind every one. If another
process holds one of two processors, each wait lasts until the scheduler comes round, and two threads take several times as long
as one.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


class FittingThreads:
    """Chooses torch's number of threads by what other processes leave; keep one for all of a process's work.

    Results may differ in the last bits with the number of threads (of large sums and unpacked products, and with them of
    gradients): what must be repeatable to the bit uses it only where all products are packed.
    """

    def __init__(self) -> None:
        self._last: tuple[float, float, float] | None = None  # seconds on the clock, of all work, of our own
        self._chosen: int | None = None

    @contextmanager
    def __call__(self) -> Iterator[Callable[[], int]]:
        """Within the context a number that fits, and never more than the caller's, which is put back behind it.

        Call what is yielded between rounds: it chooses again if ``_SECONDS`` have passed, and returns the number. Where the
        system does not tell what its processors do, the number stays as it is.
        """
        most = torch.get_num_threads()

        def fit() -> int:
            if most > 1:
                self._look()
                chosen = most if self._chosen is None else min(most, self._chosen)
                if chosen != torch.get_num_threads():
                    torch.set_num_threads(chosen)
            return torch.get_num_threads()

        try:
            fit()
            yield fit
        finally:
            if torch.get_num_threads() != most:
                torch.set_num_threads(most)

    def _look(self) -> None:
        clock = time.monotonic()
        if self._last is not None and clock - self._last[0] < _SECONDS:
            return
        if (work := _work()) is None:
            return
        last, self._last = self._last, (clock, *work)
        if last is not None:
            seconds, everybody, own = (now - before for now, before in zip(self._last, last, strict=True))
            free = len(_allowed()) - max(everybody - own, 0.0) / seconds
            self._chosen = max(int(free + _TAKEN), 1)


# How often to choose, and the share of a processor up to which others leave it to us.
_SECONDS = 0.25
_TAKEN = 0.3


def _allowed() -> set[int]:
    """The processors that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _work(file: Path = Path("/proc/stat")) -> tuple[float, float] | None:
    """Seconds of work so far, by everybody on the processors that this process may use, and by this process.

    As Linux counts them, to a hundredth of a second; None elsewhere.
    """
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    ours, busy = {f"cpu{number}" for number in _allowed()}, 0
    for name, *counts in (line.split() for line in lines if line.startswith("cpu")):
        user, nice, system, _, _, interrupts, soft, stolen = map(int, counts[:8])  # the two between are idle
        busy += (user + nice + system + interrupts + soft + stolen) * (name in ours)
    return busy / os.sysconf("SC_CLK_TCK"), time.process_time()
