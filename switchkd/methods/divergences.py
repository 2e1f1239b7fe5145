"""Divergences between two next-token distributions, given as log-probabilities.

Used twice, with the same code: inside a policy (when to switch) and as the training objective. In every function
``logp`` is the teacher's and ``logq`` the student's log-probabilities, shape ``[..., V]``, normalised over the last
dimension; the result has shape ``[...]`` and is in nats (total variation has no unit). Inputs below fp32 are upcast:
computed in bf16, the JSD of two close distributions is off by a factor of several, and a switch decision is noise.

An entry with zero probability under the first argument of a KL contributes 0 to value and gradient (0 · log 0 = 0); zero
probability under the second where the first has mass is honestly infinite.

No divergence is below 0, and of two nearly equal distributions it is known to some of its own digits rather than to those of 1
(``second_order.py``, which relies on both being normalised): two copies of a model are 1e-12 apart in fp32, not ±1e-7.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from switchkd.base.errors import ConfigError, nearest

if TYPE_CHECKING:  # tensor methods suffice at run time, and `switchkd --help` answers without loading torch
    from torch import Tensor


LN2 = math.log(2.0)  # nats in one bit
# Tokens among which a nucleus is looked for first.
_FEW = 256
# The log of no mass: finite, so that no gradient is NaN, and its exponential is 0 in every dtype.
_NO_MASS = -1e4


def log_probs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-softmax over the last dimension in fp32 or better: ``[..., V]`` logits to ``[..., V]`` log-probabilities."""
    logits = _at_least_fp32(logits)
    return (logits if temperature == 1.0 else logits / temperature).log_softmax(-1)


def forward_kl(logp: Tensor, logq: Tensor) -> Tensor:
    """``KL(p ‖ q) = Σ p log(p/q)``, the teacher's expectation; covers the teacher's modes (Hinton et al., 2015)."""
    from switchkd.methods import second_order

    return second_order.summed(second_order.kl_terms, _at_least_fp32(logp), _at_least_fp32(logq))


def reverse_kl(logp: Tensor, logq: Tensor) -> Tensor:
    """``KL(q ‖ p) = Σ q log(q/p)``, the student's expectation; seeks the teacher's modes (MiniLLM, arXiv 2306.08543)."""
    return forward_kl(logq, logp)


def jsd(logp: Tensor, logq: Tensor, beta: float = 0.5) -> Tensor:
    """GKD's generalised JSD ``β KL(p‖m) + (1−β) KL(q‖m)``, ``m = β p + (1−β) q`` (arXiv 2306.13649, eq. 1).

    Between 0 and ln 2 at ``beta = 0.5``; it tends to 0 at both ends, so β is a strength as well as a direction.
    """
    _check_open_interval("beta", beta, "forward_kl or reverse_kl")
    from switchkd.methods import second_order

    return second_order.summed(second_order.jsd_terms(beta), _at_least_fp32(logp), _at_least_fp32(logq))


def tvd(logp: Tensor, logq: Tensor) -> Tensor:
    """Total variation distance ``½ Σ |p − q|``, between 0 and 1 (f-distill, arXiv 2307.15190)."""
    return 0.5 * (_at_least_fp32(logp).exp() - _at_least_fp32(logq).exp()).abs().sum(-1)


def skew_kl(logp: Tensor, logq: Tensor, alpha: float = 0.1) -> Tensor:
    """DistiLLM's skew KL ``KL(p ‖ α p + (1−α) q)`` (arXiv 2402.03898, eq. 3); finite wherever p has mass."""
    _check_open_interval("alpha", alpha, "forward_kl")
    from switchkd.methods import second_order

    return second_order.summed(second_order.skew_terms(alpha), _at_least_fp32(logp), _at_least_fp32(logq))


def skew_reverse_kl(logp: Tensor, logq: Tensor, alpha: float = 0.1) -> Tensor:
    """DistiLLM's skew reverse KL ``KL(q ‖ (1−α) p + α q)``, SWITCH's objective at its default α = 0.1."""
    return skew_kl(logq, logp, alpha)


def coarsened(logp_topk: Tensor, ids: Tensor, logq: Tensor) -> tuple[Tensor, Tensor]:
    """Both distributions on k named ids and one tail bucket with all other mass: two tensors of log-probabilities ``[N, k+1]``.

    ``logp_topk`` ``[N, k]`` are the teacher's log-probabilities of the ``ids`` ``[N, k]`` (distinct in a row), ``logq``
    ``[N, V]`` the student's of all. Any divergence here of the two results is at least 0, at most that of the full
    distributions, grows with k, and at k = V is it: merging outcomes never moves two distributions apart. Without the bucket,
    k = 1 would always give 0, and a teacher that was not renormalised could give less.

    What the teacher's tail holds is known to the rounding of 1: below that it counts as that much. So a reverse KL stays
    finite where the k ids hold all of the teacher's mass. Gradients reach ``logq``.
    """
    import torch

    logp_topk, logq, ids = _at_least_fp32(logp_topk), _at_least_fp32(logq), ids.long()
    tail_q = logq.scatter(-1, ids, _NO_MASS).logsumexp(-1, keepdim=True)
    if ids.shape[-1] == logq.shape[-1]:
        tail_p = tail_q.detach().to(logp_topk.dtype)  # nothing is left for either
    else:
        rounding = 1.2e-7 if logp_topk.element_size() == 4 else 2.3e-16
        # 1 less the largest, exact where that is nearly 1, less the others: no wider numbers, which not every device has.
        best, place = logp_topk.max(-1, keepdim=True)
        tail = -best.expm1() - logp_topk.exp().scatter(-1, place, 0.0).sum(-1, keepdim=True)
        tail_p = tail.clamp(min=rounding).log()
    return torch.cat([logp_topk, tail_p], -1), torch.cat([logq.gather(-1, ids), tail_q], -1)


