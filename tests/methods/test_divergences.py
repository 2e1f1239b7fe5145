"""Every divergence, value and gradient, against its textbook formula in float64 probability space."""

import math

import pytest
import torch

from switchkd.base.errors import ConfigError
from switchkd.methods import divergences


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


# --- two distributions that are nearly equal, or far apart ---------------------------------------------------------


def near(distance, dtype=torch.float32, rows=8, size=2000):
    """Teacher's and student's logits in ``dtype``, so far apart."""
    generator = torch.Generator().manual_seed(4)
    z, other = (torch.randn(rows, size, dtype=torch.float64, generator=generator) for _ in range(2))
    return (3 * z).to(dtype), (3 * z + distance * other).to(dtype)


@pytest.mark.parametrize("name", [name for name in REFERENCE if name != "tvd"])
@pytest.mark.parametrize(
    "distance,relative", [(0.0, 0.0), (1e-6, 0.5), (1e-5, 0.1), (1e-3, 1e-3), (0.1, 1e-4), (3.0, 1e-5)]
)
def test_near_distributions_are_known_to_their_own_digits_and_none_is_below_zero(name, distance, relative):
    """Summed plainly, fp32 is off by 3e-7, half of the time below 0: of two copies of a model nothing else is seen."""
    zp, zq = near(distance)
    ours = divergences.by_name(name)
    value = ours(divergences.log_probs(zp), divergences.log_probs(zq)).double()
    exact = ours(divergences.log_probs(zp.double()), divergences.log_probs(zq.double()))
    assert (value >= 0).all() and ((value - exact).abs() <= relative * exact).all()
    assert (value < 1e-10).all() or distance > 1e-5


@pytest.mark.parametrize("name", [name for name in REFERENCE if name != "tvd"])
@pytest.mark.parametrize("distance", [0.0, 1e-4, 0.1, 3.0])
def test_gradients_near_and_far_are_those_of_the_plain_formula(name, distance):
    """To both distributions, each the student's in one of the two directions."""
    formula, parameters = REFERENCE[name]
    pair = [z.requires_grad_() for z in near(distance, torch.float64, rows=3, size=50)]
    value = divergences.by_name(name, **parameters)(*map(divergences.log_probs, pair))
    expected = formula(*(z.softmax(-1) for z in pair))
    for ours, plain in zip(*(torch.autograd.grad(x.sum(), pair) for x in (value, expected)), strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-14, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", REFERENCE)
def test_probabilities_below_the_smallest_number(name, dtype):
    """−inf on either side or both, numbers whose exponential is 0, and ratios whose exponential is infinite."""
    least = [-math.inf, -1e30, -800.0, -200.0, -100.0, -88.0, -80.0, -1.0]
    rows = [(a, b) for a in least for b in least]
    zp, zq = (torch.tensor([[0.0, 0.5, z[who]] for z in rows], dtype=dtype) for who in (0, 1))
    zq.requires_grad_()
    value = divergences.by_name(name)(divergences.log_probs(zp), divergences.log_probs(zq))
    for (a, b), found in zip(rows, value.tolist(), strict=True):
        first, second = (a, b) if name == "forward_kl" else (b, a)
        if name in ("forward_kl", "reverse_kl") and second == -math.inf and first >= -80:
            assert found == math.inf  # one has mass where the other has none
        else:
            assert found >= 0
    finite = value.isfinite()
    (gradient,) = torch.autograd.grad(value[finite].sum(), zq)
    assert gradient[finite].isfinite().all()


def test_a_blend_of_two_copies_spends_nothing_and_its_divergence_is_not_below_zero():
    zp, zq = near(1e-6)
    for budget in (1e-6, 0.01):
        _, spent = divergences.largest_blend(divergences.log_probs(zq), divergences.log_probs(zp), budget)
        assert (spent >= 0).all() and (spent < 1e-10).all()


# --- k named ids and a tail bucket --------------------------------------------------------------------------------


def top_k(logp, k):
    log_probs, ids = logp.topk(k)
    return log_probs, ids.int()


def merged(p, ids):
    """Brute force: the named probabilities and the sum of the others."""
    rows = []
    for row, names in zip(p, ids.tolist(), strict=True):
        rest = [row[i] for i in range(len(row)) if i not in names]
        rows.append(torch.stack([row[i] for i in names] + [sum(rest, row.new_zeros(()))]))
    return torch.stack(rows)


@pytest.mark.parametrize("k", [1, 2, 7, 10])
@pytest.mark.parametrize("name", REFERENCE)
def test_a_tail_bucket_holds_the_rest_of_the_mass(name, k):
    """Value and gradient are the textbook formula's on the merged outcomes, and finite differences agree."""
    formula, parameters = REFERENCE[name]
    logp, z = logits(0).log_softmax(-1), logits(1).requires_grad_()
    log_probs, ids = top_k(logp, k)

    def ours(z):
        pair = divergences.coarsened(log_probs, ids, divergences.log_probs(z))
        return divergences.by_name(name, **parameters)(*pair)

    expected = formula(merged(logp.exp(), ids), merged(z.softmax(-1), ids))
    torch.testing.assert_close(ours(z), expected, atol=1e-12, rtol=1e-9)
    gradients = [torch.autograd.grad(value.sum(), z)[0] for value in (ours(z), expected)]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=1e-9)
    assert torch.autograd.gradcheck(ours, z)


