"""The block engine writes the reference loop's texts, token by token in both readings, whatever the block, batch and order."""

import copy
import math
import sys
import types
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import two_tokenizers
from test_turn_law import RULES
from tiny import Spell, TabularModel, assert_same
from toy_words import TOYS, law_of
from toy_words import bridge_of as toy_bridge
from two_tokenizers import LINES, TOKENIZERS, bridge_of, byte_level, model_of, tokenizer_of

from switchkd import AdaSwitch, StudentOnly, Switch, TeacherOnly
from switchkd.decoding.settings import DecodeSettings
from switchkd.methods.policies import SSD, Hysteresis
from switchkd.writing import turn_drafts, turn_engine
from switchkd.writing.turn_engine import decode_turns
from switchkd.writing.turns import TurnJob, decode_turns_reference

PROMPTS = ["What is two", "the cat", "I don't know: 12 and", "def add(x", "W"]
RULE = Switch(tau_0=0.98, decay=0.1)
BLOCKS = [(1, 2), (2, 1), (3, 3), (5, None), (8, 4), ("auto", None)]


@cache
def writer_of(name, family="llama", seed=1, dtype=torch.float64):
    """A random model that writes what its tokenizer was made of more often than other bytes, and says so with some certainty."""
    model, tokenizer = copy.deepcopy(model_of(name, family, seed)), tokenizer_of(name)
    likely = {
        tokenizer.eos_token_id,
        *(i for line in LINES for i in tokenizer(line, add_special_tokens=False).input_ids),
    }
    likely = sorted(likely)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.35)
        head = model.get_output_embeddings().weight
        kept = 1.5 * head[likely]
        head.zero_()[likely] = kept
    return model.to(dtype)


def job_of(student, teacher, settings, families=("llama", "llama"), dtype=torch.float64, order=(0, 1, 2, 3, 4)):
    models = writer_of(student, families[0], 1, dtype), writer_of(teacher, families[1], 2, dtype)
    prompts = [
        [tokenizer_of(name)(PROMPTS[i], add_special_tokens=False).input_ids for i in order]
        for name in (student, teacher)
    ]
    ids = list(order) if len(set(order)) == len(order) else list(range(len(order)))
    return TurnJob.of(bridge_of(student, teacher), *models, *prompts, settings, ids)


def check_same(made, reference):
    assert_same(made, reference)
    assert [r.teacher_completion_ids for r in made] == [r.teacher_completion_ids for r in reference]
    assert [(r.id, r.error) for r in made] == [(r.id, r.error) for r in reference]


def check_engine(*pair, settings, blocks=BLOCKS, engine=decode_turns, **more):
    """The engine against the reference loop, which is returned."""
    reference = decode_turns_reference(job_of(*pair, settings, **more))
    for block, batch in blocks:
        check_same(engine(job_of(*pair, replace(settings, block_size=block, batch_size=batch), **more)), reference)
    return reference


def check_shows(rollouts, words=1.05):
    """That both models speak, words have several tokens, and texts are not all one word; else equalities say little."""
    speakers = [who for rollout in rollouts for who in rollout.speakers]
    places = sum(not math.isnan(d) for rollout in rollouts for d in rollout.divergences)
    assert 0 < sum(speakers) < len(speakers)
    assert words < len(speakers) / places < 6


FAMILIES = [("llama", "qwen2"), ("gpt2", "gemma3-hybrid"), ("mistral-sliding", "llama")]


PAIRS = [(one, other) for one in TOKENIZERS for other in ("coarse", "fine") if one != other]


@pytest.mark.parametrize("names", [*PAIRS, ("coarse", "coarse"), ("fine", "sentencepiece")])
def test_every_pair_of_tokenizers_block_and_batch(names):
    student, teacher = names
    families = FAMILIES[(list(TOKENIZERS).index(student) + 2 * list(TOKENIZERS).index(teacher)) % 3]
    check_shows(check_engine(student, teacher, settings=DecodeSettings(RULE, 16), families=families))


