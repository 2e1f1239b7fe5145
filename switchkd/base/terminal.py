"""The one way to a terminal: nothing that a terminal obeys passes, and one that cannot be written ends no work.

What is printed may be text that a model, a data file or another person's run directory holds. It is shown and never obeyed:
control characters stand as pictures, and no markup is read. And a terminal that was closed, a pipe whose reader has left, a log on
a full disk or an encoding without a character is no reason to lose a run: what cannot be shown is dropped, and that is said once.
"""

from __future__ import annotations

import io
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from time import monotonic
from typing import IO, Any, ParamSpec

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment

Told = ParamSpec("Told")


class Outlet(io.TextIOBase):
    """A stream that takes every text and raises nothing. ``failed`` is told of each error."""

    def __init__(self, stream: IO[str], failed: Callable[[Exception], None]):
        self.stream, self._failed = stream, failed

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self.stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return not self.stream.closed and self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()

    def write(self, text: str) -> int:
        self._try(lambda: self.stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding)))
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            self._failed(error)


class Terminal(Console):
    """A console on stdout or stderr, whatever these are at the time; ``lost`` is why nothing more can be seen there, if so.

    ``announce`` says whether that is told on stderr, once, when it happens.
    """

    def __init__(self, stderr: bool = False, **more: Any):
        super().__init__(stderr=stderr, emoji=False, markup=False, highlight=False, **more)
        self.lost: Exception | None = None
        self.announce = not stderr

    @property
    def file(self) -> IO[str]:
        return Outlet(super().file, self._lose)  # type: ignore[return-value]

    @file.setter
    def file(self, stream: IO[str]) -> None:
        self._file = stream

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich renders it; the text in it commands nothing. What rich itself says to the terminal is marked as such."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)

    def _lose(self, error: Exception) -> None:
        first, self.lost = self.lost is None, error
        if first and self.announce:
            complain(
                f"warning: stdout cannot be written ({error}): what does not fit is not shown, and the work goes on"
            )


console = Terminal()
errors = Terminal(stderr=True)


def complain(text: str) -> None:
    """A line for a person on stderr."""
    errors.print(text, soft_wrap=True)


def harmless(what: str, show: Callable[Told, Any]) -> Callable[Told, None]:
    """``show``, which only shows something: an error in it is told of once, after which nothing more is shown."""
    working = True

    def shown(*args: Told.args, **named: Told.kwargs) -> None:
        nonlocal working
        try:
            if working:
                show(*args, **named)
        except Exception as error:  # of whatever kind: looking is never a reason to stop
            working = False
            complain(
                f"warning: {what} failed ({type(error).__name__}: {error}) and is not shown any more; the work goes on"
            )

    return shown


def open_standard_streams() -> None:
    """Open /dev/null where stdin, stdout or stderr is closed: else the next file gets its number, and what is printed."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # which takes the lowest free number


def leave() -> None:
    """Flush what was printed, or give it up: Python does so at its end, and has the process fail if that fails."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError) as error:
            console.lost = console.lost or error
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# --- progress bars and numbers ------------------------------------------------------------------------------------


SAY_EVERY = 30.0  # seconds, of long work where there is no terminal


class Bar:
    """A progress bar with time left and a line of numbers that changes.

    Where there is no terminal it is a plain line when it begins, and one every SAY_EVERY seconds.
    """

    def __init__(self, progress: Progress, title: str, total: float | None, silent: bool = False, share: bool = False):
        self._progress, self._task, self._share = progress, progress.add_task(title, total=total, numbers=""), share
        self._silent = silent or progress.console.is_terminal
        self._said = monotonic()
        if not self._silent:
            progress.console.print(f"{title} …", soft_wrap=True)

    def reach(self, done: float, numbers: str | None = None) -> None:
        """Move to ``done``, and show ``numbers`` if given."""
        self.advance(done - self._progress.tasks[self._task].completed, numbers)

    def advance(self, amount: float = 1, numbers: str | None = None) -> None:
        """Move on by ``amount``, and show ``numbers`` if given."""
        self._progress.update(self._task, advance=amount)
        if numbers is not None:
            self._progress.update(self._task, numbers=numbers)
        if not self._silent and monotonic() - self._said >= SAY_EVERY:
            self._said = monotonic()
            self._progress.console.print(self._words(), soft_wrap=True)

    def _words(self) -> str:
        task = self._progress.tasks[self._task]
        done = f"{task.completed:,.0f}" + (f" of {task.total:,.0f}" if task.total else "")
        if self._share and task.total:
            done = percent(task.completed / task.total)
        return f"{task.description}: {done}" + (f" · {task.fields['numbers']}" if task.fields["numbers"] else "")

    def line(self, text: str) -> None:
        """A line that stays, for logs that are not a terminal."""
        if not self._progress.console.is_terminal:
            self._progress.console.print(text, soft_wrap=True)


