"""Attention by the ends of rows: every family's plain logits, no mask for each layer, and a mask for whoever needs one."""

import numpy as np
import pytest
import torch
from tiny import FAMILIES, VOCAB, new_model
from torch.nn.attention import varlen
from transformers import GptOssConfig, GptOssForCausalLM

from switchkd.runner import attention
from switchkd.runner.attention import KEYWORD, EndsAttention, MaskAttention, _attend, _flat, attention_of
from switchkd.runner.cache import Places, attention_windows
from switchkd.runner.runner import Runner

ROWS = [[3, 4, 5, 6, 7, 8, 9], [7, 2], [2, 9, 11, 4, 6]]


class Cached:
    """A runner whose rows are told as lists."""

    def __init__(self, model, rows, slots, vocab_size):
        self.runner = Runner(model)
        self.runner.open(rows, slots + 8, vocab_size)

    @property
    def lengths(self):
        return self.runner.read.tolist()

    @lengths.setter
    def lengths(self, lengths):
        self.runner.read = np.array(lengths)

    def told(self, rows, texts):
        for row, text in zip(rows, texts, strict=True):
            self.runner.texts[row, : len(text)] = torch.tensor(text)
        ends = np.array([len(text) for text in texts])
        return Places(np.array(list(rows)), torch.tensor(list(rows))), torch.tensor(ends), ends

    def catch_up(self, rows, texts):
        self.runner.catch_up(*self.told(rows, texts))

    def extend(self, rows, texts, drafts, _=None):
        if texts is not None:
            return self.runner.extend(*self.told(rows, texts), drafts)
        ends = self.runner.read[list(rows)]
        return self.runner.extend(Places.first(len(ends)), torch.tensor(ends), ends, drafts, tail=False)


def plain_logits(model, row, last):
    return model(torch.tensor([row])).logits[0, -last:]


def chosen(model, windows=None):
    own = model.config._attn_implementation
    by = attention_of(model, attention_windows(model) if windows is None else windows, model.dtype)
    assert model.config._attn_implementation == own
    return type(by)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rolled_back_and_extended_rows_have_the_plain_logits(family):
    model = new_model(family, 3)
    assert chosen(model) is EndsAttention
    cached = Cached(model, 3, 20, VOCAB)
    cached.catch_up(range(3), ROWS)
    cached.extend(range(3), ROWS, torch.tensor([[9, 8]] * 3), [20] * 3)
    cached.lengths = [6, 0, 3]  # roll back, one row further than the text
    more = [[5], [10], [12]]
    logits = cached.extend(range(3), ROWS, torch.tensor(more), [20] * 3)
    for row, tail, ours in zip(ROWS, more, logits, strict=True):
        torch.testing.assert_close(ours, plain_logits(model, row + tail, 2), atol=1e-11, rtol=1e-11)
    logits = cached.extend(range(3), None, torch.tensor([[3], [4], [4]]), [20] * 3)
    torch.testing.assert_close(logits[2], plain_logits(model, [*ROWS[2], 12, 4], 1), atol=1e-11, rtol=1e-11)
    logits = cached.extend(range(3), None, torch.full((3, 4), 5), [11, 6, 20])  # beyond the budget of two rows
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[1, :2], plain_logits(model, [7, 2, 10, 4, 5, 5], 2), atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(logits[2], plain_logits(model, [*ROWS[2], 12, 4, 5, 5, 5, 5], 4), atol=1e-11, rtol=1e-11)


