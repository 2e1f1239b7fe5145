"""The rules against their definitions, on distributions made by hand."""

import math

import pytest
import torch
from tiny import byte_level_tokenizer

from switchkd import AdaSwitch, StudentOnly, Switch, TeacherOnly
from switchkd.base.errors import ConfigError
from switchkd.methods.divergences import LN2, jsd
from switchkd.methods.policies import CAOPD, SKD, SSD, TRB, Hysteresis, MixIn
from switchkd.methods.relay import Relay
from switchkd.methods.sampling import keys_tensor, noise_key, speakers


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
    # Rounding in fp32 may leave [0, 1]; what is compared with tau = 1 may not.
    z = 2 * torch.randn(2, 64, generator=torch.Generator().manual_seed(9))
    z[0, 32:] = z[1, :32] = -math.inf
    q, p = z.log_softmax(-1).split(1)
    assert (jsd(p, q) / LN2).item() == pytest.approx(1.0, abs=1e-5)
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


def test_adaswitch_takes_no_rounding_for_a_jump():
    """Below its floor nothing is one, however many times the mean; what is written down is what d was compared with."""
    path = [1e-9, 1e-9, 1e-9, 5e-7, 0.0099, 0.0101]
    assert spoken(AdaSwitch(window=2), path)[0] == [0, 0, 0, 0, 0, 0]  # 3 x the mean of the last two is 0.0149
    assert spoken(AdaSwitch(window=2), [*path[:4], 0.0101])[0] == [0, 0, 0, 0, 1]
    assert spoken(AdaSwitch(window=2, floor=0.0), path)[0] == [0, 0, 0, 1, 1, 1]
    nan = pytest.approx(math.nan, nan_ok=True)
    assert limits(AdaSwitch(window=2), path) == [
        nan,
        nan,
        *[pytest.approx(0.01)] * 3,
        pytest.approx(3 * 0.00495, rel=1e-3),
    ]
    assert AdaSwitch().floor >= 1e-3


def test_adaswitch_asks_for_the_student_until_it_has_switched():
    policy = AdaSwitch(window=1, ratio=0.0)
    state = policy.init(1)
    assert policy.reads(state)[0].tolist() == [True]
    for t in range(2):
        state = policy.step(state, Q, P, torch.tensor([t])).state
    assert policy.reads(state)[0].tolist() == [False] and policy.reads(state)[1] is True


# --- blends: the joint law of token and speaker, against the procedure that each paper describes ---------------------


def joint_law(policy, q, p):
    """``[2, V]``: the probability of each token by student and by teacher."""
    decision = at(policy, 0, q, p)
    whole, teacher = decision.log_probs[0].exp(), decision.teacher_part[0].exp()
    assert whole.sum().item() == pytest.approx(1.0, abs=1e-12)
    return torch.stack([whole - teacher, teacher])


def proposed_and_resampled(q, p, accepts, resample):
    """A proposal from q is kept where it is accepted, else drawn again from ``resample``, by enumeration."""
    law = torch.zeros(2, len(q), dtype=torch.float64)
    for y, chance in enumerate(q):
        if accepts(y):
            law[0, y] += chance
        else:
            law[1] += chance * resample
    return law


ROWS = logs([0.4, 0.3, 0.2, 0.1, 0.0]), logs([0.05, 0.1, 0.15, 0.3, 0.4])


@pytest.mark.parametrize("q,p", [ROWS, ROWS[::-1], (ROWS[0], ROWS[0])])
def test_blends_have_the_law_of_their_procedures(q, p):
    q0, p0 = q[0].exp(), p[0].exp()
    top2 = set(p0.topk(2).indices.tolist())
    torch.testing.assert_close(joint_law(SKD(top_k=2), q, p), proposed_and_resampled(q0, p0, top2.__contains__, p0))
    best = torch.nn.functional.one_hot(p0.argmax(), 5).double()
    ours = joint_law(CAOPD(alpha=0.25), q, p)
    torch.testing.assert_close(ours, proposed_and_resampled(q0, p0, lambda y: p0[y] >= 0.25, best))
    torch.testing.assert_close(joint_law(MixIn(0.2), q, p), torch.stack([0.8 * q0, 0.2 * p0]))


