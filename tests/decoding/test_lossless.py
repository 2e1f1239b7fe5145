"""The block engine gives the reference loop's tokens, one by one, whatever the block, batch, order and drafter."""

import copy
import itertools
import math
import random
from functools import cache

import pytest
import torch
from tiny import FAMILIES, POLICIES, assert_same, tiny_model

from switchkd import AdaSwitch, Switch, decode, decode_reference, load_pair
from switchkd.decoding.pace import Pace
from switchkd.methods.divergences import LN2
from switchkd.methods.policies import SSD, Hysteresis
from switchkd.methods.policy import STUDENT, TEACHER
from switchkd.models.adapters import add_adapter
from switchkd.models.settings import ModelConfig

PROMPTS = [[3, 4, 5], [7], [2, 2, 9, 11, 4, 6, 8], [5, 5], [10, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21]]
BUDGET = 9


@pytest.fixture(scope="module")
def llamas():
    return tiny_model("llama", 1), tiny_model("llama", 2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", ["student_only", "teacher_only", "switch_exponential", "adaswitch", "spell"])
def test_every_family_block_and_batch(family, policy):
    student, teacher = tiny_model(family, 1), tiny_model(family, 2)
    reference = decode_reference(student, teacher, PROMPTS, POLICIES[policy], BUDGET)
    combinations = [(block, 3, drafter) for block in (1, 2, 3, 5, 8) for drafter in ("student", "teacher")]
    for block, batch, drafter in [*combinations, (3, 1, "auto"), (5, None, "auto"), ("auto", 2, "auto")]:
        out = decode(
            student, teacher, PROMPTS, POLICIES[policy], BUDGET, block_size=block, batch_size=batch, drafter=drafter
        )
        assert_same(out, reference)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy(policy):
    """On a pair of two architectures, one of them with a sliding window."""
    student, teacher = tiny_model("gpt2", 1), tiny_model("gemma3-hybrid", 2)
    reference = decode_reference(student, teacher, PROMPTS, POLICIES[policy], BUDGET)
    for block, batch, drafter in ((1, 5, "auto"), (4, 2, "student"), (4, 3, "teacher"), (8, 1, "auto")):
        out = decode(
            student, teacher, PROMPTS, POLICIES[policy], BUDGET, block_size=block, batch_size=batch, drafter=drafter
        )
        assert_same(out, reference)


@pytest.mark.parametrize("policy", [p for p in POLICIES if p not in ("student_only", "teacher_only")])
def test_the_settings_of_these_tests_let_both_models_speak(policy):
    """Otherwise the equalities above would say little."""
    spoken = set()
    for family in ("llama", "opt", "gemma3-hybrid"):
        for rollout in decode_reference(
            tiny_model(family, 1), tiny_model(family, 2), PROMPTS, POLICIES[policy], BUDGET
        ):
            spoken.update(rollout.speakers)
        if spoken == {0, 1}:
            return
    pytest.fail(f"only {spoken} spoke")


@pytest.fixture(scope="module")
def free(llamas):
    """What is written where no token ends a text."""
    return decode_reference(*llamas, PROMPTS, POLICIES["switch_constant"], BUDGET, eos_token_ids=[])


@pytest.mark.parametrize("place", range(8))
def test_eos_at_every_place_in_a_block(llamas, free, place):
    """Row 0's token at ``place`` becomes an EOS id, with another row's as a second one."""
    policy = POLICIES["switch_constant"]
    eos = [free[0].completion_ids[place], free[2].completion_ids[place]]
    reference = decode_reference(*llamas, PROMPTS, policy, BUDGET, eos_token_ids=eos)
    assert reference[0].stop_reason == "eos" and len(reference[0].completion_ids) <= place + 1
    for block, drafter in itertools.product((2, 4, 8), ("student", "teacher")):
        out = decode(
            *llamas, PROMPTS, policy, BUDGET, block_size=block, batch_size=3, eos_token_ids=eos, drafter=drafter
        )
        assert_same(out, reference)
        for rollout in out:
            inside = set(rollout.completion_ids[:-1])
            assert not inside & set(eos)


@pytest.mark.parametrize("block", [3, 5])
@pytest.mark.parametrize("difference", [None, -1, 0, 1])
def test_budgets_around_the_block_length(llamas, block, difference):
    for budget in (0, 1) if difference is None else (block + difference,):
        for policy in (POLICIES["switch_growth"], POLICIES["adaswitch"], POLICIES["teacher_only"]):
            reference = decode_reference(*llamas, PROMPTS, policy, budget, eos_token_ids=[])
            assert all(len(r.completion_ids) == budget and r.stop_reason == "length" for r in reference)
            for drafter in ("student", "teacher"):
                out = decode(
                    *llamas, PROMPTS, policy, budget, block_size=block, batch_size=2, eos_token_ids=[], drafter=drafter
                )
                assert_same(out, reference)


def test_order_and_neighbours_change_nothing(llamas):
    policy = POLICIES["spell"]
    straight = decode(*llamas, PROMPTS, policy, BUDGET, seed=3, batch_size=5)
    order = [4, 2, 0, 3, 1]
    shuffled = decode(
        *llamas, [PROMPTS[i] for i in order], policy, BUDGET, seed=3, sample_ids=order, batch_size=2, block_size=3
    )
    assert_same([shuffled[order.index(i)] for i in range(5)], straight)
    alone = decode(*llamas, [PROMPTS[2]], policy, BUDGET, seed=3, sample_ids=[2])
    assert_same(alone, [straight[2]])


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_nearly_equal_length_in_any_order(family):
    """They are read in one forward of the whole batch, which once took the rows for being in order when they were not."""
    student, teacher = tiny_model(family, 1), tiny_model(family, 2)
    lengths = random.Random(0)
    prompts = [[3 + (i + t) % 17 for t in range(lengths.randint(10, 12))] for i in range(12)]
    reference = decode_reference(student, teacher, prompts, POLICIES["switch_constant"], BUDGET)
    for batch in (3, 5, None):
        assert_same(decode(student, teacher, prompts, POLICIES["switch_constant"], BUDGET, batch_size=batch), reference)


def test_temperatures(llamas):
    for temperature in (0.0, 0.5, 2.0):
        policy = POLICIES["switch_exponential"]
        reference = decode_reference(*llamas, PROMPTS, policy, BUDGET, temperature, seed=5)
        out = decode(*llamas, PROMPTS, policy, BUDGET, temperature, seed=5, block_size=4, batch_size=4)
        assert_same(out, reference)


def test_seeds_give_other_text(llamas):
    texts = {
        tuple(tuple(r.completion_ids) for r in decode(*llamas, PROMPTS, POLICIES["student_only"], BUDGET, seed=seed))
        for seed in range(4)
    }
    assert len(texts) == 4


def test_equal_prompts_in_one_batch_get_their_own_noise(llamas):
    rollouts = decode(*llamas, [[3, 4]] * 6, POLICIES["student_only"], BUDGET, eos_token_ids=[])
    assert len({tuple(r.completion_ids) for r in rollouts}) > 1


def test_vocabulary_can_be_cut(llamas):
    """Padding rows of the logits are never drawn, whoever speaks."""
    reference = decode_reference(*llamas, PROMPTS[:2], POLICIES["spell"], BUDGET, vocab_size=12, eos_token_ids=[])
    assert max(max(r.completion_ids) for r in reference) < 12
    assert_same(decode(*llamas, PROMPTS[:2], POLICIES["spell"], BUDGET, vocab_size=12, eos_token_ids=[]), reference)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", ["student_only", "spell"])
def test_steps_on_static_buffers(family, policy):
    """What a CUDA graph would replay: whole caches, fixed tensors, also while rows enter, lag and leave."""
    student, teacher = tiny_model(family, 1), tiny_model(family, 2)
    reference = decode_reference(student, teacher, PROMPTS, POLICIES[policy], BUDGET)
    for block, batch, drafter in (("auto", 3, "auto"), (3, 5, "student"), (2, 2, "teacher")):
        out = decode(
            student, teacher, PROMPTS, POLICIES[policy], BUDGET, block_size=block, batch_size=batch, drafter=drafter,
            graphs=True,
        )  # fmt: skip
        assert_same(out, reference)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(3))
