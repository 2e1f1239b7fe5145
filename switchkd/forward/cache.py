"""A key/value cache for rows of different lengths that can be rolled back: the one file that touches cache classes.

A row's slot is its token position. Rolling a row back is lowering its length: stale slots are never attended, because
the mask is ``slot <= position``, and the next tokens overwrite them (what is not finite there must be cleared: a mask weighs it
with 0, and 0 · NaN is NaN). Positions and masks are always explicit, which is
what keeps learned positions (GPT-2, OPT), rotary positions and sliding windows right without any padding on the left.

Shapes: B rows in the cache, b rows in a forward, T new tokens, S slots, H key/value heads, D head size, V vocabulary.
"""

import inspect
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import create_causal_mask

from switchkd.forward.architecture import has_router_logits, refuse_recurrent
from switchkd.forward.modes import head_inputs

# What transformers calls the cache that a forward is given: another name since 5.24.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


class _Layer(CacheLayerMixin):
    """Keys and values of one layer in ``[B, H, S + 1, D]`` buffers; slot S is a bin for padding, never read."""

    is_sliding = False

    def __init__(self, cache: "RaggedCache"):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        _, heads, _, size = key_states.shape
        shape = (self.cache.rows, heads, self.cache.capacity + 1, size)
        self.keys = key_states.new_zeros(shape)
        self.values = value_states.new_zeros(*shape[:-1], value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, slots, end = self.cache.rows_b, self.cache.slots_bT, self.cache.end
        read = []
        for buffer, new in ((self.keys, key_states), (self.values, value_states)):
            buffer[rows.unsqueeze(1), :, slots] = new.transpose(1, 2)
            whole = buffer if self.cache.in_order else buffer[rows]
            read.append(whole[:, :, :end])
        return read[0], read[1]

    def select(self, rows: Tensor) -> None:
        if self.is_initialized:
            self.keys, self.values = self.keys[rows], self.values[rows]

    def clear(self, row: int, start: int = 0) -> None:
        if self.is_initialized:
            self.keys[row, :, start:].zero_()
            self.values[row, :, start:].zero_()

    def get_seq_length(self) -> int:
        return 0  # positions are explicit

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.end, 0

    def get_max_length(self) -> int:
        return self.cache.capacity


class RaggedCache(Cache):
    """Cache of ``rows`` rows of at most ``capacity`` tokens for a stock Hugging Face causal model."""

    def __init__(self, layers: int, rows: int, capacity: int):
        super().__init__(layers=[_Layer(self) for _ in range(layers)])
        self.rows, self.capacity = rows, capacity
        self.rows_b, self.slots_bT, self.end = torch.empty(0), torch.empty(0), 0
        self.in_order = False  # whether rows_b is every row in order, which needs no copy to be read


class CachedModel:
    """A causal language model over a ragged cache: ``lengths[row]`` tokens of each row have been read by the model.

    ``forwards`` counts rows times forwards of ``extend``, ``prefill_tokens`` the tokens read before the last known one.
    With ``keep_hidden``, ``hidden`` holds what entered the output layer in the last forward, ``[b, T, hidden size]``. With
    ``static``, forwards of one token of every row work on tensors that never move, on CUDA as one replayed graph.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rows: int,
        capacity: int,
        vocab_size: int,
        keep_hidden: bool = False,
        static: bool = False,
        dtype: torch.dtype | None = None,
    ):
        self.dtype = dtype or model.dtype  # of the masks, as of what attends
        self.model, self.capacity, self.vocab_size = model, capacity, vocab_size
        self.device = next(model.parameters()).device
        self.windows = attention_windows(model)
        self.cache = RaggedCache(len(self.windows), rows, capacity)
        self.lengths = [0] * rows
        self.forwards = self.prefill_tokens = 0
        # A balancing loss of the routers, for which a mask of four dimensions would be too many.
        self.extra = {"output_router_logits": False} if has_router_logits(model) else {}
        self.keep_hidden, self.hidden = keep_hidden, torch.empty(0)
        self.static = static
        self.step: _Step | None = None

    def reset(self, row: int) -> None:
        """Empty a row for a new prompt."""
        self.lengths[row] = 0
        self.clear_stale(row)

    def clear_stale(self, row: int) -> None:
        """Zero what lies behind a row's tokens. A masked slot that holds NaN or infinity would still give 0 · NaN = NaN."""
        for layer in self.cache.layers:
            layer.clear(row, self.lengths[row])

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order; the buffers shrink, so that the rest of a batch decodes at its own size."""
        index = torch.tensor(rows, device=self.device)
        for layer in self.cache.layers:
            layer.select(index)
        self.cache.rows, self.step = len(rows), None
        self.lengths = [self.lengths[row] for row in rows]

    def catch_up(self, rows: Sequence[int], texts: Sequence[Sequence[int]]) -> None:
        """Read what rows that are far behind have not read of ``texts[i]``, the whole of row ``rows[i]``, but its last token.

        A new prompt catches up from nothing. A row that lags by a token or two is left to ``extend``.
        """
        behind = {row: text[self.lengths[row] : -1] for row, text in zip(rows, texts, strict=True)}
        far = sorted((row for row in rows if len(behind[row]) >= _JOINED), key=lambda row: -len(behind[row]))
        while far:  # in groups of nearly equal length, so that little padding is read
            near = [row for row in far if len(behind[row]) >= 0.8 * len(behind[far[0]])]
            group, far = sorted(near), far[len(near) :]
            tails = [behind[row] for row in group]
            ends = [self.lengths[row] + len(tail) for row, tail in zip(group, tails, strict=True)]
            self._forward(group, tails, None, ends, keep=1)
            self.prefill_tokens += sum(map(len, tails))

    def extend(
        self,
        rows: Sequence[int],
        texts: Sequence[Sequence[int]] | None,
        drafts_bT: Tensor | None,
        limits: Sequence[int],
    ) -> Tensor:
        """Read the rest of each row's text and then its T drafts: logits ``[b, T + 1, V]``, or ``[b, T, V]`` without texts.

        The first of the T + 1 follow the text, the others the drafts. Drafts at positions from ``limits[i]`` on (beyond a
        row's budget) are not stored; their logits mean nothing.
        """
        tails = [[]] * len(rows) if texts is None else [t[self.lengths[r] :] for r, t in zip(rows, texts, strict=True)]
        drafts = 0 if drafts_bT is None else drafts_bT.shape[1]
        logits = self._forward(rows, tails, drafts_bT, limits, keep=drafts + (texts is not None))
        self.forwards += len(rows)
        self.prefill_tokens += sum(len(tail) - 1 for tail in tails if tail)
        return logits

    def _forward(
        self,
        rows: Sequence[int],
        tails: Sequence[Sequence[int]],
        drafts_bT: Tensor | None,
        limits: Sequence[int],
        keep: int,
    ) -> Tensor:
        """Read ``tails`` and drafts; tails are aligned on the right, so that what follows them stands in one column."""
        width = max(len(tail) for tail in tails)
        tokens = torch.tensor([[0] * (width - len(tail)) + list(tail) for tail in tails], device=self.device)
        if drafts_bT is not None:
            tokens = torch.cat([tokens.to(drafts_bT.dtype), drafts_bT], 1)
        starts = [self.lengths[row] for row in rows]
        shifts = [start - width + len(tail) for start, tail in zip(starts, tails, strict=True)]
        ends = [min(shift + tokens.shape[1], limit) for shift, limit in zip(shifts, limits, strict=True)]
        shift, start, end = torch.tensor([shifts, starts, ends], device=self.device).unsqueeze(2).unbind(0)
        positions = shift + torch.arange(tokens.shape[1], device=self.device)
        valid = (positions >= start) & (positions < end)
        positions, slots = torch.where(valid, positions, 0), torch.where(valid, positions, self.capacity)
        for row, length in zip(rows, ends, strict=True):
            self.lengths[row] = length
        self.cache.in_order = list(rows) == list(range(self.cache.rows))
        if self.static and tokens.shape[1] == 1 and self.cache.in_order:
            self.step = self.step or _Step(self)
            return self.step(tokens, positions, slots)
        self.cache.end = max(ends)
        return self.run(tokens, positions, slots, torch.tensor(rows, device=self.device), keep)

    def run(self, tokens: Tensor, positions: Tensor, slots: Tensor, rows: Tensor, keep: int) -> Tensor:
        """One forward over the first ``cache.end`` slots: logits ``[b, keep, V]``. Nothing here waits for the device."""
        self.cache.rows_b, self.cache.slots_bT = rows, slots
        with ExitStack() as stack:
            entered = stack.enter_context(head_inputs(self.model)) if self.keep_hidden else []
            output = self.model(
                input_ids=tokens,
                attention_mask=self._mask(positions),
                position_ids=positions,
                use_cache=True,
                logits_to_keep=keep,
                **self.extra,
                **{CACHE: self.cache},
            )
        self.hidden = entered[-1] if entered else self.hidden
        return output.logits[..., : self.vocab_size]

    def _mask(self, positions_bT: Tensor) -> Tensor | dict[str, Tensor]:
        """Additive masks ``[b, 1, T, S]``: one tensor, or one for each kind of layer of a hybrid model."""
        slots = torch.arange(self.cache.end, device=self.device)
        query = positions_bT[:, None, :, None]
        masks = {}
        for kind, window in dict(self.windows).items():
            seen = slots <= query
            if window is not None:
                seen &= slots > query - window
            zero = torch.zeros((), dtype=self.dtype, device=self.device)
            masks[kind] = torch.where(seen, zero, torch.finfo(self.dtype).min)
        return masks if len(masks) > 1 else next(iter(masks.values()))


class _Step:
    """The forward of one token of every row, over whole buffers: on CUDA captured as a graph at first and then replayed.

    In eager mode a small model's step waits for its launches; a graph is one launch.
    """

    def __init__(self, cached: CachedModel):
        self.cached = cached
        shape = (cached.cache.rows, 1)
        self.tokens, self.positions, self.slots = torch.zeros(3, *shape, dtype=torch.int64, device=cached.device)
        self.rows = torch.arange(shape[0], device=cached.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits = self.hidden = torch.empty(0)

    def __call__(self, tokens: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        """Of ``[B, 1]`` each, to logits ``[B, 1, V]``, which the next call may overwrite."""
        self.tokens.copy_(tokens)
        self.positions.copy_(positions)
        self.slots.copy_(slots)
        if self.cached.device.type != "cuda":
            self._run()
        elif self.graph is None:
            self._record()
        else:
            self.graph.replay()
        self.cached.hidden = self.hidden.clone()
        return self.logits

    def _run(self) -> None:
        self.cached.cache.end = self.cached.capacity
        self.logits = self.cached.run(self.tokens, self.positions, self.slots, self.rows, keep=1)
        self.hidden = self.cached.hidden

    def _record(self) -> None:
        side = torch.cuda.Stream()  # capture wants a run outside the main stream first, which prepares kernels
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._run()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._run()
        self.graph.replay()


def attention_windows(model: PreTrainedModel) -> list[tuple[str, int | None]]:
    """For each layer its kind, in transformers' words, and how many tokens it sees (None: all of them).

    Raises:
        ModelError: for layers that are neither full nor sliding-window attention; their state cannot be rolled back.
    """
    refuse_recurrent(model)
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
    return [(kind, window if kind == "sliding_attention" else None) for kind in kinds]


# A row with so many unread tokens before its last catches up in a forward of its own; with fewer, within the block's.
_JOINED = 2