@torch.no_grad()
def test_rows_of_one_length_need_no_mask_and_others_one_for_all_layers(monkeypatch):
    made, seen = [], attention._seen
    monkeypatch.setattr(attention, "_seen", lambda *args: made.append(1) or seen(*args))
    for family, masks in (("llama", 1), ("gemma3-hybrid", 2)):
        model = new_model(family, 3)
        attention_of(model, attention_windows(model), model.dtype)
        cached = Cached(model, 2, 20, VOCAB)
        cached.catch_up(range(2), [[3] * 3, [4] * 3])
        cached.extend(range(2), [[3] * 3, [4] * 3], None, [20] * 2)
        made.clear()
        cached.extend(range(2), None, torch.tensor([[3], [4]]), [20] * 2)
        assert not made  # the window of four is not full yet
        cached.extend(range(2), None, torch.tensor([[3, 4], [4, 3]]), [20] * 2)
        assert len(made) == masks
        made.clear()
        logits = cached.extend(range(2), None, torch.tensor([[3], [4]]), [20] * 2)
        assert len(made) == masks - 1  # for the layer with a window
        torch.testing.assert_close(logits[1], plain_logits(model, [4] * 4 + [4, 3, 4], 1), atol=1e-11, rtol=1e-11)
        made.clear()
        cached.lengths = [5, 4]
        cached.extend(range(2), None, torch.tensor([[3], [4]]), [20] * 2)
        assert len(made) == masks


@torch.no_grad()
def test_heads_that_share_keys_are_read_without_repeating_them(monkeypatch):
    shapes, original = [], torch.nn.functional.scaled_dot_product_attention
    model = new_model("llama", 3)
    attention_of(model, attention_windows(model), model.dtype)

    def record(query, key, value, **settings):
        shapes.append((tuple(query.shape), tuple(key.shape)))
        return original(query, key, value, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    cached = Cached(model, 1, 20, VOCAB)
    cached.extend([0], [[3, 4, 5]], None, [20])
    assert shapes == [((1, 2, 6, 4), (1, 2, 3, 4))] * 2


@torch.no_grad()
def test_the_models_own_attention_is_put_back_behind_each_forward():
    model = new_model("llama", 3)
    by_ends = EndsAttention(model, attention_windows(model))
    with pytest.raises(KeyboardInterrupt), by_ends.active():
        assert model.config._attn_implementation == attention.NAME
        raise KeyboardInterrupt
    assert model.config._attn_implementation == "sdpa"


SIZES = dict(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
)
SIZES |= dict(
    num_key_value_heads=2, head_dim=4, max_position_embeddings=64, bos_token_id=None, eos_token_id=1, sliding_window=4
)


@torch.no_grad()
def test_whoever_needs_more_keeps_the_mask(monkeypatch):
    eager = new_model("llama", 3)
    eager.config._attn_implementation = "eager"
    assert chosen(eager) is MaskAttention
    sinks = GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1)).eval()
    assert chosen(sinks) is MaskAttention
    deaf = new_model("llama", 3)
    forward = deaf.forward
    monkeypatch.setattr(deaf, "forward", lambda **inputs: forward(**{k: v for k, v in inputs.items() if k != KEYWORD}))
    assert chosen(deaf) is MaskAttention
    other = new_model("llama", 3)
    monkeypatch.setattr(other.model.layers[1].self_attn, "forward", lambda hidden_states, **_: (hidden_states, None))
    assert chosen(other) is MaskAttention  # a layer that does not dispatch
    differs = new_model("llama", 3)
    layer, attend = differs.model.layers[1].self_attn, differs.model.layers[1].self_attn.forward

    def by_name(hidden_states, **settings):
        return attend(hidden_states * (2 if differs.config._attn_implementation == attention.NAME else 1), **settings)

    monkeypatch.setattr(layer, "forward", by_name)
    assert chosen(differs) is MaskAttention
    lying = new_model("mistral-sliding", 3)
    assert chosen(lying, [("full_attention", None)] * 2) is MaskAttention


def test_masks_hide_what_comes_later_and_what_is_too_long_ago():
    """A position of padding sees nothing, and its mask is finite."""
    positions = torch.tensor([[-1, 0, 1], [2, 3, 4]])
    windows = [("sliding_attention", 2), ("full_attention", None)]
    masks = MaskAttention(windows, torch.float32).inputs(positions, torch.tensor([2, 5]), 5)["attention_mask"]
    for kind, window in windows:
        expected = [
            [[slot <= p and (window is None or slot > p - window) for slot in range(5)] for p in row]
            for row in positions
        ]
        assert torch.equal(masks[kind] == 0, torch.tensor(expected).unsqueeze(1)) and masks[kind].isfinite().all()
    one = MaskAttention(windows[:1] * 2, torch.float32).inputs(positions, torch.tensor([2, 5]), 5)["attention_mask"]
    assert torch.equal(one, masks["sliding_attention"])


