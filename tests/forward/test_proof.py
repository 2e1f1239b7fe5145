"""The proof that a model is read and decoded exactly, and what it lets nobody through with."""

import random

import pytest
import torch
from families import config_of, small_model
from tiny import FAMILIES, VOCAB, TabularModel, new_model, toy_pair
from transformers import (
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from switchkd import Switch, decode, decode_reference
from switchkd.base.errors import ConfigError, ModelError, NoMemoryError
from switchkd.data.texts import collate
from switchkd.forward import proof
from switchkd.forward.head import Head, response_hidden
from switchkd.forward.proof import prove
from switchkd.forward.twin import positions, small_config, twin
from switchkd.models.pair import Pair

SIZES = dict(vocab_size=VOCAB, hidden_size=16, pad_token_id=0, bos_token_id=None, eos_token_id=1)
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.0], "long_factor": [4.0, 8.0]}


def gpt_neo():
    """As it ships: a window of 256 in every second layer."""
    sizes = SIZES | {
        "intermediate_size": 24,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
    }
    return GPTNeoForCausalLM(GPTNeoConfig(**sizes, max_position_embeddings=512)).double().eval()


def phi(length=64):
    sizes = SIZES | {
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    ropes = {"rope_parameters": LONGROPE, "original_max_position_embeddings": length, "max_position_embeddings": 512}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Phi3ForCausalLM(Phi3Config(**sizes, **ropes)).double().eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, 0.35)
    return model


class Off(torch.nn.Module):
    """A model whose logits are those of another, but for an error where it is called with a cache, or in a batch."""

    _is_stateful = False

    def __init__(self, inner, off, when):
        super().__init__()
        self.inner, self.off, self.when = inner, off, when
        self.config, self.dtype = inner.config, inner.dtype

    def forward(self, input_ids, **settings):
        output = self.inner(input_ids, **settings)
        if self.when in settings:
            noise = torch.randn(output.logits.shape, generator=torch.Generator().manual_seed(0))
            output.logits = output.logits + self.off * output.logits.std() * noise.to(output.logits.dtype)
        return output


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("when", ["logits_to_keep", "position_ids"])
def test_an_error_of_some_percent_is_refused_in_every_dtype(dtype, when):
    """It was let through in half precision, up to a tenth."""
    prove(Off(new_model("llama", 1, dtype), 0.0, when))
    with pytest.raises(ModelError, match=r"exactly|in batches"):
        prove(Off(new_model("llama", 1, dtype), 0.03, when))


class Fixed(Off):
    """One that nobody can read in fp32."""

    def forward(self, input_ids, **settings):
        hook = self.inner.model.layers[0].mlp.up_proj.register_forward_pre_hook(self.look)
        try:
            return super().forward(input_ids, **settings)
        finally:
            hook.remove()

    def look(self, module, args):
        if args[0].dtype != torch.bfloat16:
            raise TypeError("bfloat16 alone")


def test_a_model_that_cannot_be_read_in_fp32_is_held_to_a_few_percent():
    prove(Fixed(new_model("llama", 1, torch.bfloat16), 0.0, "logits_to_keep"))
    with pytest.raises(ModelError, match="exactly"):
        prove(Fixed(new_model("llama", 1, torch.bfloat16), 0.035, "logits_to_keep"))


def test_nan_beside_sound_numbers_is_an_error():
    assert not proof._worst([0.0, float("nan"), 0.0]) <= 1.0


def test_gpt_neo_is_refused_by_name_for_a_window_of_more_tokens_than_a_probe_has():
    """Batches of 300, 270 and 3 tokens were wrong in two rows of three, and nine tokens said nothing."""
    student, teacher = gpt_neo(), gpt_neo()
    prompts = [[(3 * i + n) % VOCAB for i in range(n)] for n in (300, 270, 3)]
    with pytest.raises(ModelError, match="gpt_neo cannot be decoded exactly"):
        decode(student, teacher, prompts, Switch(), 4)
    with pytest.raises(ModelError, match="gpt_neo"):
        Head.of(student, VOCAB)


