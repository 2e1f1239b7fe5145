"""Both models' next-token laws on events that both know, so that divergences and objectives can compare them.

Shapes: n places, V_S and V_T ids of student and teacher, C tokens that both have. p is the teacher, q the student.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from switchkd.crossing.bridge import Bridge
from switchkd.methods.policy import STUDENT, TEACHER

# What is left beside the shared tokens is known to the rounding of 1: below that it counts as that much.
LEAST = math.log(1.2e-7)
# The log of no mass: finite, so that the gradient of a sum of nothing is no NaN.
_NO_MASS = -1e4


@dataclass(frozen=True, eq=False)
class Places:
    """Where the two readings of a text are compared: the token that each model predicts there, ``[n]`` places in its reading."""

    student: np.ndarray  # ascending
    teacher: np.ndarray

    def __len__(self) -> int:
        return len(self.student)

    def __getitem__(self, part: slice) -> Self:
        return type(self)(*(each[part] for each in self._arrays))

    def moved(self, student: int, teacher: int) -> Self:
        """The same places behind so many tokens of other texts."""
        return type(self)(self.student + student, self.teacher + teacher, *self._arrays[2:])

    @staticmethod
    def joined(texts: Sequence["Places"]) -> "Places":
        """The places of several texts, each of them moved, one text after the other."""
        return type(texts[0])(*map(np.concatenate, zip(*(each._arrays for each in texts), strict=True)))

    @property
    def _arrays(self) -> list[Any]:
        return [getattr(self, each.name) for each in fields(self)]


class Alignment(Protocol):
    """How the laws of two vocabularies are compared: where in a text, and on which events."""

    @property
    def index(self) -> Tensor:
        """The event that each of the student's ids is, ``[V_S]``, for objectives that look at the token written."""

    @property
    def reads_tokens(self) -> bool:
        """Whether ``token_logs`` must be given."""

    def places(self, student_ids: Sequence[int], teacher_ids: Sequence[int]) -> Places:
        """Where two readings of one completion are compared. Raises DataError where they spell two texts."""

    def __call__(
        self, logp: Tensor, logq: Tensor, places: Places | None = None, token_logs: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Both laws on the same events, from ``[n, V_T]`` and ``[n, V_S]`` log-probabilities at n places.

        ``token_logs`` ``[N_T]`` are the log-probabilities that the teacher gives to the tokens of its reading, at all of them.
        """


@dataclass(frozen=True, eq=False)
class SharedLaw:
    """Strict matches (arXiv 2610.08448): both laws on the C shared tokens alone, renormalised.

    Where all that a model can draw is shared, its law stays what it is, to the bit.
    """

    reads_tokens: ClassVar[bool] = False

    bridge: Bridge
    student: Tensor  # [C] ids
    teacher: Tensor  # [C] ids
    index: Tensor  # [V_S]: the place among the C of each of the student's ids; 0 where it is not shared
    complete: tuple[bool, bool]

    @staticmethod
    def of(bridge: Bridge, device: torch.device) -> "SharedLaw":
        student, teacher = (torch.from_numpy(ids).to(device) for ids in bridge.shared)
        index = np.zeros(max(bridge.student.vocab_size, max(bridge.student.ends.ids) + 1), dtype=np.int64)
        index[bridge.shared[STUDENT]] = np.arange(len(bridge.shared[STUDENT]))
        index[list(bridge.student.ends.ids)] = index[bridge.student.end]
        return SharedLaw(bridge, student, teacher, torch.from_numpy(index).to(device), bridge.complete)

    def places(self, student_ids: Sequence[int], teacher_ids: Sequence[int]) -> Places:
        """Where both readings have one and the same shared token."""
        return Places(*self.bridge.matches(student_ids, teacher_ids))

    def __call__(
        self, logp: Tensor, logq: Tensor, places: Places | None = None, token_logs: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``[n, C]`` each from ``[n, V_T]`` and ``[n, V_S]`` log-probabilities; gradients reach both."""
        return self._law(logp, self.teacher, TEACHER), self._law(logq, self.student, STUDENT)

    def _law(self, logs: Tensor, ids: Tensor, who: int) -> Tensor:
        own = logs.index_select(-1, ids)
        return own if self.complete[who] else own.log_softmax(-1)

    def coarse(self, logp: Tensor, logq: Tensor) -> tuple[Tensor, Tensor]:
        """The same without renormalising, and one bucket with all else behind it: ``[n, C + 1]`` each."""
        return self.with_rest(logp, self.teacher), self.with_rest(logq, self.student)

    @staticmethod
    def with_rest(logs: Tensor, ids: Tensor) -> Tensor:
        """A law on these ids and one bucket with all else."""
        rest = logs.index_fill(-1, ids, _NO_MASS).logsumexp(-1, keepdim=True)
        return torch.cat([logs.index_select(-1, ids), rest.clamp(min=LEAST)], -1)

    def mass(self, logs: Tensor, who: int) -> Tensor:
        """Probability ``[n]`` that a law gives to the shared tokens."""
        return logs.index_select(-1, (self.student, self.teacher)[who]).logsumexp(-1).exp()


@dataclass(frozen=True, eq=False)
class SortedLaw:
    """Both laws by rank (ULD, arXiv 2402.12030): the largest probability of each beside the other's, whatever the tokens are.

    It is compared where strict matches are, so that a comparison with these is one of laws alone. The smaller vocabulary is
    filled up with no mass.
    """

    reads_tokens: ClassVar[bool] = False

    bridge: Bridge
    index: Tensor  # [V_S], all 0: a rank is no token

    @staticmethod
    def of(bridge: Bridge, device: torch.device) -> "SortedLaw":
        size = max(bridge.student.vocab_size, max(bridge.student.ends.ids) + 1)
        return SortedLaw(bridge, torch.zeros(size, dtype=torch.int64, device=device))

    def places(self, student_ids: Sequence[int], teacher_ids: Sequence[int]) -> Places:
        """Where both readings have one and the same shared token."""
        return Places(*self.bridge.matches(student_ids, teacher_ids))

    def __call__(
        self, logp: Tensor, logq: Tensor, places: Places | None = None, token_logs: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``[n, max(V_S, V_T)]`` each, descending; gradients reach both."""
        size = max(logp.shape[-1], logq.shape[-1])
        p, q = (
            torch.nn.functional.pad(logs.sort(-1, descending=True).values, (0, size - logs.shape[-1]), value=-math.inf)
            for logs in (logp, logq)
        )
        return p, q
