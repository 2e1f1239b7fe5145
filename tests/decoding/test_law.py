"""The exact law of the engine, by enumeration of all branches on a tabular toy.

With probabilities that are multiples of 1/4, an inverse-CDF draw from four equally likely noise values has exactly the
target law. All 4^5 noise paths of five tokens are decoded as one batch, so the share of paths that end in a text *is* its
probability, and it must equal the product of the target distributions along that text. Who wrote a token of a blend is here
whoever has more of it.
"""

from collections import Counter

import pytest
import torch
from tiny import POLICIES, Quota, Spell, TabularModel

from switchkd import AdaSwitch, Switch, decode, decode_reference
from switchkd.decoding import board, decide, engine, pace
from switchkd.decoding import decode as decoding
from switchkd.forward.ends import Ends
from switchkd.methods.policies import CAOPD, Hysteresis
from switchkd.methods.relay import Relay
from switchkd.methods.sampling import Sampling, speakers

QUARTERS, LENGTH, VOCAB = 4, 5, 3
STUDENT = [[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [1.0, 0.0, 0.0]]
TEACHER = [[0.25, 0.25, 0.5], [0.0, 0.25, 0.75], [0.25, 0.5, 0.25]]
POLICY_CASES = {
    "spell": Spell(limit=0.2, length=2),
    "switch": Switch(tau_0=0.5, decay=0.4),
    "adaswitch": AdaSwitch(window=1, ratio=1.45, divergence="tvd"),
    "hysteresis": Hysteresis(take=0.1, give=0.08),
    "ca_opd": CAOPD(alpha=0.3),
    "relay": Relay(student_top=1, paragraphs=1, legs=2, trigger_ids=(1, 2), blank_ids=(1,)),
    "student_only": POLICIES["student_only"],
    "teacher_only": POLICIES["teacher_only"],
}


@pytest.fixture
def quartered_noise(monkeypatch):
    known_noise(monkeypatch, QUARTERS)


def known_noise(monkeypatch, parts):
    """Noise of (sample, position) is the position-th digit of the sample id in base ``parts``; a draw inverts the CDF at it."""

    def gumbel_noise(keys, vocab_size):
        sample, position = keys // 64, keys % 64
        return (((sample // parts ** position.clamp(max=9)) % parts + 0.5) / parts).unsqueeze(-1)

    def draw(log_probs, noise, temperature=1.0):
        return (noise > log_probs.exp().cumsum(-1)).sum(-1)

    monkeypatch.setattr("switchkd.methods.sampling._speaker_uniform", lambda keys: torch.full(keys.shape, 0.5))
    monkeypatch.setattr(board, "row_key", lambda seed, sample_id: sample_id * 64)
    monkeypatch.setattr(board, "keys_at", torch.add)
    monkeypatch.setattr(decoding, "noise_key", lambda seed, sample_id, position: sample_id * 64 + position)
    for module in (decoding, engine, pace):
        monkeypatch.setattr(module, "gumbel_noise", gumbel_noise)
    for module in (decoding, engine, decide):
        monkeypatch.setattr(module, "draw", draw)


def exact_law(policy, first, length=LENGTH, sampling=None):
    """Probability of every text, by recursion over the policy alone."""
    log_student, log_teacher = (torch.tensor(t, dtype=torch.float64).log() for t in (STUDENT, TEACHER))
    law = Counter()

    def goes_on(text, state, last, probability):
        if len(text) == length or (text and policy.ends(state)):
            law[text] += probability
            return
        decision = policy.step(state, log_student[[last]], log_teacher[[last]], torch.tensor([len(text)]))
        chances = (sampling or Sampling()).shape(decision.log_probs)[0].exp().tolist()
        for token in (token for token, chance in enumerate(chances) if chance > 0):
            drawn = torch.tensor([token])
            told = policy.spoke(policy.observe(decision.state, drawn), speakers(decision, drawn, torch.tensor([0])))
            goes_on((*text, token), told, token, probability * chances[token])

    goes_on((), policy.init(1), first, 1.0)
    return law


@pytest.mark.parametrize("name", POLICY_CASES)
@pytest.mark.parametrize("block,drafter", [(1, "auto"), (2, "student"), (3, "teacher"), (5, "student"), (8, "teacher")])
def test_law_is_exact(quartered_noise, name, block, drafter):
    policy = POLICY_CASES[name]
    paths = QUARTERS**LENGTH
    rollouts = decode(
        TabularModel(STUDENT),
        TabularModel(TEACHER),
        [[1]] * paths,
        policy,
        LENGTH,
        block_size=block,
        batch_size=paths // 2,
        drafter=drafter,
    )
    counted = Counter(tuple(r.completion_ids) for r in rollouts)
    expected = exact_law(policy, first=1)
    assert counted.keys() == expected.keys()
    assert all(counted[text] / paths == pytest.approx(p, abs=1e-12) for text, p in expected.items())


def test_reference_has_the_law_too(quartered_noise):
    policy = POLICY_CASES["spell"]
    paths = QUARTERS**3
    rollouts = decode_reference(TabularModel(STUDENT), TabularModel(TEACHER), [[1]] * paths, policy, 3)
    counted = Counter(tuple(r.completion_ids) for r in rollouts)
    assert len(counted) > 5
    for text, count in counted.items():
        tails = [p for t, p in exact_law(policy, 1).items() if t[:3] == text]
        assert count / paths == pytest.approx(sum(tails), abs=1e-12)


# The teacher ends with 3, the student with 1 or 3: one event, written 3. Last rows: after an end nothing is read.
BASE = [[0.25, 0.25, 0.25, 0.25], [1.0, 0, 0, 0], [0.25, 0.5, 0.25, 0.0], [1.0, 0, 0, 0]]
INSTRUCT = [[0.5, 0.0, 0.25, 0.25], [1.0, 0, 0, 0], [0.25, 0.0, 0.0, 0.75], [1.0, 0, 0, 0]]
ENDS = Ends((1, 3), 3)


def merged_law(policy, length):
    """Probability of every text up to its end, by recursion over the policy on laws that are added up by hand."""
    tables = [torch.tensor(table, dtype=torch.float64) for table in (BASE, INSTRUCT)]
    for table in tables:
        table[:, 3] += table[:, 1]
        table[:, 1] = 0
    law = Counter()

    def go_on(text, state, probability):
        if probability == 0 or len(text) == length or text[-1:] == (3,):
            law[text] += probability
            return
        logq, logp = (table[[text[-1] if text else 2]].log() for table in tables)
        decision = policy.step(state, logq, logp, torch.tensor([len(text)]))
        for token in range(4):
            drawn = torch.tensor([token])
            after = policy.spoke(policy.observe(decision.state, drawn), decision.speaker)
            go_on((*text, token), after, probability * decision.log_probs[0, token].exp().item())

    go_on((), policy.init(1), 1.0)
    return +law


@pytest.mark.parametrize("name", ["spell", "switch", "student_only", "teacher_only"])
@pytest.mark.parametrize("block,drafter", [(0, ""), (1, "auto"), (3, "student"), (4, "teacher")])
def test_law_of_ends_that_are_one_event(quartered_noise, name, block, drafter):
    policy, length = POLICY_CASES[name], 4
    paths = QUARTERS**length
    models = TabularModel(BASE), TabularModel(INSTRUCT)
    if block:
        settings = {"block_size": block, "drafter": drafter, "batch_size": paths // 2, "eos_token_ids": ENDS}
        rollouts = decode(*models, [[2]] * paths, policy, length, **settings)
    else:
        rollouts = decode_reference(*models, [[2]] * paths, policy, length, eos_token_ids=ENDS)
    counted = Counter(tuple(r.completion_ids) for r in rollouts)
    expected = merged_law(policy, length)
    assert counted.keys() == expected.keys() and not any(1 in text for text in counted)
    assert any(text[-1] == 3 and len(text) < length for text in counted)
    assert all(counted[text] / paths == pytest.approx(p, abs=1e-12) for text, p in expected.items())


def test_law_of_a_rule_that_ends_texts(monkeypatch):
    """By what it hears of who spoke; its blend is in eighths."""
    known_noise(monkeypatch, 8)
    policy, models, paths = Quota(alpha=0.5, most=2), (TabularModel(STUDENT), TabularModel(TEACHER)), 8**4
    expected = exact_law(policy, 1, 4)
    assert len({len(text) for text in expected}) > 1
    for block, drafter in ((1, "auto"), (4, "student"), (3, "teacher")):
        out = decode(*models, [[1]] * paths, policy, 4, block_size=block, drafter=drafter, batch_size=paths)
        counted = Counter(tuple(r.completion_ids) for r in out)
        assert counted.keys() == expected.keys()
        assert all(counted[text] / paths == pytest.approx(p, abs=1e-12) for text, p in expected.items())


CUTS = {
    "top_k": {"top_k": 1},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.6},
    "all": {"top_k": 2, "top_p": 0.7, "min_p": 0.1},
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", ["switch", "spell", "student_only"])
def test_law_with_cuts_is_exact(monkeypatch, cut, name):
    """Of what is left of the target distribution, in twelfths: 1/2 and 1/4 of it are 2/3 and 1/3 where the rest is cut."""
    known_noise(monkeypatch, 12)
    policy, sampling, paths = POLICY_CASES[name], Sampling(**CUTS[cut]), 12**3
    models, settings = (TabularModel(STUDENT), TabularModel(TEACHER)), CUTS[cut]
    expected = exact_law(policy, 1, 3, sampling)
    for block, drafter in ((1, "auto"), (3, "student"), (2, "teacher")):
        out = decode(*models, [[1]] * paths, policy, 3, block_size=block, drafter=drafter, batch_size=paths, **settings)
        counted = Counter(tuple(r.completion_ids) for r in out)
        assert counted.keys() == expected.keys()
        assert all(counted[text] / paths == pytest.approx(p, abs=1e-12) for text, p in expected.items())
    assert expected != exact_law(policy, 1, 3)