def test_blends_report_how_often_the_teacher_steps_in():
    q, p = ROWS
    assert at(SKD(top_k=2), 0, q, p).divergence.item() == pytest.approx(0.9)  # q outside tokens 3 and 4
    assert at(CAOPD(alpha=0.25), 0, q, p).divergence.item() == pytest.approx(0.9)
    assert math.isnan(at(MixIn(), 0, q, p).divergence.item())


def test_skd_shapes_what_each_proposes_and_tests_against_the_plain_teacher():
    q, p = ROWS
    cold = torch.tensor([0.16, 0.09, 0.04, 0.01, 0.0]) / 0.30  # q squared: temperature 0.5
    nucleus = torch.tensor([0.16, 0.09, 0.0, 0.0, 0.0]) / 0.25  # the fewest with a mass of at least 0.6
    teacher = torch.tensor([0.0, 0.0, 0.0, 0.3, 0.4]) / 0.7
    policy = SKD(top_k=3, student_temperature=0.5, student_top_p=0.6, teacher_top_p=0.6)
    expected = proposed_and_resampled(nucleus.double(), None, {2, 3, 4}.__contains__, teacher.double())
    torch.testing.assert_close(joint_law(policy, q, p).float(), expected.float())
    kept = joint_law(SKD(top_k=5, student_temperature=0.5), q, p)
    torch.testing.assert_close(kept[0].float(), cold)
    assert not kept[1].any()


def test_who_spoke_is_drawn_with_the_odds_of_the_two_parts():
    q, p = (x.repeat(4000, 1) for x in ROWS)
    decision = MixIn(0.2).step((), q, p, torch.zeros(4000))
    keys = keys_tensor([noise_key(5, sample, 0) for sample in range(4000)])
    for y in range(5):
        token = torch.full((4000,), y)
        share = speakers(decision, token, keys).double().mean().item()
        expected = (0.2 * p[0, y].exp() / decision.log_probs[0, y].exp()).item()
        assert share == pytest.approx(expected, abs=4 * math.sqrt(0.25 / 4000))
    again = speakers(decision, token, keys.flip(0))
    assert torch.equal(again, speakers(decision, token, keys).flip(0))


def test_ssd_is_a_constant_threshold_in_nats():
    nats = jsd(P, Q).item()
    assert at(SSD(tau=nats - 1e-9), 99).speaker.item() == 1 and at(SSD(tau=nats + 1e-9), 99).speaker.item() == 0
    assert at(SSD(), 0).divergence.item() == pytest.approx(nats)
    assert at(SSD(divergence="reverse_kl"), 0).divergence.item() == pytest.approx((Q.exp() * (Q - P)).sum().item())


def test_hysteresis_takes_over_high_and_gives_back_low():
    policy = Hysteresis(take=0.3, give=0.1, divergence="tvd")
    state, who = policy.init(1), []
    for distance in (0.2, 0.31, 0.2, 0.11, 0.05, 0.2, 0.4):
        q = logs([0.5 + distance, 0.5 - distance])
        decision = policy.step(state, q, logs([0.5, 0.5]), torch.tensor([0]))
        state = decision.state
        who.append(decision.speaker.item())
    assert who == [0, 1, 1, 1, 0, 0, 1]


def test_ca_opd_threshold_follows_a_cosine_of_its_logarithm_after_a_hold():
    """The paper's −log alpha: 0.693 for the first tenth, then half a cosine to 1.386."""
    policy = CAOPD()
    logs_of_alpha = [-math.log(policy.at(x).alpha) for x in (0.0, 0.05, 0.1, 0.325, 0.55, 1.0)]
    shares = [0, 0, 0, (1 - math.cos(math.pi / 4)) / 2, 0.5, 1]
    assert logs_of_alpha == pytest.approx([math.log(2) * (1 + share) for share in shares])
    assert policy.at(0.3).at(0.0).alpha == pytest.approx(policy.at(0.3).alpha)  # the trainer always asks the first one
    assert [CAOPD(0.8, 0.0).at(x).alpha for x in (0.0, 0.1, 1.0)] == [0.8, 0.8, 0.0]
    assert [CAOPD(0.8, 0.8).at(x).alpha for x in (0.0, 0.5, 1.0)] == pytest.approx([0.8] * 3)
    assert CAOPD(0.8, 0.2, hold=0.0).at(0.5).alpha == pytest.approx(0.4)  # the geometric mean


