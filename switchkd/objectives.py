"""What the student is trained on at a response token: each objective is a frozen dataclass with one pure function.

``per_token`` maps the two next-token distributions at N response tokens, and what is known of the tokens themselves, to N
losses; autograd does the rest. What it returns is what is back-propagated: nothing is added to the value only, and no
factor T² at a temperature other than 1. The loss of a step is the mean over the tokens trained on.

Shapes: N response tokens, V vocabulary. ``logp`` is the teacher, ``logq`` the student. "Constant" means: no gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from switchkd import divergences
from switchkd.errors import ConfigError
from switchkd.policies import REFERENCE, STUDENT, TEACHER

if TYPE_CHECKING:  # tensor methods suffice at run time, and `switchkd --help` answers without loading torch
    from torch import Tensor

Memory = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Tokens:
    """What is known of N response tokens beside the two distributions there."""

    ids: Tensor  # [N] int64
    speakers: Tensor  # [N] int64: who wrote it, STUDENT, TEACHER or REFERENCE
    rows: Tensor  # [N] int64, ascending: which row of the batch it is in
    returns: Tensor | None = None  # [N] rewards to come, for an objective that ``looks_ahead``

    def __getitem__(self, part: slice) -> Tokens:
        returns = None if self.returns is None else self.returns[part]
        return Tokens(self.ids[part], self.speakers[part], self.rows[part], returns)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Subclass and implement ``per_token``.

    An objective that changes over training keeps what it must in a memory of plain numbers: ``memory`` makes it,
    ``remember`` moves it after each step, ``at`` gives the objective of the next step. The trainer saves it.
    """

    reads_teacher: ClassVar[bool] = True
    compares: ClassVar[bool] = False  # whether distributions are all it looks at, so that coarse ones will do
    looks_ahead: ClassVar[bool] = False  # whether ``per_token`` needs ``tokens.returns``, which ``look_ahead`` makes

    temperature: float = 1.0
    """Temperature of both distributions; reaches neither sampling nor the policy, nor cross-entropy."""
    ce_weight: float = 0.0
    """Share of cross-entropy in the loss of a reference text's tokens."""
    student_weight: float = 1.0
    """Weight of tokens that the student wrote."""
    teacher_weight: float = 1.0
    """Weight of tokens that the teacher wrote."""

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"temperature of the objective must be above 0, got {self.temperature}")
        if not 0 <= self.ce_weight <= 1:
            raise ConfigError(f"ce_weight is a share of the loss, from 0 to 1, got {self.ce_weight}")
        if not (0 <= self.student_weight < math.inf and 0 <= self.teacher_weight < math.inf):
            weights = self.student_weight, self.teacher_weight
            raise ConfigError(f"student_weight and teacher_weight must be finite and at least 0, got {weights}")

    def per_token(self, logp: Tensor, logq: Tensor, tokens: Tokens) -> Tensor:
        """Losses ``[N]`` from ``[N, V]`` log-probabilities at this objective's temperature."""
        raise NotImplementedError

    def look_ahead(self, tokens: Tokens, logp: Tensor, logq: Tensor) -> Tokens:
        """``tokens`` with returns, from the log-probabilities ``[N]`` that the two models give to the tokens written."""
        return tokens

    def memory(self) -> Memory:
        return {}

    def at(self, memory: Memory) -> Objective:
        return self

    def remember(self, memory: Memory, loss: float, progress: float) -> Memory:
        """The memory after a step of this ``loss``, at a share ``progress`` of the training steps."""
        return memory

    def loss(self, logp: Tensor, logq: Tensor, tokens: Tokens) -> Tensor:
        """Losses ``[N]`` from log-probabilities at temperature 1: ``per_token``, weighted, with its share of cross-entropy."""
        value = self.per_token(self.soften(logp), self.soften(logq), tokens)
        for speaker, weight in ((STUDENT, self.student_weight), (TEACHER, self.teacher_weight)):
            if weight != 1:
                value = value.where(tokens.speakers != speaker, weight * value)
        if self.ce_weight:
            mixed = (1 - self.ce_weight) * value + self.ce_weight * _cross_entropy(logq, tokens)
            value = mixed.where(tokens.speakers == REFERENCE, value)
        return value

    def soften(self, logs: Tensor) -> Tensor:
        """Log-probabilities ``[..., V]`` at the objective's temperature."""
        return logs if self.temperature == 1 else (logs / self.temperature).log_softmax(-1)