@pytest.mark.parametrize("name", REFERENCE)
def test_the_merged_divergence_grows_with_k_up_to_the_full_one(name):
    function = divergences.by_name(name)
    logp, z = logits(0).log_softmax(-1), logits(1).requires_grad_()
    full = function(logp, divergences.log_probs(z))
    values = [function(*divergences.coarsened(*top_k(logp, k), divergences.log_probs(z))) for k in range(1, 12)]
    assert (values[0] > 1e-4).all()  # one id and no bucket would give 0
    assert all((low <= high + 1e-12).all() for low, high in zip(values, [*values[1:], full], strict=True))
    torch.testing.assert_close(values[-1], full, atol=1e-9, rtol=0)
    gradients = [torch.autograd.grad(value.sum(), z, retain_graph=True)[0] for value in (values[-1], full)]
    torch.testing.assert_close(*gradients, atol=1e-9, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", REFERENCE)
@pytest.mark.parametrize("case", ["all mass named", "sum above 1", "sure student", "student without a tail", "k = V"])
def test_an_empty_tail_gives_finite_values_and_gradients(name, case, dtype):
    zp, zq = logits(0, dtype), logits(1, dtype)
    logp, ids = top_k(zp.log_softmax(-1), 11 if case == "k = V" else 3)
    if case == "all mass named":
        logp = logp.log_softmax(-1)
    if case == "sum above 1":
        logp = logp.log_softmax(-1) + 1e-6
    if case == "sure student":
        zq = zq.scatter(1, ids[:, :1].long(), 300.0)
    if case == "student without a tail":
        zq = torch.full_like(zq, -math.inf).scatter(1, ids.long(), zq)
    zq.requires_grad_()
    value = divergences.by_name(name)(*divergences.coarsened(logp, ids, divergences.log_probs(zq)))
    (gradient,) = torch.autograd.grad(value.sum(), zq)
    assert value.dtype == dtype and value.isfinite().all() and gradient.isfinite().all()
    assert (value > -1e-5).all()


def test_a_tiny_tail_keeps_its_logarithm():
    """The student's to full precision, however small; the teacher's as far as its log-probabilities tell."""
    z = torch.tensor([[80.0, 1.0, 0.0, 2.0]], dtype=torch.float64)
    exact = z.log_softmax(-1)
    expected = exact[:, 1:].logsumexp(-1)
    for dtype, precision in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        _, logq = divergences.coarsened(torch.zeros(1, 1, dtype=dtype), torch.tensor([[0]]), exact.to(dtype))
        torch.testing.assert_close(logq[:, 1].double(), expected, atol=0, rtol=precision)
    for tail in (1e-3, 1e-5):
        logp = torch.tensor([[math.log1p(-tail)]], dtype=torch.float32)
        ours, _ = divergences.coarsened(logp, torch.tensor([[0]]), exact.float())
        assert ours[0, 1].exp().item() == pytest.approx(tail, rel=1e-2)
        assert ours[0, 1].item() == pytest.approx(math.log(-math.expm1(logp.item())), rel=1e-6)
    zp = exact.float().requires_grad_()  # a sure student still learns from the teacher's tail
    divergences.forward_kl(
        *divergences.coarsened(torch.tensor([[0.9]]).log(), torch.tensor([[0]]), zp)
    ).sum().backward()
    assert zp.grad is not None and zp.grad[0, 1:].sum().item() == pytest.approx(-0.1, rel=1e-5)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-2)])
