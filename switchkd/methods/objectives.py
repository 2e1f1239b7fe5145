"""What the student is trained on at a response token: each objective is a frozen dataclass with one pure function.

``per_token`` maps the two next-token distributions at N response tokens, and what is known of the tokens themselves, to N
losses; autograd does the rest. What it returns is what is back-propagated: nothing is added to the value only, and no
factor T² at a temperature other than 1. The loss of a step is the mean over the tokens trained on, or over texts by their means.

Shapes: N response tokens, V vocabulary. ``logp`` is the teacher, ``logq`` the student. "Constant" means: no gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from switchkd.base.errors import ConfigError
from switchkd.methods import divergences
from switchkd.methods.objective import CrossEntropy, Memory, Objective, Tokens, cross_entropy, of_text, without
from switchkd.methods.policy import STUDENT, TEACHER

if TYPE_CHECKING:  # tensor methods suffice at run time, and `switchkd --help` answers without loading torch
    from torch import Tensor


@dataclass(frozen=True)
class ForwardKL(Objective):
    """``KL(p ‖ q)`` (Hinton et al., arXiv 1503.02531)."""

    compares: ClassVar[bool] = True

    def per_token(self, logp: Tensor, logq: Tensor, tokens: Tokens) -> Tensor:
        return divergences.forward_kl(logp, logq)


@dataclass(frozen=True)
class ReverseKL(Objective):
    """``KL(q ‖ p)``, exact over the vocabulary at every token.

    With ``top_k`` only the terms of the student's k best tokens are summed, as in TRB (arXiv 2605.31159), and neither distribution
    is renormalised (that is ours): such a sum may be below 0.
    """

    compares: ClassVar[bool] = True
    top_k: int = 0  # of the student's tokens; 0 takes all

    @property
    def takes_coarse(self) -> bool:
        return super().takes_coarse and self.top_k == 0  # the student's best tokens may lie in the bucket

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_top_k(self.top_k)

    def per_token(self, logp: Tensor, logq: Tensor, tokens: Tokens) -> Tensor:
        if not 0 < self.top_k < logq.shape[-1]:
            return divergences.reverse_kl(logp, logq)
        return _kl_on(logq.detach().topk(self.top_k).indices, logq, logp)


@dataclass(frozen=True)
class JSD(Objective):
    """GKD's generalised JSD (arXiv 2306.13649): ``beta KL(p ‖ m) + (1 − beta) KL(q ‖ m)`` with ``m = beta p + (1 − beta) q``."""

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

    Reference text counts as a teacher's. β stays, as in the released code's default, or grows linearly by ``rise`` until the
    middle of training; its other choice is a rise of 0.5. With ``detach_mixture`` the student's part in ``(1−α) p + α q`` is
    constant, as there.
    """

    beta: float = 1.0  # weight of student text; teacher text has 2 - beta
    rise: float = 0.0  # of beta, over the first half of training
    detach_mixture: bool = False  # whether the student's mixture gets no gradient

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.beta <= 2 and 0 <= self.beta + self.rise <= 2):
            raise ConfigError(
                f"beta of distillm2 must lie in 0..2, got {self.beta}, and {self.beta + self.rise} in the end"
            )

    def per_token(self, logp: Tensor, logq: Tensor, tokens: Tokens) -> Tensor:
        on_teacher = (2 - self.beta) * divergences.skew_kl(logp, logq, self.alpha)
        on_student = self.beta * self._skew_reverse(logp, logq)
        return on_student.where(tokens.speakers == STUDENT, on_teacher)

    def _skew_reverse(self, logp: Tensor, logq: Tensor) -> Tensor:
        if not self.detach_mixture:
            return divergences.skew_reverse_kl(logp, logq, self.alpha)
        mixture = (logp + math.log1p(-self.alpha)).logaddexp(logq.detach() + math.log(self.alpha))
        return divergences.forward_kl(logq, mixture)

    def memory(self) -> Memory:
        return {"beta": self.beta} if self.rise else {}

    def at(self, memory: Memory) -> DistiLLM2:
        return replace(self, beta=memory["beta"], rise=0.0) if self.rise else self

    def remember(self, memory: Memory, loss: float, progress: float) -> Memory:
        return {"beta": self.beta + self.rise * min(1.0, 2 * progress)} if self.rise else {}


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
        forward = _weighed(share, divergences.forward_kl, logp, logq)
        return forward + _weighed(1 - share, divergences.reverse_kl, logp, logq)

    def head_share(self, logp: Tensor, logq: Tensor) -> Tensor:
        """``g_head / (g_head + g_tail)`` ``[N]``; a half where the two distributions are equal."""
        p = logp.exp()
        gaps = (p - logq.exp()).abs()
        ordered, index = p.sort(-1, descending=True)
        is_head = ordered.cumsum(-1) - ordered < self.head_mass
        # Each set summed for itself, so that the share of one without a gap is 1 or 0 and not nearly so.
        head, tail = (gaps.gather(-1, index).masked_fill(other, 0.0).sum(-1) for other in (~is_head, is_head))
        return (head / (head + tail)).masked_fill(head + tail == 0, 0.5)


@dataclass(frozen=True)
class TAID(Objective):
    """TAID (arXiv 2501.16937): forward KL to a target that begins between student and teacher and moves to the teacher.

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
        target = logq.detach()
        if self.s > 0:  # at 0 a −inf of the teacher's would be no number
            target = ((1 - self.s) * target + self.s * logp).log_softmax(-1)
        return divergences.forward_kl(target, logq)

    def memory(self) -> Memory:
        return {"s": self.s, "fall": 0.0, "loss": None}

    def at(self, memory: Memory) -> TAID:
        return replace(self, s=memory["s"])

    def remember(self, memory: Memory, loss: float, progress: float) -> Memory:
        before, fall, s = memory["loss"], memory["fall"], memory["s"]
        if before is not None:
            fall = self.momentum * fall + (1 - self.momentum) * (before - loss) / max(before, 1e-15)
            s += self.step / (1 + math.exp(-fall)) * (1 - s)
        line = self.s_end if progress >= 1 else self.s + (self.s_end - self.s) * progress
        return {"s": min(max(s, line), self.s_end), "fall": fall, "loss": loss}