def test_any_choice_of_drafter_and_length_gives_the_same_text(llamas, policy, seed, monkeypatch):
    """Every round other rows, another drafter and another length, drawn at random, whatever they cost."""
    choices = random.Random(seed)

    def plan(self, rows, left):
        served = choices.sample(sorted(rows), choices.randint(1, len(rows)))
        return self.round_of(choices.choice([STUDENT, TEACHER]), choices.randint(1, min(6, left)), frozenset(served))

    monkeypatch.setattr(Pace, "plan", plan)
    reference = decode_reference(*llamas, PROMPTS, POLICIES[policy], BUDGET, seed=seed)
    assert_same(decode(*llamas, PROMPTS, POLICIES[policy], BUDGET, seed=seed, batch_size=3), reference)


@pytest.fixture(scope="module")
def real_pair():
    return load_pair("demo", device="cpu")


@pytest.mark.demo_pair
@pytest.mark.parametrize("policy", [Switch(), AdaSwitch(window=3, ratio=1.5)])
def test_the_real_pair_in_single_precision(policy, real_pair):
    """Two texts of 8 tokens; at fp32 the two ways differ in the last bits, far below the gaps between these draws."""
    pair = real_pair
    prompts = [pair.tokenizer.encode("Mary has 12 apples and"), pair.tokenizer.encode("The sea is")]
    settings = {"max_new_tokens": 8, "eos_token_ids": pair.eos_token_ids, "vocab_size": pair.vocab_size}
    reference = decode_reference(pair.student, pair.teacher, prompts, policy, **settings)
    assert {speaker for rollout in reference for speaker in rollout.speakers} == {0, 1}
    for drafter in ("student", "teacher"):
        out = decode(pair.student, pair.teacher, prompts, policy, block_size=4, drafter=drafter, **settings)
        assert [r.completion_ids for r in out] == [r.completion_ids for r in reference]
        assert [r.speakers for r in out] == [r.speakers for r in reference]