@pytest.mark.parametrize("budget", [1e-3, 0.1, 0.5, 1.0])
def test_trb_is_the_largest_blend_within_its_budget(budget):
    q, p = logs([0.4, 0.3, 0.2, 0.1]), logs([0.05, 0.1, 0.25, 0.6])
    decision = at(TRB(budget=budget), 0, q, p)
    m = decision.log_probs
    kl = (m.exp() * (m - q)).sum().item()
    assert kl <= budget + 1e-12 and decision.divergence.item() == pytest.approx(kl)
    # On the geometric path log m = (1 − a) log q + a log p − log Z, so log-ratios of tokens give a.
    a = ((m - q)[0, 3] - (m - q)[0, 0]) / ((p - q)[0, 3] - (p - q)[0, 0])
    torch.testing.assert_close(m, ((1 - a) * q + a * p).log_softmax(1), atol=1e-9, rtol=1e-9)
    reaches = (p.exp() * (p - q)).sum().item()
    assert a.item() == pytest.approx(1.0) if reaches <= budget else kl == pytest.approx(budget, abs=1e-6)
    law = joint_law(TRB(budget=budget), q, p)
    assert law[1].sum().item() == pytest.approx(0.5 * (m.exp() - q.exp()).abs().sum().item())  # TV: as seldom as can be


def test_trb_keeps_to_tokens_that_both_can_write_and_fades_into_the_student():
    q, p = logs([0.5, 0.5, 0.0]), logs([0.0, 0.5, 0.5])
    m = at(TRB(budget=1.0), 0, q, p).log_probs.exp()
    torch.testing.assert_close(m, torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64))
    tight = at(TRB(budget=0.1), 0, q, p)  # no a > 0 is within the budget: ln 2 > 0.1
    assert torch.equal(tight.log_probs, q) and tight.divergence.item() == 0
    policy = TRB(budget=0.8, warmup=20)
    assert [policy.at(0.0, step).budget for step in (0, 5, 10, 20, 471)] == pytest.approx([0.8, 0.6, 0.4, 0.0, 0.0])
    assert policy.at(0.9, 5) == policy.at(0.01, 5)  # steps of their own, not a share of the run
    late = policy.at(0.0, 20)
    assert torch.equal(at(late, 0, q, p).log_probs, q) and late.reads(()) == (True, False)


# Policies that blend or replace, with settings at their ends too.
BLENDS = [
    MixIn(0.2), MixIn(1e-9), CAOPD(alpha=0.25), CAOPD(alpha=0.0), CAOPD(alpha=1.0), SKD(top_k=1), SKD(top_k=5), TRB(budget=0.0),
    TRB(budget=0.01), TRB(budget=50.0), Switch(schedule="constant", tau_0=0.2), SSD(divergence="forward_kl"),
    Hysteresis(divergence="reverse_kl"),
]  # fmt: skip
HOLES = {
    "p": ([1, 3], []),
    "q": ([], [0, 2]),
    "both": ([1, 4], [1, 4]),
    "apart": ([0, 1, 2], [3, 4]),
    "one-hot": ([0, 1, 3, 4],) * 2,
}