@dataclass(frozen=True)
class CrossEntropy(Objective):
    """Negative log-likelihood of the text; no teacher is asked (SFT; SeqKD on the teacher's text)."""

    reads_teacher: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature != 1:
            raise ConfigError(f"cross_entropy has no temperature, got {self.temperature}")

    def per_token(self, logp: Tensor, logq: Tensor, tokens: Tokens) -> Tensor:
        return _cross_entropy(logq, tokens)


@dataclass(frozen=True)
class ForwardKL(Objective):
    """``KL(p ‖ q)`` (Hinton et al., arXiv 1503.02531)."""

    compares: ClassVar[bool] = True

    def per_token(self, logp: Tensor, logq: Tensor, tokens: Tokens) -> Tensor:
        return divergences.forward_kl(logp, logq)


@dataclass(frozen=True)
class ReverseKL(Objective):
    """``KL(q ‖ p)``, exact over the vocabulary at every token."""

    compares: ClassVar[bool] = True

    def per_token(self, logp: Tensor, logq: Tensor, tokens: Tokens) -> Tensor:
        return divergences.reverse_kl(logp, logq)


@dataclass(frozen=True)
class JSD(Objective):
    """GKD's generalised JSD (arXiv 2306.13649); beta is the teacher's weight in the mixture, and a strength too."""

    compares: ClassVar[bool] = True
    beta: float = 0.5  # the teacher's weight in the mixture

    def __post_init__(self) -> None:
        super().__post_init__()
        divergences.by_name("jsd", beta=self.beta)

    def per_token(self, logp: Tensor, logq: Tensor, tokens: Tokens) -> Tensor:
        return divergences.jsd(logp, logq, self.beta)


@dataclass(frozen=True)
class TVD(Objective):
    """Total variation distance (f-distill, arXiv 2307.15190)."""

    compares: ClassVar[bool] = True

    def per_token(self, logp: Tensor, logq: Tensor, tokens: Tokens) -> Tensor:
        return divergences.tvd(logp, logq)


@dataclass(frozen=True)
class _Skewed(Objective):
    compares: ClassVar[bool] = True
    alpha: float = 0.1  # skew

    def __post_init__(self) -> None:
        super().__post_init__()
        divergences.by_name("skew_kl", alpha=self.alpha)


@dataclass(frozen=True)
class SkewKL(_Skewed):
    """DistiLLM's ``KL(p ‖ α p + (1−α) q)`` (arXiv 2402.03898)."""

    def per_token(self, logp: Tensor, logq: Tensor, tokens: Tokens) -> Tensor:
        return divergences.skew_kl(logp, logq, self.alpha)


@dataclass(frozen=True)
class SkewReverseKL(_Skewed):
    """``KL(q ‖ (1−α) p + α q)``: SWITCH's and DistiLLM's objective."""

    def per_token(self, logp: Tensor, logq: Tensor, tokens: Tokens) -> Tensor:
        return divergences.skew_reverse_kl(logp, logq, self.alpha)


@dataclass(frozen=True)
class DistiLLM2(_Skewed):
    """DistiLLM-2's pair of losses (arXiv 2503.07067): ``(2−β)`` skew KL on teacher text, ``β`` skew reverse KL on student text.

    Reference text counts as a teacher's. The paper moves β; here it is fixed, at 1 by default (ours).
    """

    beta: float = 1.0  # weight of student text; teacher text has 2 - beta

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta <= 2:
            raise ConfigError(f"beta of distillm2 must lie in 0..2, got {self.beta}")

    def per_token(self, logp: Tensor, logq: Tensor, tokens: Tokens) -> Tensor:
        on_teacher = (2 - self.beta) * divergences.skew_kl(logp, logq, self.alpha)
        on_student = self.beta * divergences.skew_reverse_kl(logp, logq, self.alpha)
        return on_student.where(tokens.speakers == STUDENT, on_teacher)