@dataclass(frozen=True)
class Veto(Objective):
    """Veto (arXiv 2601.07155): a divergence to the target ∝ p q^β, which moves to the teacher during training.

    β falls linearly from ``beta`` in the first step to ``beta_end`` in the last. The paper has 0.8 for reasoning, 1.0 for code and
    0.3 for summaries, each to 0, where the target is p, and the KL in both directions.
    """

    beta: float = 0.5  # power of q in the target, at the start
    beta_end: float = 0.0  # and at the end
    divergence: str = "forward_kl"  # from the target; reverse_kl is the other direction

    def __post_init__(self) -> None:
        super().__post_init__()
        divergences.by_name(self.divergence)
        if not (0 <= self.beta < math.inf and 0 <= self.beta_end < math.inf):
            raise ConfigError(f"beta and beta_end of veto must be at least 0, got {self.beta} and {self.beta_end}")

    def per_token(self, logp: Tensor, logq: Tensor, tokens: Tokens) -> Tensor:
        target = logp if self.beta == 0 else (logp + self.beta * logq.detach()).log_softmax(-1)
        return divergences.by_name(self.divergence)(target, logq)

    def memory(self) -> Memory:
        return {"beta": self.beta}

    def at(self, memory: Memory) -> Veto:
        return replace(self, beta=memory["beta"])

    def remember(self, memory: Memory, loss: float, progress: float) -> Memory:
        return {"beta": (1 - progress) * self.beta + progress * self.beta_end}


@dataclass(frozen=True)
class ReplacedCE(Objective):
    """CA-OPD: cross-entropy on tokens that the teacher put in place of the student's, a divergence on all others.

    The paper's is the forward KL on the teacher's 64 best tokens: only their terms are summed, without renormalising, and a sum
    below 0 counts as 0. ``top_k`` says how many; 0 takes all, and so do the other divergences.
    """

    divergence: str = "forward_kl"  # on all other tokens
    top_k: int = 64  # of the teacher's tokens, for forward_kl; 0 takes all

    def __post_init__(self) -> None:
        super().__post_init__()
        divergences.by_name(self.divergence)
        _check_top_k(self.top_k)

    def per_token(self, logp: Tensor, logq: Tensor, tokens: Tokens) -> Tensor:
        replaced = tokens.speakers == TEACHER
        p, q = without(replaced, logp, logq)
        return self._kept(p, q).where(~replaced, cross_entropy(logq, tokens))

    def _kept(self, logp: Tensor, logq: Tensor) -> Tensor:
        if self.divergence == "forward_kl" and 0 < self.top_k < logp.shape[-1]:
            return _kl_on(logp.topk(self.top_k).indices, logp, logq).clamp(min=0)
        return divergences.by_name(self.divergence)(logp, logq)


