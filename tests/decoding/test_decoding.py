"""End points, bad rows, and what decoding must leave alone."""

import math

import pytest
import torch
from tiny import FAMILIES, POLICIES, VOCAB, Forced, Quota, assert_same, tiny_model
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from switchkd import AdaSwitch, StudentOnly, Switch, TeacherOnly, decode, decode_reference
from switchkd.base.errors import ConfigError
from switchkd.decoding.pace import BLOCKS
from switchkd.decoding.rows import row_bytes
from switchkd.methods.sampling import Sampling
from switchkd.runner.architecture import cache_bytes_per_token

PROMPTS = [[3, 4, 5], [7], [2, 2, 9, 11, 4, 6, 8]]


@pytest.fixture
def llamas():
    return tiny_model("llama", 1), tiny_model("llama", 2)


def texts(rollouts):
    return [r.completion_ids for r in rollouts]


def generated(model, prompts, budget):
    """Greedy text of the model's own ``generate``, one prompt at a time."""
    rows = []
    for prompt in prompts:
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=budget, do_sample=False, pad_token_id=0)
        rows.append(ids[0, len(prompt) :].tolist())
    return rows


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_generate(family):
    student, teacher = tiny_model(family, 1), tiny_model(family, 2)
    ours = decode(student, teacher, PROMPTS, StudentOnly(), 10, temperature=0.0)
    assert texts(ours) == generated(student, PROMPTS, 10)
    speculative = decode(student, teacher, PROMPTS, TeacherOnly(), 10, temperature=0.0, drafter="student", block_size=4)
    assert texts(speculative) == generated(teacher, PROMPTS, 10)


def test_greedy_ignores_the_models_own_sampling_settings(llamas):
    """Models ship generation configs with top-p, top-k and repetition penalties; none may leak in."""
    before = decode(*llamas, PROMPTS, StudentOnly(), 10, temperature=1.0)
    llamas[0].generation_config.update(top_k=1, top_p=0.1, temperature=0.3, repetition_penalty=5.0, do_sample=True)
    assert texts(decode(*llamas, PROMPTS, StudentOnly(), 10, temperature=1.0)) == texts(before)


def test_threshold_above_one_is_the_student_and_below_zero_the_teacher(llamas):
    for limit, alone in ((1.5, StudentOnly()), (-0.1, TeacherOnly())):
        switch = decode(*llamas, PROMPTS, Switch(schedule="constant", tau_0=limit), 10, seed=4)
        assert texts(switch) == texts(decode(*llamas, PROMPTS, alone, 10, seed=4))
        assert {s for r in switch for s in r.speakers} == {int(limit < 0)}


def test_a_lone_models_partner_is_never_called(llamas):
    """But for a student whose drafts pay for the teacher's text."""
    student, teacher = llamas
    for block in (1, "auto"):
        only_student = decode(student, teacher, PROMPTS, StudentOnly(), 10, block_size=block)
        assert only_student.cost.teacher_forwards == only_student.cost.teacher_prefill_tokens == 0
    only_teacher = decode(student, teacher, PROMPTS, TeacherOnly(), 10, block_size=1)
    assert only_teacher.cost.student_forwards == only_teacher.cost.student_prefill_tokens == 0


def test_after_adaswitch_has_switched_everywhere_the_student_rests(llamas):
    policy = AdaSwitch(window=1, ratio=0.0)
    rollouts = decode(*llamas, PROMPTS, policy, 20, eos_token_ids=[], block_size=1)
    assert all(r.speakers == [0] + [1] * 19 for r in rollouts)
    assert rollouts.cost.student_forwards == 2 * len(PROMPTS)


def test_verified_blocks_save_forwards(llamas):
    same = (llamas[1], llamas[1])
    rollouts = decode(*same, PROMPTS, Switch(), 12, eos_token_ids=[], block_size=4, drafter="student")
    assert rollouts.cost.teacher_forwards == 3 * len(PROMPTS)
    assert rollouts.cost.kept_tokens == 12 * len(PROMPTS)


