"""A key/value cache for rows of different lengths that can be rolled back: the one file that touches cache classes.

A row's slot is its token position. Rolling a row back is lowering its length: stale slots are never attended, because
the mask is ``slot <= position``, and the next tokens overwrite them (what is not finite there must be cleared: a mask weighs it
with 0, and 0 · NaN is NaN). Positions and masks are always explicit, which is
what keeps learned positions (GPT-2, OPT), rotary positions and sliding windows right without any padding on the left.

Recurrent, linear-attention and convolution layers keep a state in place of slots, and a state cannot be rolled back. Such a row's
state is copied before it reads drafts (``mark``), and comes back where a draft is cut (``restore``).

Buffers are made once and never move, so that what a GPU has recorded stays true.

Shapes: B rows in the cache, b rows in a forward, T new tokens, S slots, H key/value heads, D head size.
"""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DummyLayer, DynamicCache, LinearAttentionLayer
from transformers.masking_utils import create_causal_mask

from switchkd.runner.architecture import ATTENDING, KEEPS_NOTHING, KEEPS_STATE, check_layers, keeps_state, layer_kinds
from switchkd.runner.modes import evaluating

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


class _StateLayer(LinearAttentionLayer):
    """The states of one layer, ``[B, …]`` each, and their copies of an earlier moment.

    While a forward runs the attributes of transformers' class hold the states of its rows alone.
    """

    def __init__(self, cache: "RaggedCache", states: int):
        super().__init__(number_of_states=states)
        self.cache = cache
        self.now: dict[tuple[str, int], Tensor] = {}
        self.marked: dict[tuple[str, int], Tensor] = {}

    def begin(self, rows: Places, begun: bool) -> None:
        """Hand out the states of a forward's rows; nothing where none of them has read anything yet (not ``begun``)."""
        for i in range(self.number_of_states):
            self.has_previous_state[i] = begun
            for name in _STATES:
                own = self.now.get((name, i)) if begun else None
                getattr(self, name)[i] = None if own is None else rows.on(own.device).of(own)
                getattr(self, f"is_{name}_initialized")[i] = own is not None

    def end(self, rows: Places) -> None:
        """Take the states that the forward has left."""
        for i in range(self.number_of_states):
            for name in _STATES:
                if (new := getattr(self, name)[i]) is not None:
                    if (name, i) not in self.now:
                        self.now[name, i] = new.new_zeros(self.cache.rows, *new.shape[1:])
                        self.marked[name, i] = torch.zeros_like(self.now[name, i])
                    _put(self.now[name, i], rows, new)
                getattr(self, name)[i] = None

    def mark(self, rows: Places) -> None:
        for key, own in self.now.items():
            _put(self.marked[key], rows, rows.on(own.device).of(own))

    def restore(self, rows: Places) -> None:
        for key, own in self.now.items():
            _put(own, rows, rows.on(own.device).of(self.marked[key]))

    def restart(self, row: int) -> None:
        for own in self.now.values():
            own[row].zero_()

    def move(self, to: Tensor, source: Tensor) -> None:
        for own in self.now.values():  # marks are of one round, and rows move between rounds
            own[to.to(own.device)] = own[source.to(own.device)]

    def clear(self, row: int, start: int) -> None:
        pass  # there are no slots behind a row's tokens


_STATES = ("conv_states", "recurrent_states")  # as transformers call them


class _BothLayer(_StateLayer, _Layer):
    """A layer that attends and keeps a state."""

    def __init__(self, cache: "RaggedCache", states: int):
        _Layer.__init__(self, cache)
        _StateLayer.__init__(self, cache, states)

    def lazy_initialization(self, *keys_and_values: Tensor, **states: Any) -> None:
        kind: Any = _Layer if keys_and_values else LinearAttentionLayer
        kind.lazy_initialization(self, *keys_and_values, **states)

    def move(self, to: Tensor, source: Tensor) -> None:
        _Layer.move(self, to, source)
        _StateLayer.move(self, to, source)

    def clear(self, row: int, start: int) -> None:
        _Layer.clear(self, row, start)


class RaggedCache(Cache):
    """Cache of ``rows`` rows of at most ``slots`` tokens for a stock Hugging Face causal model with these kinds of layers.

    Before a forward it is told of which rows that is, where their new tokens go (``places_bT``, flat, row by row), and how many
    slots are looked at.
    """

    def __init__(self, kinds: Sequence[str], states: int, rows: int, slots: int, device: torch.device):
        super().__init__(layers=[self._layer(kind, states) for kind in kinds])
        self.stores = [layer for layer in self.layers if not isinstance(layer, DummyLayer)]
        self.states = [layer for layer in self.layers if isinstance(layer, _StateLayer)]
        self.rows, self.slots, self.end = rows, slots, 0
        self.forward_rows, self.places_bT = Places.first(rows), torch.empty(0)
        # Of each row, in the flat buffer.
        self.first_slot = (torch.arange(rows, device=device) * (slots + 1)).unsqueeze(1)

    def _layer(self, kind: str, states: int) -> Any:
        if kind in KEEPS_NOTHING:
            return DummyLayer()
        if kind not in KEEPS_STATE:
            return _Layer(self)
        return (_BothLayer if kind in ATTENDING else _StateLayer)(self, states)

    def aim(self, rows: Places, slots_bT: Tensor, end: int) -> None:
        """Say what the next forward reads and writes."""
        self.forward_rows, self.end = rows, end
        self.places_bT = (slots_bT + rows.of(self.first_slot)).flatten()


def _put(own: Tensor, rows: Places, new: Tensor) -> None:
    """Write the rows of a forward, unless they were written in place."""
    if (places := rows.on(own.device).device) is not None:
        own[places] = new
    elif new.data_ptr() != own.data_ptr():
        own[: len(new)] = new


def attention_windows(model: PreTrainedModel) -> list[tuple[str, int | None]]:
    """For each layer its kind, in transformers' words, and how many tokens its attention sees (None: all of them).

    Raises:
        ModelError: for layers whose text cannot be taken back, as ``check_layers`` says.
    """
    check_layers(model)
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    return [
        (kind, window if kind in ("sliding_attention", "hybrid_sliding") else None)
        for kind in layer_kinds(model.config)
    ]


@torch.no_grad()
def state_bytes(model: PreTrainedModel) -> int:
    """Bytes that the states of one row take, and their copies; 0 for a model that keeps none. Its weights need not be there."""
    if not keeps_state(model.config):
        return 0
    with evaluating(model), FakeTensorMode(allow_non_fake_inputs=True):  # shapes alone
        cache = DynamicCache(config=model.config)
        token = torch.ones(1, 1, dtype=torch.int64, device=next(model.parameters()).device)
        model(input_ids=token, use_cache=True, **{CACHE: cache})
    kept = [own for layer in cache.layers for name in _STATES for own in getattr(layer, name, {}).values()]
    return sum(2 * own.numel() * own.element_size() for own in kept if own is not None)
