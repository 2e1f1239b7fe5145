"""Mixtures of experts: decoding whatever their config asks for, and the loss that balances their experts."""

import dataclasses

import pytest
import torch
from tiny import POLICIES, VOCAB, assert_same, byte_level_tokenizer, tiny_model, toy_examples
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from switchkd import Switch, decode, decode_reference, load_pair
from switchkd.base.errors import ConfigError, ModelError
from switchkd.data.texts import collate
from switchkd.forward.head import response_hidden
from switchkd.methods.mixes import Generated
from switchkd.methods.objectives import ForwardKL
from switchkd.models.pair import Pair
from switchkd.training.loss import balance_coefficient
from switchkd.training.settings import TrainConfig
from switchkd.training.trainer import Trainer

SIZES = dict(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=None, eos_token_id=1,
)  # fmt: skip
CONFIG = TrainConfig(
    policy=Switch(tau_0=0.6), mix=Generated(0.0), objective=ForwardKL(), max_new_tokens=6, max_steps=2,
    per_device_train_batch_size=4, learning_rate=1e-3, max_grad_norm=0, save_steps=0, seed=3,
)  # fmt: skip


def moe(seed=1, kind="mixtral", dtype=torch.float64, experts="eager", **changes):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "mixtral":
            settings = SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5} | changes
            model = MixtralForCausalLM(MixtralConfig(**settings, experts_implementation=experts))
        else:
            settings = (
                SIZES
                | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 4}
                | changes
            )
            model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings, experts_implementation=experts))
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, 0.35)
    return model.to(dtype).eval()


def trained(tmp_path, student, given=None, **changes):
    """A trainer's gradients and metrics after one step."""
    pair = Pair(tiny_model("llama", 2), student, byte_level_tokenizer(), VOCAB, (1,), ())
    config = dataclasses.replace(CONFIG, output_dir=str(tmp_path), router_aux_loss_coef=given, **changes)
    t = Trainer(pair, toy_examples(), config)
    gradients = {}
    t.learner.optimizer.register_step_pre_hook(
        lambda *_: gradients.update({n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None})
    )
    metrics, _ = t.train_step()
    return gradients, metrics, t


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("policy", ["switch_constant", "spell"])
def test_router_logits_in_the_config_do_not_stop_decoding(kind, policy):
    student, teacher = (moe(seed, kind, output_router_logits=True) for seed in (1, 2))
    prompts = [[3, 4, 5], [7], [2, 2, 9, 11, 4, 6, 8]]
    reference = decode_reference(student, teacher, prompts, POLICIES[policy], 6)
    for static in (False, True):
        assert_same(decode(student, teacher, prompts, POLICIES[policy], 6, batch_size=3, graphs=static), reference)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("output_router_logits", [False, True])
def test_the_balancing_loss_is_added_with_the_students_own_coefficient(kind, output_router_logits, tmp_path):
    """Its gradient is that of plain autograd; the objective's value stays what it was, and the two are told apart."""
    plain, without, _ = trained(tmp_path / "a", moe(1, kind, router_aux_loss_coef=0.0))
    student = moe(1, kind, router_aux_loss_coef=0.5, output_router_logits=output_router_logits)
    whole, metrics, t = trained(tmp_path / "b", student)
    assert "aux_loss" not in without and metrics["loss"] == pytest.approx(without["loss"], rel=1e-12)
    fresh = moe(1, kind)
    batch = collate([(row.prompt_ids, row.completion_ids) for row in t.reading.next(t.examples)])  # of step 1
    t.reading.rows_read = 0
    batch = collate([(row.prompt_ids, row.completion_ids) for row in t.reading.next(t.examples)])
    inputs = dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids)
    aux = fresh(**inputs, output_router_logits=True).aux_loss
    assert metrics["aux_loss"] == pytest.approx(aux.item(), rel=1e-6)
    aux.backward()
    for name, parameter in fresh.named_parameters():
        added = torch.zeros_like(parameter) if parameter.grad is None else 0.5 * parameter.grad
        torch.testing.assert_close(whole[name] - plain[name], added, atol=1e-7, rtol=1e-5)
    router = next(name for name in whole if "gate" in name and "proj" not in name)
    assert (whole[router] - plain[router]).abs().max() > 1e-4


@pytest.mark.parametrize("given,added", [(0.0, False), (10.0, True), (None, True)])
def test_it_is_off_by_choice(given, added, tmp_path):
    _, metrics, t = trained(tmp_path, moe(), given)
    assert ("aux_loss" in metrics) == added and t.learner.balance == (0.5 if given is None else given)


def test_micro_batches_weigh_by_their_tokens(tmp_path):
    """It is defined by forward: the value of a window is the mean of its micro-batches' own."""
    student = moe()
    _, metrics, t = trained(tmp_path, student, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    fresh, mean, tokens = moe(), 0.0, 0
    t.reading.rows_read = 0
    rows = t.reading.next(t.examples)
    for part in (rows[:2], rows[2:]):
        batch = collate([(row.prompt_ids, row.completion_ids) for row in part])
        count = int(batch.loss_mask.sum())
        aux = fresh(batch.input_ids, attention_mask=batch.attention_mask, output_router_logits=True).aux_loss
        mean, tokens = mean + count * aux.item(), tokens + count
    assert metrics["aux_loss"] == pytest.approx(mean / tokens, rel=1e-6)


def test_a_student_without_experts_has_none_and_is_told_so(tmp_path):
    _, metrics, _ = trained(tmp_path, tiny_model("llama", 1))
    assert "aux_loss" not in metrics
    with pytest.raises(ConfigError, match="llama has no balancing loss"):
        balance_coefficient(tiny_model("llama", 1), 0.1)
    with pytest.raises(ConfigError, match="router_aux_loss_coef must be at least 0"):
        TrainConfig(router_aux_loss_coef=-1.0)


def test_padding_does_not_move_a_mixture_of_experts():
    model, rows = moe(), [([3, 4, 5, 6, 7, 8], [9, 9, 1]), ([3], [4, 1])]
    alone = torch.cat([response_hidden(model, collate([row])) for row in rows])
    torch.testing.assert_close(response_hidden(model, collate(rows)), alone, atol=1e-11, rtol=1e-11)


def test_experts_in_float64(tmp_path):
    """Loaded so, they work; where a caller made them, the error says what to do."""
    for seed, name in ((1, "student"), (2, "teacher")):
        tokenizer = byte_level_tokenizer()
        model = moe(seed, dtype=torch.float32, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    pair = load_pair(str(tmp_path / "teacher"), str(tmp_path / "student"), dtype="float64", device="cpu")
    reference = decode_reference(pair.student, pair.teacher, [[3, 4]], Switch(), 4)
    assert_same(decode(pair.student, pair.teacher, [[3, 4]], Switch(), 4), reference)
    own = moe(experts="grouped_mm")
    with pytest.raises(ModelError, match=r"set_experts_implementation\('eager'\)"):
        decode(own, own, [[3, 4]], Switch(), 4)