@torch.no_grad()
def test_settings_that_would_change_the_weights_are_refused():
    model = new_model("llama", 3)
    ends = attention.Ends(torch.tensor([3]), attention_windows(model), 3)
    q, k = torch.randn(1, 4, 3, 4), torch.randn(1, 2, 3, 4)
    layer = model.model.layers[0].self_attn
    for settings in ({"softcap": 50.0}, {"s_aux": q}, {"position_bias": q}, {"dropout": 0.1}, {"sliding_window": 2}):
        with pytest.raises(ValueError, match="does not know"):
            _attend(layer, q, k, k, None, **{KEYWORD: ends, **settings})
    with pytest.raises(ValueError, match="does not know"):
        _attend(layer, q, k, k, torch.zeros(1, 1, 3, 3), **{KEYWORD: ends})
    _attend(layer, q, k, k, None, **{KEYWORD: ends, "softcap": None, "position_ids": q})


def by_the_docstring(
    q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa, seqused_k, num_splits
):
    """What torch says that ``varlen_attn`` gives: causal, aligned at the bottom right of the keys in use."""
    assert enable_gqa and num_splits == 1 and seqused_k.dtype == cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    out = torch.zeros_like(q)
    for row, used in enumerate(seqused_k.tolist()):
        queries = q[cu_seq_q[row] : cu_seq_q[row + 1]]
        keys, values = (
            each[cu_seq_k[row] : cu_seq_k[row] + used].repeat_interleave(q.shape[1] // k.shape[1], 1) for each in (k, v)
        )
        assert used <= cu_seq_k[row + 1] - cu_seq_k[row] <= max_k and len(queries) <= max_q
        for i, query in enumerate(queries):
            end = used - len(queries) + i + 1
            start = 0 if window_size[0] < 0 else max(end - 1 - window_size[0], 0)
            if end > 0:
                weights = torch.einsum("hd,shd->hs", query, keys[start:end]).mul(scale).softmax(-1)
                out[cu_seq_q[row] + i] = torch.einsum("hs,shd->hd", weights, values[start:end])
    return out


@pytest.mark.parametrize("window", [None, 3])
def test_the_call_for_a_gpu_means_the_same_by_its_documentation(monkeypatch, window):
    """The kernel itself waits for a GPU."""
    monkeypatch.setattr(varlen, "varlen_attn", by_the_docstring)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 4, 2, 8, generator=generator, dtype=torch.float64)
    buffers = [torch.randn(3, 12, 2, 8, generator=generator, dtype=torch.float64) for _ in range(2)]
    key, value = (buffer.transpose(1, 2)[:, :, :10] for buffer in buffers)
    ends = torch.tensor([10, 1, 6])  # the first column of the second row is padding
    ours = attention._varlen(q, key, value, ends, window, 0.3)
    kind = "full_attention" if window is None else "sliding_attention"
    layer = torch.nn.Module()
    layer.layer_idx = 0
    expected, _ = _attend(layer, q, key, value, None, 0.3, **{KEYWORD: attention.Ends(ends, [(kind, window)], 10)})
    ours[1, 0] = expected[1, 0] = 0
    torch.testing.assert_close(ours, expected)


def test_keys_are_handed_on_without_a_copy_where_slots_lie_one_after_the_other():
    buffer = torch.arange(2 * 5 * 3 * 4.0).view(2, 5, 3, 4)  # rows, slots, heads, size
    flat, stride = _flat(buffer.transpose(1, 2)[:, :, :2])
    assert stride == 5 and torch.equal(flat, buffer.view(10, 3, 4)) and flat.data_ptr() == buffer.data_ptr()
    for states in (
        buffer.transpose(1, 2).contiguous()[:, :, :2],
        buffer[:, 3:].transpose(1, 2),
    ):  # other layout; too short
        flat, stride = _flat(states)
        assert stride == 2 and torch.equal(flat, states.transpose(1, 2).reshape(4, 3, 4))
