"""Who drafts, and how far: chosen before every round from the running agreement and from what each model's forwards cost.

A round decides K positions. The drafter runs once for each of them, the other model once for all. If a draft is final with
probability a, a row keeps ``1 + a + … + a^(K−1)`` tokens of the round. The choice that keeps the most tokens a second wins;
the tokens themselves never depend on it.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from switchkd.decoding.settings import Drafter
from switchkd.methods.policy import STUDENT, TEACHER

BLOCKS = (1, 2, 3, 4, 6, 8, 12, 16, 24)
# Rows times positions of a round, each of which holds noise and two log-distributions over the vocabulary.
_MAX_TOKENS = 256
# First guesses, and all there is where no clock may be looked at: two runs on one machine then make equal choices.
_SECONDS_PER_PARAMETER = 4e-10
_SECONDS_PER_TOKEN_ID = 2.5e-8


@dataclass(frozen=True)
class Plan:
    """A round: ``drafter`` runs ``forwards`` times for a block of ``block`` positions."""

    drafter: int
    block: int
    forwards: int


class Pace:
    """Plans rounds for two models with so many ``parameters`` (student, teacher) on one device.

    ``timed``: rounds may look at the clock. What forwards cost is then measured, where the length of blocks is to be chosen by it;
    otherwise it is taken from the numbers of parameters.
    """

    def __init__(
        self,
        parameters: tuple[int, int],
        vocab_size: int,
        device: torch.device,
        block_size: int | Literal["auto"] = "auto",
        drafter: Drafter = "auto",
        timed: bool = True,
    ):
        self.drafter, self.block_size, self.timed = drafter, block_size, timed
        knee = 32 if device.type == "cpu" else 512
        self.forward = [_ForwardTime(_SECONDS_PER_PARAMETER * size, knee) for size in parameters]
        # Seconds that a position of a row takes beside the forwards: noise, policy, draws.
        self.position = _Running(_SECONDS_PER_TOKEN_ID * vocab_size, seen=0, window=4)
        # How often the student's and the teacher's draw is the final token, and how often the two are equal.
        self.agreement = [_Running(0.7, seen=4, window=32) for _ in (STUDENT, TEACHER)]
        self.equal = _Running(0.7, seen=4, window=32)

    def plan(self, reads: Sequence[tuple[bool, bool]], left: int) -> Plan:
        """The next round for rows that read (student, teacher), of which the longest has ``left`` tokens to go."""
        fitting = [k for k in BLOCKS if k <= left and (k == 1 or k * len(reads) <= _MAX_TOKENS)]
        blocks = fitting if self.block_size == "auto" else [min(self.block_size, left)]
        # A teacher that nobody reads is never the cheaper drafter.
        either = (STUDENT, TEACHER) if any(teacher for _, teacher in reads) else (STUDENT,)
        drafters = {"auto": either, "student": (STUDENT,), "teacher": (TEACHER,)}[self.drafter]
        if not any(map(any, reads)):
            return Plan(drafters[0], 1, 0)  # the policy knows the next tokens by itself
        plans = [self._plan(drafter, block, reads) for drafter in drafters for block in blocks]
        return max(plans, key=lambda plan: self._rate(plan, reads))  # of equal ones the first, with the shortest block

    def observe(self, asked: int, student: int, teacher: int, ran: int, equal: int) -> None:
        """Where the policy ``asked`` both models, final draws of each; where both ``ran``, equal draws."""
        evidence = (asked, student), (asked, teacher), (ran, equal)
        for running, (positions, hits) in zip((*self.agreement, self.equal), evidence, strict=True):
            running.fade()
            if positions:
                running.add(hits / positions, positions)

    def measure(self, forwards: Sequence[Sequence[tuple[int, float]]], rest: float, positions: int) -> None:
        """Of a round: tokens and seconds of each model's forwards, and the other seconds, over positions of all rows."""
        if self.timed and self.block_size == "auto":
            for timing, laps in zip(self.forward, forwards, strict=True):
                for tokens, seconds in laps:
                    timing.observe(tokens, seconds)
            self.position.add(max(rest, 0.0) / positions)

    def _plan(self, drafter: int, block: int, reads: Sequence[tuple[bool, bool]]) -> Plan:
        # The last position needs no draft, only the drafter's distribution, if someone looks at it.
        read, verified = any(row[drafter] for row in reads), any(row[1 - drafter] for row in reads)
        return Plan(drafter, block, block if read or not verified else block - 1)

    def _rate(self, plan: Plan, reads: Sequence[tuple[bool, bool]]) -> float:
        """Expected tokens kept a second."""
        verified = sum(row[1 - plan.drafter] for row in reads)
        seconds = plan.forwards * self.forward[plan.drafter](len(reads)) + plan.block * len(reads) * self.position.value
        if verified:
            seconds += self.forward[1 - plan.drafter](verified * plan.block)
        elif self.block_size == "auto" and plan.block > 1:
            return 0.0  # nothing to verify: a block would only run past the end of rows that stop in it
        return sum(self._kept(plan, row) for row in reads) / seconds

    def _kept(self, plan: Plan, row: tuple[bool, bool]) -> float:
        if not row[1 - plan.drafter]:
            return plan.block  # the drafter's own text
        a = (self.agreement[plan.drafter] if row[plan.drafter] else self.equal).value
        return (1 - a**plan.block) / (1 - a) if a < 1 else plan.block