@pytest.mark.parametrize("spread", [0.5, 2.0, 5.0])
@pytest.mark.parametrize("budget", [1e-4, 1e-2, 0.5, 3.0])
def test_the_largest_blend_uses_its_budget_up_and_never_more(dtype, tolerance, spread, budget):
    """Against bisection in float64, from close to far distributions; in fp32 KL itself rounds at 1e-7."""
    generator = torch.Generator().manual_seed(1)
    q, p = ((spread * torch.randn(40, 300, generator=generator).double()).log_softmax(-1) for _ in range(2))
    low, high = torch.zeros(40, 1).double(), torch.ones(40, 1).double()

    def spent(a):
        m = ((1 - a) * q + a * p).log_softmax(-1)
        return (m.exp() * (m - q)).sum(-1, keepdim=True)

    low = torch.where(spent(high) <= budget, high, low)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (
            torch.where(spent(middle) <= budget, middle, low),
            torch.where(spent(middle) <= budget, high, middle),
        )
    m, found = divergences.largest_blend(q.to(dtype), p.to(dtype), budget)
    assert (found <= budget).all() and m.dtype == dtype
    torch.testing.assert_close(found.double(), spent(low)[:, 0], atol=1e-6, rtol=tolerance)
    torch.testing.assert_close(m.double().exp(), ((1 - low) * q + low * p).softmax(-1), atol=tolerance, rtol=tolerance)


def test_blends_and_nuclei_of_a_row_do_not_depend_on_its_neighbours():
    """To the last bit: a block of any batch must decide as the row alone does. Rows need different numbers of steps."""
    generator = torch.Generator().manual_seed(2)
    spread = torch.tensor([0.3, 1.0, 3.0, 6.0] * 6).double().unsqueeze(1)
    q, p = ((spread * torch.randn(24, 400, generator=generator).double()).log_softmax(-1) for _ in range(2))
    together = [*divergences.largest_blend(q, p, 0.2), divergences.sharpened(q, 0.7, 0.9)]
    for row in range(24):
        mine = slice(row, row + 1)
        alone = [*divergences.largest_blend(q[mine], p[mine], 0.2), divergences.sharpened(q[mine], 0.7, 0.9)]
        assert all(torch.equal(a, b[mine]) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("few", [1, 3, 256])
def test_a_nucleus_is_the_fewest_tokens_that_reach_the_mass(few, monkeypatch):
    """Whether it is found among a few tokens or by a whole sort, row by row."""
    monkeypatch.setattr(divergences, "_FEW", few)
    logs = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.05, 0.9, 0.03, 0.02], [0.25, 0.24, 0.26, 0.25]]).double().log()
    expected = [[4 / 7, 3 / 7, 0, 0], [0, 1, 0, 0], [0.25 / 0.76, 0, 0.26 / 0.76, 0.25 / 0.76]]
    torch.testing.assert_close(divergences.sharpened(logs, 1.0, 0.6).exp(), torch.tensor(expected).double())
    cooler = (logs / 0.5).log_softmax(-1)
    torch.testing.assert_close(divergences.sharpened(logs, 0.5, 1.0), cooler)
    torch.testing.assert_close(divergences.sharpened(logs, 0.5, 0.6), divergences.sharpened(cooler, 1.0, 0.6))
