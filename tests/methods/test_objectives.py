"""Every objective against its formula in probability space, value and gradient, with its constants held constant.

``REFERENCES`` write each formula down once more, from the papers, on float64 probabilities. They take the student's
distribution twice: ``q`` moves, ``q0`` is where the constants are computed. The gradient of an objective must be the finite
difference of its reference in ``q`` alone, and its value the reference's.
"""

import math

import pytest
import torch

from switchkd.base.errors import ConfigError
from switchkd.methods import objectives
from switchkd.methods.objective import CrossEntropy, Tokens
from switchkd.methods.objectives import (
    AKL,
    JSD,
    OBJECTIVES,
    OPD,
    TAID,
    DistiLLM2,
    ForwardKL,
    MiniLLM,
    ReplacedCE,
    ReverseKL,
    SkewKL,
    Veto,
)

N, V = 7, 5
GENERATOR = torch.Generator().manual_seed(3)
LOGITS_P, LOGITS_Q = (2 * torch.randn(N, V, dtype=torch.float64, generator=GENERATOR) for _ in range(2))
TOKENS = Tokens(
    torch.tensor([0, 3, 1, 4, 4, 2, 0]), torch.tensor([0, 1, 2, 0, 1, 0, 2]), torch.tensor([0, 0, 0, 1, 1, 1, 3])
)


def kl(a, b):
    return (a * (a / b).log()).sum(-1)


def of_text(x):
    return x[range(N), TOKENS.ids]


def akl(p, q, q0):
    head = torch.zeros_like(p)
    for n in range(N):
        mass = 0.0
        for i in sorted(range(V), key=lambda i: -p[n, i].item()):
            if mass < 0.5:
                head[n, i] = 1
            mass += p[n, i].item()
    gap = (p - q0).abs()
    g_head, g_tail = (gap * head).sum(-1), (gap * (1 - head)).sum(-1)
    return (g_head * kl(p, q) + g_tail * kl(q, p)) / (g_head + g_tail)


def on_top(a, b, by, k=2):
    """The terms of KL(a ‖ b) at the k largest entries of ``by``."""
    return (a * (a / b).log()).gather(1, by.topk(k).indices).sum(-1)


def normalised(x):
    return x / x.sum(-1, keepdim=True)


def minillm(p, q, q0):
    reward, mixed = (of_text(p) / of_text(q0)).log(), 0.2 * of_text(p) + 0.8 * of_text(q0)
    losses = []
    for t in range(N):
        later = [reward[u] for u in range(t + 1, N) if TOKENS.rows[u] == TOKENS.rows[t]]
        to_come = sum(later) / len(later) if later else torch.tensor(0.0)
        w, w0 = (of_text(x)[t] / mixed[t] for x in (q, q0))
        losses.append(w0 * kl(q, p)[t] + torch.maximum(-to_come * w, -to_come * w.clamp(0.8, 1.2)))
    return torch.stack(losses)


SPOKEN = [TOKENS.speakers == speaker for speaker in (0, 1, 2)]
SKEW = lambda p, q: kl(p, 0.1 * p + 0.9 * q)  # noqa: E731
REFERENCES = {
    "cross_entropy": lambda p, q, q0: -of_text(q).log(),
    "forward_kl": lambda p, q, q0: kl(p, q),
    "reverse_kl": lambda p, q, q0: kl(q, p),
    "jsd": lambda p, q, q0: 0.5 * kl(p, (p + q) / 2) + 0.5 * kl(q, (p + q) / 2),
    "tvd": lambda p, q, q0: 0.5 * (p - q).abs().sum(-1),
    "skew_kl": lambda p, q, q0: SKEW(p, q),
    "skew_reverse_kl": lambda p, q, q0: SKEW(q, p),
    "distillm2": lambda p, q, q0: torch.where(SPOKEN[0], SKEW(q, p), SKEW(p, q)),
    "akl": akl,
    "taid": lambda p, q, q0: kl(normalised(q0**0.6 * p**0.4), q),
    "veto": lambda p, q, q0: kl(normalised(p * q0**0.5), q),
    "replaced_ce": lambda p, q, q0: torch.where(SPOKEN[1], -of_text(q).log(), kl(p, q)),
    "opd": lambda p, q, q0: -of_text(q) / of_text(q0) * (of_text(p) / of_text(q0)).log(),
    "minillm": minillm,
}