def test_result_keeps_length_and_order_and_bad_rows_disturb_nobody(llamas):
    good = decode(*llamas, PROMPTS, POLICIES["spell"], 10, sample_ids=[0, 2, 5])
    mixed = [PROMPTS[0], [], PROMPTS[1], [3, VOCAB], [4] * 60, PROMPTS[2]]
    for batch in (1, 2, 6):
        rollouts = decode(*llamas, mixed, POLICIES["spell"], 10, batch_size=batch)
        reasons = [r.stop_reason for r in rollouts]
        assert reasons[1] == "empty_prompt" and reasons[3] == "invalid_token" and reasons[4] == "prompt_too_long"
        assert "exceed" in rollouts[4].error and "lower max_new_tokens" in rollouts[4].error
        assert texts([rollouts[i] for i in (0, 2, 5)]) == texts(good)
        assert [r.prompt_ids for r in rollouts] == mixed
        assert all(r.completion_ids == [] for r in rollouts if r.error)
    assert [r.stop_reason for r in decode_reference(*llamas, mixed, POLICIES["spell"], 10)] == reasons


def test_a_prompt_that_just_fits_is_decoded(llamas):
    [row] = decode(*llamas, [[4] * 54], StudentOnly(), 10, eos_token_ids=[])
    assert row.stop_reason == "length" and len(row.completion_ids) == 10
    [longer] = decode(*llamas, [[4] * 55], StudentOnly(), 10, eos_token_ids=[])
    assert longer.stop_reason == "prompt_too_long" and not longer.completion_ids


def test_a_row_is_reckoned_at_its_caches_and_the_logits_of_a_block(llamas):
    """Keys and values of every token in each model, and four fp32 rows of the vocabulary for each position of a block."""
    alone = [row_bytes(llamas, tokens, 100) - row_bytes(llamas, (0, 0), 100) for tokens in ((3, 0), (0, 5))]
    assert alone == [3 * cache_bytes_per_token(llamas[0]), 5 * cache_bytes_per_token(llamas[1])]
    assert row_bytes(llamas, (0, 0), 100) == max(BLOCKS) * 100 * 16


@pytest.mark.parametrize("broken", ["student", "teacher"])
def test_nan_logits_name_model_sample_and_position_and_spare_other_rows(llamas, broken):
    """The embedding of token 21 is NaN: only the row that reads it fails, also when its place is given to another."""
    clean = decode(*llamas, PROMPTS, POLICIES["spell"], 8, eos_token_ids=[21], sample_ids=[0, 8, 9])
    with torch.no_grad():
        llamas[broken == "teacher"].get_input_embeddings().weight[21] = math.nan
    prompts = [PROMPTS[0], [5, 21], PROMPTS[1], PROMPTS[2]]
    for batch in (1, 2, 4):
        rollouts = decode(
            *llamas, prompts, POLICIES["spell"], 8, eos_token_ids=[21], sample_ids=[0, 7, 8, 9], batch_size=batch
        )
        assert rollouts[1].stop_reason == "non_finite"
        assert f"the {broken}'s logits" in rollouts[1].error
        assert "sample 7, response position 0" in rollouts[1].error
        assert texts([rollouts[i] for i in (0, 2, 3)]) == texts(clean)


def test_only_a_model_that_is_read_can_fail_a_row_and_it_is_named(llamas):
    with torch.no_grad():
        llamas[1].get_input_embeddings().weight[21] = math.nan
    for call in (decode, decode_reference):
        [row] = call(*llamas, [[5, 21]], TeacherOnly(), 4)
        assert row.stop_reason == "non_finite" and "the teacher's logits" in row.error
        [row] = call(*llamas, [[5, 21]], StudentOnly(), 4, eos_token_ids=[])
        assert row.stop_reason == "length"
    [row] = decode(*reversed(llamas), [[5, 21]], TeacherOnly(), 4, eos_token_ids=[], drafter="student")
    assert row.stop_reason == "length"  # broken drafts cost time, not the row


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral-sliding"])
@pytest.mark.parametrize("reader", ["student", "teacher"])
def test_a_rejected_draft_that_breaks_a_model_leaves_no_trace(family, value, reader):
    """What the drafter proposes, and is not written, may be NaN in a cache: a mask gives it weight 0, and 0 · NaN is NaN."""
    models = {"student": tiny_model(family, 1), "teacher": tiny_model(family, 2)}
    policy = StudentOnly() if reader == "student" else TeacherOnly()
    drafter = {"student": "teacher", "teacher": "student"}[reader]
    free = decode(*models.values(), PROMPTS, policy, 12, eos_token_ids=[])
    written = {token for rollout in free for token in [*rollout.prompt_ids, *rollout.completion_ids]}
    others = torch.tensor(sorted(set(range(VOCAB)) - written))
    assert len(others)

    def poison(module, ids, out):
        return out.masked_fill(torch.isin(ids[0], others).unsqueeze(-1), value)

    for model in models.values():
        model.get_input_embeddings().register_forward_hook(poison)
    # The drafter's text breaks it too, but a model that nobody reads may say anything.
    for block, batch, static in ((4, 3, False), (6, 2, True)):
        out = decode(
            *models.values(), PROMPTS, policy, 12, eos_token_ids=[], block_size=block, batch_size=batch, drafter=drafter,
            graphs=static,
        )  # fmt: skip
        assert [(r.stop_reason, r.error) for r in out] == [("length", None)] * 3
        assert texts(out) == texts(free)


