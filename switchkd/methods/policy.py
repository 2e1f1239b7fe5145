"""What a policy is: who writes the next token, decided from the two distributions and a state of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, NamedTuple

if TYPE_CHECKING:  # tensor methods suffice at run time, and `switchkd --help` answers without loading torch
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


STUDENT, TEACHER = 0, 1
REFERENCE = 2  # where a token is from the data, not from either model

State = tuple["Tensor", ...]


class Decision(NamedTuple):
    """What a policy says about one position of each of B rows: whose token it is, and from which probabilities it is drawn."""

    log_probs: Tensor  # [B, V] the target distribution, log
    speaker: Tensor  # [B] int64, 0 student, 1 teacher
    divergence: Tensor  # [B] what the policy compared, in its own unit; NaN where it did not look
    state: State
    # [B, V] log of the teacher's part of a blended target; ``speaker`` is then not used
    teacher_part: Tensor | None = None
    # [B] what the divergence was compared with, in its unit; NaN, or None for all rows, where with nothing
    threshold: Tensor | None = None

    @property
    def thresholds(self) -> Tensor:
        """``threshold``, spelt out ``[B]``."""
        return unseen(self.log_probs) if self.threshold is None else self.threshold


@dataclass(frozen=True)
class Policy:
    """A rule for who writes the next token: the teacher, the student, or a blend of both. Subclass and implement ``step``.

    A rule with state overrides ``init``, and ``observe`` if its state depends on the tokens drawn, ``spoke`` if on who wrote
    them; one that may leave a model unread overrides ``reads``, one that may end a text ``ends``. One that needs the tokenizer or
    the length of texts resolves them in ``bind``, one that changes over training does so in ``at``.

    At each position the engine asks ``reads`` and ``step``, draws the token and who wrote it, and then tells ``observe`` and
    ``spoke``, and asks ``ends``.
    """

    unit: ClassVar[str] = "nats"  # of its divergences and thresholds
    hands_over: ClassVar[bool] = (
        False  # whether the teacher, once it writes, writes to the end and the student is not read again
    )

    def bind(self, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> Policy:
        """This rule with what only a run knows filled in. Called once, before any text is written."""
        return self

    def at(self, progress: float, step: int = 0) -> Policy:
        """This rule in a step of training: ``progress`` is 0 in the first and 1 in the last, ``step`` counts those before it."""
        return self

    def init(self, batch: int, device: torch.device | str = "cpu") -> State:
        """The state before the first token of ``batch`` rows."""
        return ()

    def reads(self, state: State) -> tuple[Tensor | bool, Tensor | bool]:
        """Whether the next ``step`` looks at (student, teacher): bools, or ``[B]`` bool tensors.

        Where a model is not read, its row of log-probabilities may hold anything, and the engine need not run it. A rule may read
        neither, for some rows or all: it then writes a text that it knows, such as a forced beginning.
        """
        return True, True

    def step(self, state: State, logp_student: Tensor, logp_teacher: Tensor, position: Tensor) -> Decision:
        """Decide the token at ``position`` ``[B]`` from the two ``[B, V]`` log-distributions.

        The speaker says whose token it counts as, in metrics and in the loss: STUDENT or TEACHER, also where neither was read.
        """
        raise NotImplementedError

    def observe(self, state: State, token: Tensor) -> State:
        """The state once ``token`` ``[B]`` has been drawn."""
        return state

    def spoke(self, state: State, speaker: Tensor) -> State:
        """The state once it is known who wrote that token, ``[B]``: STUDENT or TEACHER; called after ``observe``."""
        return state

    def ends(self, state: State) -> Tensor | bool:
        """Whether the text ends here, before its next token: a bool, or ``[B]`` bools; asked after each token."""
        return False

    def proposal(self, speaker: int, log_probs: Tensor) -> Tensor:
        """What a model's own ``[B, V]`` log-distribution becomes where it speaks; drafts are drawn from it, which moves time."""
        return log_probs


@dataclass(frozen=True)
class StudentOnly(Policy):
    """On-policy text: the student writes every token."""

    def reads(self, state: State) -> tuple[bool, bool]:
        return True, False

    def step(self, state: State, logp_student: Tensor, logp_teacher: Tensor, position: Tensor) -> Decision:
        return spoken_by(STUDENT, logp_student, state)


@dataclass(frozen=True)
class TeacherOnly(Policy):
    """The teacher writes every token, as in SeqKD. Where the student drafts for it, this is speculative decoding."""

    hands_over = True

    def reads(self, state: State) -> tuple[bool, bool]:
        return False, True

    def step(self, state: State, logp_student: Tensor, logp_teacher: Tensor, position: Tensor) -> Decision:
        return spoken_by(TEACHER, logp_teacher, state)


def spoken_by(speaker: int, log_probs: Tensor, state: State) -> Decision:
    who = log_probs.new_full(log_probs.shape[:1], speaker).long()
    return Decision(log_probs, who, unseen(log_probs), state)


def spoken_where(
    teacher: Tensor,
    logp_student: Tensor,
    logp_teacher: Tensor,
    d: Tensor,
    state: State,
    threshold: Tensor | None = None,
) -> Decision:
    """Target and speaker for a rule that hands each row wholly to one of the two (``teacher``: ``[B]`` bool)."""
    target = logp_teacher.where(teacher.unsqueeze(1), logp_student)
    return Decision(target, teacher.long(), d, state, threshold=threshold)


def one_of(tokens: Tensor, ids: tuple[int, ...]) -> Tensor:
    """``[B]`` bool: which of ``tokens`` ``[B]`` are among ``ids``."""
    return (tokens.unsqueeze(1) == ids_on(ids, tokens.device)).any(1)


@lru_cache(maxsize=64)
def ids_on(ids: tuple[int, ...], device: torch.device) -> Tensor:
    """Token ids as int64 on a device, copied there once: a copy waits for all that the device has still to do."""
    import torch

    with torch.inference_mode(False):  # whoever asks first may be in that mode, and autograd keeps no tensor made in it
        return torch.tensor(ids, dtype=torch.int64, device=device)


def blended(target: Tensor, teacher_part: Tensor, d: Tensor, state: State) -> Decision:
    return Decision(target, d.new_zeros(d.shape).long(), d, state, teacher_part)


def unseen(log_probs: Tensor) -> Tensor:
    return log_probs.new_full(log_probs.shape[:1], math.nan)