def losses(objective, logits_q):
    logp, logq = (objectives_logs.log_softmax(-1) for objectives_logs in (LOGITS_P, logits_q))
    tokens = TOKENS
    if objective.looks_ahead:
        written = [objective.soften(logs.detach()).gather(1, TOKENS.ids.unsqueeze(1))[:, 0] for logs in (logp, logq)]
        tokens = objective.look_ahead(TOKENS, *written)
    return objective.loss(logp, logq, tokens)


def check(objective, reference):
    """Value and gradient; directions with a token's own weight, so that no token's gradient can hide in another's."""
    leaf = LOGITS_Q.clone().requires_grad_()
    values = losses(objective, leaf)
    q0 = LOGITS_Q.softmax(-1)
    expected = reference(LOGITS_P.softmax(-1), q0, q0)
    torch.testing.assert_close(values, expected, atol=1e-12, rtol=1e-12)
    weights = torch.arange(1.0, N + 1, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((weights * values).sum(), leaf)
    for direction in torch.eye(V, dtype=torch.float64):
        ahead, behind = (
            reference(LOGITS_P.softmax(-1), (LOGITS_Q + sign * 1e-6 * direction).softmax(-1), q0) for sign in (1, -1)
        )
        torch.testing.assert_close(gradient @ direction, weights * (ahead - behind) / 2e-6, atol=1e-7, rtol=1e-6)


def test_every_objective_has_a_reference():
    assert REFERENCES.keys() == OBJECTIVES.keys()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_and_gradient_are_the_papers(name):
    check(OBJECTIVES[name](), REFERENCES[name])


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "cross_entropy"])
def test_temperature_softens_both_and_adds_no_factor(name):
    reference = REFERENCES[name]

    def softened(p, q, q0):
        return reference(*(normalised(x ** (1 / 3)) for x in (p, q, q0)))

    check(OBJECTIVES[name](temperature=3.0), softened)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_weights_by_speaker_and_a_share_of_cross_entropy(name):
    reference = REFERENCES[name]
    weights = torch.tensor([0.25, 3.0, 1.0], dtype=torch.float64)[TOKENS.speakers]
    share = 0.4 * SPOKEN[2].double()

    def mixed(p, q, q0):
        return (1 - share) * weights * reference(p, q, q0) - share * of_text(q).log()

    check(OBJECTIVES[name](student_weight=0.25, teacher_weight=3.0, ce_weight=0.4), mixed)


@pytest.mark.parametrize(
    "objective,reference",
    [
        (JSD(beta=0.2), lambda p, q, q0: 0.2 * kl(p, 0.2 * p + 0.8 * q) + 0.8 * kl(q, 0.2 * p + 0.8 * q)),
        (SkewKL(alpha=0.4), lambda p, q, q0: kl(p, 0.4 * p + 0.6 * q)),
        (DistiLLM2(beta=0.5), lambda p, q, q0: torch.where(SPOKEN[0], 0.5 * SKEW(q, p), 1.5 * SKEW(p, q))),
        (TAID(s=1.0), REFERENCES["forward_kl"]),
        (TAID(s=0.0), lambda p, q, q0: kl(q0, q)),
        (Veto(beta=0.0), REFERENCES["forward_kl"]),
        (Veto(beta=2.0), lambda p, q, q0: kl(normalised(p * q0**2), q)),
        (AKL(head_mass=1.0), REFERENCES["forward_kl"]),
        (Veto(beta=2.0, divergence="reverse_kl"), lambda p, q, q0: kl(q, normalised(p * q0**2))),
        (ReplacedCE(divergence="reverse_kl"), lambda p, q, q0: torch.where(SPOKEN[1], -of_text(q).log(), kl(q, p))),
        (ReplacedCE(top_k=2), lambda p, q, q0: torch.where(SPOKEN[1], -of_text(q).log(), on_top(p, q, p).clamp(min=0))),
        (ReverseKL(top_k=2), lambda p, q, q0: on_top(q, p, q0)),
        (ReverseKL(top_k=V), REFERENCES["reverse_kl"]),
        (
            DistiLLM2(detach_mixture=True),
            lambda p, q, q0: torch.where(SPOKEN[0], kl(q, 0.9 * p + 0.1 * q0) - q.sum(-1) + 1, SKEW(p, q)),
        ),
    ],
)
def test_settings_reach_their_place(objective, reference):
    check(objective, reference)


