"""What the teachers of a step's rows say of them, in the form that it is known in."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from switchkd.data.texts import Text, by_teacher
from switchkd.forward.ends import NO_ENDS, Ends
from switchkd.forward.head import Head, Scorer
from switchkd.forward.served import ServedModel, ServedReader
from switchkd.models.pair import Pair
from switchkd.teachers.said import SeveralTeachers, Teacher, TeacherStates, TeacherTopK

Rows = Sequence[Text]


class TextReader(Protocol):
    """A model that is asked what it says of texts, wherever it runs.

    ``hidden`` are the states that enter its output layer before each of the N tokens of the rows' completions, ``[N, H]``; a row is
    the token ids of a prompt and its completion. ``head`` leads from there to next-token distributions.
    """

    head: Head

    def hidden(self, rows: Sequence[tuple[list[int], list[int]]]) -> Tensor: ...

    def log_probs(self, hidden: Tensor) -> Tensor:
        """Log-probabilities of the next token, ``[..., vocab_size]``, fp32 or wider."""
        ...


def text_reader(model: PreTrainedModel | ServedModel, vocab_size: int, ends: Ends = NO_ENDS) -> TextReader:
    """Whoever reads texts for this model; errors are those of `Scorer` and `ServedReader`."""
    return (ServedReader if isinstance(model, ServedModel) else Scorer)(model, vocab_size, ends)


class Teachers:
    """The teachers of a pair, on ``device``."""

    def __init__(self, pair: Pair, device: torch.device):
        self.pair, self.device = pair, device
        named = pair.named_teachers.items()
        self._readers = {name: text_reader(model.to(device), pair.vocab_size, pair.ends) for name, model in named}

    @torch.no_grad()
    def __call__(self, rows: Rows) -> Teacher:
        """What each row's teacher says at the row's response tokens."""
        if top := [row.said for row in rows if isinstance(row.said, tuple)]:
            ids, logs = zip(*top, strict=True)
            return TeacherTopK(torch.cat(ids).to(self.device), torch.cat(logs).to(self.device))
        groups = by_teacher(rows)
        parts = [self._states(name, [rows[place] for place in places]) for name, places in groups.items()]
        if len(parts) == 1:
            return parts[0]
        tokens = torch.arange(sum(len(row.completion_ids) for row in rows), device=self.device)
        own = tokens.split([len(row.completion_ids) for row in rows])
        return SeveralTeachers(parts, [torch.cat([own[place] for place in places]) for places in groups.values()])

    def _states(self, name: str, rows: Rows) -> TeacherStates:
        """What a teacher says of its rows: kept if it has read every one before, else it reads them now."""
        self.pair.teacher_named(name)  # raises for a name that the pair does not have
        reader = self._readers[name]
        known = [row.said for row in rows if isinstance(row.said, Tensor)]
        if len(known) == len(rows):
            hidden = torch.cat([states.to(self.device) for states in known])
        else:
            hidden = reader.hidden([(row.teacher_reads, row.completion_ids) for row in rows])
        return TeacherStates(reader.head, hidden)
