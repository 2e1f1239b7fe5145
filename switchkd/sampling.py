"""Keyed noise: every token is ``argmax(log m + T · g)`` with Gumbel noise g keyed by (seed, sample id, position).

No random state exists. Whoever proposes a token and whoever decides it use the same noise, so each token has exactly
its law, and a draft agrees with the final token by itself whenever the two distributions agree (drafter-invariant
speculative decoding, arXiv 2408.07978: probability at least (1 − TV)/(1 + TV)).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from switchkd.policies import Decision

_MASK64 = (1 << 64) - 1
_SPEAKER = 1  # parts a token's noise from the draw of who wrote it


def _mix64(x: int) -> int:
    """SplitMix64's finaliser: a bijection of 64-bit words whose output bits all depend on all input bits."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK64
    return x ^ (x >> 31)


def noise_key(seed: int, sample_id: int, position: int) -> int:
    """The 64-bit key of one draw; a change in any of the three gives an unrelated key."""
    key = 0
    for word in (seed, sample_id, position):
        key = _mix64((key + (word & _MASK64) + 0x9E3779B97F4A7C15) & _MASK64)
    return key


def gumbel_noise(keys: Sequence[int], vocab_size: int, device: torch.device | str = "cpu") -> Tensor:
    """Standard Gumbel noise, one row for each key: ``[B, V]`` fp32, each row a pure function of its key.

    The uniforms have 32 bits and full relative precision near 0, the end that wins an argmax, so tokens down to a
    probability of 1e-9 are drawn at their rate.
    """
    words = [(_int32(key), _int32(key >> 32)) for key in keys]
    low, high = torch.tensor(words, dtype=torch.int32, device=device).view(-1, 2, 1).unbind(1)
    counter = torch.arange(vocab_size, dtype=torch.int32, device=device) * _int32(0x9E3779B9)
    bits = _mix32(_mix32(counter + low).bitwise_xor_(high))
    # int32 in [−2^31, 2^31) to (0, 1): the clamp keeps log1p(−u) finite where fp32 rounds u up to 1.
    uniform = bits.double().add_(2.0**31 + 0.5).mul_(2.0**-32).float().clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def draw(log_probs: Tensor, noise: Tensor, temperature: float = 1.0) -> Tensor:
    """One token a row from ``log_probs`` ``[B, V]`` at ``temperature`` with the noise ``[B, V]``: ``[B]`` token ids.

    The law is ``softmax(log_probs / temperature)``; at temperature 0 it is the argmax, and the noise plays no part.
    """
    if temperature == 0:
        return log_probs.argmax(-1)
    return torch.add(log_probs, noise, alpha=temperature).argmax(-1)


def keyed_uniform(seed: int, sample_id: int, position: int) -> float:
    """A uniform number of [0, 1) that is a function of the three words alone."""
    return noise_key(seed, sample_id, position) / 2.0**64


def speakers(decision: Decision, token: Tensor, keys: Sequence[int]) -> Tensor:
    """Who wrote ``token`` ``[B]``: the policy's word, or, for a blended target, a draw with the odds of the two parts there.

    ``keys`` are those of the tokens' noise; the draw is independent of it.
    """
    if decision.teacher_part is None:
        return decision.speaker
    whole, part = (logs.gather(1, token.unsqueeze(1))[:, 0] for logs in (decision.log_probs, decision.teacher_part))
    uniform = torch.tensor([keyed_uniform(key, _SPEAKER, 0) for key in keys], dtype=torch.float64, device=token.device)
    return (uniform < (part - whole).double().exp()).long()


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
