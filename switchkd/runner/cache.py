"""A key/value cache for rows of different lengths that can be rolled back: the one file that touches cache classes.

A row's slot is its token position. Rolling a row back is lowering its length: stale slots are never attended, because
the mask is ``slot <= position``, and the next tokens overwrite them (what is not finite there must be cleared: a mask weighs it
with 0, and 0 · NaN is NaN). Positions and masks are always explicit, which is
what keeps learned positions (GPT-2, OPT), rotary positions and sliding windows right without any padding on the left.

Buffers are made once and never move, so that what a GPU has recorded stays true.

Shapes: B rows in the cache, b rows in a forward, T new tokens, S slots, H key/value heads, D head size.
"""

import inspect
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import create_causal_mask

from switchkd.runner.architecture import refuse_recurrent

# What transformers calls the cache that a forward is given: another name since 5.24.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


class Places(NamedTuple):
    """Which rows of a cache a forward is of, ``[b]``: for the host, and for the device (None: the first b, in order)."""

    host: np.ndarray
    device: Tensor | None = None

    @staticmethod
    def first(rows: int) -> "Places":
        """The first rows, in order, which need no copy to be read."""
        return Places(np.arange(rows))

    @staticmethod
    def at(places: np.ndarray, numbers: Tensor) -> "Places":
        """Places by number; ``numbers`` counts from 0 on the device."""
        return Places(places, None if np.array_equal(places, np.arange(len(places))) else index(places, numbers))

    def on(self, device: torch.device) -> "Places":
        """The same for another device."""
        if self.device is None or self.device.device == device:
            return self
        return self._replace(device=self.device.to(device))

    def of(self, values: Tensor) -> Tensor:
        """The rows ``[b, …]`` of ``values`` ``[B, …]``."""
        if self.device is not None:
            return values[self.device]
        return values if values.shape[0] == len(self.host) else values[: len(self.host)]


def index(places: np.ndarray, numbers: Tensor) -> Tensor:
    """Places as a tensor, put together from ``numbers``: a copy from the host would wait for all that is queued before it."""
    return torch.cat([numbers[place : place + 1] for place in places])


class _Layer(CacheLayerMixin):
    """Keys and values of one layer in ``[B, S + 1, H, D]`` buffers; slot S is a bin for padding, never read."""

    is_sliding = False

    def __init__(self, cache: "RaggedCache"):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (
            new.new_zeros(self.cache.rows, self.cache.slots + 1, new.shape[1], new.shape[3])
            for new in (key_states, value_states)
        )
        # Each as it is written, row by row, and as it is read, ``[B, H, S + 1, D]``.
        self.views = [(buffer.flatten(0, 1), buffer.transpose(1, 2)) for buffer in (self.keys, self.values)]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cache, read, device = self.cache, [], key_states.device  # which is not the cache's where layers are on several
        rows, places_bT = cache.forward_rows.on(device), cache.places_bT.to(device)
        for (flat, by_head), new in zip(self.views, (key_states, value_states), strict=True):
            flat.index_copy_(0, places_bT, new.transpose(1, 2).flatten(0, 1))
            read.append(rows.of(by_head[:, :, : cache.end]))
        return read[0], read[1]

    def move(self, to: Tensor, source: Tensor) -> None:
        if self.is_initialized:
            for buffer in (self.keys, self.values):
                buffer[to.to(buffer.device)] = buffer[source.to(buffer.device)]

    def clear(self, row: int, start: int) -> None:
        if self.is_initialized:
            self.keys[row, start:].zero_()
            self.values[row, start:].zero_()

    def get_seq_length(self) -> int:
        return 0  # positions are explicit

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.end, 0

    def get_max_length(self) -> int:
        return self.cache.slots


class RaggedCache(Cache):
    """Cache of ``rows`` rows of at most ``slots`` tokens for a stock Hugging Face causal model.

    Before a forward it is told of which rows that is, where their new tokens go (``places_bT``, flat, row by row), and how many
    slots are looked at.
    """

    def __init__(self, layers: int, rows: int, slots: int, device: torch.device):
        super().__init__(layers=[_Layer(self) for _ in range(layers)])
        self.rows, self.slots, self.end = rows, slots, 0
        self.forward_rows, self.places_bT = Places.first(rows), torch.empty(0)
        # Of each row, in the flat buffer.
        self.first_slot = (torch.arange(rows, device=device) * (slots + 1)).unsqueeze(1)

    def aim(self, rows: Places, slots_bT: Tensor, end: int) -> None:
        """Say what the next forward reads and writes."""
        self.forward_rows, self.end = rows, end
        self.places_bT = (slots_bT + rows.of(self.first_slot)).flatten()


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
