"""Attention over rows of different lengths: by where each row ends, or where a model cannot be told that, by a mask.

The columns of a forward are aligned on the right: column j of row i stands at position ``ends[i] - T + j`` and sees the slots up to
there (in a layer with a window w, the last w of them). A negative position is padding: its output means nothing. That is causal
attention aligned at the bottom right, which kernels know without a mask; and where a mask is made after all, it is made once for
all layers, and the query heads that share a key head are read as further queries instead of repeating keys and values.

Slots behind a row's end must hold finite numbers: weighed with 0 they would else give NaN.

Shapes: b rows, T columns, S slots, Q query heads, H key/value heads, D head size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from switchkd.runner.architecture import ATTENDING
from switchkd.runner.modes import evaluating

NAME = "switchkd_ragged"
KEYWORD = "ragged_ends"  # of a model's forward, which hands it down to its attention
# What transformers call the mask of a layer that attends and keeps a state.
_OF_BOTH = {"hybrid": "full_attention", "hybrid_sliding": "sliding_attention"}
Windows = Sequence[tuple[str, int | None]]  # of each layer: its kind, and how many tokens it sees (None: all)


class Ends:
    """Where the rows of one forward end, and the masks that come of it, for as long as the forward takes."""

    def __init__(self, ends_b: Tensor, windows: Windows, even: bool):
        self.ends_b, self.windows, self.even = ends_b, windows, even
        self.layers = 0  # how many have attended
        self._masks: dict[tuple[int | None, int, int], Tensor | None] = {}

    def mask(self, window: int | None, query: Tensor, slots: int, groups: int) -> Tensor | None:
        """Additive, ``[b, 1, groups · T, S]``; None if each row's only column sees all slots."""
        key = window, slots, groups
        if key not in self._masks:
            columns = query.shape[2]
            if self.even and columns == 1 and (window is None or window >= slots):
                return self._masks.setdefault(key, None)
            positions = self.ends_b.unsqueeze(1) + torch.arange(-columns, 0, device=query.device)
            self._masks[key] = _seen(positions, slots, window, query.dtype).repeat(1, 1, groups, 1)
        return self._masks[key]


class MaskAttention:
    """The model's own attention, with an additive mask of four dimensions, which every family takes."""

    def __init__(self, windows: Windows, dtype: torch.dtype):
        self.windows, self.dtype = windows, dtype

    def inputs(self, positions_bT: Tensor, ends_b: Tensor, slots: int, even: bool = False) -> dict[str, Any]:
        """What the model's forward is given: one mask ``[b, 1, T, S]``, or one for each kind of layer of a hybrid model."""
        masks = {
            _OF_BOTH.get(kind, kind): _seen(positions_bT, slots, window, self.dtype) if kind in ATTENDING else None
            for kind, window in dict(self.windows).items()
        }
        if any(kind in _OF_BOTH for kind, _ in self.windows):
            masks["linear_attention"] = None
        return {"attention_mask": masks if len(masks) > 1 else next(iter(masks.values()))}

    @contextmanager
    def active(self) -> Iterator[None]:
        """The context of a forward with such inputs."""
        yield


class EndsAttention:
    """Attention without a mask, by the ends of the rows."""

    def __init__(self, model: PreTrainedModel, windows: Windows):
        self.config, self.windows = model.config.get_text_config(decoder=True), windows

    def inputs(self, positions_bT: Tensor, ends_b: Tensor, slots: int, even: bool = False) -> dict[str, Any]:
        """What the model's forward is given; ``ends_b`` ``[b]``, int64, is one behind the position of each row's last column.

        ``even``: all of them are ``slots``, as the host knows. Then a single column needs no mask.
        Columns behind a row's budget count: their ends lie beyond what is stored. On CUDA the cache needs room for them.
        """
        return {"attention_mask": None, KEYWORD: Ends(ends_b, self.windows, even)}

    @contextmanager
    def active(self) -> Iterator[None]:
        """The context of a forward with such inputs; the model's own attention is put back behind it."""
        own = self.config._attn_implementation
        self.config._attn_implementation = NAME
        try:
            yield
        finally:
            self.config._attn_implementation = own


Attention = MaskAttention | EndsAttention


def attention_of(model: PreTrainedModel, windows: Windows, dtype: torch.dtype) -> Attention:
    """Attention by ends where every layer of the model dispatches to it and gives the same logits; else by masks.

    ``dtype`` is that of masks. The probe is made once for each model, device and dtype.
    """
    state = model.dtype, next(model.parameters()).device.type, getattr(model.config, "_attn_implementation", None)
    if model not in _by_ends or _by_ends[model][0] != state:
        _by_ends[model] = state, _takes_ends(model, windows)
    return EndsAttention(model, windows) if _by_ends[model][1] else MaskAttention(windows, dtype)


