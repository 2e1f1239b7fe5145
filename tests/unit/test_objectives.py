"""The loss at the right positions, masked by position, and equal to what is back-propagated."""

import math

import pytest
import torch
from tiny import FAMILIES, VOCAB, tiny_model

from switchkd import objectives
from switchkd.data import collate
from switchkd.objectives import Objective, response_logits, response_tokens

ROWS = [([3, 4, 5], [6, 7, 1]), ([8], [9, 9, 1, 9, 9]), ([4, 4], [])]
NAMES = ["forward_kl", "reverse_kl", "jsd", "tvd", "skew_kl", "skew_reverse_kl"]


FORWARD_KL = Objective("forward_kl")


def total(student, teacher, rows, objective=FORWARD_KL, **batch_settings):
    batch = collate(rows, **batch_settings)
    with torch.no_grad():
        teacher_logits = response_logits(teacher, batch, VOCAB)
    return objective.total(teacher_logits, response_logits(student, batch, VOCAB))


@pytest.mark.parametrize("family", FAMILIES)
def test_response_logits_are_the_models_own(family):
    """Padded and ragged rows give the logits of each row alone, at the position before each response token."""
    model = tiny_model(family)
    ours = response_logits(model, collate(ROWS), VOCAB)
    alone = [model(torch.tensor([p + c])).logits[0, len(p) - 1 : len(p) + len(c) - 1] for p, c in ROWS]
    torch.testing.assert_close(ours, torch.cat(alone), atol=1e-11, rtol=1e-11)
    assert response_tokens(collate(ROWS)).tolist() == [6, 7, 1, 9, 9, 1, 9, 9]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_one_hot_teacher_gives_the_models_own_labels_loss(family):
    """Labels shifted by one too many or too few would train the model to copy."""
    model, batch = tiny_model(family), collate(ROWS)
    labels = batch.input_ids.masked_fill(~batch.loss_mask, -100)
    own = model(batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids, labels=labels)
    one_hot = torch.full((8, VOCAB), -math.inf, dtype=torch.float64)
    one_hot[torch.arange(8), response_tokens(batch)] = 0.0
    ours = Objective("forward_kl").total(one_hot, response_logits(model, batch, VOCAB)) / 8
    torch.testing.assert_close(ours, own.loss.double(), atol=1e-6, rtol=1e-6)


def test_soft_capping_scale_and_bias_of_the_head_are_never_missed():
    from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

    sizes = dict(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    capped = Gemma2ForCausalLM(
        Gemma2Config(**sizes, final_logit_softcapping=0.05, attn_implementation="eager")
    ).double()
    scaled = CohereForCausalLM(CohereConfig(**sizes, logit_scale=7.0)).double()
    biased = tiny_model("llama")
    biased.lm_head.bias = torch.nn.Parameter(torch.arange(VOCAB, dtype=torch.float64))
    for model in (capped.eval(), scaled.eval(), biased):
        batch = collate(ROWS)
        ours = response_logits(model, batch, VOCAB)
        full = model(batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids).logits
        torch.testing.assert_close(ours, full[:, :-1][batch.loss_mask[:, 1:]], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_reported_loss_is_what_is_back_propagated(name, temperature):
    """Finite differences of the reported scalar equal the gradient, also at a temperature (no factor on one of them)."""
    objective = Objective(name, alpha=0.2, beta=0.3, temperature=temperature)
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(3, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: objective.total(teacher, z), (student,), eps=1e-6, atol=1e-8)
    p, q = (z / temperature for z in (teacher, student))
    assert torch.equal(objective.total(teacher, student), Objective(name, 0.2, 0.3).total(p, q))


@pytest.mark.parametrize("name", NAMES)
def test_chunks_change_neither_value_nor_gradient(name, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(7, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    student.requires_grad_()
    values = []
    for chunk in (100, 3, 1):
        monkeypatch.setattr(objectives, "CHUNK", chunk)
        loss = Objective(name).total(teacher, student)
        values.append((loss, *torch.autograd.grad(loss, student)))
    for other in values[1:]:
        torch.testing.assert_close(other, values[0], atol=1e-12, rtol=1e-12)


def test_prompt_and_padding_are_never_scored():
    """Masks go by position: any padding token gives the same loss, also the end token, and batch equals sum of rows."""
    student, teacher = tiny_model("llama", 1), tiny_model("llama", 2)
    loss = total(student, teacher, ROWS)
    for pad in (1, 9):
        torch.testing.assert_close(total(student, teacher, ROWS, pad_id=pad), loss, atol=1e-12, rtol=1e-12)
    parts = sum(total(student, teacher, [row]) for row in ROWS)
    torch.testing.assert_close(parts, loss, atol=1e-11, rtol=1e-11)


def test_eos_is_trained_and_nothing_behind_it():
    student, teacher = tiny_model("llama", 1), tiny_model("llama", 2)
    with_eos, without = total(student, teacher, [([3, 4], [6, 1])]), total(student, teacher, [([3, 4], [6])])
    assert with_eos > without
    batch = collate([([3, 4], [6, 1]), ([3], [5, 5, 5, 5])], pad_id=1)
    assert batch.loss_mask[0].tolist() == [False, False, True, True, False]


@pytest.mark.parametrize("name", NAMES)
def test_empty_responses_give_a_finite_zero(name):
    student, teacher = tiny_model("llama", 1), tiny_model("llama", 2)
    loss = total(student, teacher, [([3, 4], []), ([5], [])], Objective(name))
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in student.parameters())


def test_padding_rows_of_the_logits_carry_no_mass():
    """Two models with different padding rows are compared on the shared vocabulary, renormalised."""
    student, teacher = tiny_model("llama", 1), tiny_model("llama", 2)
    batch = collate(ROWS)
    with torch.no_grad():
        teacher.lm_head.weight[20:] = 5.0
    p, q = (response_logits(m, batch, 20) for m in (teacher, student))
    expected = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum()
    torch.testing.assert_close(Objective("forward_kl").total(p, q), expected)


def test_gradients_reach_every_student_weight():
    student, teacher = tiny_model("gpt2", 1), tiny_model("gpt2", 2)
    total(student, teacher, ROWS).backward()
    assert all(p.grad.abs().sum() > 0 for n, p in student.named_parameters() if "wpe" not in n)