def test_minillm_without_mix_in_clip_or_normalisation():
    """Weights are 1 in value; R is a sum; on the student's own text the gradient is that of the whole text's reverse KL."""

    def plain(p, q, q0):
        reward = (of_text(p) / of_text(q0)).log()
        later = [sum(reward[u] for u in range(t + 1, N) if TOKENS.rows[u] == TOKENS.rows[t]) for t in range(N)]
        to_come = torch.tensor([float(x) for x in later], dtype=torch.float64)
        return kl(q, p) - to_come * of_text(q) / of_text(q0)

    check(MiniLLM(alpha=0.0, clip=1e9, length_normalised=False), plain)


def test_opd_is_unbiased_for_the_reverse_kl():
    """Averaged over the student's law of the token, value and gradient are the exact reverse KL's."""
    leaf = LOGITS_Q.clone().requires_grad_()
    q = LOGITS_Q.softmax(-1)
    total = 0.0
    for y in range(V):
        tokens = Tokens(torch.full((N,), y), TOKENS.speakers, TOKENS.rows)
        total = total + q[:, y] * OPD().loss(LOGITS_P.log_softmax(-1), leaf.log_softmax(-1), tokens)
    exact_leaf = LOGITS_Q.clone().requires_grad_()
    exact = kl(exact_leaf.softmax(-1), LOGITS_P.softmax(-1))
    torch.testing.assert_close(total, exact)
    ours, expected = (torch.autograd.grad(x.sum(), y)[0] for x, y in ((total, leaf), (exact, exact_leaf)))
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in ("cross_entropy", "veto")])
def test_a_student_that_is_the_teacher_stays_where_it_is(name):
    """Also TVD, whose slope is chosen as 0 there. Replaced tokens still have their cross-entropy; Veto's target is sharper."""
    leaf = LOGITS_P.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(losses(OBJECTIVES[name](), leaf).sum(), leaf)
    still = ~SPOKEN[1] if name == "replaced_ce" else slice(None)
    assert gradient[still].abs().max() < 1e-12


# Settings at which a formula has a factor of 0, or an end, beside those in the middle.
ENDS = {
    "cross_entropy": [{}],
    "forward_kl": [{}],
    "reverse_kl": [{}, {"top_k": 2}, {"top_k": 1}],
    "jsd": [{}, {"beta": 1e-6}, {"beta": 1 - 1e-6}],
    "tvd": [{}],
    "skew_kl": [{}, {"alpha": 1e-6}, {"alpha": 1 - 1e-6}],
    "skew_reverse_kl": [{}, {"alpha": 1e-6}, {"alpha": 1 - 1e-6}],
    "distillm2": [{}, {"beta": 0.0}, {"beta": 2.0}, {"detach_mixture": True}],
    "akl": [{}, {"head_mass": 1.0}, {"head_mass": 1e-6}],
    "taid": [{}, {"s": 0.0}, {"s": 1.0}],
    "veto": [{}, {"beta": 0.0}, {"beta": 3.0}, {"divergence": "reverse_kl"}, {"beta": 0.0, "divergence": "reverse_kl"}],
    "replaced_ce": [{}, {"top_k": 1}, {"top_k": 0}, {"divergence": "reverse_kl"}, {"divergence": "skew_kl"}],
    "opd": [{}],
    "minillm": [{}, {"alpha": 0.0}, {"clip": 0.0}, {"length_normalised": False}],
}
SHARES = [{}, {"student_weight": 0.0}, {"teacher_weight": 0.0}, {"ce_weight": 1.0}]
# Entries (token, id) to which a model gives no probability; the fourth token was written with id 4, the sixth with 2.
HOLES = {
    "p": ([(0, 1), (3, 0), (5, 4)], []),
    "q": ([], [(1, 0), (4, 1), (6, 3)]),
    "both": ([(n, (TOKENS.ids[n] + 1) % V) for n in range(0, N, 2)],) * 2,
    "apart": ([(2, 0), (2, 2)], [(2, 3), (2, 4)]),
    "one-hot p": ([(n, i) for n in range(N) for i in range(V) if i != TOKENS.ids[n]], []),
    "one-hot q": ([], [(n, i) for n in range(N) for i in range(V) if i != TOKENS.ids[n]]),
    "one-hot both": ([(n, i) for n in range(N) for i in range(V) if i != TOKENS.ids[n]],) * 2,
    "written, by p": ([(3, 4), (5, 2)], []),
    "written, by q": ([], [(3, 4), (5, 2)]),
    "written by q, and apart": ([(3, 1), (5, 3)], [(3, 4), (5, 2)]),
}


