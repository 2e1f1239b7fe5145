"""Every divergence, value and gradient, against its textbook formula in float64 probability space."""

import math

import pytest
import torch

from switchkd import divergences
from switchkd.errors import ConfigError


def kl(p, q):
    return (p * (p / q).log()).sum(-1)


# The formulas written out over probabilities, p the teacher and q the student.
REFERENCE = {
    "forward_kl": (lambda p, q: kl(p, q), {}),
    "reverse_kl": (lambda p, q: kl(q, p), {}),
    "jsd": (lambda p, q: 0.3 * kl(p, 0.3 * p + 0.7 * q) + 0.7 * kl(q, 0.3 * p + 0.7 * q), {"beta": 0.3}),
    "tvd": (lambda p, q: (p - q).abs().sum(-1) / 2, {}),
    "skew_kl": (lambda p, q: kl(p, 0.2 * p + 0.8 * q), {"alpha": 0.2}),
    "skew_reverse_kl": (lambda p, q: kl(q, 0.8 * p + 0.2 * q), {"alpha": 0.2}),
}


def logits(seed, dtype=torch.float64):
    return 2 * torch.randn(4, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("name", REFERENCE)
def test_value_and_gradient_on_asymmetric_distributions(name):
    formula, parameters = REFERENCE[name]
    ours = divergences.by_name(name, **parameters)
    p, z = logits(0).softmax(-1), logits(1).requires_grad_()
    value = ours(p.log(), divergences.log_probs(z))
    (gradient,) = torch.autograd.grad(value.sum(), z)
    z2 = z.detach().clone().requires_grad_()
    expected = formula(p, z2.softmax(-1))
    (expected_gradient,) = torch.autograd.grad(expected.sum(), z2)
    torch.testing.assert_close(value, expected, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-12, rtol=1e-10)
    assert (value > 0).all()


def test_hand_made_values():
    p, q = torch.tensor([0.5, 0.5]).double().log(), torch.tensor([0.25, 0.75]).double().log()
    assert divergences.forward_kl(p, q).item() == pytest.approx(0.5 * math.log(4 / 3))
    assert divergences.reverse_kl(p, q).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert divergences.tvd(p, q).item() == pytest.approx(0.25)
    disjoint = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double().log()
    assert divergences.jsd(disjoint[0], disjoint[1]).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("name", REFERENCE)
def test_equal_distributions_diverge_by_nothing(name):
    logp = logits(3).log_softmax(-1)
    assert divergences.by_name(name)(logp, logp).abs().max() < 1e-12


@pytest.mark.parametrize("name", REFERENCE)
@pytest.mark.parametrize("masked", ["teacher", "both"])
def test_masked_entries_give_finite_values_and_gradients(name, masked):
    """A −inf · 0 hides behind a finite loss as a NaN gradient."""
    zp, zq = logits(0).clone(), logits(1)
    zp[:, 2] = -math.inf
    if masked == "both":
        zq = zq.clone()
        zq[:, 2] = -math.inf
    elif name == "reverse_kl":
        pytest.skip("q has mass where p has none: reverse KL is honestly infinite")
    zq.requires_grad_()
    value = divergences.by_name(name)(divergences.log_probs(zp), divergences.log_probs(zq))
    (gradient,) = torch.autograd.grad(value.sum(), zq)
    assert value.isfinite().all() and gradient.isfinite().all()


def test_missing_support_is_honestly_infinite():
    p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0]).log()
    assert divergences.forward_kl(p, q) == math.inf


@pytest.mark.parametrize("name", REFERENCE)
def test_half_precision_logits_are_upcast(name):
    """From identical bf16 logits, values and gradients within 0.1 % of float64's, also where p and q nearly agree."""
    p, q = logits(0, torch.bfloat16), (logits(0) + 0.2 * logits(1)).to(torch.bfloat16).requires_grad_()
    value = divergences.by_name(name)(divergences.log_probs(p), divergences.log_probs(q))
    (gradient,) = torch.autograd.grad(value.sum(), q)
    exact_q = q.detach().double().requires_grad_()
    exact = divergences.by_name(name)(divergences.log_probs(p.double()), divergences.log_probs(exact_q))
    (exact_gradient,) = torch.autograd.grad(exact.sum(), exact_q)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), exact, rtol=1e-3, atol=1e-7)
    # The gradient itself is handed back in bf16, which has 8 bits.
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=5e-3, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1, math.nan])
def test_beta_at_the_ends_is_refused_instead_of_training_on_zero(beta):
    with pytest.raises(ConfigError, match="forward_kl or reverse_kl"):
        divergences.jsd(logits(0), logits(1), beta)
    with pytest.raises(ConfigError, match="beta"):
        divergences.by_name("jsd", beta=beta)


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'forward_kl'"):
        divergences.by_name("foward_kl")