@contextmanager
def bar(
    title: str, total: float | None, quiet: bool = False, on: Terminal | None = None, share: bool = False
) -> Iterator[Bar]:
    """Show a progress bar while the block runs, or nothing if ``quiet``; on the console, or another terminal.

    One of a ``share`` is in percent of ``total``, and the numbers that it is given say how long is left.
    """
    on = on or console
    counted = (MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=24),
        *((TaskProgressColumn(), TimeElapsedColumn()) if share else counted), TextColumn("{task.fields[numbers]}"),
    )  # fmt: skip
    with Progress(*columns, console=on, disable=quiet or not on.is_terminal) as progress:
        yield Bar(progress, title, total, quiet, share)


def number(value: float, digits: int = 3, decimals: int | None = None) -> str:
    """So many significant digits, or all before the point, without an exponent for everyday sizes; "-" for NaN, "0" for 0 alone.

    With ``decimals`` so many behind the point, for values that stand together; one that is not 0 never looks so.
    """
    if math.isnan(value) or not value:
        return "-" if value else "0"
    if decimals is not None and (text := f"{value:,.{decimals}f}").strip("-0.,"):
        return text
    digits = digits if decimals is None else 1
    rounded = float(f"{value:.{digits - 1}e}")  # first, as 9.996 has one digit more before the point than it seems
    place = _place(rounded)
    if not -7 < place < 15:
        return f"{rounded:.{digits - 1}e}"
    return f"{value:,.{max(digits - 1 - place, 0)}f}"


def decimals(values: Iterable[float | None], digits: int = 3) -> int | None:
    """The decimals that values of one kind need together, such as a score and its interval: those of ``digits`` significant ones
    of the largest, and as many more as it takes to tell their ends apart. None where each is better written on its own."""
    known = [v for v in values if v is not None and math.isfinite(v)]
    largest = float(f"{max(map(abs, known), default=0.0):.{digits - 1}e}")
    if not largest or not -7 < _place(largest) < 15:
        return None
    spread = max(known) - min(known)
    apart = 1 - _place(spread) if spread > 1e-9 * largest else 0
    return max(digits - 1 - _place(largest), apart, 0)


def _place(value: float) -> int:
    """The place of the first digit: 0 before the point, -1 behind it."""
    return math.floor(math.log10(abs(value))) if value and math.isfinite(value) else 0


def duration(seconds: float) -> str:
    """A time as people say it."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{number(seconds)} s"


def percent(share: float) -> str:
    """A share from 0 to 1 in whole percent, or in as many digits as it takes not to be taken for none or all."""
    whole = f"{share:.0%}"
    if whole in ("0%", "100%") and share not in (0, 1):
        return f"{number(100 * share, 2)}%" if share < 0.5 else f"{100 - float(f'{100 - 100 * share:.1g}'):.9g}%"
    return whole


# C0 has pictures in Unicode; C1, which some terminals obey too, has none, and neither have the marks that turn the direction of
# what follows, so that a line reads otherwise than it is. Newline and tab stay.
_SHOWN: dict[int, str] = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"}
_SHOWN |= {0x7F: "␡"} | {code: f"\\x{code:02x}" for code in range(0x80, 0xA0)}
_SHOWN |= {code: f"\\u{code:04x}" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def visible(text: str) -> str:
    """``text`` with control characters as pictures (␛) and marks of direction spelt out, so that a terminal shows them and obeys
    none; newline and tab stay."""
    return text.translate(_SHOWN)
