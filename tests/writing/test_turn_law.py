"""The exact law of texts written in turns of words: all paths of noise through the reference loop against the definition.

Both are in `toy_words.py`. Probabilities must agree to 1e-12, text by text in both readings, with who wrote each token; so must
what the rule compared. Mistakes put into the loop must show.
"""

import math
import sys
import types
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from tiny import Spell
from toy_words import PROMPTS, TOYS, Definition, Paths, bridge_of, loop_law

from switchkd import AdaSwitch, StudentOnly, Switch, TeacherOnly
from switchkd.decoding.settings import DecodeSettings
from switchkd.methods.policies import SSD, Hysteresis
from switchkd.methods.policy import STUDENT, TEACHER
from switchkd.writing import turn_laws, turn_texts, turns

RULES = {
    "switch": Switch(tau_0=0.8, decay=0.2),
    "switch_linear": Switch(schedule="linear", tau_0=0.9, horizon=3),
    "switch_growth": Switch(schedule="growth", tau_0=0.5, decay=0.4),
    "adaswitch": AdaSwitch(window=1, ratio=1.05, divergence="tvd"),
    "adaswitch_student_token": AdaSwitch(window=1, ratio=1.05, divergence="tvd", switch_token_by="student"),
    "ssd": SSD(tau=0.4),
    "hysteresis": Hysteresis(take=0.45, give=0.35),
    "spell": Spell(limit=0.6, length=2),
    "student_only": StudentOnly(),
    "teacher_only": TeacherOnly(),
}
BOTH = [name for name in RULES if not name.endswith("_only")]
CUTS = {
    "cold": {"temperature": 0.6},
    "hot": {"temperature": 1.7},
    "greedy": {"temperature": 0.0},
    "nucleus": {"top_p": 0.75},
    "nucleus of a cold one": {"temperature": 0.6, "top_p": 0.9},
}


@cache
def definition(toy, settings):
    return Definition(TOYS[toy], settings)


def check(toy, settings, loop=turns):
    """That the loop has the law of the definition, and saw what the definition says."""
    expected, made = definition(toy, settings), loop_law(TOYS[toy], settings, loop)
    assert made.outcomes.keys() == expected.outcomes.keys()
    assert sum(made.outcomes.values()) == pytest.approx(1, abs=1e-12)
    for outcome, chance in expected.outcomes.items():
        assert made.outcomes[outcome] == pytest.approx(chance, abs=1e-12)
        rollout = made.rollouts[outcome]
        seen = list(zip(rollout.divergences, rollout.thresholds, strict=True))
        assert seen == [pytest.approx(said, abs=1e-5, nan_ok=True) for said in expected.seen[outcome]]
        spelt = [
            b"".join(tokens.known[token] for token in ids)
            for tokens, ids in zip(TOYS[toy].sides, outcome[:2], strict=True)
        ]
        assert spelt[STUDENT] == spelt[TEACHER]
    return expected


@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("rule", RULES)
def test_law_is_exact(toy, rule):
    check(toy, DecodeSettings(RULES[rule], 4))


@pytest.mark.parametrize("budget", [1, 2, 3, 5])
@pytest.mark.parametrize("toy", ["characters", "unspelt"])
def test_law_with_other_budgets(toy, budget):
    check(toy, DecodeSettings(RULES["ssd"], budget))


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("toy", ["letters", "characters"])
def test_law_of_what_is_drawn_otherwise(toy, cut):
    """The rule compares the laws as they are; each model draws from what the settings leave of its own."""
    settings = DecodeSettings(RULES["spell"], 4, **CUTS[cut])
    assert check(toy, settings).outcomes != definition(toy, DecodeSettings(RULES["spell"], 4)).outcomes