@dataclass(frozen=True)
class AKL(Objective):
    """Adaptive KL (arXiv 2404.02657): forward and reverse KL weighted by the gap on the head and on the tail of p.

    The head is the smallest set of tokens with a mass of at least ``head_mass`` under p; the gap of a set is Σ|p − q| on
    it. ``(g_head KL(p‖q) + g_tail KL(q‖p)) / (g_head + g_tail)`` with constant weights.
    """

    compares: ClassVar[bool] = True
    head_mass: float = 0.5  # probability that the head holds

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.head_mass <= 1:
            raise ConfigError(f"head_mass of akl must lie in (0, 1], got {self.head_mass}")

    def per_token(self, logp: Tensor, logq: Tensor, tokens: Tokens) -> Tensor:
        share = self.head_share(logp, logq.detach())
        return share * divergences.forward_kl(logp, logq) + (1 - share) * divergences.reverse_kl(logp, logq)

    def head_share(self, logp: Tensor, logq: Tensor) -> Tensor:
        """``g_head / (g_head + g_tail)`` ``[N]``; a half where the two distributions are equal."""
        p = logp.exp()
        gaps = (p - logq.exp()).abs()
        ordered, index = p.sort(-1, descending=True)
        is_head = ordered.cumsum(-1) - ordered < self.head_mass
        head, whole = gaps.gather(-1, index).masked_fill(~is_head, 0.0).sum(-1), gaps.sum(-1)
        return (head / whole).masked_fill(whole == 0, 0.5)


@dataclass(frozen=True)
class TAID(Objective):
    """TAID (arXiv 2501.16937): forward KL to a constant target between student and teacher that moves to the teacher.

    Target ``softmax((1−s) · student logits + s · teacher logits)``. s starts at ``s`` and ends at ``s_end``; after each step
    it grows by ``step · sigmoid(momentum) · (1 − s)``, where momentum averages the relative fall of the loss, and is never
    behind the straight line from start to end.
    """

    s: float = 0.4  # the teacher's share at the start
    s_end: float = 1.0  # and at the end
    step: float = 5e-4  # growth of s in a step
    momentum: float = 0.99  # of the relative fall of the loss

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.s <= self.s_end <= 1:
            raise ConfigError(f"taid needs 0 <= s <= s_end <= 1, got s={self.s}, s_end={self.s_end}")
        if not 0 <= self.step < math.inf or not 0 <= self.momentum < 1:
            raise ConfigError(f"taid needs step >= 0 and 0 <= momentum < 1, got {self.step} and {self.momentum}")

    def per_token(self, logp: Tensor, logq: Tensor, tokens: Tokens) -> Tensor:
        if self.s == 1:
            return divergences.forward_kl(logp, logq)
        target = ((1 - self.s) * logq.detach() + self.s * logp).log_softmax(-1)
        return divergences.forward_kl(target, logq)

    def memory(self) -> Memory:
        return {"s": self.s, "fall": 0.0, "loss": None}

    def at(self, memory: Memory) -> TAID:
        return replace(self, s=memory["s"])

    def remember(self, memory: Memory, loss: float, progress: float) -> Memory:
        before, fall, s = memory["loss"], memory["fall"], memory["s"]
        if before is not None:
            fall = self.momentum * fall + (1 - self.momentum) * (before - loss) / max(before, 1e-15)
            s = max(s + self.step / (1 + math.exp(-fall)) * (1 - s), self.s + (self.s_end - self.s) * progress)
        return {"s": min(s, self.s_end), "fall": fall, "loss": loss}


@dataclass(frozen=True)
class Veto(Objective):
    """Veto (arXiv 2601.07155): forward KL to the constant target ∝ p q^β. β = 0 is forward KL; its default is ours."""

    beta: float = 0.5  # power of q in the target

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta < math.inf:
            raise ConfigError(f"beta of veto must be at least 0, got {self.beta}")

    def per_token(self, logp: Tensor, logq: Tensor, tokens: Tokens) -> Tensor:
        target = logp if self.beta == 0 else (logp + self.beta * logq.detach()).log_softmax(-1)
        return divergences.forward_kl(target, logq)


@dataclass(frozen=True)
class ReplacedCE(Objective):
    """CA-OPD: cross-entropy on tokens that the teacher put in place of the student's, a divergence on all others.

    The source says KL without a direction; reverse, as in OPD, is ours.
    """

    divergence: str = "reverse_kl"  # on all other tokens

    def __post_init__(self) -> None:
        super().__post_init__()
        divergences.by_name(self.divergence)

    def per_token(self, logp: Tensor, logq: Tensor, tokens: Tokens) -> Tensor:
        kept = divergences.by_name(self.divergence)(logp, logq)
        return kept.where(tokens.speakers != TEACHER, _cross_entropy(logq, tokens))


