"""The loss at the right positions, masked by position, and equal to what is back-propagated."""

import math

import pytest
import torch
from tiny import FAMILIES, POLICIES, VOCAB, tiny_model
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from switchkd import decode
from switchkd.base.errors import ModelError
from switchkd.data.texts import collate
from switchkd.forward.head import Head, Sizes, response_hidden
from switchkd.methods.divergences import log_probs
from switchkd.methods.objective import Tokens
from switchkd.methods.objectives import OBJECTIVES, ForwardKL
from switchkd.teachers.said import TeacherStates
from switchkd.training import loss
from switchkd.training.loss import response_tokens

ROWS = [([3, 4, 5], [6, 7, 1]), ([8], [9, 9, 1, 9, 9]), ([4, 4], [])]
SPEAKERS = [[0, 1, 0], [1, 0, 2, 2, 0], []]
FORWARD_KL = ForwardKL()


def total(student, teacher, rows, objective=FORWARD_KL, **batch_settings):
    batch = collate(rows, **batch_settings)
    with torch.no_grad():
        states = TeacherStates(Head.of(teacher, VOCAB), response_hidden(teacher, batch))
    tokens = response_tokens(batch, SPEAKERS if rows is ROWS else [[0] * len(completion) for _, completion in rows])
    return loss.total(objective, states, Head.of(student, VOCAB), response_hidden(student, batch), tokens)


def dense(objective, teacher_logits, student_logits, tokens):
    """The sum by plain autograd through all logits."""
    logp, logq = log_probs(teacher_logits), log_probs(student_logits)
    if objective.looks_ahead:
        written = (objective.soften(logs).detach().gather(1, tokens.ids.unsqueeze(1))[:, 0] for logs in (logp, logq))
        tokens = objective.look_ahead(tokens, *written)
    return objective.loss(logp, logq, tokens).sum()


def response_logits(model, batch, vocab_size=VOCAB):
    return Head.of(model, vocab_size)(response_hidden(model, batch))


def transformed_models():
    """A soft cap (Gemma 2), a scale (Cohere), a divisor (Granite) and a bias on the output layer."""
    sizes = dict(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    gemma = Gemma2Config(**sizes, head_dim=4, final_logit_softcapping=0.05, attn_implementation="eager")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = {
            "capped": Gemma2ForCausalLM(gemma),
            "scaled": CohereForCausalLM(CohereConfig(**sizes, logit_scale=7.0)),
            "divided": GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=0.3)),
        }
    biased = tiny_model("llama")
    biased.lm_head.bias = torch.nn.Parameter(torch.linspace(-2, 3, VOCAB, dtype=torch.float64))
    return {name: model.double().eval() for name, model in models.items()} | {"biased": biased}