def test_these_settings_show_what_they_should():
    """Otherwise the equalities above would say little."""
    ends, cut_in_word, cut_in_character, kept, words = 0, 0, 0, 0, 0
    for rule in BOTH:
        found = Counter()
        for name, toy in TOYS.items():
            law = definition(name, DecodeSettings(RULES[rule], 4))
            kept += law.places["not asked"]
            for (student, teacher, speakers, reason), chance in law.outcomes.items():
                found.update({who: chance for who in set(speakers)})
                ends += reason == "eos"
                cut_in_word += reason == "length" and len(student) < 4
                text = b"".join(toy.teacher.known[token] for token in teacher)
                cut_in_character += reason == "length" and text[-1:] == b"\xc3"
                places = sum(not math.isnan(said[0]) for said in law.seen[student, teacher, speakers, reason])
                words += 1 < places < len(student)
        assert min(found[STUDENT], found[TEACHER]) > 0.05, f"{rule}: {found}"
    assert min(ends, cut_in_word, cut_in_character, kept, words) > 10


@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("who", [STUDENT, TEACHER])
def test_a_model_that_is_never_relieved_writes_by_its_own_law(toy, who):
    """However many places there are: its tokens are those of a plain loop, up to the budget of either reading."""
    budget, name = 5, toy
    toy, rule = TOYS[toy], Switch(schedule="constant", tau_0=-1.0 if who == TEACHER else 2.0)
    plain = definition(name, DecodeSettings(rule, budget))
    tokens, alone = toy.sides[who], Counter()

    def goes_on(ids, chance):
        text = b"".join(tokens.known[token] for token in ids)
        readings = ids if who == STUDENT else toy.student.encode(text), toy.teacher.encode(text)
        if max(len(ids), *map(len, readings)) >= budget:
            alone[readings[STUDENT][:budget]] += chance
            return
        for token, share in plain.law(who, ids).items():
            if token in plain.ends(who):
                alone[(*readings[STUDENT], max(plain.ends(STUDENT)))] += chance * share
            else:
                goes_on((*ids, token), chance * share)

    goes_on((), 1.0)
    made = Counter()
    for (student, _, speakers, _), chance in loop_law(toy, DecodeSettings(rule, budget)).outcomes.items():
        made[student] += chance
        assert set(speakers) == {who}
    assert made.keys() == alone.keys() and len(made) > 20
    assert all(made[ids] == pytest.approx(chance, abs=1e-12) for ids, chance in alone.items())


def test_every_draw_has_noise_of_its_own(monkeypatch):
    """A token that is dropped, and the one that the other model draws in its place, too."""
    keys = []
    monkeypatch.setattr(turns, "gumbel_noise", lambda key, _: keys.append(int(key)) or key)
    monkeypatch.setattr(turns, "draw", Paths().draw)
    settings, dropped = DecodeSettings(RULES["spell"], 30), 0
    for toy in TOYS.values():
        for seed in range(20):
            paths = Paths()
            paths.choices, paths.at, paths.chance, paths.left = (), 0, 1.0, {}
            monkeypatch.setattr(turns, "draw", paths.draw)
            keys.clear()
            job = turns.TurnJob.of(bridge_of(toy), toy.model(STUDENT), toy.model(TEACHER), *PROMPTS, settings, [seed])
            (rollout,) = turns.decode_turns_reference(job)
            assert len(keys) == len(set(keys))
            dropped += len(keys) > max(len(rollout.completion_ids), len(rollout.teacher_completion_ids))
    assert dropped


# --- mistakes -----------------------------------------------------------------------------------------------------