@dataclass(frozen=True)
class OPD(Objective):
    """On-policy distillation with the sampled reverse KL as advantage (Thinking Machines, 2025).

    ``−A · q(y) / q_0(y)`` with constants ``A = log p(y) − log q(y)`` and ``q_0 = q``: the value is the sampled reverse KL,
    the gradient that of its expectation.
    """

    def per_token(self, logp: Tensor, logq: Tensor, tokens: Tokens) -> Tensor:
        p, q = _of_text(logp, tokens), _of_text(logq, tokens)
        return (q.detach() - p) * (q - q.detach()).exp()


@dataclass(frozen=True)
class MiniLLM(Objective):
    """Reverse KL of whole texts by policy gradient (arXiv 2306.08543).

    With rewards ``r_t = log p(y_t) − log q(y_t)``, the loss of a token is the exact single step ``w_t KL(q_t ‖ p_t)`` plus
    ``max(−R w_t, −R clip(w_t, 1 ± clip))``, where R is the mean reward of the tokens after t and
    ``w_t = q(y_t) / (α p(y_t) + (1−α) q(y_t))`` weighs text of the mix-in back to the student's; the denominator, R and the
    weight of the single step are constants. ``alpha`` must be the policy's (0 where the student writes alone).
    """

    looks_ahead: ClassVar[bool] = True

    alpha: float = 0.2  # of the mix-in that wrote the text
    clip: float = 0.2  # of the importance weight, around 1
    length_normalised: bool = True  # R is the mean reward to come, else the sum

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha < 1 or not 0 <= self.clip < math.inf:
            raise ConfigError(f"minillm needs 0 <= alpha < 1 and clip >= 0, got {self.alpha} and {self.clip}")

    def look_ahead(self, tokens: Tokens, logp: Tensor, logq: Tensor) -> Tokens:
        rewards = (logp - logq).double()
        from_here = rewards.flip(0).cumsum(0).flip(0)
        counts = tokens.rows.bincount()
        ends = counts.cumsum(0)[tokens.rows]  # where each token's row ends
        beyond = from_here.new_zeros(len(rewards) + 1)
        beyond[:-1] = from_here
        returns = from_here - rewards - beyond[ends]
        if self.length_normalised:
            left = ends - rewards.new_ones(len(rewards)).cumsum(0)
            returns = returns / left.clamp(min=1)
        return replace(tokens, returns=returns)

    def per_token(self, logp: Tensor, logq: Tensor, tokens: Tokens) -> Tensor:
        assert tokens.returns is not None
        p, q = _of_text(logp, tokens), _of_text(logq, tokens)
        written = q.detach()
        if self.alpha > 0:
            written = (p + math.log(self.alpha)).logaddexp(written + math.log1p(-self.alpha))
        weight = (q - written).exp()
        reward = tokens.returns.to(weight.dtype)
        clipped = weight.clamp(1 - self.clip, 1 + self.clip)
        return weight.detach() * divergences.reverse_kl(logp, logq) - (reward * weight).minimum(reward * clipped)


def _of_text(logs: Tensor, tokens: Tokens) -> Tensor:
    """Log-probabilities ``[N]`` of the tokens written."""
    return logs.gather(-1, tokens.ids.unsqueeze(-1)).squeeze(-1)


def _cross_entropy(logq: Tensor, tokens: Tokens) -> Tensor:
    return -_of_text(logq, tokens)


OBJECTIVES: dict[str, type[Objective]] = {
    "cross_entropy": CrossEntropy,
    "forward_kl": ForwardKL,
    "reverse_kl": ReverseKL,
    "jsd": JSD,
    "tvd": TVD,
    "skew_kl": SkewKL,
    "skew_reverse_kl": SkewReverseKL,
    "distillm2": DistiLLM2,
    "akl": AKL,
    "taid": TAID,
    "veto": Veto,
    "replaced_ce": ReplacedCE,
    "opd": OPD,
    "minillm": MiniLLM,
}