class _Running:
    """A mean that begins at a first guess, worth ``seen`` observations, and remembers about ``window`` of them."""

    def __init__(self, first: float, seen: int, window: int):
        self.first = self.value = first
        self.seen, self.window = seen, window

    def add(self, mean: float, count: int = 1) -> None:
        self.value += (mean - self.value) * count / (self.seen + count)
        self.seen = min(self.seen + count, self.window)

    def fade(self) -> None:
        """What is not seen for long comes back to its first guess, so that it is tried again."""
        self.value += (self.first - self.value) / 1024


class _ForwardTime:
    """Seconds of a forward over n tokens: ``s · (1 + n / knee)`` with a scale s for each power of two of n.

    Sizes not met yet take the scale of the nearest that was; ``knee`` is where a forward begins to cost by its tokens.
    """

    def __init__(self, guess: float, knee: int):
        self.knee, self.guess = knee, guess
        self.scales: dict[int, _Running] = {}
        self.met: set[int] = set()

    def __call__(self, tokens: int) -> float:
        size = _size(tokens)
        nearest = min(self.scales, key=lambda known: abs(known - size), default=None)
        scale = self.guess if nearest is None else self.scales[nearest].value
        return scale * (1 + tokens / self.knee)

    def observe(self, tokens: int, seconds: float) -> None:
        size, scale = _size(tokens), seconds / (1 + tokens / self.knee)
        if size not in self.met:
            self.met.add(size)  # the first forward of a size prepares kernels and says nothing of the next
        else:
            self.scales.setdefault(size, _Running(scale, seen=1, window=4)).add(scale)


def _size(tokens: int) -> int:
    return round(math.log2(tokens))


class Stopwatch:
    """Time of work on a device: laps are marked as it is queued, and read later. One that is not ``on`` looks at no clock."""

    def __init__(self, device: torch.device, on: bool = True):
        self.cuda, self.on = device.type == "cuda", on
        self.laps: list[tuple[int, Any, Any]] = []

    def now(self) -> Any:
        if not self.on:
            return None
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def lap(self, size: int, start: Any) -> None:
        """Work on ``size`` tokens that began at ``start`` has been queued."""
        if self.on:
            self.laps.append((size, start, self.now()))

    def take(self) -> list[tuple[int, float]]:
        """Sizes and seconds of the laps since the last call. On CUDA it waits for the end of each."""
        laps, self.laps = self.laps, []
        return [(size, self._seconds(start, end)) for size, start, end in laps]

    def _seconds(self, start: Any, end: Any) -> float:
        if not self.cuda:
            return end - start
        end.synchronize()  # an event that has not happened yet has no time: asking for it is an error
        return start.elapsed_time(end) / 1e3
