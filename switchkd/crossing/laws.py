"""Both models' next-token laws on what two vocabularies share, so that every divergence and objective can compare them.

Shapes: n places, V_S and V_T ids of student and teacher, C tokens that both have. p is the teacher, q the student.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from switchkd.crossing.bridge import Bridge
from switchkd.methods.policy import STUDENT, TEACHER

# What is left beside the shared tokens is known to the rounding of 1: below that it counts as that much.
_LEAST = math.log(1.2e-7)
# The log of no mass: finite, so that the gradient of a sum of nothing is no NaN.
_NO_MASS = -1e4


@dataclass(frozen=True, eq=False)
class SharedLaw:
    """Strict matches (arXiv 2610.08448): both laws on the C shared tokens alone, renormalised.

    Where all that a model can draw is shared, its law stays what it is, to the bit.
    """

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
        return SharedLaw(student, teacher, torch.from_numpy(index).to(device), bridge.complete)

    def __call__(self, logp: Tensor, logq: Tensor) -> tuple[Tensor, Tensor]:
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
        return torch.cat([logs.index_select(-1, ids), rest.clamp(min=_LEAST)], -1)

    def mass(self, logs: Tensor, who: int) -> Tensor:
        """Probability ``[n]`` that a law gives to the shared tokens."""
        return logs.index_select(-1, (self.student, self.teacher)[who]).logsumexp(-1).exp()