@dataclass(frozen=True)
class OPD(Objective):
    """On-policy distillation with the sampled reverse KL as advantage (Thinking Machines, 2025).

    ``−A · q(y) / q_0(y)`` with constants ``A = log p(y) − log q(y)`` and ``q_0 = q``: the value is the sampled reverse KL,
    the gradient that of its expectation.
    """

    def per_token(self, logp: Tensor, logq: Tensor, tokens: Tokens) -> Tensor:
        p, q = of_text(logp, tokens), of_text(logq, tokens)
        return (q.detach() - p) * (q - q.detach()).exp()


@dataclass(frozen=True)
class MiniLLM(Objective):
    """Reverse KL of whole texts by policy gradient (arXiv 2306.08543).

    With rewards ``r_t = log p(y_t) − log q(y_t)``, the loss of a token is the exact single step ``w_t KL(q_t ‖ p_t)`` plus
    ``max(−R w_t, −R clip(w_t, 1 ± clip))``, where R is the mean reward of the tokens after t and
    ``w_t = q(y_t) / (α p(y_t) + (1−α) q(y_t))`` corrects for text that the blend wrote and not the student alone. The
    denominator, R and the weight of the single step are constants. ``alpha`` must be that of the policy ``mix_in`` (0 where the
    student writes alone).
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
        rewards = logp - logq
        counts = tokens.rows.bincount()
        ends = counts.cumsum(0)[tokens.rows]  # where each token's row ends
        left = ends - tokens.rows.new_ones(len(rewards)).cumsum(0)
        # Each row for itself, its end first, and no difference of sums: one infinite reward must reach what it is a return of.
        backwards = rewards.new_zeros(len(counts), int(counts.max()) + 1 if len(counts) else 1)
        backwards[tokens.rows, left + 1] = rewards
        returns = backwards.cumsum(1)[tokens.rows, left]
        return replace(tokens, returns=returns / left.clamp(min=1) if self.length_normalised else returns)

    def per_token(self, logp: Tensor, logq: Tensor, tokens: Tokens) -> Tensor:
        assert tokens.returns is not None
        p, q = of_text(logp, tokens), of_text(logq, tokens)
        written = q.detach()
        if self.alpha > 0:
            written = (p + math.log(self.alpha)).logaddexp(written + math.log1p(-self.alpha))
        weight = (q - written).exp()
        reward = tokens.returns.to(weight.dtype)
        clipped = weight.clamp(1 - self.clip, 1 + self.clip)
        step = _weighed(weight.detach(), divergences.reverse_kl, logp, logq)
        return step - _times(weight, reward).minimum(_times(clipped, reward))


def _kl_on(ids: Tensor, logp: Tensor, logq: Tensor) -> Tensor:
    """The terms ``p log(p / q)`` ``[N]`` of the tokens ``ids`` ``[N, k]`` alone, summed; nothing is renormalised."""
    logp, logq = logp.gather(-1, ids), logq.gather(-1, ids)
    p = logp.exp()
    return (p * (logp - logq).masked_fill(p == 0, 0.0)).sum(-1)


def _times(factor: Tensor, value: Tensor) -> Tensor:
    """The product, with 0 times anything 0."""
    return factor * value.masked_fill(factor == 0, 0.0)


def _weighed(weight: Tensor, divergence: divergences.Divergence, logp: Tensor, logq: Tensor) -> Tensor:
    """The product, with 0 times anything 0, also in the gradient; the weight is a constant."""
    return weight * divergence(*without(weight == 0, logp, logq))


def _check_top_k(top_k: int) -> None:
    if top_k < 0:
        raise ConfigError(f"top_k of an objective is a number of tokens, or 0 for all, got {top_k}")


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
