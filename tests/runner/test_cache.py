"""The ragged cache on every family, and the probe that refuses what it cannot do."""

import numpy as np
import pytest
import torch
from tiny import FAMILIES, VOCAB, tiny_model
from transformers import RwkvConfig, RwkvForCausalLM

from switchkd import Switch, decode
from switchkd.base.errors import ModelError
from switchkd.forward.proof import prove
from switchkd.runner import runner as running
from switchkd.runner.cache import Places, attention_windows
from switchkd.runner.runner import Runner

ROWS = [[3, 4, 5, 6, 7, 8, 9], [7, 2], [2, 9, 11, 4, 6]]
SLOTS = 24


class Reader:
    """A runner whose rows are told as lists."""

    def __init__(self, model, rows=3, keep_hidden=False):
        self.runner = Runner(model)
        self.runner.open(rows, SLOTS, VOCAB, keep_hidden=keep_hidden)

    def places(self, rows):
        in_order = list(rows) == list(range(len(rows)))
        return Places(np.array(rows), None if in_order else torch.tensor(rows))

    def extend(self, rows, texts, drafts=None):
        """Logits after the rest of the texts and after each draft; what was unread is read on the way."""
        places, ends = self.places(rows), np.array([len(text) for text in texts])
        for row, text in zip(rows, texts, strict=True):
            self.runner.texts[row, : len(text)] = torch.tensor(text)
        self.runner.catch_up(places, torch.tensor(ends), ends)
        drafts = None if drafts is None else torch.tensor(drafts)
        return self.runner.extend(places, torch.tensor(ends), ends, drafts)


def plain_logits(model, row, last):
    return model(torch.tensor([row])).logits[0, -last:]


def assert_plain(model, texts, logits):
    for text, ours in zip(texts, logits, strict=True):
        torch.testing.assert_close(ours, plain_logits(model, text, len(ours)), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rolled_back_and_extended_rows_have_the_plain_logits(family):
    model = tiny_model(family, 3)
    reader = Reader(model)
    wrong = reader.extend(range(3), ROWS, [[9, 8]] * 3)
    assert_plain(model, [[*row, 9, 8] for row in ROWS], wrong)
    assert reader.runner.read.tolist() == [9, 4, 7]
    reader.runner.read = np.array([6, 0, 3])  # roll back, one row further than the text
    logits = reader.extend(range(3), ROWS, [[5], [10], [12]])
    assert_plain(model, [[*row, token] for row, token in zip(ROWS, (5, 10, 12), strict=True)], logits)
    ends = reader.runner.read.copy()
    drafts = torch.tensor([[3, 4]] * 3)
    more = reader.runner.extend(Places.first(3), torch.tensor(ends), ends, drafts, tail=False)
    assert_plain(model, [[*row, token, 3, 4] for row, token in zip(ROWS, (5, 10, 12), strict=True)], more)


@torch.no_grad()
def test_every_row_in_another_order_reads_its_own_cache():
    model, order = tiny_model("llama", 3), [2, 0, 1]
    reader = Reader(model)
    reader.extend(range(3), ROWS)
    logits = reader.extend(order, [[*ROWS[row], 5] for row in order])
    assert_plain(model, [[*ROWS[row], 5] for row in order], logits)


@torch.no_grad()
def test_the_output_layer_is_given_numbers_in_order():
    """Of a view torch may make the product by copying the layer's weight for every row: 200 times as slow in bf16."""
    model, seen = tiny_model("llama", 3), []
    model.get_output_embeddings().register_forward_hook(lambda _, args, __: seen.append(args[0].is_contiguous()))
    Reader(model).extend(range(3), ROWS, [[9, 8]] * 3)
    assert len(seen) > 1 and all(seen)


@torch.no_grad()
def test_some_rows_may_be_left_behind_and_catch_up_later():
    model = tiny_model("mistral-sliding", 3)
    reader = Reader(model)
    reader.extend(range(3), ROWS)
    reader.extend([0, 2], [[*ROWS[0], 5], [*ROWS[2], 7]])
    texts = [[*ROWS[0], 5, 6], [*ROWS[1], 4, 4, 8], [*ROWS[2], 7]]
    assert_plain(model, texts, reader.extend(range(3), texts))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", [1, 2, 5, 9])
@torch.no_grad()
def test_prompts_that_are_read_in_pieces_give_the_same(family, tokens, monkeypatch):
    """However few tokens a forward may have, which is then a row of one, or a few rows."""
    monkeypatch.setattr(running, "PREFILL_TOKENS", tokens)
    model, widest = tiny_model(family, 3), []
    texts = [[3 + (7 * i + j) % 17 for j in range(length)] for i, length in enumerate((13, 12, 3, 1, 9))]
    reader = Reader(model, rows=5)
    run = reader.runner.run

    def watched(ids, *rest):
        widest.append(ids.numel())
        return run(ids, *rest)

    monkeypatch.setattr(reader.runner, "run", watched)
    assert_plain(model, texts, reader.extend(range(5), texts))
    assert max(widest[:-1]) <= tokens and reader.runner.prefill_tokens == sum(len(text) - 1 for text in texts)


@torch.no_grad()
def test_rows_that_move_and_places_that_are_used_again():
    """A row that held NaNs is given to a new prompt; another one goes to the place of a row that is gone."""
    model = tiny_model("gemma3-hybrid", 3)
    reader = Reader(model)
    reader.extend(range(3), ROWS)
    for layer in reader.runner.cache.layers:
        layer.keys[1] = layer.values[1] = float("nan")
    reader.runner.read[1] = 0
    reader.runner.clear(1)
    reader.runner.move(Places(np.array([0]), torch.tensor([0])), Places(np.array([2]), torch.tensor([2])))
    logits = reader.extend([0, 1], [[*ROWS[2], 8], [5, 6, 7]])
    assert_plain(model, [[*ROWS[2], 8], [5, 6, 7]], logits)


@torch.no_grad()
def test_drafts_may_lie_beyond_the_learned_positions():
    """Beyond a row's budget their logits mean nothing, and the others stay what they are."""
    model, row = tiny_model("gpt2", 3), [3] * 62
    runner = Runner(model)
    runner.open(1, 72, VOCAB)
    runner.texts[0, :62] = 3
    runner.catch_up(Places.first(1), torch.tensor([62]), np.array([62]))
    logits = runner.extend(Places.first(1), torch.tensor([62]), np.array([62]), torch.tensor([[4, 5, 6, 7]]))
    torch.testing.assert_close(logits[0, :3], plain_logits(model, [*row, 4, 5], 3), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_buffers_stay_where_they_are(family):
    """What a GPU has recorded reads and writes the same places at every step."""
    reader, places = Reader(tiny_model(family, 3)), set()
    texts = [list(row) for row in ROWS]
    for token in range(5, 9):
        reader.extend(range(3), texts)
        layers = reader.runner.cache.layers
        places.add(tuple(buffer.data_ptr() for layer in layers for buffer in (layer.keys, layer.values)))
        texts = [[*text, token] for text in texts]
    assert len(places) == 1


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
    rwkv = RwkvForCausalLM(RwkvConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2)).eval()
    for refuse in (attention_windows, lambda model: decode(model, tiny_model(), [[3]], Switch(), 4)):
        with pytest.raises(
            ModelError, match=r"rwkv has a recurrent state.*take back.*full_attention, sliding_attention"
        ):
            refuse(rwkv)
    model = tiny_model("qwen3")
    model.config.layer_types = ["indexed_attention", "full_attention"]
    with pytest.raises(ModelError, match=r"qwen3 has layers of kind indexed_attention"):
        attention_windows(model)
