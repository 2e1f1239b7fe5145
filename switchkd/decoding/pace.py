"""Which rows a round serves, who drafts for them, and how far: chosen from the running agreement and from what forwards cost.

A round decides K positions. The drafter runs once for each of them, the other model once for all. If a draft is final with
probability a, a row keeps ``1 + a + … + a^(K−1)`` tokens of the round. Rows that read both models and rows that read one want
different rounds: a round may serve some of them, and the others wait. The choice that keeps the most tokens a second wins; the
tokens themselves never depend on it.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from switchkd.base.errors import ConfigError
from switchkd.decoding.decide import Block, decide
from switchkd.decoding.settings import Drafter
from switchkd.forward.ends import Ends
from switchkd.methods.policy import STUDENT, TEACHER, Policy
from switchkd.methods.sampling import Sampling, gumbel_noise
from switchkd.runner.cache import Places
from switchkd.runner.runner import Runner

BLOCKS = (1, 2, 3, 4, 6, 8, 12, 16, 24)
# A round may have so many positions of all of its rows together whatever the vocabulary, and more as long as a tensor over
# positions and vocabulary has at most so many numbers.
_POSITIONS, _NUMBERS = 256, 2**23
# The chance that a text goes on behind a token, where nobody checks the drafter: what runs past the end is lost.
_GOES_ON = 0.98

Reads = tuple[bool, bool]  # which models a row's next step looks at: student, teacher
Line = tuple[float, float]  # seconds of n tokens: the first, and n times the second


@dataclass(frozen=True)
class Costs:
    """What decoding costs on a machine, in seconds: forwards of n tokens of student and teacher, and deciding n positions.

    They are measured once and planned with from then on, so that equal costs and texts give equal rounds, to the last bit.
    """

    student: Line
    teacher: Line
    decision: Line

    def __call__(self, who: int, tokens: int) -> float:
        fixed, each = (self.student, self.teacher)[who]
        return fixed + each * tokens

    def deciding(self, positions: int) -> float:
        return self.decision[0] + self.decision[1] * positions

    def plain(self) -> tuple[float, ...]:
        """As a setting holds them."""
        return *self.student, *self.teacher, *self.decision

    @staticmethod
    def of(plain: tuple[float, ...]) -> "Costs":
        """From what a setting holds; raises ConfigError for anything but six numbers that are at least 0."""
        if len(plain) != 6 or not all(value >= 0 for value in plain):
            raise ConfigError(
                f"costs must be six numbers of seconds that are at least 0, as config.yaml of a run holds them, got {plain}"
            )
        return Costs((plain[0], plain[1]), (plain[2], plain[3]), (plain[4], plain[5]))


# Where nothing is to be chosen, nothing is measured, and any costs do.
NO_COSTS = Costs((1.0, 0.0), (1.0, 0.0), (0.0, 0.0))


@dataclass(frozen=True)
class Plan:
    """A round for the rows that read as ``served`` says: ``drafter`` runs ``forwards`` times for a block of ``block`` positions."""

    drafter: int
    block: int
    forwards: int
    served: frozenset[Reads]


class Pace:
    """Plans rounds for two models of these costs.

    Each position of each row takes memory for noise and two log-distributions over the vocabulary, so that many rows get short
    blocks, and shorter ones the larger the vocabulary is. Without ``vocab_size`` it is taken for large. ``keep_state`` says of
    student and teacher whether a row whose block is cut must read again what is kept of it.
    """

    def __init__(
        self,
        costs: Costs,
        block_size: int | Literal["auto"] = "auto",
        drafter: Drafter = "auto",
        vocab_size: int = _NUMBERS,
        keep_state: tuple[bool, bool] = (False, False),
    ):
        self.costs, self.drafter, self.block_size = costs, drafter, block_size
        self.keep_state = keep_state
        self.positions = max(_POSITIONS, _NUMBERS // vocab_size)
        # How often the student's and the teacher's draw is the final token, and how often the two are equal.
        self.agreement = [_Running(0.7, seen=4, window=32) for _ in (STUDENT, TEACHER)]
        self.equal = _Running(0.7, seen=4, window=32)
        self.returned = False  # whether a row that read one model, or none, has come to read both again

    def plan(self, rows: Mapping[Reads, int], left: int) -> Plan:
        """The next round. ``rows`` counts those that read alike; the longest has ``left`` tokens to go."""
        everyone = frozenset(rows)
        groups = [everyone, *(frozenset([reads]) for reads in rows if len(rows) > 1)]
        if (True, True) in rows and not self.returned:
            # Those that still read both will read as the others do: served first, they share all that these have yet to do.
            groups = [served for served in groups if (True, True) in served]
        plans = [plan for group in groups for plan in self._plans(rows, group, left)]
        return max(plans, key=lambda plan: self._rate(plan, rows))  # of equal ones the first, with the shortest block

    def observe(self, asked: int, student: int, teacher: int, ran: int, equal: int) -> None:
        """Where the policy ``asked`` both models, final draws of each; where both ``ran``, equal draws."""
        evidence = (asked, student), (asked, teacher), (ran, equal)
        for running, (positions, hits) in zip((*self.agreement, self.equal), evidence, strict=True):
            running.fade()
            if positions:
                running.add(hits / positions, positions)

    def _plans(self, rows: Mapping[Reads, int], served: frozenset[Reads], left: int) -> list[Plan]:
        count = sum(rows[reads] for reads in served)
        fitting = [k for k in BLOCKS if k <= left and (k == 1 or k * count <= self.positions)]
        blocks = fitting if self.block_size == "auto" else [min(self.block_size, left)]
        # A teacher that nobody reads is never the cheaper drafter.
        either = (STUDENT, TEACHER) if any(teacher for _, teacher in served) else (STUDENT,)
        drafters = {"auto": either, "student": (STUDENT,), "teacher": (TEACHER,)}[self.drafter]
        if not any(map(any, served)):
            return [Plan(drafters[0], 1, 0, served)]  # the policy knows the next tokens by itself
        return [self.round_of(drafter, block, served) for drafter in drafters for block in blocks]

    @staticmethod
    def round_of(drafter: int, block: int, served: frozenset[Reads]) -> Plan:
        """A round of this length. The last position needs no draft, only the drafter's words, if someone looks at them."""
        read, verified = any(reads[drafter] for reads in served), any(reads[1 - drafter] for reads in served)
        return Plan(drafter, block, block if read or not verified else block - 1, served)

    def _rate(self, plan: Plan, rows: Mapping[Reads, int]) -> float:
        """Expected tokens kept a second."""
        count = sum(rows[reads] for reads in plan.served)
        verified = sum(rows[reads] for reads in plan.served if reads[1 - plan.drafter])
        seconds = plan.forwards * self.costs(plan.drafter, count) + self.costs.deciding(plan.block * count)
        if verified:
            seconds += self.costs(1 - plan.drafter, verified * plan.block)
        if verified and plan.block > 1 and any(self.keep_state):
            cut = sum(
                rows[reads] * (1 - self._final(plan, reads) ** (plan.block - 1))
                for reads in plan.served
                if reads[1 - plan.drafter]
            )
            seconds += sum(
                self._reading_again(who, cut, plan.block) for who in (STUDENT, TEACHER) if self.keep_state[who]
            )
        kept = sum(rows[reads] * self._kept(plan, reads) for reads in plan.served)
        return kept / seconds if seconds else kept

    def _reading_again(self, who: int, cut: float, block: int) -> float:
        """Seconds that a model takes to read again what so many cut rows keep of a block: half of it, in pieces (``Runner``)."""
        fixed, each = (self.costs.student, self.costs.teacher)[who]
        return fixed * min(cut, 1.0) * (block - 1).bit_length() + each * cut * block / 2

    def _final(self, plan: Plan, reads: Reads) -> float:
        """The chance that a draft is final, or of the drafter's own text, that it goes on."""
        if not reads[1 - plan.drafter]:
            return _GOES_ON
        return (self.agreement[plan.drafter] if reads[plan.drafter] else self.equal).value

    def _kept(self, plan: Plan, reads: Reads) -> float:
        a = self._final(plan, reads)
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


