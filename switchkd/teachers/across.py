"""What teachers with a tokenizer of their own say of texts: where the two readings are compared, on events that both know.

Shapes: N response tokens of a batch as the student reads them, n of them that are compared, H hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from switchkd.base.errors import ConfigError
from switchkd.crossing.alignments import check_objective
from switchkd.crossing.laws import Alignment, Places, SharedLaw
from switchkd.data.texts import Text
from switchkd.forward.head import Head
from switchkd.methods.objective import Objective, Tokens
from switchkd.methods.policy import STUDENT, TEACHER
from switchkd.methods.rules import name_of
from switchkd.teachers.said import Teacher


@dataclass(eq=False)
class Tally:
    """What was compared since it was asked last: of how many tokens, and how much probability the events that both know hold."""

    tokens: int = 0
    compared: int = 0
    places: int = 0  # at which the masses were looked at
    masses: list[Tensor] = field(default_factory=list)  # [2]: sums of the student's and the teacher's there

    def take(self) -> dict[str, float]:
        """``cross/coverage``, and of strict matches ``cross/student_mass`` and ``cross/teacher_mass``: means."""
        found = {"cross/coverage": self.compared / self.tokens} if self.tokens else {}
        if self.places:
            student, teacher = (torch.stack(self.masses).sum(0) / self.places).tolist()
            found |= {"cross/student_mass": student, "cross/teacher_mass": teacher}
        self.tokens = self.compared = self.places = 0
        self.masses = []
        return found


@dataclass(frozen=True, eq=False)
class TeacherAcross:
    """What such a teacher says at n places, as what enters its output layer there, ``[n, H]``, and how that is compared."""

    head: Head
    hidden: Tensor
    law: Alignment
    places: Places
    token_logs: Tensor | None  # of all tokens of the teacher's reading, if the alignment reads them
    tally: Tally

    def at(self, rows: slice) -> Callable[[slice, Tensor], tuple[Tensor, Tensor]]:
        """As of `TeacherStates`: both laws on the same events."""
        logits, places = self.head(self.hidden[rows]), self.places[rows]

        def says(piece: slice, logq: Tensor) -> tuple[Tensor, Tensor]:
            logp = self.head.log_probs(logits[piece]).to(logq.device)
            if not piece.start and isinstance(self.law, SharedLaw):  # of some tokens: to look at all would cost a tenth
                self._count(self.law, logp, logq.detach())
            return self.law(logp, logq, places[piece], self.token_logs)

        return says

    def _count(self, law: SharedLaw, logp: Tensor, logq: Tensor) -> None:
        masses = [law.mass(logs, who).sum() for logs, who in ((logq, STUDENT), (logp, TEACHER))]
        self.tally.places += len(logp)
        self.tally.masses.append(torch.stack(masses))

    def events(self, ids: Tensor) -> Tensor:
        """The events that the student's ids are."""
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


def compared(law: Alignment, row: Text) -> Places:
    """Where the two readings of a row's completion are compared."""
    return law.places(row.completion_ids, row.teacher_completion)


def joined(found: Sequence[Places], sizes: Sequence[tuple[int, int]]) -> Places:
    """Places in several rows, of so many tokens each as student and teacher read them, as places in the rows laid end to end."""
    moved, student, teacher = [], 0, 0
    for places, (own, theirs) in zip(found, sizes, strict=True):
        moved.append(places.moved(student, teacher))
        student, teacher = student + own, teacher + theirs
    return Places.joined(moved)


def check_across(objective: Objective, alignment: str) -> None:
    """Raise ConfigError for an objective that has no meaning on the tokens that two tokenizers compare, under this alignment."""
    if not objective.reads_teacher:
        return
    if objective.looks_ahead:
        raise ConfigError(
            f"the objective {name_of(objective)} adds up rewards over whole texts, and with two tokenizers only the tokens that "
            "match have one; take one that compares distributions, such as forward_kl or jsd, or opd"
        )
    if objective.ce_weight:
        raise ConfigError(
            f"ce_weight {objective.ce_weight:g} wants cross-entropy at every token of a text, and with two tokenizers the loss is "
            "on those that match; leave it 0, or give the text as lm_file too"
        )
    check_objective(alignment, objective)
