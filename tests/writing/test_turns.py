"""What texts in turns of words are made of: rules that can decide, rows that fail, budgets, and readings."""

import copy
import math
import random
from dataclasses import dataclass

import pytest
import torch
from test_turn_engine import RULE, job_of
from tiny import POLICIES
from two_tokenizers import LINES, TOKENIZERS, bridge_of

from switchkd.base.errors import ConfigError
from switchkd.crossing.readings import spans
from switchkd.decoding.settings import DecodeSettings
from switchkd.methods.policies import SSD
from switchkd.methods.policy import STUDENT, TEACHER, Policy, spoken_where
from switchkd.writing import turns
from switchkd.writing.turn_engine import decode_turns
from switchkd.writing.turn_texts import TurnText
from switchkd.writing.turns import check_policy, decode_turns_reference

LOOPS = {"reference": decode_turns_reference, "engine": decode_turns}
TOKEN_BY_TOKEN = {
    "mix_in": "mix_in",
    "skd": "skd",
    "skd_sharpened": "skd",
    "ca_opd": "ca_opd",
    "trb": "trb",
    "relay": "relay",
    "parity": "Parity",
    "forced": "Forced",
    "quota": "Quota",
}


@pytest.mark.parametrize("name", POLICIES)
def test_rules_that_decide_token_by_token_are_refused_by_name(name):
    if name not in TOKEN_BY_TOKEN:
        check_policy(POLICIES[name])
        return
    with pytest.raises(ConfigError, match=rf"the policy \S*{TOKEN_BY_TOKEN[name]} (blends|looks at)"):
        check_policy(POLICIES[name])


@dataclass(frozen=True)
class Everywhere(Policy):
    """A rule of one's own."""

    def step(self, state, logp_student, logp_teacher, position):
        d = (logp_student.exp() - logp_teacher.exp()).abs().sum(-1)
        return spoken_where(position % 2 == 1, logp_student, logp_teacher, d, state)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_rule_of_ones_own(loop):
    check_policy(Everywhere())
    for rollout in LOOPS[loop](job_of("coarse", "fine", DecodeSettings(Everywhere(), 16))):
        at_places = [who for who, d in zip(rollout.speakers, rollout.divergences, strict=True) if not math.isnan(d)]
        assert at_places == [place % 2 for place in range(len(at_places))]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("who", [STUDENT, TEACHER, None])
def test_a_model_that_is_not_finite_ends_its_row_and_no_other(loop, who):
    """``None``: both are not, in the same place."""
    settings = DecodeSettings(RULE, 12, block_size=4)
    whole = decode_turns_reference(job_of("coarse", "fine", settings))
    job, bridge = job_of("coarse", "fine", settings), bridge_of("coarse", "fine")
    models = [copy.deepcopy(model) for model in (job.student, job.teacher)]
    for which in (STUDENT, TEACHER) if who is None else (who,):
        # A token that one row alone reads, in its prompt or where both models have written something.
        readings = [
            [*text.prompts[which], *(rollout.completion_ids if which == STUDENT else rollout.teacher_completion_ids)]
            for text, rollout in zip(job.texts, whole, strict=True)
        ]
        others = {index for at, reading in enumerate(readings) if at != 3 for index in reading}
        bad = next(
            index for index in (readings[3] if who is None else reversed(readings[3][:-1])) if index not in others
        )
        with torch.no_grad():
            models[which].get_input_embeddings().weight[bad] = math.nan
    job.student, job.teacher = models
    made = LOOPS[loop](job)
    for at in (0, 1, 2, 4):
        assert made[at].completion_ids == whole[at].completion_ids and made[at].stop_reason == whole[at].stop_reason
    assert made[3].stop_reason == "non_finite"
    name = ("student", "teacher")[who or STUDENT]
    assert made[3].error.startswith(f"the {name}'s logits are not finite at sample 3, response position ")
    assert made[3].completion_ids == whole[3].completion_ids[: len(made[3].completion_ids)]
    assert bridge.student.spelling.decode(made[3].completion_ids) == bridge.teacher.spelling.decode(
        made[3].teacher_completion_ids
    )