@pytest.mark.parametrize("broken", ["student", "teacher"])
@pytest.mark.parametrize("token", [10, 14, 18])
def test_a_broken_draft_breaks_no_text_that_stood_in_one_forward_with_it(broken, token):
    """Both models are read, and one lags: what it catches up on stands in the cache after a forward that a draft has broken."""
    models = {"student": tiny_model("llama", 1, torch.float32), "teacher": tiny_model("llama", 2, torch.float32)}
    with torch.no_grad():
        models[broken].get_input_embeddings().weight[token] = math.nan
    prompts = [[3, 4, 5], [6, 7], [8, 9, 11]]
    for policy in (Switch(tau_0=0.6, decay=0.03), AdaSwitch(window=2, ratio=1.1)):
        expected = decode_reference(*models.values(), prompts, policy, 12, eos_token_ids=[1])
        for drafter, block in (("student", 4), ("student", 8), ("teacher", 4), ("teacher", 8)):
            out = decode(*models.values(), prompts, policy, 12, eos_token_ids=[1], drafter=drafter, block_size=block)
            assert texts(out) == texts(expected)
            assert [r.stop_reason for r in out] == [r.stop_reason for r in expected]


def test_text_that_the_policy_knows_asks_no_model(llamas):
    """Where nobody is read for any row, no model is run; where some rows are, the others wait for nobody."""
    policy = Forced(words=(6, 11, 7, 3))
    rollouts = decode(*llamas, PROMPTS, policy, 4, eos_token_ids=[])
    assert texts(rollouts) == [[6, 11, 7, 3]] * 3
    assert rollouts.cost.student_forwards == rollouts.cost.teacher_forwards == 0


def test_a_text_that_the_policy_ends_says_so(llamas):
    """Behind an end token that is the reason; at the end of the budget the policy's word goes first: nothing is cut off."""
    policy = Quota(alpha=0.9, most=2)
    for call in (decode, decode_reference):
        for row in call(*llamas, PROMPTS, policy, 20, eos_token_ids=[]):
            assert (
                row.stop_reason == "policy"
                and row.error is None
                and sum(row.speakers) == 2 == 1 + sum(row.speakers[:-1])
            )
            again = call(
                *llamas, [row.prompt_ids], policy, len(row.completion_ids), eos_token_ids=[], sample_ids=[row.id]
            )
            assert again[0].stop_reason == "policy" and again[0].completion_ids == row.completion_ids
            last = call(
                *llamas, [row.prompt_ids], policy, 20, eos_token_ids=row.completion_ids[-1:], sample_ids=[row.id]
            )
            assert last[0].stop_reason == "eos"


def test_modes_weights_and_random_state_are_left_alone(llamas):
    student, teacher = llamas
    student.train()
    teacher.model.layers[0].train()
    state, weights = torch.get_rng_state(), [p.clone() for p in student.parameters()]
    decode(student, teacher, PROMPTS, Switch(), 5)
    decode_reference(student, teacher, PROMPTS, Switch(), 5)
    assert student.training and not teacher.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(weights, student.parameters(), strict=True))


def test_dropout_is_off_and_the_cache_on_under_gradient_checkpointing():
    student, teacher = tiny_model("gpt2", 1), tiny_model("gpt2", 2)
    quiet = decode(student, teacher, PROMPTS, Switch(), 10)
    student.train()
    student.gradient_checkpointing_enable()
    assert texts(decode(student, teacher, PROMPTS, Switch(), 10)) == texts(quiet)