def line(work: Callable[[int], object], sizes: tuple[int, int], device: torch.device) -> Line:
    """Seconds of ``work(n)``, taken for a straight line through its values at two sizes; each is called once before.

    Of several the shortest counts: whatever else the machine does only adds to it.
    """
    few, many = (min(_seconds(work, size, device)) for size in sizes)
    each = max(many - few, 0.0) / (sizes[1] - sizes[0])
    # Two digits say what there is to know, and are readable where they are written down.
    return float(f"{max(few - each * sizes[0], 0.0):.2g}"), float(f"{each:.2g}")


def _seconds(work: Callable[[int], object], size: int, device: torch.device) -> list[float]:
    watch = Stopwatch(device)
    for _ in range(4):
        start = watch.now()
        work(size)
        watch.lap(size, start)
    return [seconds for _, seconds in watch.take()][1:]  # the first prepares kernels and says nothing of the next


# Positions of the longer of two blocks that are timed, and what the forwards of each model cost since it was first used.
_TIMED = 4
_lines: WeakKeyDictionary[nn.Module, dict[torch.device, Line]] = WeakKeyDictionary()
_decisions: dict[object, Line] = {}


def time_forwards(runner: Runner, rows: int) -> Line:
    """Seconds of a model's forwards, measured once for each model on its empty cache; what that leaves there is written over."""
    known = _lines.setdefault(runner.model, {})
    if runner.device not in known:
        places, ends = Places.first(rows), np.zeros(rows, dtype=np.int64)
        forwards = runner.forwards

        def forward(tokens: int) -> None:
            ids = torch.zeros(rows, tokens // rows, dtype=torch.int64, device=runner.device)
            runner.extend(places, ids[:, 0], ends, ids, tail=False)

        known[runner.device] = line(forward, (rows, _TIMED * rows), runner.device)
        runner.forwards = forwards
        for row in range(rows):
            runner.restart(row)
    return known[runner.device]


def time_decision(
    policy: Policy, sampling: Sampling, ends: Ends, vocab_size: int, rows: int, device: torch.device
) -> Line:
    """Seconds of noise, draws and the policy's step, measured once for each policy."""
    known = repr(policy), sampling, vocab_size, device
    if known not in _decisions:
        state, start = policy.init(rows, device), torch.zeros(rows, dtype=torch.int64, device=device)
        logits = torch.linspace(-3, 0, vocab_size, device=device).repeat(rows, _TIMED, 1)
        softer = logits / 2

        def decision(positions: int) -> None:
            keys = torch.arange(positions, device=device).view(rows, -1)
            noise = gumbel_noise(keys, vocab_size)
            logq, logp = (each[:, : keys.shape[1]].log_softmax(-1) for each in (logits, softer))
            block = Block((logq, logp), (None, None), keys, keys, noise, start, start + positions)
            decide(policy, state, sampling, ends, block)

        _decisions[known] = line(decision, (rows, _TIMED * rows), device)
    return _decisions[known]


class Stopwatch:
    """Time of work on a device: laps are marked as it is queued, and read later."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.laps: list[tuple[int, Any, Any]] = []

    def now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def lap(self, size: int, start: Any) -> None:
        """Work on ``size`` tokens that began at ``start`` has been queued."""
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
