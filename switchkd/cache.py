"""A key/value cache for rows of different lengths that can be rolled back: the one file that touches cache classes.

A row's slot is its token position. Rolling a row back is lowering its length: stale slots are never attended, because
the mask is ``slot <= position``, and the next tokens overwrite them. Positions and masks are always explicit, which is
what keeps learned positions (GPT-2, OPT), rotary positions and sliding windows right without any padding on the left.

Shapes: B rows in the cache, b rows in a forward, T new tokens, S slots, H key/value heads, D head size, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from switchkd.errors import ModelError
from switchkd.models import refuse_recurrent


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
            whole = buffer if rows.shape[0] == buffer.shape[0] else buffer[rows]
            read.append(whole[:, :, :end])
        return read[0], read[1]

    def select(self, rows: Tensor) -> None:
        if self.is_initialized:
            self.keys, self.values = self.keys[rows], self.values[rows]

    def clear(self, row: int) -> None:
        if self.is_initialized:
            self.keys[row].zero_()
            self.values[row].zero_()

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


class CachedModel:
    """A causal language model over a ragged cache: ``lengths[row]`` tokens of each row have been read by the model.

    ``forwards`` counts rows times forwards of ``extend``, ``prefill_tokens`` the tokens fed by ``catch_up``.
    """

    def __init__(self, model: PreTrainedModel, rows: int, capacity: int, vocab_size: int):
        self.model, self.capacity, self.vocab_size = model, capacity, vocab_size
        self.device = next(model.parameters()).device
        self.windows = attention_windows(model)
        self.cache = RaggedCache(len(self.windows), rows, capacity)
        self.lengths = [0] * rows
        self.forwards = self.prefill_tokens = 0

    def reset(self, row: int) -> None:
        """Empty a row for a new prompt. Zeroing matters: a masked slot that holds NaN still gives 0 · NaN = NaN."""
        self.lengths[row] = 0
        for layer in self.cache.layers:
            layer.clear(row)

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order; the buffers shrink, so that the rest of a batch decodes at its own size."""
        index = torch.tensor(rows, device=self.device)
        for layer in self.cache.layers:
            layer.select(index)
        self.cache.rows = len(rows)
        self.lengths = [self.lengths[row] for row in rows]

    def catch_up(self, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> None:
        """Read ``tokens[i]``, the whole of row ``rows[i]``, as far as it has not been read, but for its last token.

        The last token is left for ``extend``, whose logits give the next one. A new prompt catches up from nothing.
        """
        behind = [(row, ids[self.lengths[row] : -1]) for row, ids in zip(rows, tokens, strict=True)]
        behind = [(row, ids) for row, ids in behind if ids]
        if not behind:
            return
        width = max(len(ids) for _, ids in behind)
        padded = torch.tensor([list(ids) + [0] * (width - len(ids)) for _, ids in behind], device=self.device)
        starts = [self.lengths[row] for row, _ in behind]
        ends = [start + len(ids) for start, (_, ids) in zip(starts, behind, strict=True)]
        self._forward([row for row, _ in behind], padded, starts, ends, keep=1)
        for end, (row, ids) in zip(ends, behind, strict=True):
            self.lengths[row] = end
            self.prefill_tokens += len(ids)

    def extend(self, rows: Sequence[int], tokens_bT: Tensor, limits: Sequence[int]) -> Tensor:
        """Read T more tokens of each of ``rows`` and return their logits ``[b, T, V]``.

        Tokens at positions from ``limits[i]`` on (drafts beyond a row's budget) are not stored; their logits mean nothing.
        """
        starts = [self.lengths[row] for row in rows]
        width = tokens_bT.shape[1]
        logits = self._forward(rows, tokens_bT, starts, limits, keep=width)
        for row, start, limit in zip(rows, starts, limits, strict=True):
            self.lengths[row] = min(start + width, limit)
        self.forwards += len(rows)
        return logits

    def _forward(
        self, rows: Sequence[int], tokens_bT: Tensor, starts: Sequence[int], limits: Sequence[int], keep: int
    ) -> Tensor:
        start, limit = torch.tensor([list(starts), list(limits)], device=self.device).unsqueeze(2).unbind(0)
        positions = start + torch.arange(tokens_bT.shape[1], device=self.device)
        valid = positions < limit
        positions = torch.where(valid, positions, 0)
        cache = self.cache
        cache.rows_b = torch.tensor(rows, device=self.device)
        cache.slots_bT = torch.where(valid, positions, self.capacity)
        cache.end = max(min(s + tokens_bT.shape[1], e) for s, e in zip(starts, limits, strict=True))
        output = self.model(
            input_ids=tokens_bT,
            attention_mask=self._mask(positions),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
        )
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
            zero = torch.zeros((), dtype=self.model.dtype, device=self.device)
            masks[kind] = torch.where(seen, zero, torch.finfo(self.model.dtype).min)
        return masks if len(masks) > 1 else next(iter(masks.values()))


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


@torch.no_grad()
def verify_cache(model: PreTrainedModel) -> None:
    """Prove on a probe that rows of different lengths, rolled back and extended, get the logits of a plain forward.

    Whatever the architecture does with masks, positions or windows, it is either exact here or refused.

    Raises:
        ModelError: the logits differ by more than rounding.
    """
    vocab_size = model.config.get_text_config().vocab_size
    rows = [[(7 * i + row) % vocab_size for i in range(length)] for row, length in enumerate((9, 4))]
    with evaluating(model):
        cached = CachedModel(model, len(rows), 12, vocab_size)
        cached.catch_up([0, 1], rows)
        wrong = torch.full((2, 2), 1 % vocab_size, device=cached.device)
        cached.extend([0, 1], wrong, [12, 12])
        cached.lengths = [len(row) - 2 for row in rows]
        tails = torch.tensor([row[-2:] for row in rows], device=cached.device)
        logits = cached.extend([0, 1], tails, [12, 12])
        plain = [model(torch.tensor([row], device=cached.device)).logits[0, -2:, :vocab_size] for row in rows]
    expected = torch.stack(plain).float()
    error = (logits.float() - expected).abs().max().item() / max(expected.abs().max().item(), 1.0)
    if not error < {torch.float64: 1e-9, torch.float32: 1e-3}.get(model.dtype, 0.1):
        raise ModelError(
            f"{model.config.model_type} cannot be decoded exactly with the ragged cache: on a probe its logits are off by "
            f"{error:.2g} (relative). Its attention is not plain full or sliding-window attention; choose another model"
        )


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout, cache allowed under gradient checkpointing), each model's own mode restored after."""
    with ExitStack() as stack:
        for model in models:
            stack.callback(model.train, model.training)
            model.eval()
        yield
