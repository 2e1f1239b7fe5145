"""Keyed noise: every token is ``argmax(log m + T · g)`` with Gumbel noise g keyed by (seed, sample id, position).

No random state exists. Whoever proposes a token and whoever decides it use the same noise, so each token has exactly
its law, and a draft agrees with the final token by itself whenever the two distributions agree (drafter-invariant
speculative decoding, arXiv 2408.07978: probability at least (1 − TV)/(1 + TV)).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import TYPE_CHECKING

from switchkd.base.errors import ConfigError
from switchkd.methods import divergences

if TYPE_CHECKING:  # settings are checked here, and `switchkd --help` answers without loading torch
    import torch
    from torch import Tensor

    from switchkd.methods.policy import Decision


_MASK64 = (1 << 64) - 1


class Use(IntEnum):
    """What a key is for: the first word of each, so that no two uses ever share one."""

    TOKEN = 0  # (seed, sample id, position): the noise of a token, in training, samples, evaluation and stored text
    SPEAKER = 1  # (key of a token, 0, 0): who wrote it, where the target is a blend
    CHOICE = 2  # (seed, step, 0): which text a training step reads
    REPLAY = 3  # (seed, step, place in the buffer): what is replayed
    DROPOUT = 4  # (seed, step, micro-batch of all ranks)
    ADAPTER = 5  # (seed, 0, 0): a LoRA adapter's first weights
    WEIGHTS = 6  # (seed, 0, role): the small pair's first weights
    GENERATE = 7  # (seed, first prompt of a batch, 0): the generator that transformers' generate draws from
    TEACHER = (
        8  # (seed, sample id, byte position): the noise of the teacher's token, where it has a tokenizer of its own
    )


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from its target distribution: at a temperature, from what is left after up to three cuts.

    The cuts are transformers' and in its order: of the target at the temperature, the ``top_k`` most probable tokens stay (with all
    that tie with the last), then the fewest whose mass reaches ``top_p``, then those with at least ``min_p`` times the probability
    of the best. The neutral values 0, 1 and 0 cut nothing. Temperature 0 takes the best token, which no cut removes.

    Raises:
        ConfigError: for a setting out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature must be at least 0 (0 is greedy) and finite, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1 (1 keeps all tokens), got {self.top_p}")
        if self.top_k < 0:
            raise ConfigError(f"top_k must be at least 0 (0 keeps all tokens), got {self.top_k}")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p must be from 0 (keeps all tokens) to 1, got {self.min_p}")

    @property
    def cuts(self) -> dict[str, float]:
        """The cuts that are made, by name; none where tokens are drawn from the whole distribution, and in greedy text."""
        made = {"top_p": self.top_p < 1, "top_k": self.top_k > 0, "min_p": self.min_p > 0}
        return {name: getattr(self, name) for name, is_made in made.items() if is_made and self.temperature > 0}

    def shape(self, log_probs: Tensor) -> Tensor:
        """The log-distribution ``[B, V]`` without what is cut from it, for ``draw`` at this temperature."""
        if not self.cuts:
            return log_probs
        kept = divergences.sharpened(log_probs, self.temperature, 1.0)
        if 0 < self.top_k < kept.shape[-1]:
            least = kept.topk(self.top_k).values[..., -1:]
            kept = kept.masked_fill(kept < least, -math.inf).log_softmax(-1)
        kept = divergences.sharpened(kept, 1.0, self.top_p)
        if self.min_p > 0:
            kept = kept.masked_fill(kept < kept.amax(-1, keepdim=True) + math.log(self.min_p), -math.inf)
        return log_probs.masked_fill(kept == -math.inf, -math.inf).log_softmax(-1)


_GOLDEN64 = 0x9E3779B97F4A7C15


def _mix64(x: int) -> int:
    """SplitMix64's finaliser: a bijection of 64-bit words whose output bits all depend on all input bits."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK64
    return x ^ (x >> 31)


def noise_key(seed: int, sample_id: int, position: int, use: Use = Use.TOKEN) -> int:
    """The 64-bit key of one draw; a change in any of the three, or another use, gives an unrelated key."""
    return _next_key(row_key(seed, sample_id, use), position)


def row_key(seed: int, sample_id: int, use: Use = Use.TOKEN) -> int:
    """What the keys of all positions of a row have in common."""
    return _next_key(_next_key(_mix64(use), seed), sample_id)


def _next_key(key: int, word: int) -> int:
    return _mix64((key + (word & _MASK64) + _GOLDEN64) & _MASK64)


