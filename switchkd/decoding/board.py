"""The rows that are being decoded, as tensors: their texts, how far each is, their noise keys, and what was said of each token.

The host holds a copy of what it plans by (lengths, which models each row reads), kept up from the one summary that comes home a
round. The first ``count`` places are in use.

Shapes: P places, b rows of a round, K positions of a block.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from switchkd.decoding.decide import Verdict
from switchkd.decoding.pace import BLOCKS, Reads
from switchkd.decoding.rows import Job, Row
from switchkd.methods.policy import STUDENT, TEACHER, State
from switchkd.methods.sampling import as_int64, keys_at, row_key
from switchkd.runner.cache import Places

# What a place notes of each token: the token, who wrote it, divergence and threshold. Ids are exact in fp32 up to 2^24.
_NOTES = 4


class Board:
    """``places`` rows on a device. What a row has beyond its ``written`` tokens is of drafts, and means nothing."""

    def __init__(self, job: Job, places: int, devices: Sequence[torch.device], wide: torch.dtype):
        self.job, self.device = job, (device := devices[STUDENT])
        block = job.settings.block_size
        self.budget = job.settings.max_new_tokens + (max(BLOCKS) if block == "auto" else block)
        self.slots = [job.capacity(who) + self.budget - job.settings.max_new_tokens for who in (STUDENT, TEACHER)]
        shared = all(row.teacher_prompt is None for row in job.rows) and devices[TEACHER] == device
        rooms = list(zip(self.slots, devices, strict=True))[: 2 - shared]
        texts = [torch.zeros(places, slots, dtype=torch.int64, device=each) for slots, each in rooms]
        self.own_texts, self.texts = texts, [texts[0], texts[-1]]  # by STUDENT, TEACHER: of each, and as each reads it
        self.prompts = [torch.zeros(places, dtype=torch.int64, device=device) for _ in texts]
        self.written = torch.zeros(places, dtype=torch.int64, device=device)
        self.keys = torch.zeros(places, self.budget, dtype=torch.int64, device=device)
        self.notes = torch.zeros(places, self.budget, _NOTES, dtype=wide, device=device)
        self.columns = torch.arange(max(self.budget, places), device=device)
        policy = job.settings.policy
        self.state: State = policy.init(places, device)
        self.first_reads = [bool(read) for read in policy.reads(policy.init(1))]
        self.hidden: Tensor | None = None  # [P, budget, hidden size], what entered the teacher's output layer
        self.rows: list[Row] = []
        self.prompts_n, self.written_n = np.zeros((2, places), dtype=np.int64), np.zeros(places, dtype=np.int64)
        self.reads_n = np.zeros((places, 2), dtype=bool)
        self.heard = np.zeros(places, dtype=bool)  # whether the teacher read every token of a row
        self.ended = np.zeros(places, dtype=bool)

    @property
    def count(self) -> int:
        """Places in use."""
        return len(self.rows)

    def ends(self, who: int, rows: Places) -> tuple[Tensor, np.ndarray]:
        """Tokens of the rows' texts as a model reads them: ``[b]`` on the device, and the same on the host."""
        prompts = self.prompts[who if len(self.prompts) == 2 else 0]
        ends = (rows.of(prompts) + rows.of(self.written)).to(self.texts[who].device)
        return ends, self.prompts_n[who, rows.host] + self.written_n[rows.host]

    def reading(self) -> dict[Reads, int]:
        """How many rows read (student, teacher) at their next step."""
        kinds, counts = np.unique(self.reads_n[: self.count], axis=0, return_counts=True)
        return {(student, teacher): n for (student, teacher), n in zip(kinds.tolist(), counts.tolist(), strict=True)}

    def serving(self, served: frozenset[Reads]) -> Places:
        """The places of the rows that read so."""
        reads = self.reads_n[: self.count, None] == np.array(list(served))
        return self.at(np.flatnonzero(reads.all(2).any(1)))

    def at(self, places: np.ndarray) -> Places:
        """Places by number."""
        return Places.at(places, self.columns)

    def _numbers(self, rows: Places) -> Tensor:
        return self.columns[: len(rows.host)] if rows.device is None else rows.device

    def state_of(self, rows: Places) -> State:
        return tuple(rows.of(part) for part in self.state)

    def keys_of(self, rows: Places, start: Tensor, block: int) -> Tensor:
        """The keys ``[b, K]`` of the next draws."""
        return rows.of(self.keys).gather(1, start.unsqueeze(1) + self.columns[:block])

    def write(self, rows: Places, verdict: Verdict) -> None:
        """Put down what was decided, all K positions, and move every row on by what it keeps."""
        tokens = verdict.tokens
        steps, start = self.columns[: tokens.shape[1]], rows.of(self.written)
        first = self._numbers(rows)
        place, at = first.unsqueeze(1), start.unsqueeze(1) + steps
        for text, prompts in zip(self.own_texts, self.prompts, strict=True):
            there = text.device
            text[place.to(there), (at + rows.of(prompts).unsqueeze(1)).to(there)] = tokens.to(there)
        wide = self.notes.dtype
        said = tokens.to(wide), verdict.speakers.to(wide), verdict.divergences.to(wide), verdict.thresholds.to(wide)
        self.notes[place, at] = torch.stack(said, -1)
        self.written.index_add_(0, first, verdict.kept)
        for part, new in zip(self.state, verdict.state, strict=True):
            part[first] = new

    def listen(self, rows: Places, hidden: Tensor) -> None:
        """Note what entered the teacher's output layer for the next tokens, ``[b, T, H]``."""
        if self.hidden is None:
            self.hidden = hidden.new_zeros(len(self.keys), self.budget, hidden.shape[-1])
        first = self._numbers(rows)
        at = rows.of(self.written).unsqueeze(1) + self.columns[: hidden.shape[1]]
        self.hidden[first.unsqueeze(1).to(hidden.device), at.to(hidden.device)] = hidden

    def admit(self, rows: Sequence[Row], places: np.ndarray) -> None:
        """Give places to new rows: one copy to the device for all of them. Places beyond those in use follow on them."""
        widths = [max(len(row.prompt_of(who)) for row in rows) for who in range(len(self.own_texts))]
        table = np.zeros((len(rows), sum(widths) + len(widths) + 2), dtype=np.int64)
        table[:, -1] = places
        for i, row in enumerate(rows):
            table[i, -2], first = as_int64(row_key(row.seed, row.id) + row.start), 0
            for who, width in enumerate(widths):
                prompt = row.prompt_of(who)
                table[i, first : first + len(prompt)] = prompt
                table[i, sum(widths) + who] = len(prompt)
                first += width
            self.prompts_n[:, places[i]] = [len(row.prompt_of(who)) for who in (STUDENT, TEACHER)]
        self.written_n[places], self.heard[places], self.ended[places] = 0, True, False
        for place, row in zip(places.tolist(), rows, strict=True):
            self.rows[place : place + 1] = [row]
        here = torch.from_numpy(table).to(self.device)
        index, first = here[:, -1], 0
        for who, width in enumerate(widths):
            text = self.own_texts[who]
            text[index.to(text.device), :width] = here[:, first : first + width].to(text.device)
            self.prompts[who][index] = here[:, sum(widths) + who]
            first += width
        self.written[index] = 0
        self.keys[index] = keys_at(here[:, -2:-1], self.columns[: self.budget])
        fresh = self.job.settings.policy.init(len(rows), self.device)
        for part, new in zip(self.state, fresh, strict=True):
            part[index] = new
        self.reads_n[places] = self.first_reads

    def fetch(self, places: np.ndarray) -> None:
        """Bring the rows at these places home: what was written of each, and what was said of it."""
        rows = self.at(places)
        notes = rows.of(self.notes).cpu().numpy()
        for own, place in zip(notes, places.tolist(), strict=True):
            self.rows[place].fill(own[: self.written_n[place]])

    def hidden_of(self, place: int, device: torch.device) -> Tensor | None:
        """What entered the teacher's output layer for each token of a row, ``[n, H]``; None if it did not read all of them."""
        if self.hidden is None or not self.heard[place]:
            return None
        return self.hidden[place, : self.written_n[place]].to(device, copy=True)

    def move(self, to: Places, source: Places) -> None:
        """Rows go to other places, where nobody needs what was there."""
        parts = [*self.own_texts, *self.prompts, self.written, self.keys, self.notes, *self.state]
        for part in [*parts, *([] if self.hidden is None else [self.hidden])]:
            new, old = to.on(part.device), source.on(part.device)
            part[new.device] = part[old.device]
        for numbers in (self.prompts_n.T, self.written_n, self.reads_n, self.heard, self.ended):
            numbers[to.host] = numbers[source.host]
        for place, other in zip(to.host.tolist(), source.host.tolist(), strict=True):
            self.rows[place] = self.rows[other]
