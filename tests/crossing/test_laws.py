"""Both laws on what two vocabularies share: values and gradients against formulas in probability space."""

import math
from types import SimpleNamespace

import pytest
import torch
from test_objectives import REFERENCES, TOKENS, N, V
from two_tokenizers import bridge_of, side, tokenizer_of

from switchkd.crossing.bridge import Bridge
from switchkd.crossing.laws import SharedLaw
from switchkd.forward.ends import Ends
from switchkd.methods.objectives import OBJECTIVES
from switchkd.methods.policy import STUDENT, TEACHER

# A student of 8 ids and a teacher of 9 share 5: the ids of each, in one order. The student's end is 6, the teacher's 0.
OF_STUDENT, OF_TEACHER = [0, 2, 3, 6, 7], [4, 8, 1, 0, 5]
GENERATOR = torch.Generator().manual_seed(5)
LOGITS_P = 2 * torch.randn(N, 9, dtype=torch.float64, generator=GENERATOR)
LOGITS_Q = 2 * torch.randn(N, 8, dtype=torch.float64, generator=GENERATOR)
CPU = torch.device("cpu")


def toy(student=OF_STUDENT, teacher=OF_TEACHER, complete=(False, False), ends=(6,)):
    shared = tuple(torch.tensor(ids).numpy() for ids in (student, teacher))
    own = SimpleNamespace(vocab_size=8, ends=Ends(ends), end=6)
    return SharedLaw.of(SimpleNamespace(shared=shared, complete=complete, student=own), CPU)


def on_shared(logits, ids):
    """Probabilities on the shared tokens, renormalised, the plain way."""
    p = logits.softmax(-1)[:, ids]
    return p / p.sum(-1, keepdim=True)


