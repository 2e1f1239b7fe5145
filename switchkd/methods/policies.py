"""Who writes the next token: each rule is a frozen dataclass with explicit state.

A policy maps the two next-token distributions at a position to the **target distribution** the token is drawn from, and
says who speaks. It knows no model, no tokenizer, no cache. Its state is a tuple of tensors whose first dimension is the
row, so that the engine can undo a step, row by row, by keeping the old state.

A rule may blend: then the target is a sum of a student's and a teacher's part. Who spoke is drawn at random; the teacher with
the share that its part has in the probability of the token. So token and speaker together are distributed exactly as in the
published procedures that propose a token, test it and draw another one.

Shapes: B rows, V vocabulary. ``p`` is the teacher, ``q`` the student, ``t`` the response position (0 for the first token).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from switchkd.base.errors import ConfigError, nearest
from switchkd.methods import divergences
from switchkd.methods.policy import (
    STUDENT,
    TEACHER,
    Decision,
    Policy,
    State,
    StudentOnly,
    TeacherOnly,
    blended,
    spoken_by,
    spoken_where,
    unseen,
)
from switchkd.methods.relay import Relay

if TYPE_CHECKING:  # tensor methods suffice at run time, and `switchkd --help` answers without loading torch
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Switch(Policy):
    """SWITCH (arXiv 2410.19503): the teacher writes where JSD(p, q) is above the threshold ``tau(t)``, else the student does.

    Each token is decided for itself, so that the student may write again at the next one. The JSD is in bits and lies between 0
    and 1. With t the position in the answer, ``tau(t)`` is

    * ``exponential``: ``tau_0 · exp(−decay · t)``, the paper's rule with its tau_0 = 1 and decay = 1/10;
    * ``linear``: ``tau_0 · (1 − t / horizon)``, at least 0; the horizon is by default the maximum response length;
    * ``constant``: ``tau_0`` (the paper's ablation: 0.2);
    * ``growth``: ``tau_0 · exp(decay · t)``. The paper gives no constants; tau_0 = 0.01 with decay 0.1 mirrors its decay.

    With a threshold of 1 or more the student always writes, with a negative one the teacher. Late in a text ``tau(t)`` falls
    below the rounding of the models, in fp32 after some 220 tokens, in bf16 after some 100 (``docs/engine.md``). Where the two
    models agree to all their digits, who writes is chance from there on; what is written is the same.
    """

    unit = "bits"

    schedule: Literal["exponential", "linear", "constant", "growth"] = "exponential"  # how tau moves with the position
    tau_0: float = 1.0  # tau at the first token, in bits
    decay: float = 0.1  # per token, of exponential and growth
    horizon: int | None = None  # of linear, in tokens

    def __post_init__(self) -> None:
        schedules = ("exponential", "linear", "constant", "growth")
        if self.schedule not in schedules:
            raise ConfigError(f"unknown schedule {self.schedule!r} of Switch{nearest(self.schedule, schedules)}")
        if not math.isfinite(self.tau_0):
            raise ConfigError(f"tau_0 of Switch must be finite, got {self.tau_0}")
        if not 0 <= self.decay < math.inf:
            raise ConfigError(f"decay of Switch must be at least 0, got {self.decay}; schedule='growth' makes tau grow")
        if self.horizon is not None and self.horizon < 1:
            raise ConfigError(f"horizon of Switch must be at least 1 token, got {self.horizon}")

    def bind(self, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> Switch:
        return replace(self, horizon=max_new_tokens) if self.horizon is None else self

    def threshold(self, position: Tensor) -> Tensor:
        """``tau(t)`` in bits for the positions ``[B]``, in their dtype if it has fractions, else in fp32."""
        t = position if position.is_floating_point() else position.float()
        if self.schedule == "exponential":
            return self.tau_0 * (-self.decay * t).exp()
        if self.schedule == "growth":
            return self.tau_0 * (self.decay * t).exp()
        if self.schedule == "linear":
            if self.horizon is None:
                raise ConfigError(
                    "schedule='linear' needs the maximum response length: give horizon, or bind the policy"
                )
            return self.tau_0 * (1 - t / self.horizon).clamp(min=0)
        return t.new_full(t.shape, self.tau_0)

    def step(self, state: State, logp_student: Tensor, logp_teacher: Tensor, position: Tensor) -> Decision:
        # Rounding may leave [0, 1] by an ulp, and the first token (tau = 1) must be the student's.
        bits = (divergences.jsd(logp_teacher, logp_student) / divergences.LN2).clamp(0.0, 1.0)
        tau = self.threshold(position.to(bits.dtype))
        return spoken_where(bits > tau, logp_student, logp_teacher, bits, state, tau)


@dataclass(frozen=True)
class AdaSwitch(Policy):
    """AdaSwitch (arXiv 2510.07842): the student writes until the divergence jumps; from there on the teacher writes.

    At each position the divergence D(p ‖ q) in nats is compared with ``ratio`` times the mean of the last ``window`` divergences.
    Once it is above, the teacher writes to the end. The paper's ratio is 3. The window length is not in the text available
    to us: its default is ours, from a sweep (``docs/methods.md``). Three further choices are ours: no switch before the window is
    full; the teacher writes the token at which the switch comes (``switch_token_by``); and a divergence below ``floor`` is never a
    jump, because without that a student that equals its teacher would be replaced for rounding alone. After the switch the
    student is not looked at, and the divergence is NaN.

    State: (window ``[B, L]`` fp32, number seen ``[B]``, switched ``[B]``).
    """

    hands_over = True

    window: int = 4  # divergences of which the mean is taken: L of the paper, in tokens
    ratio: float = 3.0  # how many times the mean counts as a jump: K of the paper
    divergence: str = "forward_kl"  # a name of switchkd.divergences
    switch_token_by: Literal["teacher", "student"] = "teacher"  # who writes the token at the switching position
    require_full_window: bool = True  # no switch before L tokens
    floor: float = 0.01  # the least that the divergence is compared with, in its unit

    def __post_init__(self) -> None:
        divergences.by_name(self.divergence)
        if self.window < 1:
            raise ConfigError(f"window of AdaSwitch must be at least 1 token, got {self.window}")
        if not self.ratio >= 0:
            raise ConfigError(f"ratio of AdaSwitch must be at least 0, got {self.ratio}")
        if not 0 <= self.floor < math.inf:
            raise ConfigError(f"floor of AdaSwitch must be finite and at least 0, got {self.floor}")
        if self.switch_token_by not in ("teacher", "student"):
            raise ConfigError(f"switch_token_by must be 'teacher' or 'student', got {self.switch_token_by!r}")

    def init(self, batch: int, device: torch.device | str = "cpu") -> State:
        import torch

        return (
            torch.zeros(batch, self.window, dtype=torch.float32, device=device),
            torch.zeros(batch, dtype=torch.int64, device=device),
            torch.zeros(batch, dtype=torch.bool, device=device),
        )

    def reads(self, state: State) -> tuple[Tensor, bool]:
        return ~state[2], True

    def step(self, state: State, logp_student: Tensor, logp_teacher: Tensor, position: Tensor) -> Decision:
        window, seen, switched = state
        d = divergences.by_name(self.divergence)(logp_teacher, logp_student)
        enough = seen >= (self.window if self.require_full_window else 1)
        limit = (window.sum(1) / seen.clamp(1, self.window) * self.ratio).clamp(min=self.floor)
        compared = enough & ~switched
        jumped = switched | (compared & (d > limit))
        oldest = (seen % self.window).unsqueeze(1)
        new_state = (window.scatter(1, oldest, d.float().unsqueeze(1)), seen + 1, jumped)
        teacher = jumped if self.switch_token_by == "teacher" else switched
        seen_d, seen_limit = d.masked_fill(switched, math.nan), limit.where(compared, math.nan)
        return spoken_where(teacher, logp_student, logp_teacher, seen_d, new_state, seen_limit)


@dataclass(frozen=True)
class MixIn(Policy):
    """MiniLLM's blend (arXiv 2306.08543): the token is drawn from α p + (1 − α) q; the paper's α is 0.2.

    This is also SWITCH's ablation with a random writer for each token: a coin that names the teacher with probability α, and
    then a draw from the model that it named, gives each token the same probability.
    """

    alpha: float = 0.2  # the teacher's share

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ConfigError(f"alpha of MixIn must lie strictly between 0 and 1, got {self.alpha}")

    def step(self, state: State, logp_student: Tensor, logp_teacher: Tensor, position: Tensor) -> Decision:
        teacher = logp_teacher + math.log(self.alpha)
        target = (logp_student + math.log1p(-self.alpha)).logaddexp(teacher)
        return blended(target, teacher, unseen(target), state)


@dataclass(frozen=True)
class SKD(Policy):
    """Speculative Knowledge Distillation (arXiv 2410.11325): the student proposes a token; if it is not among the teacher's
    ``top_k`` most probable ones, the teacher draws another.

    A token y then has the probability ``q(y) [y in top-K of p] + (1 − q(top-K)) p(y)``. The divergence that is recorded is the
    probability of a rejection, ``1 − q(top-K)``. ``student_`` and ``teacher_`` temperature and top_p shape what each proposes, as
    in the released code (0.5 and 0.5, 0.2 and 0.5); the top-K is of p itself.
    """

    unit = "probability"

    top_k: int = 25  # K of the paper: tokens of the teacher that are accepted
    student_temperature: float = 1.0  # of the proposal
    student_top_p: float = 1.0  # of the proposal
    teacher_temperature: float = 1.0  # of what is drawn in its place
    teacher_top_p: float = 1.0  # of what is drawn in its place

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ConfigError(f"top_k of SKD must be at least 1, got {self.top_k}")
        for who in ("student", "teacher"):
            temperature, top_p = getattr(self, f"{who}_temperature"), getattr(self, f"{who}_top_p")
            if not 0 < temperature < math.inf or not 0 < top_p <= 1:
                raise ConfigError(
                    f"SKD needs {who}_temperature > 0 and 0 < {who}_top_p <= 1, got {temperature}, {top_p}"
                )

    def step(self, state: State, logp_student: Tensor, logp_teacher: Tensor, position: Tensor) -> Decision:
        best = logp_teacher.topk(min(self.top_k, logp_teacher.shape[-1])).indices
        kept = logp_student.new_zeros(logp_student.shape).scatter(1, best, 1.0).bool()
        return _replacing(self.proposal(STUDENT, logp_student), kept, self.proposal(TEACHER, logp_teacher), state)

    def proposal(self, speaker: int, log_probs: Tensor) -> Tensor:
        if speaker == STUDENT:
            return divergences.sharpened(log_probs, self.student_temperature, self.student_top_p)
        return divergences.sharpened(log_probs, self.teacher_temperature, self.teacher_top_p)


@dataclass(frozen=True)
class SSD(Policy):
    """Speculative self-distillation: the teacher writes where the divergence exceeds a constant ``tau``, else the student does.

    The divergence is the JSD in nats (at most ln 2); values of tau from 0.2 to 0.5 are reported to be good.
    """

    tau: float = 0.3  # in nats
    divergence: str = "jsd"  # a name of switchkd.divergences

    def __post_init__(self) -> None:
        divergences.by_name(self.divergence)
        if not math.isfinite(self.tau):
            raise ConfigError(f"tau of SSD must be finite, got {self.tau}")

    def step(self, state: State, logp_student: Tensor, logp_teacher: Tensor, position: Tensor) -> Decision:
        d = divergences.by_name(self.divergence)(logp_teacher, logp_student)
        return spoken_where(d > self.tau, logp_student, logp_teacher, d, state, d.new_full(d.shape, self.tau))


@dataclass(frozen=True)
class Hysteresis(Policy):
    """Two thresholds: the teacher begins to write where the divergence is above ``take``, and goes on until it is below ``give``.

    The rule is ours, and so are its numbers. DASH-OPD (arXiv 2607.29078) has two thresholds for whole turns of an agent, which is
    another method. The divergence is the JSD in nats by default. State: whether the teacher holds ``[B]``.
    """

    take: float = 0.4  # above it the teacher takes over
    give: float = 0.1  # below it the teacher gives back
    divergence: str = "jsd"  # a name of switchkd.divergences

    def __post_init__(self) -> None:
        divergences.by_name(self.divergence)
        if not -math.inf < self.give <= self.take < math.inf:
            raise ConfigError(f"Hysteresis needs finite give <= take, got give={self.give}, take={self.take}")

    def init(self, batch: int, device: torch.device | str = "cpu") -> State:
        import torch

        return (torch.zeros(batch, dtype=torch.bool, device=device),)

    def step(self, state: State, logp_student: Tensor, logp_teacher: Tensor, position: Tensor) -> Decision:
        (holds,) = state
        d = divergences.by_name(self.divergence)(logp_teacher, logp_student)
        teacher = (d >= self.give).where(holds, d > self.take)
        limit = d.new_full(d.shape, self.take).masked_fill(holds, self.give)
        return spoken_where(teacher, logp_student, logp_teacher, d, (teacher,), limit)


@dataclass(frozen=True)
class CAOPD(Policy):
    """CA-OPD: the student proposes a token; if the teacher gives it a probability below ``alpha``, the teacher's most probable
    token takes its place.

    Over training −log alpha follows half a cosine from that of ``alpha`` to that of ``alpha_end``, after a first part ``hold``
    of the steps in which it stays: 0.693 to 1.386 with the paper's 0.5, 0.25 and 0.1. The divergence is the probability of a
    replacement, the student's mass on tokens that would be replaced.
    """

    unit = "probability"

    alpha: float = 0.5  # threshold at the first step
    alpha_end: float = 0.25  # threshold at the last step
    hold: float = 0.1  # share of the steps, at first, in which the threshold stays

    def __post_init__(self) -> None:
        for name in ("alpha", "alpha_end"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} of CAOPD is a probability, got {getattr(self, name)}")
        if not 0 <= self.hold < 1:
            raise ConfigError(f"hold of CAOPD is a share of the steps, from 0 to below 1, got {self.hold}")

    def at(self, progress: float, step: int = 0) -> CAOPD:
        gone = (1 - math.cos(math.pi * max(0.0, progress - self.hold) / (1 - self.hold))) / 2
        # A mean of logarithms, as a product: so it also knows the logarithm of 0.
        return replace(self, alpha=self.alpha ** (1 - gone) * self.alpha_end**gone)

    def step(self, state: State, logp_student: Tensor, logp_teacher: Tensor, position: Tensor) -> Decision:
        kept = logp_teacher.exp() >= self.alpha
        instead = logp_teacher.new_full(logp_teacher.shape, -math.inf)
        instead = instead.scatter(1, logp_teacher.argmax(1, keepdim=True), 0.0)
        return _replacing(logp_student, kept, instead, state)


@dataclass(frozen=True)
class TRB(Policy):
    """Trust-region blending (arXiv 2605.31159): the token is drawn from m ∝ q^(1−a) p^a, with the largest a for which KL(m ‖ q) is
    within a budget.

    ``budget`` is in nats and falls linearly to 0 over the first ``warmup`` steps, however many follow; from there on the
    student writes. The paper has 0.001 to 0.05 nats and 15, 25 or 50 steps. The divergence is KL(m ‖ q). As such a blend is no
    sum, the teacher's part is what m has above q, which makes the teacher's share the smallest that fits m.
    """

    budget: float = 0.01  # at the first step, in nats
    warmup: int = 25  # steps after which it is 0

    def __post_init__(self) -> None:
        if not 0 <= self.budget < math.inf or not self.warmup >= 1:
            raise ConfigError(
                f"TRB needs budget >= 0 (nats) and warmup >= 1 (steps), got {self.budget} and {self.warmup}"
            )

    def at(self, progress: float, step: int = 0) -> TRB:
        return replace(self, budget=self.budget * max(0.0, 1 - step / self.warmup))

    def reads(self, state: State) -> tuple[bool, bool]:
        return True, self.budget > 0

    def step(self, state: State, logp_student: Tensor, logp_teacher: Tensor, position: Tensor) -> Decision:
        if self.budget == 0:
            return spoken_by(STUDENT, logp_student, state)
        target, kl = divergences.largest_blend(logp_student, logp_teacher, self.budget)
        above = (target.exp() - logp_student.exp()).clamp(min=0)
        return blended(target, above.log(), kl, state)


def _replacing(proposal: Tensor, kept: Tensor, instead: Tensor, state: State) -> Decision:
    """Proposals that are not ``kept`` ``[B, V]`` are drawn again from ``instead``: both ``[B, V]`` log-distributions."""
    lost = proposal.exp().masked_fill(kept, 0.0).sum(1)
    teacher = instead + lost.log().unsqueeze(1)
    target = proposal.masked_fill(~kept, -math.inf).logaddexp(teacher)
    return blended(target, teacher, lost, state)


POLICIES: dict[str, type[Policy]] = {
    "student_only": StudentOnly,
    "teacher_only": TeacherOnly,
    "switch": Switch,
    "adaswitch": AdaSwitch,
    "mix_in": MixIn,
    "skd": SKD,
    "ssd": SSD,
    "hysteresis": Hysteresis,
    "ca_opd": CAOPD,
    "trb": TRB,
    "relay": Relay,
}