@pytest.mark.parametrize("families", [("qwen2", "gpt2"), ("gemma3-hybrid", "mistral-sliding"), ("gpt2", "llama")])
def test_every_family(families):
    settings = DecodeSettings(RULE, 16)
    check_shows(check_engine("fine", "coarse", settings=settings, families=families, blocks=[(3, 3), (8, None)]))


POLICIES = {
    "student_only": StudentOnly(),
    "teacher_only": TeacherOnly(),
    "switch_exponential": Switch(tau_0=0.7, decay=0.08),
    "switch_linear": Switch(schedule="linear", tau_0=0.8, horizon=16),
    "switch_growth": Switch(schedule="growth", tau_0=0.2, decay=0.15),
    "adaswitch": AdaSwitch(window=2, ratio=1.1),
    "adaswitch_student_token": AdaSwitch(window=2, ratio=1.1, divergence="tvd", switch_token_by="student"),
    "ssd": SSD(tau=0.32),
    "hysteresis": Hysteresis(take=0.36, give=0.28),
    "spell": Spell(limit=0.5, length=3),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy(policy):
    """Also one of one's own that leaves the student unread for a while."""
    settings = DecodeSettings(POLICIES[policy], 16)
    rollouts = check_engine("coarse", "fine", settings=settings, blocks=[(2, 2), (5, 3), ("auto", None)])
    if not policy.endswith("_only"):
        check_shows(rollouts)


@pytest.mark.parametrize("budget", [0, 1, 2, 7, 30])
def test_budgets(budget):
    settings = DecodeSettings(RULE, budget)
    rollouts = check_engine("sentencepiece", "fine", settings=settings, blocks=[(1, 3), (4, None), (64, 2)])
    for rollout in rollouts:
        longest = max(len(rollout.completion_ids), len(rollout.teacher_completion_ids))
        assert len(rollout.completion_ids) <= budget and (longest >= budget or rollout.stop_reason == "eos")


CUTS = {
    "greedy": {"temperature": 0.0},
    "cold": {"temperature": 0.6},
    "nucleus": {"top_p": 0.8},
    "the best": {"top_k": 5, "min_p": 0.1},
    "another seed": {"seed": 7},
}


@pytest.mark.parametrize("cut", CUTS)
def test_what_is_drawn_otherwise(cut):
    settings = DecodeSettings(RULE, 16, **CUTS[cut])
    check_shows(check_engine("fine", "coarse", settings=settings, blocks=[(3, 3), ("auto", None)]), 1.0)


def test_single_precision():
    settings = DecodeSettings(RULE, 16)
    check_shows(
        check_engine("coarse", "sentencepiece", settings=settings, dtype=torch.float32, blocks=[(3, 3), (8, 2)])
    )


def test_order_and_neighbours_change_nothing():
    settings, order = DecodeSettings(RULE, 16, block_size=3), [4, 2, 0, 3, 1]
    straight = decode_turns(job_of("coarse", "fine", settings))
    shuffled = decode_turns(job_of("coarse", "fine", replace(settings, batch_size=2), order=order))
    check_same([shuffled[order.index(i)] for i in range(5)], straight)
    check_same(decode_turns(job_of("coarse", "fine", settings, order=[2])), [straight[2]])


# Where words are long, a model may see no end of one, some tokens cannot be spelt, and a student has two ends.
TOY_RULES = ["spell", "switch", "adaswitch_student_token"]


@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("rule", TOY_RULES)
def test_toys(toy, rule):
    check_toys(toy, rule)


def check_toys(toy, rule, engine=decode_turns, blocks=((2, 7), (5, None))):
    toy, settings = TOYS[toy], DecodeSettings(RULES[rule], 12)

    def job(settings):
        tables = [
            [law_of(toy, who, 0, last) for last in range(len(tokens.known))] for who, tokens in enumerate(toy.sides)
        ]
        prompts = [[[1]] * 24, [[0]] * 24]
        return TurnJob.of(toy_bridge(toy), *map(TabularModel, tables), *prompts, settings)

    reference = decode_turns_reference(job(settings))
    for block, batch in blocks:
        check_same(engine(job(replace(settings, block_size=block, batch_size=batch))), reference)


def test_a_reader_whose_tokens_are_far_shorter(monkeypatch):
    """What is read for the longest row of a batch must not reach into another row's place."""
    monkeypatch.setitem(two_tokenizers.TOKENIZERS, "bytes", lambda: byte_level(256))
    check_far_shorter(decode_turns, turn_engine, monkeypatch)


def check_far_shorter(engine, module, monkeypatch):
    monkeypatch.setattr(module, "_SPARE", 4)  # so that it is met soon
    settings, order = DecodeSettings(Switch(schedule="constant", tau_0=2.0), 30), [0] * 9
    reference = decode_turns_reference(job_of("sentencepiece", "bytes", settings, order=order))
    own = replace(settings, block_size=4, batch_size=3)
    check_same(engine(job_of("sentencepiece", "bytes", own, order=order)), reference)


# --- mistakes -----------------------------------------------------------------------------------------------------

LAST = "most[row] = max(len(text.ids(who)) - 1, 0)"
MUTANTS = {
    "the first place of a draft passed over": (
        "if here.speaker != writer:",
        "if here.speaker != writer and (place or writer is None):",
    ),
    "the other takes over at the first place": (
        "relieved.append((draft.text, mine[place].speaker, first[at] + place))",
        "relieved.append((draft.text, mine[place].speaker, first[at]))",
    ),
    "the cache of a hand-over is stale": (LAST, "most[row] = len(text.ids(who)) + 1"),
    "the state of dropped places kept": ("where_rows(decided, new, part[index])", "new"),
    "the key of the next place": ("keys_at(row_keys, clock)", "keys_at(row_keys, clock + k)"),
    "keys by token": ("clock = clock + self.sizes[who][token]", "clock = clock + 1"),
    "the noise of the other writer": (
        "Use.TOKEN if who == STUDENT else Use.TEACHER",
        "Use.TEACHER if who == STUDENT else Use.TOKEN",
    ),
    "the reader's law one token late": (
        "logits[rows, columns]",
        "logits[rows, (columns + 1).clamp(max=logits.shape[1] - 1)]",
    ),
    "a row in place of a finished one has its state": ("part[row] = new[0]", "pass"),
    "the padding of one row in another's place": (
        "if len(asked) > 1 and longest + width",
        "if longest + width + 1 < 0 and longest + width",
    ),
}


def mutant_of(old, new):
    """``decode_turns`` of the engine and its drafts with one line changed."""
    made = {}
    for each in (turn_drafts, turn_engine):
        source = Path(each.__file__).read_text(encoding="utf-8")
        made[each] = types.ModuleType(f"mutant_{each.__name__.rpartition('.')[2]}"), source.count(old)
        sys.modules[made[each][0].__name__] = made[each][0]
        exec(compile("import math\n" + source.replace(old, new), "mutant", "exec"), vars(made[each][0]))
    (drafts, there), (engine, here) = made.values()
    assert there + here == 1, f"the mutant no longer fits the source: {old}"
    engine.Draft, engine.Said, engine.keep = drafts.Draft, drafts.Said, drafts.keep
    return engine


def check_all(module, monkeypatch):
    """What finds mistakes soonest."""
    for toy in ("unspelt", "letters"):
        check_toys(toy, "spell", module.decode_turns, [(5, 7)])
    check_engine(
        "coarse", "fine", settings=DecodeSettings(POLICIES["spell"], 16), blocks=[(4, 3)], engine=module.decode_turns
    )
    check_far_shorter(module.decode_turns, module, monkeypatch)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name, monkeypatch):
    monkeypatch.setitem(two_tokenizers.TOKENIZERS, "bytes", lambda: byte_level(256))
    mutant = mutant_of(*MUTANTS[name])
    with pytest.raises((AssertionError, IndexError, RuntimeError, ValueError)):
        check_all(mutant, monkeypatch)
