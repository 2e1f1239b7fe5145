"""Keyed noise for a vLLM server, with which its greedy step is switchkd's keyed draw: ``argmax(log m + T · g)``.

A file of its own, which imports nothing of switchkd: it runs in vLLM's environment. Copy it to a folder F and start the server with
``PYTHONPATH=F vllm serve … --logits-processors switchkd_noise:KeyedNoise``. Requests that do not ask for noise are left alone.

The noise is `switchkd.methods.sampling.gumbel_noise` to the last bit.
"""

from typing import Any

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality


class KeyedNoise(LogitsProcessor):
    """Adds the noise that a request's ``vllm_xargs`` name: the key of its row, the position of its first token, T, vocabulary."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.rows: dict[int, tuple[Any, ...]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        for index in batch_update.removed if batch_update else ():
            self.rows.pop(index, None)
        for index, params, _, written in batch_update.added if batch_update else ():
            asked = params.extra_args or {}
            self.rows.pop(index, None)
            if "switchkd_key" in asked:
                numbers = (asked[f"switchkd_{name}"] for name in ("key", "start", "temperature", "vocab_size"))
                self.rows[index] = (*numbers, written)
        for one, other, how in batch_update.moved if batch_update else ():
            moved, back = self.rows.pop(one, None), self.rows.pop(other, None)
            if moved is not None:
                self.rows[other] = moved
            if back is not None and how == MoveDirectionality.SWAP:
                self.rows[one] = back

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for index, (key, start, temperature, vocab_size, written) in self.rows.items():
            size = int(vocab_size)
            logits[index, size:] = float("-inf")
            if temperature > 0:
                logits[index, :size] += temperature * gumbel(
                    key_at(int(key), int(start) + len(written)), size, logits.device
                )
        return logits


_GOLDEN64 = 0x9E3779B97F4A7C15


def key_at(row_key: int, position: int) -> int:
    """The 64-bit key of a row's draw at a position."""
    x = (row_key + position + _GOLDEN64) % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x = (x ^ (x >> shift)) * factor % 2**64
    return x


def gumbel(key: int, vocab_size: int, device: torch.device) -> torch.Tensor:
    """Standard Gumbel noise of a key, ``[V]`` fp32."""
    bits = torch.arange(vocab_size, dtype=torch.int32, device=device) * _int32(0x9E3779B9) + _int32(key)
    bits = _mix32(_mix32(bits) ^ _int32(key >> 32))
    high, low = (bits >> 8).float() + 2.0**23, (bits & 255).float() + 0.5
    uniform = ((low + high * 256) * -(2.0**-32)).clamp(min=2.0**-24 - 1)
    return -(-uniform.log1p()).log()


def _mix32(x: torch.Tensor) -> torch.Tensor:
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = (x ^ ((x >> shift) & ((1 << (32 - shift)) - 1))) * _int32(factor)
    return x


def _int32(word: int) -> int:
    return (word + 2**31) % 2**32 - 2**31