def with_holes(objective, holes, depth):
    """Losses, and the gradient in the student's logits of the finite ones, where entries are ``-depth``."""
    logits_p, logits_q = LOGITS_P.clone(), LOGITS_Q.clone()
    for logits, entries in zip((logits_p, logits_q), holes, strict=True):
        for entry in entries:
            logits[entry] = -depth
    leaf = logits_q.requires_grad_()
    logp, logq, tokens = logits_p.log_softmax(-1), leaf.log_softmax(-1), TOKENS
    if objective.looks_ahead:
        written = [x.detach().gather(1, TOKENS.ids.unsqueeze(1))[:, 0] for x in (logp, logq)]
        tokens = objective.look_ahead(TOKENS, *written)
    return objective.loss(logp, logq, tokens), leaf


def test_every_objective_is_tried_at_its_ends():
    assert ENDS.keys() == OBJECTIVES.keys()


@pytest.mark.parametrize("holes", HOLES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_probability_is_what_ever_less_probability_tends_to(name, holes):
    """Wherever losses stay where they are as entries sink, they and their gradients are the same at −inf; no NaN of 0 · inf."""
    for settings in ENDS[name]:
        if holes.startswith("written") and holes != "written, by p" and settings.get("alpha") == 0:
            continue  # text of the student's own that it cannot write has the importance weight 0 / 0
        for share in SHARES:
            objective = OBJECTIVES[name](**settings, **share)
            (low, _), (lower, lower_leaf), (none, leaf) = (
                with_holes(objective, HOLES[holes], d) for d in (800, 1600, math.inf)
            )
            settled = ((low - lower).abs() < 1e-6) & lower.isfinite()
            told = f"{objective}: {none.tolist()}, not {lower.tolist()}"
            torch.testing.assert_close(none[settled], lower[settled], atol=1e-9, rtol=1e-9, msg=told)
            (ours,) = torch.autograd.grad(none[settled].sum(), leaf)
            (expected,) = torch.autograd.grad(lower[settled].sum(), lower_leaf)
            ours, expected = ours[settled], expected[settled]
            torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-9, msg=lambda m, o=objective: f"{o}: {m}")


def test_an_infinite_reward_stays_in_its_text():
    """Rewards of texts are summed each for itself; a difference of sums over all made those of other texts inf − inf."""
    logp, logq = torch.zeros(N), torch.arange(float(N))
    logp[4] = -math.inf  # the second token of the second text
    returns = MiniLLM(length_normalised=False).look_ahead(TOKENS, logp, logq).returns
    assert returns.tolist() == [-3.0, -2.0, 0.0, -math.inf, -5.0, 0.0, 0.0]


def test_entries_without_mass_give_finite_values_and_gradients():
    logits_p, leaf = LOGITS_P.clone(), LOGITS_Q.clone()
    logits_p[:, 0] = leaf[:, 0] = -math.inf  # padding ids that both leave out
    leaf.requires_grad_()
    tokens = Tokens(TOKENS.ids.clamp(min=1), TOKENS.speakers, TOKENS.rows, torch.ones(N))
    for name, objective in OBJECTIVES.items():
        values = objective().loss(logits_p.log_softmax(-1), leaf.log_softmax(-1), tokens)
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
        assert values.isfinite().all() and gradient[:, 1:].isfinite().all(), name


def test_taid_moves_to_the_teacher():
    taid = TAID(s=0.4, s_end=1.0, step=0.1, momentum=0.9)
    memory = taid.memory()
    assert taid.at(memory).s == 0.4
    first = taid.remember(memory, 2.0, 0.0)
    assert first["s"] == 0.4 and first["loss"] == 2.0  # one loss says nothing yet
    second = taid.remember(first, 1.5, 0.0)
    fall = 0.1 * (2.0 - 1.5) / 2.0
    assert second["fall"] == pytest.approx(fall)
    assert second["s"] == pytest.approx(0.4 + 0.1 / (1 + math.exp(-fall)) * 0.6)
    assert taid.remember(second, 9.0, 0.9)["s"] == pytest.approx(0.4 + 0.6 * 0.9)  # never behind the straight line
    assert taid.remember(second, 1.0, 1.0)["s"] == 1.0
    slower = taid.remember(first, 2.5, 0.0)
    assert 0.4 < slower["s"] < second["s"]
    assert taid.remember(memory, 2.0, 1.0)["s"] == 1.0  # a run of two steps ends at the teacher as any other