_by_ends: WeakKeyDictionary[nn.Module, tuple[object, bool]] = WeakKeyDictionary()


@torch.no_grad()
def _takes_ends(model: PreTrainedModel, windows: Windows) -> bool:
    if getattr(model.config.get_text_config(decoder=True), "_attn_implementation", None) != "sdpa":
        return False  # somebody chose another, or the family needs it
    device = next(model.parameters()).device
    tokens = torch.tensor([[1, 2, 3, 1], [3, 1, 1, 2]], device=device)
    attention = EndsAttention(model, windows)
    inputs = attention.inputs(tokens, torch.full((2,), 4, device=device), 4)
    with evaluating(model):
        expected = model(input_ids=tokens, use_cache=False).logits.float()
        try:
            with attention.active():
                logits = model(input_ids=tokens, use_cache=False, **inputs).logits.float()
        except Exception:  # it does not hand the keyword down, or wants more of its attention than is known here
            return False
    error = (logits - expected).square().mean(-1).sqrt() / expected.std(-1).clamp(min=1e-6)
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 2e-2
    attending = sum(kind in ATTENDING for kind, _ in windows)
    return inputs[KEYWORD].layers == attending and bool((error <= tolerance).all())


def _seen(positions_bT: Tensor, slots: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """An additive mask ``[b, 1, T, S]`` of what each position sees.

    What is hidden has the lowest finite number: padding sees nothing, and a row of -inf is NaN in a plain softmax.
    """
    query, slot = positions_bT[:, None, :, None], torch.arange(slots, device=positions_bT.device)
    seen = slot <= query
    if window is not None:
        seen &= slot > query - window
    zero = torch.zeros((), dtype=dtype, device=positions_bT.device)
    return torch.where(seen, zero, torch.finfo(dtype).min)


# --- the function that transformers calls -----------------------------------------------------------------------------------

# What models hand down that says nothing of the weights of attention, or what is known already.
_MEANINGLESS = {
    "position_ids",
    "use_cache",
    "cache",
    "past_key_values",
    "cache_position",
    "output_attentions",
    "is_causal",
    "output_router_logits",
}


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **settings: Any,
) -> tuple[Tensor, None]:
    """``query`` ``[b, Q, T, D]`` over ``key`` and ``value`` ``[b, H, S, D]``: ``[b, T, Q, D]``."""
    ends: Ends = settings.pop(KEYWORD)
    window = ends.windows[module.layer_idx][1]
    told = settings.pop("sliding_window", window)
    unknown = {name for name, setting in settings.items() if setting is not None} - _MEANINGLESS
    if unknown or dropout or attention_mask is not None or told != window:
        raise ValueError(f"attention by ends does not know {sorted(unknown) or 'this mask, window or dropout'}")
    ends.layers += 1
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _varlen(query, key, value, ends.ends_b, window, scaling), None
    b, heads, columns, _ = query.shape
    groups = heads // key.shape[1]
    mask = ends.mask(window, query, key.shape[2], groups)
    # Heads that share keys become queries of one head: no key is read twice, let alone copied.
    together = query.reshape(b, key.shape[1], groups * columns, -1)
    out = nn.functional.scaled_dot_product_attention(together, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(b, heads, columns, -1).transpose(1, 2).contiguous(), None


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, ends_b: Tensor, window: int | None, scaling: float | None
) -> Tensor:
    """One call of torch's flash attention for rows of different lengths, the same whatever else is in the batch.

    Not yet run on a GPU. It costs no copy if the cache holds ``[b, S, H, D]`` and hands out views of it.
    """
    from torch.nn.attention.varlen import varlen_attn

    b, heads, columns, _ = query.shape
    (keys, stride), (values, _) = _flat(key), _flat(value)
    count = torch.arange(b + 1, dtype=torch.int32, device=query.device)
    out = varlen_attn(
        query.transpose(1, 2).reshape(b * columns, heads, -1),
        keys,
        values,
        cu_seq_q=count * columns,
        cu_seq_k=count * stride,
        max_q=columns,
        max_k=stride,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=True,
        seqused_k=ends_b.to(torch.int32),
        num_splits=1,
    )
    assert isinstance(out, Tensor)
    return out.view(b, columns, heads, -1)


def _flat(states: Tensor) -> tuple[Tensor, int]:
    """Of ``[b, H, S, D]`` all slots of all rows one after the other, ``[b · stride, H, D]``, and the slots from row to row."""
    b, heads, slots, size = states.shape
    row, head, slot, one = states.stride()
    held = states.untyped_storage().nbytes() // states.element_size() - states.storage_offset()
    if (head, slot, one) != (size, heads * size, 1) or row % slot or b * row > held:
        return states.transpose(1, 2).reshape(b * slots, heads, size), slots
    stride = row // slot
    return states.as_strided((b * stride, heads, size), (slot, head, one)), stride


AttentionInterface.register(NAME, _attend)
