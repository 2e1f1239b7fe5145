"""What an objective is: a loss at every response token, from the two distributions there."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from switchkd.base.errors import ConfigError
from switchkd.methods.policy import REFERENCE, STUDENT, TEACHER

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
    lengths: Tensor | None = None  # [N] int64: tokens of the text it is in, where each text counts by its mean

    def __getitem__(self, part: slice | Tensor) -> Tokens:
        returns, lengths = (None if x is None else x[part] for x in (self.returns, self.lengths))
        return Tokens(self.ids[part], self.speakers[part], self.rows[part], returns, lengths)

    def without_returns(self, left_out: Tensor) -> Tokens:
        """These tokens with returns of 0 at those that do not count."""
        return self if self.returns is None else replace(self, returns=self.returns.masked_fill(left_out, 0.0))

    def by_text(self) -> Tokens:
        """These tokens, all there are of their rows, knowing the lengths of their texts."""
        return replace(self, lengths=self.rows.bincount()[self.rows])


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The number that is lowered at every token of an answer. Subclass and implement ``per_token``.

    An objective that changes over training keeps what it must in a memory of plain numbers: ``memory`` makes it,
    ``remember`` moves it after each step, ``at`` gives the objective of the next step. The trainer saves it.

    Where a model gives a token no probability (−inf), an objective is as finite as its formula, in value and in gradient, and
    0 times anything is 0.
    """

    reads_teacher: ClassVar[bool] = True
    compares: ClassVar[bool] = False  # whether distributions are all it looks at, so that coarse ones will do
    looks_ahead: ClassVar[bool] = False  # whether ``per_token`` needs ``tokens.returns``, which ``look_ahead`` makes
    over_tokens: ClassVar[bool] = False  # whether its mean is over tokens, whatever ``loss_over`` says

    temperature: float = 1.0
    """Temperature of both distributions in the loss. It changes neither sampling nor who writes, nor cross-entropy."""
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

    @property
    def takes_coarse(self) -> bool:
        """Whether all but the teacher's largest probabilities may be one bucket."""
        return self.compares and self.temperature == 1 and self.ce_weight == 0

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
        """The memory after a step of this ``loss``; ``progress`` is the coming step's, 0 in the first of a run, 1 in the last."""
        return memory

    def loss(self, logp: Tensor, logq: Tensor, tokens: Tokens) -> Tensor:
        """Losses ``[N]`` from log-probabilities at temperature 1: ``per_token``, weighted, with its share of cross-entropy."""
        weights = {STUDENT: self.student_weight, TEACHER: self.teacher_weight, REFERENCE: 1 - self.ce_weight}
        p, q, own = logp, logq, tokens
        for speaker, weight in weights.items():
            if weight == 0:
                p, q = without(tokens.speakers == speaker, p, q)
                own = own.without_returns(tokens.speakers == speaker)
        value = self.per_token(self.soften(p), self.soften(q), own)
        for speaker, weight in weights.items():
            if weight != 1:
                value = value.where(tokens.speakers != speaker, weight * value)
        if self.ce_weight:
            mixed = value + self.ce_weight * cross_entropy(logq, tokens)
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
        return cross_entropy(logq, tokens)


@dataclass(frozen=True)
class PlainText(CrossEntropy):
    """Cross-entropy of a second corpus or of validation text, which is a mean over tokens in any case."""

    over_tokens: ClassVar[bool] = True


def cross_entropy(logq: Tensor, tokens: Tokens) -> Tensor:
    return -of_text(logq, tokens)


def without(left_out: Tensor, *logs: Tensor) -> list[Tensor]:
    """Log-distributions ``[N, V]``, uniform at those of the N tokens that do not count.

    An infinite loss there would be NaN in the gradient of what does: 0 times infinity.
    """
    return [each.masked_fill(left_out.unsqueeze(-1), -math.log(each.shape[-1])) for each in logs]


def of_text(logs: Tensor, tokens: Tokens) -> Tensor:
    """Log-probabilities ``[N]`` of the tokens written."""
    return logs.gather(-1, tokens.ids.unsqueeze(-1)).squeeze(-1)