@pytest.mark.parametrize("family", FAMILIES)
def test_response_logits_are_the_models_own(family):
    """Padded and ragged rows give the logits of each row alone, at the position before each response token."""
    model = tiny_model(family)
    ours = response_logits(model, collate(ROWS))
    alone = [model(torch.tensor([p + c])).logits[0, len(p) - 1 : len(p) + len(c) - 1] for p, c in ROWS]
    torch.testing.assert_close(ours, torch.cat(alone), atol=1e-11, rtol=1e-11)
    tokens = response_tokens(collate(ROWS), SPEAKERS)
    assert tokens.ids.tolist() == [6, 7, 1, 9, 9, 1, 9, 9]
    assert tokens.rows.tolist() == [0] * 3 + [1] * 5 and tokens.speakers.tolist() == [*SPEAKERS[0], *SPEAKERS[1]]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_one_hot_teacher_gives_the_models_own_labels_loss(family):
    """Labels shifted by one too many or too few would train the model to copy."""
    model, batch = tiny_model(family), collate(ROWS)
    labels = batch.input_ids.masked_fill(~batch.loss_mask, -100)
    own = model(batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids, labels=labels)
    one_hot = torch.full((8, VOCAB), -math.inf, dtype=torch.float64)
    tokens = response_tokens(batch, SPEAKERS)
    one_hot[torch.arange(8), tokens.ids] = 0.0
    logq = log_probs(response_logits(model, batch))
    for ours in (FORWARD_KL.loss(one_hot, logq, tokens), OBJECTIVES["cross_entropy"]().loss(one_hot, logq, tokens)):
        torch.testing.assert_close(ours.mean(), own.loss.double(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["capped", "scaled", "divided", "biased"])
def test_soft_capping_scale_and_bias_of_the_head_are_never_missed(name):
    model = transformed_models()[name]
    batch = collate(ROWS)
    full = model(batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids).logits
    expected = full[:, :-1][batch.loss_mask[:, 1:]]
    torch.testing.assert_close(response_logits(model, batch), expected, atol=1e-12, rtol=1e-12)


def test_heads_that_are_not_what_they_seem_are_refused():
    model = tiny_model("llama")
    model.config.final_logit_softcapping = 2.0  # named, and not done by this architecture
    with pytest.raises(ModelError, match="after the output layer"):
        Head.of(model, VOCAB)
    model = tiny_model("llama")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ModelError, match="adapt the layers of the body only"):
        Head.of(model, VOCAB)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_head_that_is_off_by_a_few_percent_is_refused_in_any_dtype(dtype):
    model = tiny_model("llama").to(dtype)
    assert Head.of(model, VOCAB).scale == 1.0

    def scaled(module, inputs, output):
        output.logits = output.logits * 1.04

    model.register_forward_hook(scaled)
    with pytest.raises(ModelError, match="after the output layer"):
        Head.of(model, VOCAB)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("student", ["llama", "capped", "scaled", "divided", "biased"])
def test_the_chunked_loss_is_the_dense_one(name, student, monkeypatch):
    """Value and every gradient of the student, at several sizes of chunk and piece, against plain autograd through all logits."""
    student = tiny_model("llama", 1) if student == "llama" else transformed_models()[student]
    teacher = tiny_model("qwen2", 2)
    temperature = {} if name == "cross_entropy" else {"temperature": 1.7}
    objective = OBJECTIVES[name](**temperature, student_weight=0.7, teacher_weight=1.3, ce_weight=0.2)
    batch = collate(ROWS)
    with torch.no_grad():
        teacher_logits = response_logits(teacher, batch)
    expected_loss = dense(objective, teacher_logits, response_logits(student, batch), response_tokens(batch, SPEAKERS))
    names, parameters = zip(*student.named_parameters(), strict=True)
    expected = torch.autograd.grad(expected_loss / 7, parameters)
    for rows, piece in ((100, 100), (5, 2), (3, 3), (1, 1)):
        monkeypatch.setattr("switchkd.forward.head.CPU_SIZES", Sizes(4 * VOCAB * rows, 4 * VOCAB * piece))
        ours_loss = total(student, teacher, ROWS, objective)
        torch.testing.assert_close(ours_loss, expected_loss, atol=1e-12, rtol=1e-12)
        for name, ours, wanted in zip(names, torch.autograd.grad(ours_loss / 7, parameters), expected, strict=True):
            torch.testing.assert_close(ours, wanted, atol=1e-12, rtol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "tvd", "skew_kl", "skew_reverse_kl", "distillm2"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_reported_loss_is_what_is_back_propagated(name, temperature):
    """Finite differences of the reported scalar equal the gradient, also at a temperature (no factor on one of them).

    Objectives with constants in them have theirs in ``test_objectives.py``.
    """
    objective = OBJECTIVES[name](temperature=temperature, student_weight=0.5, ce_weight=0.3)
    tokens = Tokens(torch.tensor([4, 0, 2]), torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1]))
    generator = torch.Generator().manual_seed(0)
    shapes = (5, 4), (3, 4), (5, 4), (5,), (3, 4)
    weight_p, hidden_p, weight, bias, hidden = (
        torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes
    )

    def value(weight, bias, hidden):
        heads = [torch.nn.Linear(4, 5).double() for _ in range(2)]
        for linear, values in zip(heads, ((weight_p, weight_p[:, 0]), (weight, bias)), strict=True):
            del linear.weight, linear.bias
            linear.weight, linear.bias = values
        teacher, student = (
            TeacherStates(Head(heads[0], 5), hidden_p.detach()),
            Head(heads[1], 5, scale=1.5, softcap=2.0),
        )
        return loss.total(objective, teacher, student, hidden, tokens)

    inputs = weight, bias, hidden
    for i, gradient in enumerate(torch.autograd.grad(value(*inputs), inputs)):
        direction = torch.randn(inputs[i].shape, dtype=torch.float64, generator=generator)
        ahead, behind = (
            value(*(x + sign * 1e-6 * direction if i == j else x for j, x in enumerate(inputs))) for sign in (1, -1)
        )
        torch.testing.assert_close((ahead - behind) / 2e-6, (gradient * direction).sum(), atol=1e-7, rtol=1e-6)
    assert hidden_p.grad is None