@pytest.mark.parametrize("holes", HOLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_probability_is_what_ever_less_probability_tends_to(holes, dtype):
    """Targets, the teacher's part and what is compared, with −inf in either distribution or both; never a NaN of 0 · inf."""
    z = torch.randn(2, 5, generator=torch.Generator().manual_seed(4)).to(dtype)

    def decided(policy, depth):
        logits = z.clone()
        for row, ids in zip(logits, HOLES[holes], strict=True):
            row[ids] = -depth
        p, q = logits.log_softmax(-1).split(1)
        return at(policy, 3, q, p)

    for policy in BLENDS:
        low, none = decided(policy, 900.0), decided(policy, math.inf)
        assert none.log_probs.exp().sum().item() == pytest.approx(1.0, abs=1e-6), policy
        assert none.divergence.isnan().tolist() == low.divergence.isnan().tolist(), policy
        if isinstance(policy, TRB):  # its blend with almost no probability has a place between, which is of no use
            continue
        torch.testing.assert_close(none.log_probs.exp(), low.log_probs.exp(), atol=1e-6, rtol=0)
        if none.teacher_part is not None:
            torch.testing.assert_close(none.teacher_part.exp(), low.teacher_part.exp(), atol=1e-6, rtol=0)


def relayed(policy, tokens, q=Q, p=P, drafted=()):
    """A relay over ``tokens`` where the two distributions stay the same: whose each is (S student, T teacher, B a trigger that
    either writes), whether the student is asked, and after how many the text ends (None: it does not).

    At a trigger the student drew the same token at the positions ``drafted``.
    """
    state, who, asked = policy.init(1), "", []
    for t, token in enumerate(tokens):
        asked.append(policy.reads(state)[0].item())
        decision = policy.step(state, q, p, torch.tensor([0]))
        teacher = decision.teacher_part[0].exp().sum().item()
        kind = "S" if teacher == 0 else "T" if teacher == pytest.approx(1.0) else "B"
        if kind == "B":  # all that can be written is the teacher's best token
            best = p[0].argmax().item()
            assert decision.log_probs[0].exp().nonzero().flatten().tolist() == [best]
            assert teacher == pytest.approx(1 - q[0, best].exp().item())
        speaker = int(kind == "T" or (kind == "B" and t not in drafted))
        state = policy.spoke(policy.observe(decision.state, torch.tensor([token])), torch.tensor([speaker]))
        who += kind
        if policy.ends(state).item():
            return who, asked, t + 1
    return who, asked, None


def test_relay_takes_legs_of_paragraphs_and_ends_the_text_after_the_last():
    """Token 0 is the teacher's best and a trigger; 9 holds a blank line, 7 is a newline."""
    lines = {"blank_ids": (9,), "line_end_ids": (7,), "line_start_ids": (7,)}
    policy = Relay(student_top=1, paragraphs=2, legs=2, trigger_ids=(0,), **lines)
    assert relayed(policy, [0, 9, 5, 9, 0, 9, 9, 0, 0]) == ("BTTTBTT", [True, *[False] * 3, True, False, False], 7)
    assert relayed(policy, [0, 7, 5, 7, 7, 7, 7, 7]) == ("BTTTTTTB", [True, *[False] * 6, True], None)
    assert relayed(Relay(student_top=1, legs=1, trigger_ids=(0,), **lines), [0, 9, 9, 4, 9])[2] == 5


def test_a_leg_has_a_most_of_tokens():
    policy = Relay(student_top=1, leg_tokens=3, trigger_ids=(0,), legs=2)
    assert relayed(policy, [0, 5, 5, 0, 5, 5]) == ("BTTBTT", [True, False, False] * 2, 6)
    assert relayed(Relay(student_top=1, leg_tokens=1, trigger_ids=(0,), legs=2), [0, 0]) == ("BB", [True, True], 2)
    assert Relay().leg_tokens == 256 and Relay().paragraphs == 3 and Relay().legs == 2 and Relay().student_top == 5


def test_relay_does_not_hand_over_where_the_student_drew_the_trigger_too():
    policy = Relay(student_top=1, trigger_ids=(0,), leg_tokens=2, legs=1)
    assert relayed(policy, [0, 0, 0, 5], drafted=(0, 1)) == ("BBBT", [True, True, True, False], 4)


def test_relay_wants_a_trigger_that_the_student_would_not_write():
    policy = Relay(student_top=1, trigger_ids=(0,))
    assert relayed(policy, [3])[0] == "B"
    assert relayed(policy, [3], q=P)[0] == "S"  # the student's best too
    assert relayed(Relay(student_top=2, trigger_ids=(0,)), [3])[0] == "S"  # among the student's two best
    assert relayed(policy, [3], p=Q, q=P)[0] == "S"  # the teacher's best is no trigger


class Words(list):
    """As much of a tokenizer as a rule looks at: the text of each id."""

    def batch_decode(self, rows):
        return [self[i] for [i] in rows]


def test_relay_knows_its_words_in_lower_case_and_behind_a_space():
    words = "Wait But Hmm Actually Hold However Yet Oh Alternatively No Ah Oops Well"
    assert " ".join(Relay().triggers) == words
    texts = ["Wait", " Wait", "wait", " wait", "WAIT", "Wait ", "\nWait", "Waiting", "  wait", "But", " well"]
    assert Relay().bind(Words(texts), 8).trigger_ids == (0, 1, 2, 3, 9, 10)


def test_relay_finds_its_tokens_in_the_tokenizer():
    tokenizer = byte_level_tokenizer()
    policy = Relay(triggers=("t", "W")).bind(tokenizer, 8)
    assert {tokenizer.decode([i]) for i in policy.trigger_ids} == {"t", "W", "w"}
    newline = tokenizer.encode("\n", add_special_tokens=False)
    assert set(newline) <= set(policy.line_end_ids) & set(policy.line_start_ids)
    assert all("\n\n" in tokenizer.decode([i]) for i in policy.blank_ids)
    assert policy.bind(tokenizer, 8) is policy


def test_the_linear_schedule_takes_its_horizon_from_the_run():
    policy = Switch(schedule="linear").bind(None, 40)
    assert policy.horizon == 40 and Switch(schedule="linear", horizon=7).bind(None, 40).horizon == 7
    assert policy.threshold(torch.tensor([0, 20, 40, 60])).tolist() == [1.0, 0.5, 0.0, 0.0]


@pytest.mark.parametrize(
    "make,words",
    [
        (lambda: Switch(schedule="expnential"), "did you mean 'exponential'"),
        (lambda: Switch(schedule="linear", horizon=0), "at least 1 token"),
        (lambda: at(Switch(schedule="linear"), 0), "give horizon, or bind"),
        (lambda: Switch(tau_0=math.nan), "finite"),
        (lambda: Switch(decay=-0.1), "growth"),
        (lambda: AdaSwitch(window=0), "at least 1"),
        (lambda: AdaSwitch(ratio=-1.0), "at least 0"),
        (lambda: AdaSwitch(ratio=math.nan), "at least 0"),
        (lambda: AdaSwitch(floor=-1.0), "floor of AdaSwitch must be finite"),
        (lambda: Relay(leg_tokens=0), "leg_tokens of Relay must be at least 1"),
        (lambda: AdaSwitch(divergence="kl_forward"), "unknown divergence"),
        (lambda: AdaSwitch(switch_token_by="nobody"), "'teacher' or 'student'"),
        (lambda: MixIn(alpha=1.0), "strictly between 0 and 1, got 1.0"),
        (lambda: SKD(top_k=0), "at least 1, got 0"),
        (lambda: SKD(teacher_top_p=0.0), "teacher_top_p <= 1, got 1.0, 0.0"),
        (lambda: SKD(student_temperature=0.0), "student_temperature > 0"),
        (lambda: SSD(tau=math.inf), "finite"),
        (lambda: SSD(divergence="js"), "did you mean 'jsd'"),
        (lambda: Hysteresis(take=0.1, give=0.2), "give <= take"),
        (lambda: CAOPD(alpha_end=1.5), "alpha_end of CAOPD is a probability"),
        (lambda: TRB(budget=-1.0), "budget >= 0"),
        (lambda: TRB(warmup=0), r"warmup >= 1 \(steps\)"),
        (lambda: CAOPD(hold=1.0), "from 0 to below 1, got 1.0"),
        (lambda: Relay(legs=0), "legs of Relay must be at least 1"),
        (lambda: Relay().init(1), "bind it to a tokenizer"),
        (lambda: Relay(triggers=("Aha",)).bind(byte_level_tokenizer(), 8), "none of Relay's triggers"),
    ],
)
def test_wrong_settings_are_explained(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def limits(policy, kls):
    """The thresholds that a rule compares the forward KLs ``kls`` with."""
    seen, state = [], policy.init(1)
    for t, kl in enumerate(kls):
        p = torch.tensor([[1.0, 0.0]], dtype=torch.float64).log()
        q = torch.tensor([[math.exp(-kl), 1 - math.exp(-kl)]], dtype=torch.float64).log()
        decision = policy.step(state, q, p, torch.tensor([t]))
        seen.append(float(decision.thresholds))
        state = policy.observe(decision.state, torch.tensor([0]))
    return seen


def test_a_decision_says_what_the_divergence_was_compared_with():
    nan = pytest.approx(math.nan, nan_ok=True)
    kls = [0.1, 0.3, 0.25, 0.9, 0.2]
    assert limits(Switch(decay=0.5), kls) == pytest.approx([math.exp(-0.5 * t) for t in range(5)])
    # Mean of the last two, times 3; nothing before the window is full and after the switch (0.9 > 0.825).
    assert limits(AdaSwitch(window=2), kls) == [nan, nan, pytest.approx(0.6), pytest.approx(0.825), nan]
    assert limits(SSD(tau=0.3), kls) == [0.3] * 5
    assert limits(Hysteresis(take=0.5, give=0.2, divergence="forward_kl"), kls) == [0.5, 0.5, 0.5, 0.5, 0.2]
    assert limits(MixIn(), kls) == [nan] * 5
