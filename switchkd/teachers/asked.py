"""What the teachers of a step's rows say of them, in the form that it is known in."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from switchkd.crossing.alignments import alignment_of
from switchkd.crossing.bridge import Side
from switchkd.data.texts import Text, by_teacher
from switchkd.forward.ends import NO_ENDS, Ends
from switchkd.forward.head import Head, Scorer, sizes_on
from switchkd.forward.parallel import Together
from switchkd.forward.served import ServedModel, ServedReader
from switchkd.models.pair import Pair
from switchkd.teachers.across import Tally, TeacherAcross, Voice, compared, joined
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
    if isinstance(model, ServedModel):
        return ServedReader(model, vocab_size, ends)
    scorer, together = Scorer(model, vocab_size, ends), Together.of(model)
    return scorer if together.alone else GroupReader(scorer, together)


def side_reader(model: PreTrainedModel | ServedModel, side: Side) -> TextReader:
    """The same for a model that spells text so."""
    return text_reader(model, side.vocab_size, side.ends)


class GroupReader:
    """A model that several processes run together, each of which has rows of its own, perhaps none: all must ask in step."""

    def __init__(self, scorer: Scorer, together: Together):
        self.scorer, self.head, self.together = scorer, scorer.head, together

    def hidden(self, rows: Sequence[tuple[list[int], list[int]]]) -> Tensor:
        """As `TextReader`. The rows of all are read in one forward, equal ones once."""
        mine = [(tuple(prompt), tuple(completion)) for prompt, completion in rows]
        every = dict.fromkeys(row for own in self.together.gather(mine) for row in own)
        if not every:
            return self.head.linear.weight[:0]
        hidden = self.scorer.hidden([(list(prompt), list(completion)) for prompt, completion in every])
        parts = dict(zip(every, hidden.split([len(completion) for _, completion in every]), strict=True))
        return torch.cat([hidden[:0], *(parts[row] for row in mine)])

    def log_probs(self, hidden: Tensor) -> Tensor:
        return self.scorer.log_probs(hidden)


class Teachers:
    """The teachers of a pair, for a student on ``device``.

    Those with a tokenizer of their own are compared with it by the ``alignment``; the ``tally`` says at how many tokens.
    """

    def __init__(self, pair: Pair, device: torch.device, alignment: str = "strict"):
        self.pair, self.device, self.together = pair, device, Together.of(pair.teacher)
        stay = pair.teachers_stay or not self.together.alone
        named = {name: model if stay else model.to(device) for name, model in pair.named_teachers.items()}
        self._readers = {name: side_reader(model, pair.side_of(name)) for name, model in named.items()}
        self._laws = {name: alignment_of(alignment, bridge, device) for name, bridge in pair.bridges.items()}
        self.tally = Tally()

    def trained(self, row: Text) -> int:
        """How many tokens of a row its teacher speaks of: those that match, where it has a tokenizer of its own."""
        law = self._laws.get(row.teacher)
        return len(row.completion_ids) if law is None else len(compared(law, row))

    @torch.no_grad()
    def voices(self, rows: Rows) -> list[Voice]:
        """What each row's teacher says at the row's response tokens, or at those of them that match its own.

        Processes that run the teachers together ask in step.
        """
        bridges, groups = self.pair.bridges, by_teacher(rows)
        if not bridges:
            return [Voice(self(rows))]
        own = [i for i, row in enumerate(rows) if row.teacher not in bridges]
        starts = torch.tensor([0, *(len(row.completion_ids) for row in rows)]).cumsum(0)
        asked = list(bridges) if not self.together.alone else [name for name in groups if name in bridges]
        found = [self._voice(name, rows, groups.get(name, []), starts) for name in asked]
        if own or (not self.together.alone and len(bridges) < len(self._readers)):
            places = torch.cat([torch.arange(int(starts[i]), int(starts[i + 1])) for i in own] or [starts[:0]])
            found.append(Voice(self([rows[i] for i in own]), places.to(self.device)))
        return found

    def _voice(self, name: str, rows: Rows, places: Sequence[int], starts: Tensor) -> Voice:
        """What a teacher with a tokenizer of its own says of its rows, at these places of a batch."""
        own, law = [rows[place] for place in places], self._laws[name]
        states = self._states(name, own)
        found = [compared(law, row) for row in own]
        self.tally.tokens += sum(len(row.completion_ids) for row in own)
        self.tally.compared += sum(map(len, found))
        mine = torch.cat(
            [starts[:0], *(torch.from_numpy(p.student) + starts[i] for i, p in zip(places, found, strict=True))]
        )
        if not own:  # the rows are another process's
            return Voice(TeacherStates(states.head, states.hidden), mine.to(self.device))
        at = joined(found, [(0, len(row.teacher_completion)) for row in own])
        hidden = states.hidden[torch.from_numpy(at.teacher).to(states.hidden.device)]
        logs = _of_reading(states, own).to(self.device) if law.reads_tokens else None
        return Voice(TeacherAcross(states.head, hidden, law, at, logs, self.tally), mine.to(self.device))

    @torch.no_grad()
    def __call__(self, rows: Rows) -> Teacher:
        """What each row's teacher says at the row's response tokens, where teachers have the student's tokenizer.

        Processes that run the teachers together ask in step.
        """
        if top := [row.said for row in rows if isinstance(row.said, tuple)]:
            ids, logs = zip(*top, strict=True)
            return TeacherTopK(torch.cat(ids).to(self.device), torch.cat(logs).to(self.device))
        groups = by_teacher(rows)
        # A process may have no row of a teacher that another one has rows of: all ask every teacher, in one order.
        shared = [name for name in self._readers if name not in self.pair.bridges]
        asked = groups if self.together.alone else dict.fromkeys([*shared, *groups])
        found = {name: self._states(name, [rows[place] for place in groups.get(name, ())]) for name in asked}
        parts = [found[name] for name in groups]
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
        unknown = rows if len(known) < len(rows) else []
        hidden = reader.head.linear.weight[:0]
        if unknown or not self.together.alone:  # the others may have rows to be read
            hidden = reader.hidden([(row.teacher_reads, row.teacher_completion) for row in unknown])
        if not unknown:
            hidden = torch.cat([hidden, *(states.to(hidden.device) for states in known)])
        return TeacherStates(reader.head, hidden)


def _of_reading(states: TeacherStates, rows: Rows) -> Tensor:
    """Log-probabilities ``[N]`` that a teacher gives to the tokens of its reading of rows."""
    head, device = states.head, states.hidden.device
    ids = torch.tensor([i for row in rows for i in row.teacher_completion], dtype=torch.int64, device=device)
    ids = head.ends.events(ids)
    step = max(1, sizes_on(device).chunk // (4 * head.vocab_size))
    parts = [
        head.log_probs(head(hidden)).gather(1, own.unsqueeze(1))[:, 0]
        for hidden, own in zip(states.hidden.split(step), ids.split(step), strict=True)
    ]
    return torch.cat([states.hidden.new_zeros(0), *parts])