@pytest.mark.parametrize(
    "student, teacher", [("fine", "coarse"), ("coarse", "sentencepiece"), ("sentencepiece", "fine")]
)
def test_both_models_read_one_text_wherever_it_may_change_hands(student, teacher, monkeypatch):
    bridge, seen = bridge_of(student, teacher), []

    def turn(row, token):
        text = row.text
        spelt = [side.spelling.decode(text.reading(who)) for who, side in enumerate(bridge.sides)]
        seen.append(spelt[STUDENT] == spelt[TEACHER])
        assert not text.word and spelt[STUDENT].endswith(text.tail) and len(text.student_ids) < text.budget
        own(row, token)

    own = turns._Row.turn
    monkeypatch.setattr(turns._Row, "turn", turn)
    for rollout in decode_turns_reference(job_of(student, teacher, DecodeSettings(SSD(0.3), 12))):
        texts = [
            b"".join(side.bytes_of(ids))
            for side, ids in zip(bridge.sides, (rollout.completion_ids, rollout.teacher_completion_ids), strict=True)
        ]
        assert texts[STUDENT] == texts[TEACHER] and len(rollout.completion_ids) <= 12
        assert len(rollout.speakers) == len(rollout.divergences) == len(rollout.completion_ids)
    assert all(seen) and len(seen) > 20


# --- texts without models -----------------------------------------------------------------------------------------


def written(bridge, data, chance, budget=10**9):
    """A text of both sides' own tokens, in turns at random; and these tokens."""
    own = [side.spelling.encode(data) for side in bridge.sides]
    starts = [
        {int(first): token for (first, _), token in zip(spans(side.bytes_of(ids)), ids, strict=True)}
        for side, ids in zip(bridge.sides, own, strict=True)
    ]
    text, at = TurnText(bridge, 0, ([1], [1]), budget), 0
    while at < len(data) and not text.stop_reason:
        if text.writer is None or text.begins(starts[text.writer][at]):
            text.close()
            speaker = chance.randrange(2)
            text.begin(starts[speaker][at], speaker, 0.5, 0.25)
        else:
            text.go_on(starts[text.writer][at])
        at += len(bridge.sides[text.writer].spelling.bytes_of[starts[text.writer][at]])
    if not text.stop_reason:
        text.close()
    return text, own


@pytest.mark.parametrize("teacher", TOKENIZERS)
@pytest.mark.parametrize("student", TOKENIZERS)
def test_readings_of_canonical_words_are_canonical(student, teacher):
    """Both models then read what each would make of the whole text by itself."""
    bridge, chance = bridge_of(student, teacher), random.Random(0)
    for line in [*LINES[:5], "It is all.\n\nWait\n\n    return x\n\tNo."]:
        text, own = written(bridge, line.strip().encode(), chance)
        assert [text.student_ids, text.teacher_ids] == own


@pytest.mark.parametrize("budget", range(1, 14))
def test_budgets_within_a_word_and_a_character(budget):
    for names in (("fine", "coarse"), ("coarse", "fine"), ("sentencepiece", "fine"), ("fine", "sentencepiece")):
        bridge = bridge_of(*names)
        for seed in range(8):
            text, own = written(bridge, " naïve 東京 café".encode(), random.Random(seed), budget)
            student, teacher = (side.spelling.decode(text.reading(who)) for who, side in enumerate(bridge.sides))
            assert student == teacher and " naïve 東京 café".encode().startswith(student)
            assert len(text.student_ids) == len(text.speakers) == len(text.divergences) == len(text.thresholds)
            assert len(text.student_ids) <= budget
            assert max(map(len, (text.student_ids, text.teacher_ids))) >= min(budget, *map(len, own)) or seed
