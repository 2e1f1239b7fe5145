"""What the teachers of a step's rows say of them, in the form that it is known in."""

from collections.abc import Sequence

import torch
from torch import Tensor

from switchkd.data.texts import Text, by_teacher
from switchkd.forward.head import Scorer
from switchkd.models.pair import Pair
from switchkd.teachers.said import SeveralTeachers, Teacher, TeacherStates, TeacherTopK

Rows = Sequence[Text]


class Teachers:
    """The teachers of a pair, on ``device``."""

    def __init__(self, pair: Pair, device: torch.device):
        self.device = device
        named = pair.named_teachers.items()
        self._scorers = {name: Scorer(model.to(device), pair.vocab_size, pair.ends) for name, model in named}

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
        scorer = self._scorers[name]
        known = [row.said for row in rows if isinstance(row.said, Tensor)]
        if len(known) == len(rows):
            hidden = torch.cat([states.to(self.device) for states in known])
        else:
            hidden = scorer.hidden([(row.teacher_reads, row.completion_ids) for row in rows])
        return TeacherStates(scorer.head, hidden)
