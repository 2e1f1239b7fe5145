"""What a rule says along a text that two models with different tokenizers have written: for records that are checked."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from switchkd.crossing.bridge import Bridge
from switchkd.crossing.readings import spans
from switchkd.decoding.rollouts import Rollout
from switchkd.methods.policy import STUDENT, TEACHER, Policy
from switchkd.writing.turn_laws import TurnLaws
from switchkd.writing.turns import only_reader


@torch.no_grad()
def replayed_turns(logs: Sequence[Tensor], policy: Policy, rollout: Rollout, bridge: Bridge) -> dict[str, list[Any]]:
    """Speakers, divergences and thresholds by token of the student's reading, as ``policy`` has them.

    ``logs`` are the laws of STUDENT, ``[T, V_S]``, and TEACHER, ``[T', V_T]``, at the tokens of their own readings.
    """
    count = len(rollout.completion_ids)
    speakers, divergences, thresholds = [STUDENT] * count, [math.nan] * count, [math.nan] * count
    found: dict[str, list[Any]] = {"speakers": speakers, "divergences": divergences, "thresholds": thresholds}
    if (alone := only_reader(policy)) is not None:
        return found | {"speakers": [alone] * count}
    laws, state, turns, writer = TurnLaws(bridge, logs[STUDENT].device), policy.init(1), 0, STUDENT
    for mine, theirs, tail in places(rollout, bridge):
        own = laws.own(STUDENT, logs[STUDENT][[mine]]), laws.own(TEACHER, logs[TEACHER][[theirs]])
        read = [bool(each) for each in policy.reads(state)]
        asked = (own[STUDENT] if read[STUDENT] else None, own[TEACHER] if read[TEACHER] else None)
        turn = laws.decide(policy, state, asked, [tail], torch.tensor([writer]), torch.tensor([turns]))
        state, writer, turns = turn.state, int(turn.speaker), turns + int(turn.asked)
        speakers[mine:] = [writer] * (count - mine)
        divergences[mine], thresholds[mine] = float(turn.divergence), float(turn.threshold)
    return found


def places(rollout: Rollout, bridge: Bridge) -> list[tuple[int, int, bytes]]:
    """Where the text might have changed hands: the tokens of both readings that begin there, and how the text ends before."""
    mine, theirs = bridge.student.bytes_of(rollout.completion_ids), bridge.teacher.bytes_of(rollout.teacher_completion)
    text = b"".join(mine)
    other = {int(first): at for at, (first, _) in reversed(list(enumerate(spans(theirs))))}
    ended = bridge.student.ended(rollout.completion_ids)
    found = []
    for at, (first, last) in enumerate(spans(mine).tolist()):
        is_end = ended and at == len(mine) - 1
        begins = (
            first == 0 or is_end or (last > first and bridge.boundaries.between(text[:first][-8:], text[first:][:8]))
        )
        if begins and first in other and not (first == 0 and at):
            found.append((at, len(theirs) - 1 if is_end else other[first], text[:first][-8:]))
    return found
