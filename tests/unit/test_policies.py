"""The rules against their definitions, on distributions made by hand."""

import math

import pytest
import torch

from switchkd import AdaSwitch, StudentOnly, Switch, TeacherOnly
from switchkd.divergences import LN2, jsd
from switchkd.errors import ConfigError


def logs(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


P, Q = logs([0.9, 0.1]), logs([0.2, 0.8])


def bits_of(p, q):
    m = (p.exp() + q.exp()) / 2
    kl = lambda a: (a.exp() * (a - m.log())).sum(-1)  # noqa: E731
    return (0.5 * kl(p) + 0.5 * kl(q)) / math.log(2)


def at(policy, t, q=Q, p=P):
    return policy.step(policy.init(1), q, p, torch.tensor([t]))


def test_student_only_and_teacher_only():
    for policy, target, speaker in ((StudentOnly(), Q, 0), (TeacherOnly(), P, 1)):
        decision = at(policy, 3)
        assert torch.equal(decision.log_probs, target) and decision.speaker.item() == speaker
        assert math.isnan(decision.divergence.item())


def test_switch_threshold_is_the_papers():
    tau = Switch().threshold(torch.tensor([0, 10, 23, 46]))
    assert tau.tolist() == pytest.approx([1.0, math.exp(-1), math.exp(-2.3), math.exp(-4.6)])


def test_switch_hands_over_above_the_threshold_only():
    jsd = bits_of(P, Q).item()
    crossing = -math.log(jsd) / 0.1  # where tau(t) = jsd
    before, after = at(Switch(), math.floor(crossing)), at(Switch(), math.ceil(crossing))
    assert before.speaker.item() == 0 and torch.equal(before.log_probs, Q)
    assert after.speaker.item() == 1 and torch.equal(after.log_probs, P)
    assert before.divergence.item() == pytest.approx(jsd)


def test_switch_returns_control():
    policy = Switch(schedule="constant", tau_0=0.2)
    assert [at(policy, t, q, P).speaker.item() for t, q in enumerate((P, Q, P))] == [0, 1, 0]


def test_first_token_is_the_students_even_for_disjoint_distributions():
    disjoint = at(Switch(), 0, logs([1.0, 0.0]), logs([0.0, 1.0]))
    assert disjoint.speaker.item() == 0 and disjoint.divergence.item() <= 1.0
    # In fp32 the JSD of these two is 1.0000001 bits before it is held within [0, 1].
    z = 2 * torch.randn(2, 64, generator=torch.Generator().manual_seed(9))
    z[0, 32:] = z[1, :32] = -math.inf
    q, p = z.log_softmax(-1).split(1)
    assert (jsd(p, q) / LN2).item() > 1.0
    assert Switch().step((), q, p, torch.tensor([0])).speaker.item() == 0
    in_single = Switch().step((), logs([1.0, 0.0]).float(), logs([0.0, 1.0]).float(), torch.tensor([0]))
    assert in_single.speaker.item() == 0


@pytest.mark.parametrize(
    "policy,expected",
    [
        (Switch(schedule="linear", tau_0=0.8, horizon=10), [0.8, 0.4, 0.0]),
        (Switch(schedule="constant", tau_0=0.2), [0.2, 0.2, 0.2]),
        (Switch(schedule="growth", tau_0=0.01, decay=0.2), [0.01, 0.01 * math.e, 0.01 * math.exp(4)]),
        (Switch(tau_0=0.5, decay=0.2), [0.5, 0.5 / math.e, 0.5 * math.exp(-4)]),
    ],
)
def test_switch_schedules(policy, expected):
    assert policy.threshold(torch.tensor([0, 5, 20])).tolist() == pytest.approx(expected)


def test_positions_differ_by_row():
    policy = Switch()
    decision = policy.step((), Q.repeat(2, 1), P.repeat(2, 1), torch.tensor([0, 40]))
    assert decision.speaker.tolist() == [0, 1]
    assert torch.equal(decision.log_probs, torch.cat([Q, P]))


def spoken(policy, divergences_wanted):
    """Speakers and divergences along a path whose forward KL is as wanted."""
    state, speakers, seen = policy.init(1), [], []
    for t, kl in enumerate(divergences_wanted):
        p, q = logs([1.0, 0.0]), torch.tensor([[-kl, math.log(-math.expm1(-kl))]], dtype=torch.float64)
        decision = policy.step(state, q, p, torch.tensor([t]))
        state = decision.state
        speakers.append(decision.speaker.item())
        seen.append(decision.divergence.item())
    return speakers, seen


def test_adaswitch_switches_once_and_for_ever():
    speakers, seen = spoken(AdaSwitch(window=2, ratio=3.0), [1.0, 2.0, 4.4, 4.6, 0.1, 0.1])
    # Means of the last two: –, –, 1.5 (4.4 < 4.5), 3.2 (4.6 < 9.6): nothing yet.
    assert speakers == [0, 0, 0, 0, 0, 0]
    assert seen == pytest.approx([1.0, 2.0, 4.4, 4.6, 0.1, 0.1])
    speakers, seen = spoken(AdaSwitch(window=2, ratio=3.0), [1.0, 2.0, 4.6, 0.1, 0.1])
    assert speakers == [0, 0, 1, 1, 1]
    assert seen[:3] == pytest.approx([1.0, 2.0, 4.6]) and all(map(math.isnan, seen[3:]))


def test_adaswitch_window_slides():
    # Over all five the mean would be 1.88 and 6 > 5.64 would switch; the last two have mean 4.
    assert spoken(AdaSwitch(window=2, ratio=3.0), [0.2, 0.5, 0.7, 1.0, 7.0, 6.0])[0] == [0, 0, 0, 0, 1, 1]
    assert spoken(AdaSwitch(window=2, ratio=3.0), [1.0, 1.0, 1.0, 2.9, 5.0, 6.0])[0] == [0] * 6
    # The oldest goes first: the last two have mean 2, the first and the third would have 1.5 and 5.5 > 4.5 would switch.
    assert spoken(AdaSwitch(window=2, ratio=3.0), [1.0, 2.0, 2.0, 5.5])[0] == [0] * 4


def test_adaswitch_options():
    path = [0.5, 4.0, 0.5]
    assert spoken(AdaSwitch(window=4, ratio=3.0), path)[0] == [0, 0, 0]
    assert spoken(AdaSwitch(window=4, ratio=3.0, require_full_window=False), path)[0] == [0, 1, 1]
    late = AdaSwitch(window=4, ratio=3.0, require_full_window=False, switch_token_by="student")
    assert spoken(late, path)[0] == [0, 0, 1]


def test_adaswitch_asks_for_the_student_until_it_has_switched():
    policy = AdaSwitch(window=1, ratio=0.0)
    state = policy.init(1)
    assert policy.reads(state)[0].tolist() == [True]
    for t in range(2):
        state = policy.step(state, Q, P, torch.tensor([t])).state
    assert policy.reads(state)[0].tolist() == [False] and policy.reads(state)[1] is True


@pytest.mark.parametrize(
    "make,words",
    [
        (lambda: Switch(schedule="expnential"), "did you mean 'exponential'"),
        (lambda: Switch(schedule="linear"), "needs horizon"),
        (lambda: Switch(tau_0=math.nan), "finite"),
        (lambda: Switch(decay=-0.1), "growth"),
        (lambda: AdaSwitch(window=0), "at least 1"),
        (lambda: AdaSwitch(ratio=-1.0), "at least 0"),
        (lambda: AdaSwitch(ratio=math.nan), "at least 0"),
        (lambda: AdaSwitch(divergence="kl_forward"), "unknown divergence"),
        (lambda: AdaSwitch(switch_token_by="nobody"), "'teacher' or 'student'"),
    ],
)
def test_wrong_settings_are_explained(make, words):
    with pytest.raises(ConfigError, match=words):
        make()
