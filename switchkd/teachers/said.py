"""What a teacher says of texts, in the forms that it is known in; each gives log-probabilities piece by piece."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from switchkd.forward.head import Head
from switchkd.methods import divergences


@dataclass(frozen=True, eq=False)
class TeacherStates:
    """What the teacher says at N tokens, as what enters its output layer there, ``[N, H]``, and the layer."""

    head: Head
    hidden: Tensor

    def at(self, rows: slice) -> Callable[[slice, Tensor], tuple[Tensor, Tensor]]:
        """For a chunk of the tokens: a function of a piece of it and the student's ``logq`` there to ``(logp, logq)``."""
        logits = self.head(self.hidden[rows])
        return lambda piece, logq: (self.head.log_probs(logits[piece]).to(logq.device), logq)


@dataclass(frozen=True, eq=False)
class TeacherTopK:
    """What is known of the teacher at N tokens: its k largest log-probabilities ``[N, k]``, fp32 or wider, and their ``ids``.

    Both models are compared on these and one bucket with all other tokens (``divergences.coarsened``).
    """

    ids: Tensor
    log_probs: Tensor

    def at(self, rows: slice) -> Callable[[slice, Tensor], tuple[Tensor, Tensor]]:
        ids, logs = self.ids[rows], self.log_probs[rows]
        return lambda piece, logq: divergences.coarsened(logs[piece], ids[piece], logq)


@dataclass(frozen=True, eq=False)
class SeveralTeachers:
    """What several teachers say at N tokens, each at its own: ``places[i]``, ascending, are the tokens of ``parts[i]``."""

    parts: Sequence[TeacherStates]
    places: Sequence[Tensor]

    def at(self, rows: slice) -> Callable[[slice, Tensor], tuple[Tensor, Tensor]]:
        found = []
        for part, places in zip(self.parts, self.places, strict=True):
            inside = (places >= rows.start) & (places < rows.stop)
            own = part.head(part.hidden[inside.to(part.hidden.device)])
            found.append((places[inside] - rows.start, own.to(places.device)))
        logits = torch.cat([own for _, own in found])
        order = torch.cat([places for places, _ in found]).argsort()
        logits, law = logits[order], self.parts[0].head.log_probs  # all of one pair
        return lambda piece, logq: (law(logits[piece]), logq)


Teacher = TeacherStates | TeacherTopK | SeveralTeachers