def keys_at(row_keys: Tensor, positions: Tensor) -> Tensor:
    """``noise_key`` as tensors, where ``row_keys`` are of ``row_key``: int64 of equal bits, broadcast over ``positions``."""
    x = row_keys + positions + as_int64(_GOLDEN64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * as_int64(factor)
    return x


def keys_tensor(keys: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Keys as int64 ``[B]`` of equal bits."""
    import torch

    return torch.tensor([as_int64(key) for key in keys], dtype=torch.int64, device=device)


def gumbel_noise(keys: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise, one row for each of the int64 ``keys`` ``[...]``: ``[..., V]`` fp32, a pure function of its key.

    The uniforms have 32 bits and full relative precision near 0, the end that wins an argmax, so tokens down to a
    probability of 1e-9 are drawn at their rate.
    """
    import torch

    flat, counter = keys.reshape(-1, 1), _counter(vocab_size, keys.device)
    noise = torch.empty(len(flat), vocab_size, device=keys.device)
    rows, columns = len(flat), vocab_size
    if keys.device.type == "cpu":  # piece by piece in the cache: some forty passes are four times as fast there
        columns = min(vocab_size, _CACHED)
        rows = _CACHED // columns
    for row in range(0, len(flat), max(rows, 1)):
        here = slice(row, row + rows)
        low, high = flat[here].to(torch.int32), (flat[here] >> 32).to(torch.int32)
        for column in range(0, vocab_size, columns):
            there = slice(column, column + columns)
            _gumbel(counter[there], low, high, noise[here, there])
    return noise.view(*keys.shape, vocab_size)


# Numbers of a piece of noise that is worked on at once on a CPU.
_CACHED = 2**16


def _gumbel(counter: Tensor, low: Tensor, high: Tensor, out: Tensor) -> None:
    """The noise ``[b, v]`` of keys whose two halves are ``[b, 1]``, at the places of ``counter`` ``[v]``."""
    import torch

    bits = _mix32(_mix32(counter + low).bitwise_xor_(high))
    # int32 in [−2^31, 2^31) to (0, 1), rounded once: both addends are exact in fp32. float64, which would be simpler, is not
    # there on every device. The clamp keeps log1p(−u) finite where u is rounded up to 1.
    high_bits, low_bits = (bits >> 8).float().add_(2.0**23), bits.bitwise_and_(255).float().add_(0.5)
    negative = low_bits.add_(high_bits, alpha=256).mul_(-(2.0**-32)).clamp_(min=2.0**-24 - 1)
    torch.neg(negative.log1p_().neg_().log_(), out=out)


@lru_cache(maxsize=4)
def _counter(vocab_size: int, device: torch.device) -> Tensor:
    import torch

    return torch.arange(vocab_size, dtype=torch.int32, device=device) * _int32(0x9E3779B9)


def draw(log_probs: Tensor, noise: Tensor, temperature: float = 1.0) -> Tensor:
    """One token a row from ``log_probs`` ``[B, V]`` at ``temperature`` with the noise ``[B, V]``: ``[B]`` token ids.

    The law is ``softmax(log_probs / temperature)``; at temperature 0 it is the argmax, and the noise plays no part.
    """
    if temperature == 0:
        return log_probs.argmax(-1)
    return log_probs.add(noise, alpha=temperature).argmax(-1)


def keyed_uniform(seed: int, sample_id: int, position: int, use: Use = Use.TOKEN) -> float:
    """A uniform number of [0, 1) that is a function of the three words and the use alone."""
    return noise_key(seed, sample_id, position, use) / 2.0**64


def speakers(decision: Decision, token: Tensor, keys: Tensor) -> Tensor:
    """Who wrote ``token`` ``[B]``: what the policy says, or, where it blends both models, one of them, drawn at random.

    The teacher is drawn with the share that its part has in the probability of the token. With p 0.5, q 0.1 and the blend
    0.2 p + 0.8 q = 0.18, that is 0.2 · 0.5 / 0.18.

    ``keys`` ``[B]`` are those of the tokens' noise; the draw is independent of it.
    """
    if decision.teacher_part is None:
        return decision.speaker
    whole, part = (logs.gather(1, token.unsqueeze(1))[:, 0] for logs in (decision.log_probs, decision.teacher_part))
    odds = (part - whole).exp()
    return (_speaker_uniform(keys) < odds).long()


def _speaker_uniform(keys: Tensor) -> Tensor:
    """``keyed_uniform(key, 0, 0, Use.SPEAKER)`` of each key, cut to the 24 bits that fp32 holds.

    Rounded, it might be 1, and not below the odds of a sure teacher.
    """
    zero = keys.new_zeros(())
    key = keys_at(keys_at(keys_at(zero + as_int64(_mix64(Use.SPEAKER)), keys), zero), zero)
    return ((key >> 40) & 0xFFFFFF).float().mul_(2.0**-24)


def _mix32(x: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser, in place; int32 products wrap, and ``& mask`` makes the right shift logical."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, None)):
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << (32 - shift)) - 1))
        if factor is not None:
            x.mul_(_int32(factor))
    return x


def _int32(word: int) -> int:
    """The low 32 bits of ``word`` as a signed integer."""
    return (word + 2**31) % 2**32 - 2**31


def as_int64(word: int) -> int:
    """The signed integer of the same 64 bits."""
    return (word + 2**63) % 2**64 - 2**63
