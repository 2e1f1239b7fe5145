"""Who writes the next token: each rule is a frozen dataclass with explicit state.

A policy maps the two next-token distributions at a position to the **target distribution** the token is drawn from, and
says who speaks. It knows no model, no tokenizer, no cache. Its state is a tuple of tensors whose first dimension is the
row, so that the engine can undo a step, row by row, by keeping the old state.

Shapes: B rows, V vocabulary. ``p`` is the teacher, ``q`` the student, ``t`` the response position (0 for the first token).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from switchkd import divergences
from switchkd.errors import ConfigError, nearest

if TYPE_CHECKING:  # tensor methods suffice at run time, and `switchkd --help` answers without loading torch
    import torch
    from torch import Tensor

STUDENT, TEACHER = 0, 1

State = tuple["Tensor", ...]


class Decision(NamedTuple):
    """What a policy says about one position of each row."""

    log_probs: Tensor  # [B, V] the target distribution, log
    speaker: Tensor  # [B] int64, 0 student, 1 teacher
    divergence: Tensor  # [B] what the policy compared, in its own unit; NaN where it did not look
    state: State


@dataclass(frozen=True)
class Policy:
    """A rule for who speaks. Subclass, implement ``step``; override ``init`` if it has state, ``reads`` if it can."""

    def init(self, batch: int, device: torch.device | str = "cpu") -> State:
        """The state before the first token of ``batch`` rows."""
        return ()

    def reads(self, state: State) -> tuple[Tensor | bool, Tensor | bool]:
        """Whether the next ``step`` looks at (student, teacher): bools, or ``[B]`` bool tensors.

        Where a model is not read, its row of log-probabilities may hold anything, and the engine need not run it.
        """
        return True, True

    def step(self, state: State, logp_student: Tensor, logp_teacher: Tensor, position: Tensor) -> Decision:
        """Decide the token at ``position`` ``[B]`` from the two ``[B, V]`` log-distributions."""
        raise NotImplementedError


@dataclass(frozen=True)
class StudentOnly(Policy):
    """On-policy text: m = q."""

    def reads(self, state: State) -> tuple[bool, bool]:
        return True, False

    def step(self, state: State, logp_student: Tensor, logp_teacher: Tensor, position: Tensor) -> Decision:
        return _spoken_by(STUDENT, logp_student, state)


@dataclass(frozen=True)
class TeacherOnly(Policy):
    """The teacher's own text, as in SeqKD: m = p. With student drafts it is speculative decoding of the teacher."""

    def reads(self, state: State) -> tuple[bool, bool]:
        return False, True

    def step(self, state: State, logp_student: Tensor, logp_teacher: Tensor, position: Tensor) -> Decision:
        return _spoken_by(TEACHER, logp_teacher, state)


@dataclass(frozen=True)
class Switch(Policy):
    """SWITCH (arXiv 2410.19503): m = p where JSD(p, q) > tau(t), else q. Memoryless; control may return at once.

    The divergence is the JSD in bits, so it lies between 0 and 1, and ``tau(t)`` is

    * ``exponential``: ``tau_0 · exp(−decay · t)``, the paper's rule with its tau_0 = 1 and decay = 1/10;
    * ``linear``: ``tau_0 · (1 − t / horizon)``, at least 0; the horizon is the maximum response length;
    * ``constant``: ``tau_0`` (the paper's ablation: 0.2);
    * ``growth``: ``tau_0 · exp(decay · t)``. The paper gives no constants; tau_0 = 0.01 with decay 0.1 mirrors its decay.

    A threshold of 1 or more never hands over, a negative one always does.
    """

    schedule: Literal["exponential", "linear", "constant", "growth"] = "exponential"
    tau_0: float = 1.0
    decay: float = 0.1
    horizon: int | None = None

    def __post_init__(self) -> None:
        schedules = ("exponential", "linear", "constant", "growth")
        if self.schedule not in schedules:
            raise ConfigError(f"unknown schedule {self.schedule!r} of Switch{nearest(self.schedule, schedules)}")
        if not math.isfinite(self.tau_0):
            raise ConfigError(f"tau_0 of Switch must be finite, got {self.tau_0}")
        if not 0 <= self.decay < math.inf:
            raise ConfigError(f"decay of Switch must be at least 0, got {self.decay}; schedule='growth' makes tau grow")
        if self.schedule == "linear" and (self.horizon is None or self.horizon < 1):
            raise ConfigError(f"schedule='linear' needs horizon >= 1 (the maximum response length), got {self.horizon}")

    def threshold(self, position: Tensor) -> Tensor:
        """``tau(t)`` in bits for the positions ``[B]``."""
        t = position.double()
        if self.schedule == "exponential":
            return self.tau_0 * (-self.decay * t).exp()
        if self.schedule == "growth":
            return self.tau_0 * (self.decay * t).exp()
        if self.schedule == "linear":
            return self.tau_0 * (1 - t / (self.horizon or 1)).clamp(min=0)
        return t.new_full(t.shape, self.tau_0)

    def step(self, state: State, logp_student: Tensor, logp_teacher: Tensor, position: Tensor) -> Decision:
        # Rounding may leave [0, 1] by an ulp, and the first token (tau = 1) must be the student's.
        bits = (divergences.jsd(logp_teacher, logp_student) / divergences.LN2).clamp(0.0, 1.0)
        teacher = bits > self.threshold(position)
        return _spoken_where(teacher, logp_student, logp_teacher, bits, state)