def sharpened(logs: Tensor, temperature: float, top_p: float) -> Tensor:
    """Log-probabilities ``[B, V]`` at a temperature, cut to the fewest tokens whose mass reaches ``top_p`` and renormalised."""
    if temperature != 1:
        logs = (logs / temperature).log_softmax(-1)
    if top_p == 1:
        return logs
    # A nucleus is mostly small, and a CPU sorts slowly; rows where it is not are sorted whole, each for itself.
    few = _FEW if logs.device.type == "cpu" else logs.shape[-1]
    best, index = logs.topk(min(few, logs.shape[-1]))
    cut = logs.new_full(logs.shape, -math.inf).scatter(-1, index, _nucleus(best, top_p))
    if best.shape[-1] < logs.shape[-1] and (short := best.exp().sum(-1) < top_p).any():
        ordered, index = logs[short].sort(descending=True)
        cut[short] = _nucleus(ordered, top_p).gather(-1, index.argsort())
    return cut.log_softmax(-1)


def _nucleus(ordered: Tensor, top_p: float) -> Tensor:
    """Descending log-probabilities without those behind a mass of ``top_p``."""
    p = ordered.exp()
    return ordered.masked_fill(p.cumsum(-1) - p >= top_p, -math.inf)


def largest_blend(logq: Tensor, logp: Tensor, budget: float) -> tuple[Tensor, Tensor]:
    """Log of m ∝ q^(1−a) p^a ``[B, V]`` for the largest a in [0, 1] with KL(m ‖ q) <= budget (nats), and that KL ``[B]``.

    KL(m ‖ q) grows with a, and its root almost in proportion: Newton steps on the root, within a bracket, come as near to the
    budget as rounding lets see, from below, in a quarter of the passes of a bisection. Tokens that one of the two cannot write
    have no mass where a > 0.
    """
    ratio = logp - logq
    live = ratio.isfinite()
    ratio, base = ratio.masked_fill(~live, 0.0), logq.masked_fill(~live, -math.inf)
    tiny, slack = (1e-12, 1e-6) if logq.element_size() == 4 else (1e-24, 1e-12)

    def blend(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log m, KL(m ‖ q) and the slope of its root in a."""
        unnormalised = base + a.unsqueeze(1) * ratio
        log_z = unnormalised.logsumexp(1)
        m = unnormalised - log_z.unsqueeze(1)
        weighted = m.exp() * ratio
        mean = weighted.sum(1)
        # The plain sum is off by 1e-6, and costs half as much: a large budget does not notice.
        kl = forward_kl(m, logq) if budget < 1e-3 else (a * mean - log_z).clamp(min=0)
        return m, kl, a * ((weighted * ratio).sum(1) - mean * mean) / (2 * kl.clamp(min=tiny).sqrt())

    low, high = logq.new_zeros(len(logq)), logq.new_ones(len(logq))
    all_of_p, target = blend(high)[1], math.sqrt(budget) * (1 - slack)
    a, done = (target / all_of_p.clamp(min=tiny).sqrt()).clamp(max=1), all_of_p <= budget
    for _ in range(10):
        _, kl, slope = blend(a)
        fits = kl <= budget
        low, high = a.where(fits, low), high.where(fits, a)
        newton = a + (target - kl.sqrt()) / slope.clamp(min=tiny)
        done = done | (fits & (kl >= budget * (1 - 10 * slack)))  # such a row moves no more, whatever its neighbours do
        a = a.where(done, newton.where((newton > low) & (newton < high), (low + high) / 2))
        if logq.device.type == "cpu" and done.all():  # elsewhere the question would cost more than the steps
            break
    low = (0 * low + 1).where(all_of_p <= budget, low)
    m, apart = blend(low)[0], low > 0
    kl = forward_kl(m, logq).clamp(max=budget)  # of which the plain sum may have seen the last digits otherwise
    return m.where(apart.unsqueeze(1), logq), kl.masked_fill(~apart, 0.0)


Divergence = Callable[["Tensor", "Tensor"], "Tensor"]

_PARAMETERS = {
    forward_kl: (),
    reverse_kl: (),
    jsd: ("beta",),
    tvd: (),
    skew_kl: ("alpha",),
    skew_reverse_kl: ("alpha",),
}
BY_NAME = {function.__name__: function for function in _PARAMETERS}


def by_name(name: str, *, alpha: float = 0.1, beta: float = 0.5) -> Divergence:
    """The divergence called ``name``, with the one of ``alpha`` and ``beta`` that it takes filled in.

    Raises:
        ConfigError: for an unknown name (the nearest is suggested) or a parameter outside (0, 1).
    """
    if name not in BY_NAME:
        raise ConfigError(f"unknown divergence {name!r}{nearest(name, BY_NAME)}")
    function = BY_NAME[name]
    values = {key: {"alpha": alpha, "beta": beta}[key] for key in _PARAMETERS[function]}
    for key, value in values.items():
        _check_open_interval(key, value, "forward_kl or reverse_kl")
    return partial(function, **values) if values else function  # type: ignore[arg-type]


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.element_size() >= 4 else x.float()


def _check_open_interval(name: str, value: float, instead: str) -> None:
    if not 0.0 < value < 1.0:
        raise ConfigError(f"{name} must lie strictly between 0 and 1, got {value}; at the ends use {instead}")