def test_with_adapters_in_the_body_the_head_keeps_its_weight():
    """As with LoRA: the head is frozen, and the gradient of a low-rank update in the body is the dense loss's."""
    student, teacher = tiny_model("llama", 1), tiny_model("llama", 2)
    student.requires_grad_(False)
    layer = student.model.layers[0].self_attn.q_proj
    down, up = (torch.full(s, 0.1, dtype=torch.float64, requires_grad=True) for s in ((16, 2), (2, 16)))
    layer.register_forward_hook(lambda _, args, output: output + args[0] @ down @ up)
    batch = collate(ROWS)
    logits = response_logits(teacher, batch), response_logits(student, batch)
    expected = torch.autograd.grad(dense(FORWARD_KL, *logits, response_tokens(batch, SPEAKERS)), (down, up))
    for ours, wanted in zip(torch.autograd.grad(total(student, teacher, ROWS), (down, up)), expected, strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-12, rtol=1e-10)
    assert student.lm_head.weight.grad is None


def test_a_second_backward_pass_is_refused():
    value = total(tiny_model("llama", 1), tiny_model("llama", 2), ROWS)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="back-propagated once"):
        value.backward()


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_lower_precision_stays_near(dtype, tolerance):
    """The divergence is fp32 whatever the weights; head gradients of several chunks are summed in fp32."""
    wide = total(tiny_model("llama", 1), tiny_model("llama", 2), ROWS)
    student = tiny_model("llama", 1).to(dtype)
    value = total(student, tiny_model("llama", 2).to(dtype), ROWS)
    value.backward()
    assert value.dtype == torch.float32 and student.lm_head.weight.grad.dtype == dtype
    torch.testing.assert_close(value.double(), wide, rtol=tolerance, atol=tolerance)


# Text of the student alone, and text that the policy knows, is not read by the teacher while it is written.
@pytest.mark.parametrize("policy", [name for name in POLICIES if name not in ("student_only", "forced")])
@pytest.mark.parametrize(
    "settings", [{}, {"block_size": 4, "drafter": "teacher"}, {"block_size": 3, "drafter": "student"}]
)
def test_hidden_states_of_decoding_are_those_of_a_fresh_forward(policy, settings):
    """So is the loss, and its gradient, to 1e-10; rows stop at different lengths and enter late."""
    student, teacher = tiny_model("llama", 1), tiny_model("gpt2", 2)
    prompts = [[3, 4, 5], [7], [2, 2, 9, 11, 4, 6, 8], [5, 6]]
    rollouts = decode(student, teacher, prompts, POLICIES[policy], 9, batch_size=2, keep_hidden=True, **settings)
    batch = collate([(r.prompt_ids, r.completion_ids) for r in rollouts])
    kept = torch.cat([r.said for r in rollouts])
    with torch.no_grad():
        fresh = response_hidden(teacher, batch)
    torch.testing.assert_close(kept, fresh, atol=1e-10, rtol=1e-10)
    results = []
    for hidden_p in (kept, fresh):
        states, head = TeacherStates(Head.of(teacher, VOCAB), hidden_p), Head.of(student, VOCAB)
        tokens = response_tokens(batch, [r.speakers for r in rollouts])
        value = loss.total(FORWARD_KL, states, head, response_hidden(student, batch), tokens)
        results.append((value, *torch.autograd.grad(value, list(student.parameters()))))
    torch.testing.assert_close(results[0], results[1], atol=1e-10, rtol=1e-10)