# --- student and teacher nearly equal: a copy, an adapter that does nothing yet, the last steps of a run ---------------


def near_pair(family, dtype, distance):
    """A teacher and its copy, each weight of which is off by a share ``distance`` of itself."""
    teacher = tiny_model(family, 2, dtype)
    student = copy.deepcopy(teacher)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1 + distance * torch.randn(parameter.shape, generator=generator).to(dtype))
    return student, teacher


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3-hybrid"])
def test_a_student_that_is_its_teacher_is_never_handed_over(family, dtype):
    """Blocks and single tokens round differently: the divergence of two copies is 1e-11 in fp32, 1e-4 in bf16, and no jump."""
    pair = near_pair(family, dtype, 0.0)
    prompts, settings = PROMPTS[:3], {"max_new_tokens": 12, "eos_token_ids": []}
    for policy in (AdaSwitch(), AdaSwitch(window=2, ratio=0.5)):
        ways = [decode_reference(*pair, prompts, policy, **settings)]
        for block, drafter in ((4, "student"), (5, "teacher")):
            ways.append(decode(*pair, prompts, policy, block_size=block, drafter=drafter, **settings))
        for rollout in (rollout for way in ways for rollout in way):
            assert set(rollout.speakers) == {0} and 0 <= max(rollout.divergences) < 1e-3
            seen = [limit for limit in rollout.thresholds if not math.isnan(limit)]
            assert seen and min(seen) > 0.0099  # 0.01 in fp32


def test_an_adapter_without_effect_is_never_handed_over():
    pytest.importorskip("peft")
    student = tiny_model("llama", 2, torch.float32)
    add_adapter(student, ModelConfig(use_peft=True, lora_r=2, lora_alpha=2), seed=0)
    teacher = tiny_model("llama", 2, torch.float32)
    for rollouts in (
        decode_reference(student, teacher, PROMPTS[:2], AdaSwitch(), 12, eos_token_ids=[]),
        decode(student, teacher, PROMPTS[:2], AdaSwitch(), 12, block_size=4, drafter="student", eos_token_ids=[]),
    ):
        assert {speaker for rollout in rollouts for speaker in rollout.speakers} == {0}


def widest_gap(values):
    """The middle of the widest step between ascending values: no rounding takes one across it."""
    below, above = max(itertools.pairwise(values), key=lambda step: step[1] / step[0])
    return math.sqrt(below * above)


@cache
def near_and_probed(distance):
    """A pair of nearly equal models, and the divergences on its student's text, ascending."""
    pair = near_pair("llama", torch.float32, distance)
    probe = decode_reference(*pair, PROMPTS[:3], SSD(tau=9.0), 14, eos_token_ids=[])
    return pair, sorted(d for rollout in probe for d in rollout.divergences)


@pytest.mark.parametrize("distance", [1e-4, 1e-2])
@pytest.mark.parametrize("rule", ["switch", "ssd", "hysteresis", "adaswitch"])
def test_near_models_are_told_apart_alike_in_fp32(rule, distance):
    """Thresholds amid the divergences that there are: tokens, speakers and thresholds are equal, numbers to 2 %."""
    pair, seen = near_and_probed(distance)
    third = len(seen) // 3
    low, high = (widest_gap(seen[third * k // 2 :][:third]) for k in (1, 3))
    policy = {
        "switch": Switch(schedule="constant", tau_0=low / LN2),
        "ssd": SSD(tau=low),
        "hysteresis": Hysteresis(take=high, give=low),
        "adaswitch": AdaSwitch(window=2, ratio=1.1, floor=low / 10),
    }[rule]
    reference = decode_reference(*pair, PROMPTS[:3], policy, 14, eos_token_ids=[])
    assert {speaker for rollout in reference for speaker in rollout.speakers} == {0, 1}
    for block, drafter in ((4, "student"), (7, "teacher")):
        out = decode(*pair, PROMPTS[:3], policy, 14, block_size=block, drafter=drafter, eos_token_ids=[])
        assert_same(out, reference)
        for ours, theirs in zip(out, reference, strict=True):
            for name in ("divergences", "thresholds"):
                values = [torch.tensor(getattr(each, name)) for each in (ours, theirs)]
                torch.testing.assert_close(*values, equal_nan=True, rtol=2e-2, atol=1e-11)