KEPT = "if token is None or speaker != text.writer:"
READ = "return self.bridge.word(1 - self.writer, self.spelt)"
MUTANTS = {
    "a hand-over at any token end": (
        turn_texts,
        "return self.bridge.beginnings[self.writer].begins(self.tail, token)",
        "return True",
    ),
    "the reader lacks the last token of the word": (
        turn_texts,
        "return self.prompts[who] + self.reading(who) +",
        "return self.prompts[who] + self.reading(who)[: None if who == self.writer else -1] +",
    ),
    "the reader is given the writer's ids": (turn_texts, READ, "return self.word"),
    "the reader reads single bytes": (
        turn_texts,
        READ,
        "return [i for byte in self.spelt for i in self.bridge.sides[1 - self.writer].spelling.encode(bytes([byte]))]",
    ),
    "the law of words not renormalised": (
        turn_laws,
        "law = cut - mass.masked_fill(mass == -math.inf, 0.0)",
        "law = cut",
    ),
    "the dropped token kept": (turns, KEPT, "if token is None:"),
    "the token that stands drawn again": (turns, KEPT, "if True:"),
    "the other draws from its full law": (
        turns,
        "self.laws.beginning(speaker, law, [text.tail])[0]",
        "law",
    ),
    "both models have one noise": (turn_texts, "Use.TOKEN if who == STUDENT else Use.TEACHER", "Use.TOKEN"),
    "after a hand-over the noise of the other": (
        turn_texts,
        "Use.TOKEN if who == STUDENT else Use.TEACHER",
        "Use.TEACHER if self.writer else Use.TOKEN",
    ),
    "noise by token in place of byte": (turn_texts, "self.clock += max(len(data), 1)", "self.clock += bool(self.word[1:])"),
    "a model that sees no word's end is asked": (turn_laws, "mass >= math.log(LEAST_MASS)", "mass > -math.inf"),
    "the writer's mass in place of the other's": (turn_laws, "(writer != who) & (mass", "(writer == who) & (mass"),
    "the rule compares full laws": (
        turn_laws,
        "self.shared.coarse(teacher[0], student[0])",
        "self.shared.coarse(laws[TEACHER], laws[STUDENT])",
    ),
    "the rule compares shared tokens alone": (
        turn_laws,
        "self.shared.coarse(teacher[0], student[0])",
        "self.shared(teacher[0], student[0])",
    ),
    "t counts tokens": (turns, "torch.tensor([text.turns])", "torch.tensor([len(text.student_ids)])"),
    "t counts words": (turns, "torch.tensor([text.turns])", "torch.tensor([text.words])"),
    "the state of a place where the rule was not asked": (turn_laws, "where_rows(asked, one, old)", "one"),
    "tokens that the other cannot spell": (turn_laws, "if len(ids) else logs", "if False else logs"),
    "the teacher's reading has no budget": (
        turn_texts,
        "if len(mine) + len(self.word) >= self.budget:",
        "if self.writer == STUDENT and len(mine) + len(self.word) >= self.budget:",
    ),
    "the student's reading over its budget": (turn_texts, "            self._cut()\n", ""),
    "the teacher reads what was cut": (turn_texts, "while not kept.startswith(before):", "while False:"),
    "the end is one word with the last": (
        turn_texts,
        "self._note(1)",
        "self.said = (math.nan, math.nan)\n            self._note(1)",
    ),
}  # fmt: skip
# The cases in which they must show, the quickest first.
SHOWING = [
    ("unspelt", RULES["switch"], 4),
    ("unspelt", RULES["spell"], 4),
    ("letters", RULES["hysteresis"], 4),
    ("characters", RULES["adaswitch"], 4),
    ("characters", RULES["switch_linear"], 3),
    ("long words", RULES["spell"], 4),
    ("long words", RULES["adaswitch_student_token"], 4),
    ("long words", RULES["switch_growth"], 4),
    ("letters", RULES["ssd"], 4),
    ("letters", RULES["spell"], 4),
]


def mutant_of(module, old, new):
    """The loop's module with one line of it, or of what it is made of, changed."""
    made = {}
    for each in {module, turns}:
        source = Path(each.__file__).read_text(encoding="utf-8")
        if each is module:
            assert source.count(old) == 1, f"the mutant no longer fits the source: {old}"
            source = source.replace(old, new)
        made[each] = types.ModuleType(f"mutant_{each.__name__.rpartition('.')[2]}")
        sys.modules[made[each].__name__] = made[each]
        exec(compile(source, "mutant", "exec"), vars(made[each]))
    for name in ("TurnText", "TurnLaws"):
        if module is not turns and hasattr(made[module], name):
            setattr(made[turns], name, getattr(made[module], name))
    return made[turns]


def check_all(loop):
    for toy, rule, budget in SHOWING:
        check(toy, DecodeSettings(rule, budget), loop)


def test_the_loop_passes():
    check_all(turns)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name):
    mutant = mutant_of(*MUTANTS[name])
    with pytest.raises((AssertionError, IndexError, KeyError, ValueError)):
        check_all(mutant)
