"""The teacher's law in the student's tokens: each teacher token goes to the longest student token that it begins with.

This scores nearly every student token, where strict matches leave out those of other lengths (BPM, arXiv 2607.22334).

Shapes: n places, V_S and V_T ids of student and teacher, N_T tokens of the teacher's reading. p is the teacher, q the student.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from switchkd.crossing.bridge import Bridge, Side
from switchkd.crossing.laws import LEAST, Places
from switchkd.crossing.readings import spans
from switchkd.methods.policy import STUDENT, TEACHER


@dataclass(frozen=True, eq=False)
class PrefixPlaces(Places):
    """Where a student token begins with a teacher token or within it, and what the two have of each other, ``[n]`` each."""

    written: np.ndarray  # bytes of the teacher's token that stand before the student's: b"" where both begin
    last: np.ndarray  # place of the last teacher token that the student's reaches into, counted from ``teacher``
    source: np.ndarray  # event that the teacher's token, without what is written, goes to
    token: np.ndarray  # the student's token


@dataclass(frozen=True, eq=False)
class PrefixLaw:
    """The teacher's law over the V_S ids of the student and one bucket for what none of them can stand for.

    A teacher token goes to the longest student token that is a prefix of it, ends to the end, other tokens without bytes to the
    bucket. Where the student's token begins inside a teacher token, the law is that of the teacher tokens that go on from the
    bytes already there; those that end there are left out, since what would follow them nobody has asked. Where it reaches beyond
    the teacher token, the mass of the teacher's tokens under it, one after the other, is counted as its own, which is a lower
    bound of what the teacher gives to texts that go on so.
    """

    reads_tokens: ClassVar[bool] = True

    bridge: Bridge
    index: Tensor  # [V_S]
    route: Tensor  # [V_T]: the event of each teacher token, V_S for the bucket
    _spelt: dict[bytes, int]  # the student's tokens that may be drawn
    _sorted: list[tuple[bytes, int]]  # the teacher's tokens that have bytes
    _kept: dict[bytes, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @staticmethod
    def of(bridge: Bridge, device: torch.device) -> "PrefixLaw":
        student, teacher = bridge.sides
        spelt = {data: ids[0] for ids in student.spelling.ids.values() if (data := _drawn(student, ids[0]))}
        size = student.vocab_size
        tokens = [_drawn(teacher, index) for index in range(teacher.vocab_size)]
        route = np.array([_longest(spelt, data, size) for data in tokens], dtype=np.int64)
        route[bridge.shared[TEACHER]] = bridge.shared[STUDENT]
        route[[index for index in teacher.ends.ids if index < len(route)]] = student.end
        index = np.arange(max(size, max(student.ends.ids) + 1))
        index[list(student.ends.ids)] = student.end
        known = sorted((data, index) for index, data in enumerate(tokens) if data)
        return PrefixLaw(bridge, torch.from_numpy(index).to(device), torch.from_numpy(route).to(device), spelt, known)

    def places(self, student_ids: Sequence[int], teacher_ids: Sequence[int]) -> PrefixPlaces:
        """Where the student's tokens can be scored: all that have bytes and are in the teacher's reading, and ends that match.

        Left out are tokens of white space alone that do not match one to one: two vocabularies cut it at will, and a student
        that learns the other's cuts loses its layout. Raises DataError where the readings spell two texts.
        """
        student, teacher = self.bridge.sides
        matched = self.bridge.matches(student_ids, teacher_ids)
        mine, theirs = student.bytes_of(student_ids), teacher.bytes_of(teacher_ids)
        own, other, text = spans(mine), spans(theirs), b"".join(theirs)
        filled = np.flatnonzero(other[:, 1] > other[:, 0])
        same = set(matched[STUDENT].tolist())
        scored = np.array(
            [
                at
                for at, data in enumerate(mine)
                if data and own[at, 1] <= len(text) and (at in same or not data.decode(errors="replace").isspace())
            ],
            dtype=np.int64,
        )
        first = filled[np.searchsorted(other[filled, 0], own[scored, 0], side="right") - 1]
        last = filled[np.searchsorted(other[filled, 0], own[scored, 1], side="left") - 1]
        if len(matched[STUDENT]) and student_ids[matched[STUDENT][-1]] in student.ends.ids:
            scored, first, last = (
                np.append(each, places[-1])
                for each, places in zip((scored, first, last), (*matched, matched[TEACHER]), strict=True)
            )
        written, source = np.empty(len(scored), dtype=object), np.zeros(len(scored), dtype=np.int64)
        for at, (i, j) in enumerate(zip(scored.tolist(), first.tolist(), strict=True)):
            written[at] = text[other[j, 0] : own[i, 0]]
            source[at] = self._event(teacher_ids[j], theirs[j][len(written[at]) :], written[at])
        return PrefixPlaces(
            scored, first, written, last - first, source, np.asarray(student_ids, dtype=np.int64)[scored]
        )

    def __call__(
        self, logp: Tensor, logq: Tensor, places: Places | None = None, token_logs: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``[n, V_S + 1]`` each from ``[n, V_T]`` and ``[n, V_S]`` log-probabilities at n places; gradients reach ``logq``.

        ``token_logs`` ``[N_T]`` are log p of the tokens of the teacher's reading, by which ``places.teacher`` counts.
        """
        assert isinstance(places, PrefixPlaces) and token_logs is not None, "the law of a prefix depends on the text"
        with torch.no_grad():
            p = self._moved(*self._routed(logp, places), places, token_logs.to(logp.dtype))
            p[:, -1].clamp_(min=LEAST)
        nothing = logq.new_full((len(logq), 1), LEAST)  # the student writes its own tokens alone
        return p, torch.cat([logq, nothing], -1)

    def _routed(self, logp: Tensor, places: PrefixPlaces) -> tuple[Tensor, Tensor]:
        """The law of the student's events, and the log of what the tokens that are still possible were of the whole, ``[n]``."""
        found, mass = logp.new_empty(len(logp), self.bridge.student.vocab_size + 1), logp.new_zeros(len(logp))
        for written in dict.fromkeys(places.written):
            rows = torch.from_numpy(np.flatnonzero(places.written == written)).to(logp.device)
            law, route = logp[rows], self.route
            if written:
                ids, route = self._behind(written)
                law = law.index_select(-1, ids)
                whole = law.logsumexp(-1)
                mass[rows] = whole.masked_fill(whole == -math.inf, 0.0)
                law = law - mass[rows].unsqueeze(-1)
            found[rows] = _summed(law, route, found.shape[-1])
        return found, mass

    def _behind(self, written: bytes) -> tuple[Tensor, Tensor]:
        """The teacher's tokens that go on from some bytes, and the event that each goes to without these."""
        if written not in self._kept:
            found, at = [], bisect_left(self._sorted, (written, self.bridge.teacher.vocab_size))
            while at < len(self._sorted) and (token := self._sorted[at])[0].startswith(written):
                found.append((token[1], self._event(token[1], token[0][len(written) :], written)))
                at += 1
            ids, route = torch.tensor(found, dtype=torch.int64, device=self.route.device).view(-1, 2).unbind(1)
            self._kept[written] = ids.contiguous(), route.contiguous()
        return self._kept[written]

    def _event(self, index: int, rest: bytes, written: bytes) -> int:
        """Where a teacher token goes of which ``rest`` is to come."""
        return _longest(self._spelt, rest, self.bridge.student.vocab_size) if written else int(self.route[index])

    def _moved(self, p: Tensor, mass: Tensor, places: PrefixPlaces, token_logs: Tensor) -> Tensor:
        """The law with the mass of the teacher's tokens under a longer student token moved from the first one's event to its."""
        rows = np.flatnonzero(places.last)
        if not len(rows):
            return p
        width = np.arange(int(places.last.max()) + 1)
        under = places.teacher[rows, None] + np.minimum(width, places.last[rows, None])
        counted = torch.from_numpy(width <= places.last[rows, None]).to(p.device)
        at, source, token = (
            torch.from_numpy(each).to(p.device) for each in (rows, places.source[rows], places.token[rows])
        )
        chain = token_logs[torch.from_numpy(under).to(p.device)].masked_fill(~counted, 0.0).sum(-1) - mass[at]
        chain = chain.minimum(p[at, source])  # no more than is there, however the two were rounded
        left = (chain - p[at, source]).masked_fill(chain == -math.inf, -math.inf)
        p[at, source] += torch.log1p(-left.exp())
        p[at, token] = p[at, token].logaddexp(chain)
        return p


def _drawn(side: Side, index: int) -> bytes:
    """The bytes of a token that a model may draw as text, b"" for others."""
    return side.bytes_of([index])[0] if index < side.vocab_size else b""


def _longest(spelt: dict[bytes, int], data: bytes, none: int) -> int:
    """The longest of some tokens that ``data`` begins with; ``none`` if there is none."""
    for length in range(len(data), 0, -1):
        if (found := spelt.get(data[:length])) is not None:
            return found
    return none


def _summed(logs: Tensor, route: Tensor, size: int) -> Tensor:
    """Log of the mass that comes to each of ``size`` events ``[n, size]``; where one token alone does, its own to the bit."""
    alone = torch.bincount(route, minlength=size)[route] == 1
    found = logs.new_zeros(len(logs), size).index_add_(1, route, logs.exp()).log_()
    return found.index_copy_(1, route[alone], logs[:, alone])