def losses_of(objective, logp, logq):
    tokens = TOKENS
    if objective.looks_ahead:
        written = [logs.detach().gather(1, tokens.ids.unsqueeze(1))[:, 0] for logs in (logp, logq)]
        tokens = objective.look_ahead(tokens, *written)
    return objective.loss(logp, logq, tokens)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_and_gradient_of_every_objective_are_its_formula_on_the_shared_tokens(name):
    assert len(OF_STUDENT) == V  # so that the references' tokens are places among the shared ones
    objective, leaf = OBJECTIVES[name](), LOGITS_Q.clone().requires_grad_()
    p, q0 = on_shared(LOGITS_P, OF_TEACHER), on_shared(LOGITS_Q, OF_STUDENT)
    values = losses_of(objective, *toy()(LOGITS_P.log_softmax(-1), leaf.log_softmax(-1)))
    torch.testing.assert_close(values, REFERENCES[name](p, q0, q0), atol=1e-12, rtol=1e-12)
    weights = torch.arange(1.0, N + 1, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((weights * values).sum(), leaf)
    for direction in torch.eye(8, dtype=torch.float64):
        ahead, behind = (
            REFERENCES[name](p, on_shared(LOGITS_Q + sign * 1e-6 * direction, OF_STUDENT), q0) for sign in (1, -1)
        )
        torch.testing.assert_close(gradient @ direction, weights * (ahead - behind) / 2e-6, atol=1e-7, rtol=1e-6)


def test_tokens_that_are_not_shared_move_nothing():
    law = toy()
    p, q = (logits.clone().requires_grad_() for logits in (LOGITS_P, LOGITS_Q))
    OBJECTIVES["jsd"]().loss(*law(p.log_softmax(-1), q.log_softmax(-1)), TOKENS).sum().backward()
    for leaf, ids, size in ((p, OF_TEACHER, 9), (q, OF_STUDENT, 8)):
        others = [index for index in range(size) if index not in ids]
        assert leaf.grad[:, others].abs().max() < 1e-15
        assert leaf.grad[:, ids].abs().min() > 1e-5


def test_the_place_of_a_token_among_the_shared_ones():
    law = toy(ends=(1, 6))
    assert law.index[OF_STUDENT].tolist() == list(range(V))
    assert law.index[1] == law.index[6] == 3  # any end is the end
    assert len(law.index) == 8


def test_the_end_may_lie_behind_the_ids_that_are_drawn():
    assert len(toy(ends=(6, 11)).index) == 12


def test_mass_is_what_each_law_gives_to_the_shared_tokens():
    law = toy()
    torch.testing.assert_close(law.mass(LOGITS_P.log_softmax(-1), TEACHER), LOGITS_P.softmax(-1)[:, OF_TEACHER].sum(-1))
    torch.testing.assert_close(law.mass(LOGITS_Q.log_softmax(-1), STUDENT), LOGITS_Q.softmax(-1)[:, OF_STUDENT].sum(-1))


# --- with one bucket -------------------------------------------------------------------------------------------------


def test_coarse_laws_are_the_laws_with_one_bucket_for_the_rest():
    p, q = toy().coarse(LOGITS_P.log_softmax(-1), LOGITS_Q.log_softmax(-1))
    for found, logits, ids in ((p, LOGITS_P, OF_TEACHER), (q, LOGITS_Q, OF_STUDENT)):
        own = logits.softmax(-1)
        expected = torch.cat([own[:, ids], 1 - own[:, ids].sum(-1, keepdim=True)], -1)
        torch.testing.assert_close(found.exp(), expected, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(found.exp().sum(-1), torch.ones(N, dtype=torch.float64))


def test_a_bucket_without_tokens_counts_as_rounding_and_has_a_finite_gradient():
    everything = list(range(8))
    law = toy(everything, everything, (True, True))
    leaf = LOGITS_Q.log_softmax(-1).requires_grad_()
    p, q = law.coarse(LOGITS_P[:, :8].log_softmax(-1), leaf)
    assert p[:, -1].exp().tolist() == pytest.approx([1.2e-7] * N)
    torch.testing.assert_close(q.exp().sum(-1), torch.ones(N, dtype=torch.float64), atol=2e-7, rtol=0)
    OBJECTIVES["jsd"]().loss(p, q, TOKENS).sum().backward()
    assert leaf.grad.isfinite().all()


def test_a_bucket_of_tokens_that_may_not_be_drawn_has_a_finite_gradient():
    """All that is not shared is −inf, as an end that counts as another one."""
    leaf = LOGITS_Q.index_fill(1, torch.tensor([1, 4, 5]), -math.inf).log_softmax(-1).requires_grad_()
    p, q = toy().coarse(LOGITS_P.log_softmax(-1), leaf)
    assert q[:, -1].isfinite().all()
    OBJECTIVES["skew_reverse_kl"]().loss(p, q, TOKENS).sum().backward()
    assert leaf.grad.isfinite().all()


# --- equal tokenizers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["coarse", "sentencepiece"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_equal_tokenizers_laws_losses_and_gradients_are_the_ordinary_ones_to_the_bit(name, dtype):
    marks = {token: token for token in tokenizer_of(name).all_special_tokens}
    law = SharedLaw.of(Bridge(side(name), side(name, "teacher"), marks), CPU)
    size = len(tokenizer_of(name))
    logp, logq = (torch.randn(N, size, dtype=dtype, generator=GENERATOR).log_softmax(-1) for _ in range(2))
    assert all(map(torch.equal, law(logp, logq), (logp, logq)))
    assert law.index.tolist() == list(range(size))
    for objective in OBJECTIVES.values():
        found = []
        for through in (law, lambda p, q: (p, q)):
            leaf = logq.clone().requires_grad_()
            values = losses_of(objective(), *through(logp, leaf))
            found.append((values.detach(), torch.autograd.grad(values.sum(), leaf)[0]))
        assert all(map(torch.equal, *found)), objective


def test_a_law_of_which_part_is_shared_is_renormalised_on_its_own_side_alone():
    law = toy(OF_STUDENT, OF_TEACHER, (True, False))
    q = LOGITS_Q.index_fill(1, torch.tensor([1, 4, 5]), -math.inf).log_softmax(-1)
    p_shared, q_shared = law(LOGITS_P.log_softmax(-1), q)
    assert torch.equal(q_shared, q[:, OF_STUDENT])
    torch.testing.assert_close(p_shared.exp(), on_shared(LOGITS_P, OF_TEACHER))


def test_the_law_of_a_real_bridge_names_the_same_bytes_on_both_sides():
    bridge = bridge_of("coarse", "sentencepiece")
    law = SharedLaw.of(bridge, CPU)
    mine, theirs = (
        side.bytes_of(ids.tolist()) for side, ids in zip(bridge.sides, (law.student, law.teacher), strict=True)
    )
    assert mine == theirs
    assert mine.count(b"") == 1
    assert law.index[bridge.student.end] == mine.index(b"")