@pytest.mark.parametrize("name", ["bloom", "openai-gpt", "cpmant", "xlm", "xlnet"])
def test_families_that_cannot_be_called_so_are_refused_and_raise_nothing_else(name):
    model = small_model(name)
    for use in (lambda: decode(model, small_model(name), [[3, 4]], Switch(), 2), lambda: prove(model)):
        with pytest.raises(ModelError, match="choose another model"):
            use()


def test_longrope_ends_where_a_longer_row_would_change_a_shorter_one():
    """Beyond, one set of rotations serves the whole batch: the loss of a batch is not that of its rows."""
    student, teacher = phi(), phi()
    prompts = [[(3 * i + n) % VOCAB for i in range(n)] for n in (80, 56, 3)]
    rollouts = decode(student, teacher, prompts, Switch(), 8, eos_token_ids=[])
    assert (
        rollouts[0].stop_reason == "prompt_too_long" and "longrope" in rollouts[0].error and "64" in rollouts[0].error
    )
    reference = decode_reference(student, teacher, prompts, Switch(), 8, eos_token_ids=[])
    assert [r.completion_ids for r in rollouts] == [r.completion_ids for r in reference]
    rows = [(prompt[:-4], prompt[-4:]) for prompt in prompts if len(prompt) > 4]
    alone = torch.cat([student(torch.tensor([p + c])).logits[0, len(p) - 1 : -1] for p, c in rows[1:]])
    head = Head.of(student, VOCAB)
    torch.testing.assert_close(head(response_hidden(student, collate(rows[1:]))), alone)
    with pytest.raises(ModelError, match=r"80 tokens exceed .* 64 .*longrope"):
        response_hidden(student, collate(rows))


def test_a_run_says_why_a_context_is_short():
    from switchkd.runs.opening import check_context
    from switchkd.training.settings import TrainConfig

    pair = Pair(phi(), phi(), toy_pair().tokenizer, VOCAB, (1,), ())
    with pytest.raises(ConfigError, match=r"context of 64 \(beyond original_max_position_embeddings longrope"):
        check_context(
            TrainConfig(max_prompt_length=60, max_new_tokens=10, max_completion_length=10, eval_samples=0), pair
        )


@pytest.mark.parametrize("broken", ["window", "longrope"])
def test_the_twin_finds_what_a_short_probe_does_not(broken, monkeypatch):
    """Negative controls: a cache that does not know the window, and a context without its limit."""
    monkeypatch.setattr(proof, "_architectures", set())
    if broken == "window":
        model = tiny_mistral(4096)
        monkeypatch.setattr(
            "switchkd.runner.runner.attention_windows",
            lambda model: [("full_attention", None)] * model.config.num_hidden_layers,
        )
    else:
        model = phi(4096)
        monkeypatch.setattr("switchkd.runner.architecture.exact_lengths", lambda config: {})
    proof._compare(model, None, model.dtype)  # the short probe of the model itself
    with pytest.raises(ModelError, match=r"exactly|in batches|more text"):
        prove(model)


