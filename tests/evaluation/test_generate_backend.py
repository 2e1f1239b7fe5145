"""transformers' generate as a second opinion: the engine's greedy tokens, unbiased samples, nothing inherited or left behind."""

import math

import pytest
import torch
from tiny import FAMILIES, VOCAB, tiny_model
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from switchkd import StudentOnly, decode
from switchkd.base.errors import ConfigError, DataError
from switchkd.decoding.settings import DecodeSettings
from switchkd.evaluation.generate_backend import complete_by_generate
from switchkd.methods.sampling import Sampling

PROMPTS = [[3, 4, 5], [7], [2, 2, 9, 11, 4, 6, 8, 14, 21], [5, 5], [19, 3, 8, 8], [13]]
EOS = (1, 6)
WIDE = dict(
    vocab_size=200, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    max_position_embeddings=16, bos_token_id=None, eos_token_id=1,
)  # fmt: skip
# Each of them changes the text, and generate takes each from the model where its caller leaves it at None.
INHERITED = {"top_k": 2, "repetition_penalty": 5.0, "min_length": 14, "no_repeat_ngram_size": 2, "suppress_tokens": [4]}


def engine(model, vocab_size=VOCAB, tokens=20):
    rollouts = decode(
        model, model, PROMPTS, StudentOnly(), tokens, temperature=0, eos_token_ids=EOS, vocab_size=vocab_size
    )
    return [(rollout.completion_ids, rollout.stop_reason) for rollout in rollouts]


def generated(model, prompts=PROMPTS, **changes):
    told = {"eos_token_ids": EOS, "vocab_size": VOCAB}
    told |= {name: changes.pop(name) for name in ("eos_token_ids", "vocab_size", "progress") if name in changes}
    settings = {"max_new_tokens": 20, "batch_size": 4, "temperature": 0.0} | changes
    return complete_by_generate(model, prompts, DecodeSettings(StudentOnly(), **settings), **told)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_the_engines(family):
    reasons = set()
    for seed in range(3):
        model = tiny_model(family, seed)
        completions = generated(model)
        assert completions == engine(model)
        reasons |= {reason for _, reason in completions}
    assert reasons == {"eos", "length"}


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_first_sampled_token_has_the_law_of_the_softmax(temperature, monkeypatch):
    """Of 200 tokens: generate's own top_k of 50 would leave most of them out."""
    monkeypatch.setitem(FAMILIES, "wide", lambda: LlamaForCausalLM(LlamaConfig(**WIDE)))
    model = tiny_model("wide", scale=8.0)
    prompts = [[9, 7], [2, 7, 9]] * 10_000  # every first row is padded
    settings = {"max_new_tokens": 1, "temperature": temperature, "seed": 4, "vocab_size": 200, "batch_size": 5_000}
    tokens = torch.tensor([ids[0] for ids, _ in generated(model, prompts, **settings)])
    for prompt, drawn in zip(prompts[:2], (tokens[::2], tokens[1::2]), strict=True):
        with torch.no_grad():
            law = (model(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
        assert law.sort().values[:-50].sum() > 0.02
        rate = drawn.bincount(minlength=200) / len(drawn)
        # Five standard deviations of a binomial rate, and five draws for the rarest.
        bound = 5 * (law * (1 - law) / len(drawn)).sqrt() + 5 / len(drawn)
        assert ((rate - law).abs() < bound).all()
        assert abs(rate[law.sort().indices[:-50]].sum() - law.sort().values[:-50].sum()) < 0.02


def test_nothing_is_inherited_from_the_models_generation_config():
    model = tiny_model("llama", 1)
    sampling = {"temperature": 1.0, "seed": 2}
    greedy, sampled = generated(model), generated(model, **sampling)
    model.generation_config = own = GenerationConfig(**INHERITED, eos_token_id=2)
    assert generated(model) == greedy
    assert generated(model, **sampling) == sampled
    assert model.generation_config is own and own.repetition_penalty == 5.0
    prompt = torch.tensor(PROMPTS[:1])
    leaking = model.generate(prompt, generation_config=GenerationConfig(max_new_tokens=20, eos_token_id=list(EOS)))
    assert leaking[0, 3:].tolist() != greedy[0][0]  # an explicit config alone is not enough


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_padding_rows_of_the_logits_are_never_drawn(temperature):
    model = tiny_model("qwen2", 2)
    with torch.no_grad():
        model.get_output_embeddings().weight[VOCAB - 3 :] *= 4
    settings = {"temperature": temperature, "max_new_tokens": 20}
    assert any(token >= VOCAB - 3 for ids, _ in generated(model, **settings) for token in ids)
    completions = generated(model, **settings, vocab_size=VOCAB - 3)
    assert all(token < VOCAB - 3 for ids, _ in completions for token in ids)
    if not temperature:
        shorter = [prompt for prompt in PROMPTS if max(prompt) < VOCAB - 3]
        assert generated(model, shorter, **settings, vocab_size=VOCAB - 3) == [
            row for row, prompt in zip(engine(model, VOCAB - 3), PROMPTS, strict=True) if prompt in shorter
        ]


def test_random_state_and_mode_are_left_alone_and_a_seed_gives_its_text():
    model = tiny_model("gpt2", 3).train()
    state = torch.get_rng_state()
    done = []
    one, again, other = (generated(model, temperature=1.0, seed=seed, progress=done.append) for seed in (1, 1, 2))
    assert one == again != other
    assert generated(model) == engine(model)  # dropout is off
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert done == [4, 2] * 3


CUTS = {"top_k": {"top_k": 2}, "top_p": {"top_p": 0.5}, "min_p": {"min_p": 0.4}}


@pytest.mark.parametrize("cut", CUTS)
def test_cuts_leave_the_tokens_that_the_engines_do(cut):
    """Of many first tokens both write the same few; the model's own settings, which cut otherwise, are heard by neither."""
    model = tiny_model("llama", 3)
    model.generation_config.update(top_k=1, top_p=0.1)
    prompts = [PROMPTS[0]] * 400
    settings = {"temperature": 1.5, "seed": 3, **CUTS[cut]}
    theirs = {ids[0] for ids, _ in generated(model, prompts, max_new_tokens=1, batch_size=400, **settings)}
    ours = decode(model, model, prompts, StudentOnly(), 1, **settings)
    with torch.no_grad():
        law = (model(torch.tensor(prompts[:1])).logits[:, -1] / 1.5).log_softmax(-1)
    left = (Sampling(1.0, **CUTS[cut]).shape(law)[0] > -math.inf).nonzero().flatten().tolist()
    assert theirs == {rollout.completion_ids[0] for rollout in ours} == set(left) and 1 < len(left) < VOCAB


@pytest.mark.parametrize(
    "prompts, changes, error, message",
    [
        ([[3], []], {}, DataError, "prompt 1 is empty"),
        ([[3] * 50], {}, DataError, "50 tokens .* 20 exceed the model's context of 64"),
        ([[3]], {"batch_size": 0}, ConfigError, "batch_size must be at least 1, got 0"),
        ([[3]], {"temperature": -1.0}, ConfigError, "got -1.0"),
    ],
)
def test_what_cannot_be_completed_is_refused(prompts, changes, error, message):
    with pytest.raises(error, match=message):
        generated(tiny_model("gpt2"), prompts, **changes)


def test_without_an_end_token_every_row_has_its_whole_budget():
    completions = generated(tiny_model("llama"), eos_token_ids=())
    assert [(len(ids), reason) for ids, reason in completions] == [(20, "length")] * len(PROMPTS)
