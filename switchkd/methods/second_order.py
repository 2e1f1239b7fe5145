"""Sums over the vocabulary whose terms are all at least 0 and of second order where p and q are near, with their gradients.

The terms of ``Σ p log(p/q)`` are of first order in log(q/p) and of both signs: in fp32 their sum is off by 3e-7, and as often below
0 as above where p and q are equal. Both being normalised, ``q − p`` may be added to each term, which is then
``p · (expm1(r) − r)`` with r = log(q/p): at least 0 and of second order, and the sum is the same. What is left of the error is the
rounding of r.

A term is p times a function of r, so its derivative by log p is the term less its derivative by log q, which is called the slope.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Of each entry of the vocabulary its term, and, if asked for, its slope.
Terms = Callable[[Tensor, Tensor, bool], tuple[Tensor, "Tensor | None"]]

# Below exp(_LEAST), the smallest of which fp32 knows the inverse, a probability is 0 as far as a sum is concerned.
_LEAST = -85.0


def summed(terms: Terms, logp: Tensor, logq: Tensor) -> Tensor:
    """Sum over the last dimension of ``terms(logp, logq, …)``; gradients reach both arguments."""
    if torch.is_grad_enabled() and (logp.requires_grad or logq.requires_grad):
        return _Summed.apply(terms, logp, logq)
    if logp is logq:
        return logp.new_zeros(logp.shape[:-1])  # of a distribution and itself
    return terms(logp, logq, False)[0].sum(-1)


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, terms: Terms, logp: Tensor, logq: Tensor) -> Tensor:
        value, slope = terms(logp, logq, True)
        ctx.save_for_backward(value, slope)
        return value.sum(-1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (value, slope), grad = ctx.saved_tensors, grad.unsqueeze(-1)
        _, wants_p, wants_q = ctx.needs_input_grad
        return None, grad * (value - slope) if wants_p else None, grad * slope if wants_q else None


def kl_terms(logp: Tensor, logq: Tensor, with_slope: bool) -> tuple[Tensor, Tensor | None]:
    """Of ``KL(p ‖ q)``; infinite where q is 0 and p is not."""
    return _from_ratio(logp, logq.exp(), r := logq - logp, r.expm1(), with_slope)


def skew_terms(alpha: float) -> Terms:
    """Of ``KL(p ‖ m)`` with ``m = α p + (1 − α) q``."""

    def terms(logp: Tensor, logq: Tensor, with_slope: bool) -> tuple[Tensor, Tensor | None]:
        q = logq.exp()
        more = _ratio(logp, logq).expm1_().mul_(1 - alpha)  # m/p − 1
        slope = (more / (more + 1)).mul_(q).mul_(1 - alpha) if with_slope else None  # (1 − α) q (1 − p/m)
        return _from_ratio(logp, q.mul_(1 - alpha), more.log1p(), more, False)[0], slope

    return terms


def jsd_terms(beta: float) -> Terms:
    """Of ``β KL(p ‖ m) + (1 − β) KL(q ‖ m)`` with ``m = β p + (1 − β) q``."""

    def terms(logp: Tensor, logq: Tensor, with_slope: bool) -> tuple[Tensor, Tensor | None]:
        d = _ratio(logp, logq)
        to_p = d.expm1().mul_(1 - beta).log1p_()  # log(m/p); log(m/q) is d less
        slope = d.sub_(to_p).mul_(logq.exp()).mul_(1 - beta)
        value = torch.sub(slope, to_p.mul_(logp.exp()), alpha=beta).clamp_(min=0)
        return value, slope if with_slope else None

    return terms


def _from_ratio(logp: Tensor, q: Tensor, r: Tensor, more: Tensor, with_slope: bool) -> tuple[Tensor, Tensor | None]:
    """Terms of ``KL(p ‖ q)`` and slopes, from r = log(q/p), which is overwritten, and ``more`` = q/p − 1."""
    p, nothing = logp.exp(), logp < _LEAST
    slope = torch.where(nothing, q, p * more) if with_slope else None
    return torch.where(nothing, q, torch.sub(more, r, out=r).clamp_(min=0).mul_(p)), slope


def _ratio(logp: Tensor, logq: Tensor) -> Tensor:
    """log(q/p), finite also where one or both are 0."""
    return logq.clamp(min=_LEAST).sub_(logp.clamp(min=_LEAST))
