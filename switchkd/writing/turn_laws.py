"""What two models with different tokenizers say where a word may begin, and who writes it.

A *place* is where both tokenizers have a token end, whatever follows (`crossing.boundaries`). There both laws are cut to the tokens
that begin a word and compared on the tokens that both vocabularies have, with one bucket for the rest of each.

Shapes: n places, V ids of one model, C shared tokens. p is the teacher, q the student.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from switchkd.crossing.boundaries import last_character
from switchkd.crossing.bridge import Bridge
from switchkd.crossing.laws import SharedLaw
from switchkd.decoding.decide import spread, where_rows
from switchkd.methods.policy import STUDENT, TEACHER, Policy, State

# A model that gives so little to all words together believes that the word goes on: it is not asked who writes the next one.
LEAST_MASS = 0.01


class Turn(NamedTuple):
    """What was decided at n places, ``[n]`` each: whether the rule was asked, whom it names, what it compared."""

    asked: Tensor
    speaker: Tensor
    divergence: Tensor
    threshold: Tensor
    state: State


class TurnLaws:
    """The laws of both models of a bridge, on the device where turns are decided."""

    def __init__(self, bridge: Bridge, device: torch.device):
        self.bridge, self.device = bridge, device
        self.shared = SharedLaw.of(bridge, device)
        self._class_of = [
            torch.from_numpy(own.class_of[: side.vocab_size]).to(device)
            for own, side in zip(bridge.beginnings, bridge.sides, strict=True)
        ]
        self._unspelt = [torch.tensor(ids, dtype=torch.int64, device=device) for ids in bridge.unspelt]
        self._places: tuple[dict[bytes, int], dict[bytes, int]] = ({}, {})  # of the last characters met so far
        self._rows: tuple[list[Tensor], list[Tensor]] = ([], [])

    def own(self, who: int, logs: Tensor) -> Tensor:
        """The law of a writer, ``[..., V]``: never a token that the other cannot spell."""
        ids = self._unspelt[who]
        return logs.index_fill(-1, ids, -math.inf).log_softmax(-1) if len(ids) else logs

    def beginning(self, who: int, logs: Tensor, before: Sequence[bytes]) -> tuple[Tensor, Tensor]:
        """The law of a word's first token behind texts that end so, ``[n, V]``, and the log of what it was of the whole, ``[n]``.

        Every token may be the first of a text (``before`` is b"").
        """
        allowed = self._begins(who, before)
        cut = logs.masked_fill(~allowed, -math.inf)
        mass = cut.logsumexp(-1, keepdim=True)
        law = cut - mass.masked_fill(mass == -math.inf, 0.0)
        first = torch.tensor([not data for data in before], device=self.device).unsqueeze(-1)
        return logs.where(first, law), mass[:, 0]

    def _begins(self, who: int, before: Sequence[bytes]) -> Tensor:
        """``[n, V]`` bool: the tokens that begin a word behind texts that end so."""
        places, rows = self._places[who], self._rows[who]
        ends = [last_character(data) for data in before]
        for end in ends:
            if end not in places:
                places[end] = len(rows)
                classes = torch.from_numpy(self.bridge.beginnings[who].behind(end)).to(self.device)
                rows.append(torch.ones_like(classes) if not end else classes)
        found = torch.stack([rows[places[end]] for end in ends])
        return found.gather(1, self._class_of[who].expand(len(ends), -1))

    def decide(
        self,
        policy: Policy,
        state: State,
        laws: tuple[Tensor | None, Tensor | None],
        before: Sequence[bytes],
        writer: Tensor,
        turns: Tensor,
    ) -> Turn:
        """Who writes the next word behind texts that end so: ``laws`` are by STUDENT, TEACHER, None for one that nobody asked.

        ``writer`` ``[n]`` wrote the last word, ``turns`` ``[n]`` counts the places before at which the rule was asked. Where the
        other model's mass on words is below ``LEAST_MASS`` the writer goes on, and the rule is not asked.
        """
        cut = [None if law is None else self.beginning(who, law, before) for who, law in enumerate(laws)]
        student, teacher = cut
        if student is not None and teacher is not None:
            logp, logq = self.shared.coarse(teacher[0], student[0])
        else:
            who, one = (STUDENT, student) if teacher is None else (TEACHER, teacher)
            assert one is not None, "a rule for words reads one model at least"
            logp = logq = SharedLaw.with_rest(one[0], (self.shared.student, self.shared.teacher)[who])
        asked = self._asks(policy, state, [None if each is None else each[1] for each in cut], before, writer)
        decision = policy.step(state, logq, logp, turns)
        new = policy.spoke(decision.state, decision.speaker)
        return Turn(
            asked,
            decision.speaker.where(asked, writer),
            decision.divergence.masked_fill(~asked, math.nan),
            decision.thresholds.masked_fill(~asked, math.nan),
            tuple(where_rows(asked, one, old) for one, old in zip(new, state, strict=True)),
        )

    def _asks(
        self, policy: Policy, state: State, masses: Sequence[Tensor | None], before: Sequence[bytes], writer: Tensor
    ) -> Tensor:
        """Whether the rule is asked, ``[n]``: it is before a text's first word, where it does not read the model that does not
        write, and where that model believes that the word has ended."""
        asked = torch.tensor([not data for data in before], device=self.device)
        for who, (read, mass) in enumerate(zip(policy.reads(state), masses, strict=True)):
            if mass is not None:
                asked = asked | ((writer != who) & (mass >= math.log(LEAST_MASS)))
            asked = asked | ((writer != who) & ~spread(read, asked))
        return asked