def test_hidden_states_are_kept_only_if_asked_for_and_only_whole():
    pair = tiny_model("llama", 1), tiny_model("llama", 2)
    assert decode(*pair, [[3, 4]], POLICIES["spell"], 6)[0].said is None
    assert decode(*pair, [[3, 4]], POLICIES["student_only"], 6, keep_hidden=True)[0].said is None
    [row] = decode(*pair, [[3, 4]], POLICIES["spell"], 6, keep_hidden=True, eos_token_ids=[])
    assert row.said.shape == (6, 16)
    assert "said" not in row.to_json()


def test_prompt_and_padding_are_never_scored():
    """Masks go by position: any padding token gives the same loss, also the end token, and batch equals sum of rows."""
    student, teacher = tiny_model("llama", 1), tiny_model("llama", 2)
    value = total(student, teacher, ROWS)
    for pad in (1, 9):
        torch.testing.assert_close(total(student, teacher, ROWS, pad_id=pad), value, atol=1e-12, rtol=1e-12)
    parts = sum(total(student, teacher, [row]) for row in ROWS)
    torch.testing.assert_close(parts, value, atol=1e-11, rtol=1e-11)


def test_eos_is_trained_and_nothing_behind_it():
    student, teacher = tiny_model("llama", 1), tiny_model("llama", 2)
    with_eos, without = total(student, teacher, [([3, 4], [6, 1])]), total(student, teacher, [([3, 4], [6])])
    assert with_eos > without
    batch = collate([([3, 4], [6, 1]), ([3], [5, 5, 5, 5])], pad_id=1)
    assert batch.loss_mask[0].tolist() == [False, False, True, True, False]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_empty_responses_give_a_finite_zero(name):
    student, teacher = tiny_model("llama", 1), tiny_model("llama", 2)
    value = total(student, teacher, [([3, 4], []), ([5], [])], OBJECTIVES[name]())
    value.backward()
    assert value.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in student.parameters())


def test_padding_rows_of_the_logits_carry_no_mass():
    """Two models with different padding rows are compared on the shared vocabulary, renormalised."""
    student, teacher = tiny_model("llama", 1), tiny_model("llama", 2)
    batch = collate(ROWS)
    with torch.no_grad():
        teacher.lm_head.weight[20:] = 5.0
    heads, hidden = zip(*((Head.of(m, 20), response_hidden(m, batch)) for m in (teacher, student)), strict=True)
    p, q = (log_probs(head(h)) for head, h in zip(heads, hidden, strict=True))
    assert p.shape == (8, 20)
    value = loss.total(
        FORWARD_KL, TeacherStates(heads[0], hidden[0]), heads[1], hidden[1], response_tokens(batch, SPEAKERS)
    )
    torch.testing.assert_close(value, (p.exp() * (p - q)).sum())
    value.backward()
    assert not student.lm_head.weight.grad[20:].any() and student.lm_head.weight.grad[:20].all(1).all()


def test_gradients_reach_every_student_weight():
    student, teacher = tiny_model("gpt2", 1), tiny_model("gpt2", 2)
    total(student, teacher, ROWS).backward()
    assert all(p.grad.abs().sum() > 0 for n, p in student.named_parameters() if "wpe" not in n)