def test_a_top_of_the_teachers_tokens_may_cost_nothing_but_gains_nothing():
    """Its terms alone may add up to less than 0, where the student gives these tokens more than the teacher does."""
    logp, logq = (torch.tensor([[a, a, 1 - 2 * a]], dtype=torch.float64).log() for a in (0.35, 0.49))
    tokens = Tokens(torch.tensor([0]), torch.tensor([0]), torch.tensor([0]))
    leaf = logq.clone().requires_grad_()
    [loss] = ReplacedCE(top_k=2).loss(logp, leaf, tokens)
    loss.backward()
    assert kl(logp.exp()[:, :2], logq.exp()[:, :2]) < 0 and loss == 0.0 and not leaf.grad.any()


def moved(objective, points):
    """What the objective is at these points of training, the first of them its start."""
    memory, found = objective.memory(), []
    for progress in [*points[1:], 1.0]:
        found.append(objective.at(memory))
        memory = objective.remember(memory, 1.0, progress)
    return found


def test_vetos_target_moves_to_the_teacher():
    assert [x.beta for x in moved(Veto(beta=0.8), (0.0, 0.25, 0.5, 1.0))] == pytest.approx([0.8, 0.6, 0.4, 0.0])
    assert [x.beta for x in moved(Veto(beta=0.5, beta_end=0.5), (0.0, 0.5, 1.0))] == [0.5, 0.5, 0.5]
    check(moved(Veto(beta=2.0), (0.0, 0.5))[1], lambda p, q, q0: kl(normalised(p * q0), q))
    check(moved(Veto(beta=2.0), (0.0, 1.0))[1], REFERENCES["forward_kl"])


def test_distillm2_may_move_to_the_students_text():
    grown = moved(DistiLLM2(rise=0.5), (0.0, 0.25, 0.5, 1.0))
    assert [x.beta for x in grown] == pytest.approx([1.0, 1.25, 1.5, 1.5])
    check(grown[1], lambda p, q, q0: torch.where(SPOKEN[0], 1.25 * SKEW(q, p), 0.75 * SKEW(p, q)))
    assert DistiLLM2().memory() == {}


@pytest.mark.parametrize(
    "make,words",
    [
        (lambda: ForwardKL(temperature=0.0), "temperature of the objective must be above 0, got 0.0"),
        (lambda: CrossEntropy(temperature=2.0), "cross_entropy has no temperature"),
        (lambda: ForwardKL(ce_weight=1.5), "ce_weight is a share"),
        (lambda: ForwardKL(student_weight=-1.0), "at least 0"),
        (lambda: JSD(beta=1.0), "strictly between 0 and 1"),
        (lambda: SkewKL(alpha=0.0), "strictly between 0 and 1"),
        (lambda: DistiLLM2(beta=2.5), "0..2, got 2.5"),
        (lambda: AKL(head_mass=0.0), "head_mass"),
        (lambda: TAID(s=0.9, s_end=0.5), "s <= s_end"),
        (lambda: TAID(momentum=1.0), "momentum < 1"),
        (lambda: Veto(beta=-0.1), "at least 0"),
        (lambda: ReplacedCE(divergence="kl"), "unknown divergence"),
        (lambda: ReplacedCE(top_k=-1), "0 for all, got -1"),
        (lambda: ReverseKL(top_k=-1), "0 for all, got -1"),
        (lambda: DistiLLM2(rise=1.5), "0..2, got 1.0, and 2.5 in the end"),
        (lambda: Veto(beta_end=-1.0), "at least 0, got 0.5 and -1.0"),
        (lambda: Veto(divergence="kl"), "unknown divergence"),
        (lambda: MiniLLM(alpha=1.0), "alpha < 1"),
    ],
)
def test_wrong_settings_are_explained(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_importing_objectives_needs_no_torch():
    assert "torch" not in vars(objectives)