def test_no_prompts_at_all(llamas):
    assert decode(*llamas, [], Switch()) == []


def test_progress_is_told_after_every_round(llamas):
    seen = []
    rollouts = decode(*llamas, PROMPTS, Switch(), 6, block_size=1, progress=lambda cost: seen.append(cost.kept_tokens))
    assert seen == sorted(seen) and seen[-1] == sum(len(r.completion_ids) for r in rollouts)
    assert len(seen) == rollouts.cost.rounds


@pytest.mark.parametrize(
    "settings,words",
    [
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"temperature": -0.5}, "greedy"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.5}, "top_p must be above 0"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"min_p": 1.1}, "min_p must be from 0"),
        ({"block_size": 0}, "block_size"),
        ({"batch_size": 0}, "batch_size"),
        ({"drafter": "both"}, "drafter"),
        ({"sample_ids": [1]}, "1 sample_ids for 3 prompts"),
        ({"vocab_size": VOCAB + 1}, "vocab_size"),
    ],
)
def test_wrong_arguments_are_explained(llamas, settings, words):
    with pytest.raises(ConfigError, match=words):
        decode(*llamas, PROMPTS, Switch(), **settings)


def test_rollouts_as_json(llamas):
    [row] = decode(*llamas, [[3, 4]], AdaSwitch(window=1, ratio=0.0), 4, eos_token_ids=[])
    record = row.to_json()
    assert record["divergences"][0] > 0 and record["divergences"][-1] is None
    assert row.teacher_share == 0.75


CUTS = {
    "top_p": {"top_p": 0.6},
    "top_k": {"top_k": 2},
    "min_p": {"min_p": 0.3},
    "all": {"top_p": 0.8, "top_k": 4, "min_p": 0.1},
}


@pytest.mark.parametrize("policy", ["student_only", "switch_exponential", "skd_sharpened", "relay"])
@pytest.mark.parametrize("cut", CUTS)
def test_cuts_of_what_is_drawn_are_the_reference_loops(llamas, cut, policy):
    for temperature in (1.0, 0.7):
        settings = {"temperature": temperature, "max_new_tokens": 9, "seed": 2, **CUTS[cut]}
        reference = decode_reference(*llamas, PROMPTS, POLICIES[policy], **settings)
        for block, drafter in ((4, "student"), (3, "teacher")):
            out = decode(
                *llamas, PROMPTS, POLICIES[policy], block_size=block, drafter=drafter, batch_size=2, **settings
            )
            assert_same(out, reference)


@pytest.mark.parametrize("cut", CUTS)
def test_cuts_are_transformers_own_and_reach_no_decision(llamas, cut):
    """Of a rule whose target is a model's distribution every token is one that transformers' warpers leave, and its number too."""
    logits = 3 * torch.randn(6, 50, generator=torch.Generator().manual_seed(1)).double()
    for temperature in (1.0, 0.6, 1.7):
        scores = logits / temperature
        if top_k := CUTS[cut].get("top_k"):
            scores = TopKLogitsWarper(top_k)(None, scores)
        if top_p := CUTS[cut].get("top_p"):
            scores = TopPLogitsWarper(top_p)(None, scores)
        if min_p := CUTS[cut].get("min_p"):
            scores = MinPLogitsWarper(min_p)(None, scores)
        ours = Sampling(temperature, **CUTS[cut]).shape(logits.log_softmax(-1))
        torch.testing.assert_close((ours / temperature).softmax(-1), scores.softmax(-1))
        torch.testing.assert_close(ours.exp().sum(-1), torch.ones(6).double())
    plain = decode(*llamas, PROMPTS, Switch(tau_0=9), 1, eos_token_ids=[])
    shaped = decode(*llamas, PROMPTS, Switch(tau_0=9), 1, eos_token_ids=[], **CUTS[cut])
    assert [r.divergences for r in plain] == [r.divergences for r in shaped]
    greedy = [texts(decode(*llamas, PROMPTS, Switch(), 9, temperature=0.0, **own)) for own in ({}, CUTS[cut])]
    assert greedy[0] == greedy[1]
