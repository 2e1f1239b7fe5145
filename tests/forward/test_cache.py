"""The ragged cache on every family, and the probe that refuses what it cannot do."""

import pytest
import torch
from tiny import FAMILIES, VOCAB, tiny_model
from transformers import MambaConfig, MambaForCausalLM

from switchkd import Switch, decode
from switchkd.base.errors import ModelError
from switchkd.forward.cache import CachedModel, attention_windows
from switchkd.forward.proof import prove

ROWS = [[3, 4, 5, 6, 7, 8, 9], [7, 2], [2, 9, 11, 4, 6]]


def plain_logits(model, row, last):
    return model(torch.tensor([row])).logits[0, -last:]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rolled_back_and_extended_rows_have_the_plain_logits(family):
    model = tiny_model(family, 3)
    cached = CachedModel(model, 3, 20, VOCAB)
    cached.catch_up(range(3), ROWS)
    assert cached.lengths == [6, 0, 4]  # two tokens are left to the next forward
    cached.extend(range(3), ROWS, torch.tensor([[9, 8]] * 3), [20] * 3)
    cached.lengths = [6, 0, 3]  # roll back, one row further than the text
    more = [[5], [10], [12]]
    logits = cached.extend(range(3), ROWS, torch.tensor(more), [20] * 3)
    for row, tail, ours in zip(ROWS, more, logits, strict=True):
        torch.testing.assert_close(ours, plain_logits(model, row + tail, 2), atol=1e-11, rtol=1e-11)
    assert cached.lengths == [8, 3, 6]
    logits = cached.extend(range(3), None, torch.tensor([[3, 4]] * 3), [20] * 3)
    torch.testing.assert_close(logits[2], plain_logits(model, [*ROWS[2], 12, 3, 4], 2), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_every_row_in_another_order_reads_its_own_cache(static):
    model, order = tiny_model("llama", 3), [2, 0, 1]
    cached = CachedModel(model, 3, 20, VOCAB, static=static)
    cached.catch_up(range(3), ROWS)
    cached.extend(range(3), ROWS, None, [20] * 3)
    logits = cached.extend(order, None, torch.full((3, 1), 5), [20] * 3)
    for row, ours in zip(order, logits, strict=True):
        torch.testing.assert_close(ours, plain_logits(model, [*ROWS[row], 5], 1), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_static_steps_keep_their_tensors_and_give_the_same(family):
    """The tensors that a graph would hold on to are the same ones at every step, and so are the caches."""
    model = tiny_model(family, 3)
    static, plain = (CachedModel(model, 3, 20, VOCAB, keep_hidden=True, static=static) for static in (True, False))
    places = set()
    for cached in (static, plain):
        cached.catch_up(range(3), ROWS)
        cached.extend(range(3), ROWS, None, [20] * 3)
    for token in range(5, 9):
        drafts = torch.full((3, 1), token)
        ours, expected = (cached.extend(range(3), None, drafts, [20] * 3) for cached in (static, plain))
        torch.testing.assert_close(ours, expected, atol=1e-11, rtol=1e-11)
        torch.testing.assert_close(static.hidden, plain.hidden, atol=1e-11, rtol=1e-11)
        inputs = static.step.tokens, static.step.positions, static.step.slots
        held = [*inputs, *(b for layer in static.cache.layers for b in (layer.keys, layer.values))]
        places.add(tuple(tensor.data_ptr() for tensor in held))
    assert len(places) == 1 and static.cache.end == 20
    static.select([0, 2])
    assert static.step is None


@torch.no_grad()
def test_some_rows_may_be_left_behind_and_catch_up_later():
    model = tiny_model("mistral-sliding", 3)
    cached = CachedModel(model, 3, 20, VOCAB)
    cached.catch_up(range(3), ROWS)
    cached.extend([0, 2], [ROWS[0], ROWS[2]], None, [20, 20])
    texts = [[*ROWS[0], 5], [*ROWS[1], 4, 4, 8], [*ROWS[2], 7]]
    cached.catch_up(range(3), texts)
    assert cached.lengths == [7, 4, 5]
    logits = cached.extend(range(3), texts, None, [20] * 3)
    for text, ours in zip(texts, logits, strict=True):
        torch.testing.assert_close(ours, plain_logits(model, text, 1), atol=1e-11, rtol=1e-11)


@torch.no_grad()
def test_selected_and_reused_rows():
    """A row that held NaNs is given to a new prompt; two rows are kept in another order."""
    model = tiny_model("gemma3-hybrid", 3)
    cached = CachedModel(model, 3, 20, VOCAB)
    cached.catch_up(range(3), ROWS)
    for layer in cached.cache.layers:
        layer.keys[1] = layer.values[1] = float("nan")
    cached.reset(1)
    cached.select([2, 1])
    cached.catch_up([1], [[5, 6, 7]])
    logits = cached.extend([0, 1], [ROWS[2], [5, 6, 7]], None, [20, 20])
    torch.testing.assert_close(logits[0], plain_logits(model, ROWS[2], 1), atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(logits[1], plain_logits(model, [5, 6, 7], 1), atol=1e-11, rtol=1e-11)


@torch.no_grad()
def test_drafts_beyond_the_limit_are_not_stored():
    """They may even lie beyond the learned positions of the model."""
    model = tiny_model("gpt2", 3)
    row = [3] * 62
    cached = CachedModel(model, 1, 64, VOCAB)
    cached.catch_up([0], [row])
    logits = cached.extend([0], [row], torch.tensor([[4, 5, 6, 7]]), [64])
    assert cached.lengths == [64]
    torch.testing.assert_close(logits[0, :3], plain_logits(model, [*row, 4, 5], 3), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_family_passes_the_probe(family, dtype):
    model = tiny_model(family, 1, dtype).train()
    prove(model)
    assert model.training


def test_the_probe_refuses_attention_that_is_not_what_its_config_says():
    model = tiny_model("mistral-sliding")
    model.config.sliding_window = None  # the weights were made to see four tokens; the mask now shows all
    reference = tiny_model("mistral-sliding")

    class Lying(torch.nn.Module):
        _is_stateful = False

        def __init__(self):
            super().__init__()
            self.inner, self.config, self.dtype = model, model.config, torch.float64

        def forward(self, input_ids, **settings):
            return (self.inner if settings else reference)(input_ids, **settings)

    with pytest.raises(ModelError, match="cannot be decoded exactly"):
        prove(Lying())


def test_models_that_cannot_be_rolled_back_are_refused_by_name():
    """Also by ``decode``, for a model that its caller loaded."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    mamba = MambaForCausalLM(MambaConfig(**sizes)).eval()
    for refuse in (attention_windows, lambda model: decode(model, tiny_model(), [[3]], Switch(), 4)):
        with pytest.raises(
            ModelError, match=r"mamba has layers of kind linear_attention.*full or sliding-window attention"
        ):
            refuse(mamba)
    model = tiny_model("qwen3")
    model.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ModelError, match=r"qwen3 has layers of kind linear_attention"):
        attention_windows(model)