@dataclass(frozen=True)
class AdaSwitch(Policy):
    """AdaSwitch (arXiv 2510.07842): the student explores; at the first jump of the divergence the teacher takes over.

    At position t, ``d_t = D(p ‖ q)`` (nats) is compared with ``ratio`` times the mean of the last ``window`` divergences;
    once above it, the teacher writes to the end. The paper's ratio is 3. The window length is not in the text available
    to us, so its default is ours; so are two further readings: no switch before the window is full, and the teacher
    writes the token at the switching position (``switch_token_by``). After the switch the student is not looked at and
    the divergence is NaN.

    State: (window ``[B, L]`` float64, number seen ``[B]``, switched ``[B]``).
    """

    window: int = 8
    ratio: float = 3.0
    divergence: str = "forward_kl"
    switch_token_by: Literal["teacher", "student"] = "teacher"
    require_full_window: bool = True

    def __post_init__(self) -> None:
        divergences.by_name(self.divergence)
        if self.window < 1:
            raise ConfigError(f"window of AdaSwitch must be at least 1 token, got {self.window}")
        if not self.ratio >= 0:
            raise ConfigError(f"ratio of AdaSwitch must be at least 0, got {self.ratio}")
        if self.switch_token_by not in ("teacher", "student"):
            raise ConfigError(f"switch_token_by must be 'teacher' or 'student', got {self.switch_token_by!r}")

    def init(self, batch: int, device: torch.device | str = "cpu") -> State:
        import torch

        return (
            torch.zeros(batch, self.window, dtype=torch.float64, device=device),
            torch.zeros(batch, dtype=torch.int64, device=device),
            torch.zeros(batch, dtype=torch.bool, device=device),
        )

    def reads(self, state: State) -> tuple[Tensor, bool]:
        return ~state[2], True

    def step(self, state: State, logp_student: Tensor, logp_teacher: Tensor, position: Tensor) -> Decision:
        window, seen, switched = state
        d = divergences.by_name(self.divergence)(logp_teacher, logp_student)
        enough = seen >= (self.window if self.require_full_window else 1)
        mean = window.sum(1) / seen.clamp(1, self.window)
        jump = ~switched & enough & (d > self.ratio * mean)
        teacher = switched | jump if self.switch_token_by == "teacher" else switched
        oldest = (seen % self.window).unsqueeze(1)
        recorded = d.double().masked_fill(switched, 0.0).unsqueeze(1)
        new_state = (window.scatter(1, oldest, recorded), seen + 1, switched | jump)
        return _spoken_where(teacher, logp_student, logp_teacher, d.masked_fill(switched, math.nan), new_state)


def _spoken_by(speaker: int, log_probs: Tensor, state: State) -> Decision:
    rows = log_probs.shape[0]
    who = log_probs.new_full((rows,), speaker).long()
    return Decision(log_probs, who, log_probs.new_full((rows,), math.nan), state)


def _spoken_where(teacher: Tensor, logp_student: Tensor, logp_teacher: Tensor, d: Tensor, state: State) -> Decision:
    """Target and speaker for a rule that hands each row wholly to one of the two (``teacher``: ``[B]`` bool)."""
    target = logp_teacher.where(teacher.unsqueeze(1), logp_student)
    return Decision(target, teacher.long(), d, state)


POLICIES: dict[str, type[Policy]] = {
    "student_only": StudentOnly,
    "teacher_only": TeacherOnly,
    "switch": Switch,
    "adaswitch": AdaSwitch,
}
