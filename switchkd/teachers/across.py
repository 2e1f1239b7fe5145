"""What teachers with a tokenizer of their own say of texts: at the tokens that match the student's, on what both vocabularies have.

Shapes: N response tokens of a batch as the student reads them, n of them that match, V ids, C shared ones, H hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from switchkd.base.errors import ConfigError
from switchkd.crossing.bridge import Bridge
from switchkd.crossing.laws import SharedLaw
from switchkd.data.texts import Text
from switchkd.forward.head import Head
from switchkd.methods.objective import Objective, Tokens
from switchkd.methods.rules import name_of
from switchkd.teachers.said import Teacher


@dataclass(frozen=True, eq=False)
class TeacherAcross:
    """What such a teacher says at n tokens, as what enters its output layer there, ``[n, H]``, and the law of what is shared."""

    head: Head
    hidden: Tensor
    law: SharedLaw

    def at(self, rows: slice) -> Callable[[slice, Tensor], tuple[Tensor, Tensor]]:
        """As of `TeacherStates`: both laws ``[…, C]``."""
        logits = self.head(self.hidden[rows])
        return lambda piece, logq: self.law(self.head.log_probs(logits[piece]).to(logq.device), logq)

    def events(self, ids: Tensor) -> Tensor:
        """The places among the C of the student's ids."""
        return self.law.index[ids]


@dataclass(frozen=True, eq=False)
class Voice:
    """A teacher, and the response tokens of a batch at which it is heard: their places, ``[n]``, or all N."""

    teacher: Teacher | TeacherAcross
    places: Tensor | None = None

    def of(self, tokens: Tokens) -> Tokens:
        """Those of the N tokens that it speaks of."""
        return tokens if self.places is None else tokens[self.places]

    def states(self, hidden: Tensor) -> Tensor:
        """The same of the student's hidden states ``[N, H]``."""
        return hidden if self.places is None else hidden[self.places]


def matches(bridge: Bridge, row: Text) -> tuple[np.ndarray, np.ndarray]:
    """Places of the tokens of a row that match: in its completion, and in the teacher's reading of it."""
    return bridge.matches(row.completion_ids, row.teacher_completion)


def laid_out(
    found: Sequence[tuple[np.ndarray, np.ndarray]], sizes: Sequence[tuple[int, int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Places in several rows, of so many tokens each as student and teacher read them, as places in the rows laid end to end."""
    starts = np.cumsum([(0, 0), *sizes], axis=0)
    nothing = np.zeros(0, dtype=np.int64)
    student, teacher = (
        np.concatenate([nothing, *(places[side] + start[side] for places, start in zip(found, starts, strict=False))])
        for side in (0, 1)
    )
    return student, teacher


def check_across(objective: Objective) -> None:
    """Raise ConfigError for an objective that has no meaning on the tokens that match alone."""
    if not objective.reads_teacher:
        return
    name, instead = name_of(objective), "take one that compares distributions, such as forward_kl or jsd, or opd"
    if objective.looks_ahead:
        raise ConfigError(
            f"the objective {name} adds up rewards over whole texts, and with two tokenizers only the tokens that match have one; "
            f"{instead}"
        )
    if objective.ce_weight:
        raise ConfigError(
            f"ce_weight {objective.ce_weight:g} wants cross-entropy at every token of a text, and with two tokenizers the loss is "
            "on those that match; leave it 0, or give the text as lm_file too"
        )