def tiny_mistral(window, cls=MistralForCausalLM):
    sizes = SIZES | {
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return cls(MistralConfig(**sizes, sliding_window=window, max_position_embeddings=16384)).double().eval()


class Unshrinkable(MistralForCausalLM):
    """A class that makes no small copy."""

    def __init__(self, config):
        if config._experts_implementation == "eager":  # as in a twin
            raise ValueError("this size alone")
        super().__init__(config)


def test_a_class_without_a_twin_is_read_itself_across_its_window(monkeypatch):
    prove(tiny_mistral(100, Unshrinkable))
    monkeypatch.setattr(
        "switchkd.runner.runner.attention_windows",
        lambda model: [("full_attention", None)] * model.config.num_hidden_layers,
    )
    with pytest.raises(ModelError, match="exactly"):
        prove(tiny_mistral(100, Unshrinkable))
    with pytest.raises(ModelError, match=r"sliding_window = 9000.*so long a text is too much to try"):
        prove(tiny_mistral(9000, Unshrinkable))


def test_every_number_that_acts_by_position_is_small_in_a_twin():
    config = small_config(config_of("gemma3_text"))
    assert positions(config)["sliding_window"] == 8 and set(config.layer_types) == {
        "sliding_attention",
        "full_attention",
    }
    config = small_config(config_of("phi3, longrope"))
    assert positions(config) == {"original_max_position_embeddings": 20}
    assert len(config.rope_parameters["long_factor"]) == 4
    # One that nobody here has heard of is found by its size, and straddled as it is.
    config.new_kind_of_span = 77
    assert positions(config)["new_kind_of_span"] == 77


def test_a_model_is_proved_once_and_again_where_it_became_another(monkeypatch):
    calls = []
    compare = proof._compare
    monkeypatch.setattr(proof, "_compare", lambda *args: (calls.append(args[0]), compare(*args)))
    student, teacher = new_model("qwen3", 1), new_model("qwen3", 2)
    for _ in range(2):
        decode(student, teacher, [[3, 4]], Switch(), 2)
    assert calls.count(student) == calls.count(teacher) == 1
    decode(student.float(), teacher, [[3, 4]], Switch(), 2)
    assert calls.count(student) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_proving_leaves_weights_modes_and_random_states_alone(family, dtype):
    model = new_model(family, 1, dtype).train()
    model.get_output_embeddings().eval()
    before = {name: (p.data_ptr(), p.dtype, p.clone()) for name, p in model.named_parameters()}
    modes, states = [m.training for m in model.modules()], (torch.get_rng_state(), random.getstate())
    prove(model)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    for name, parameter in model.named_parameters():
        place, kind, value = before[name]
        assert (parameter.data_ptr(), parameter.dtype) == (place, kind) and torch.equal(parameter, value)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_half_precision_is_put_back_where_a_forward_fails():
    model = new_model("llama", 1, torch.bfloat16)
    with pytest.raises(RuntimeError), proof._in_fp32(model):
        model.model.layers[1].mlp.up_proj.forward = lambda x: x[:, :, :1] @ torch.ones(3, 3)
        model(torch.tensor([[3, 4]]))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_memory_that_runs_out_is_no_fault_of_the_model():
    model = new_model("llama")
    model.forward = lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory"))
    with pytest.raises((torch.OutOfMemoryError, NoMemoryError)):
        prove(Off(model, 0.0, "logits_to_keep"))


def test_a_toy_without_attention_is_decoded_as_before():
    toy = TabularModel([[0.1, 0.2, 0.7]] * 3)
    assert decode(toy, toy, [[1]], Switch(), 3, eos_token_ids=[])[0].stop_reason == "length"


def test_twins_are_of_the_models_class_and_equal_each_time():
    config = config_of("llama")
    a, b = (twin(LlamaForCausalLM, config) for _ in range(2))
    assert type(a) is LlamaForCausalLM and all(
        torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True)
    )
    assert sum(p.numel() for p in a.parameters()) < 100_000


def test_broken_weights_are_left_to_whoever_reads_a_text():
    """They are no fault of the architecture, and rows say where they were met."""
    student, teacher = new_model("llama", 1), new_model("llama", 2)
    teacher.lm_head.weight.data.fill_(float("nan"))
    [row] = decode(student, teacher, [[3, 4]], Switch(), 2)
    assert row.stop_reason == "non_finite" and "teacher" in row.error


def test_masked_tokens_are_compared_with_masked_tokens():
    logits = torch.tensor([[0.0, 1.0, -torch.inf]])
    assert proof._error(logits, logits.clone()) == 0
    assert not proof._error(torch.tensor([[0.0, 1.0, 2.0]]), logits) <= 1
