"""Scores against values worked out another way, and evaluation that leaves training alone."""

import math

import pytest
import torch
from tiny import VOCAB, toy_examples, toy_pair

from switchkd.errors import DataError
from switchkd.evaluation import EvalSettings, evaluate, rouge_l

SETTINGS = EvalSettings(max_new_tokens=5, batch_size=4, score_batch_size=3)


@pytest.fixture
def pair():
    made = toy_pair()
    made.tokenizer.batch_decode = lambda rows, **_: [" ".join(f"w{i}" for i in row) for row in rows]
    return made


@torch.no_grad()
def log_probs(model, example):
    ids = example.prompt_ids + example.completion_ids
    return model(torch.tensor([ids])).logits[0, len(example.prompt_ids) - 1 : -1].log_softmax(-1)


def test_divergence_and_perplexity_are_per_reference_token(pair):
    examples = toy_examples(7)
    scores = evaluate(pair, pair.student, examples, SETTINGS)
    kl, nll, tokens = 0.0, 0.0, 0
    for example in examples:
        p, q = log_probs(pair.teacher, example), log_probs(pair.student, example)
        kl += (p.exp() * (p - q)).sum().item()
        nll -= q[range(len(q)), example.completion_ids].sum().item()
        tokens += len(q)
    assert scores.forward_kl == pytest.approx(kl / tokens)
    assert scores.perplexity == pytest.approx(math.exp(nll / tokens))
    assert (scores.examples, scores.reference_tokens) == (7, tokens)
    assert evaluate(pair, pair.teacher, examples, SETTINGS).forward_kl == 0.0


def test_the_evaluated_models_own_text_is_scored(pair):
    examples = toy_examples(3)
    before = evaluate(pair, pair.student, examples, SETTINGS).rouge_l
    from dataclasses import replace

    from switchkd import StudentOnly, decode

    rollouts = decode(
        pair.student, pair.teacher, [e.prompt_ids for e in examples], StudentOnly(), 5, 0.0, eos_token_ids=(1,)
    )
    own = [replace(e, references=(text,)) for e, text in zip(examples, pair.tokenizer.batch_decode(
        [r.completion_ids for r in rollouts]), strict=True)]  # fmt: skip
    assert before == 0.0
    assert evaluate(pair, pair.student, own, SETTINGS).rouge_l == pytest.approx(100.0)
    assert evaluate(pair, pair.teacher, own, SETTINGS).rouge_l < 100.0


def test_batch_size_cannot_move_a_score(pair):
    sampled = {"max_new_tokens": 5, "temperature": 1.0, "seed": 3}
    one, many = (
        evaluate(pair, pair.student, toy_examples(5), EvalSettings(**sampled, batch_size=b, score_batch_size=b))
        for b in (1, 5)
    )
    assert one.rouge_l == many.rouge_l
    assert one.forward_kl == pytest.approx(many.forward_kl, rel=1e-12)


def test_rouge_l_by_hand():
    # Longest common subsequence "the cat the mat" = 4 of 6 and 5 words: F1 = 2·(4/5)(4/6)/((4/5)+(4/6)).
    assert rouge_l("the cat near the mat", ["the cat sat on the mat"]) == pytest.approx(100 * 8 / 11)
    assert rouge_l("running", ["ran", "runs"]) == pytest.approx(100.0)  # stemmed, best of the references
    assert rouge_l("", ["a word"]) == 0.0


def test_evaluating_changes_neither_mode_nor_weights_nor_random_state(pair):
    pair.student.train()
    state, weights = torch.get_rng_state(), [p.clone() for p in pair.student.parameters()]
    counts = []
    evaluate(pair, pair.student, toy_examples(5), SETTINGS, counts.append)
    assert sum(counts) == 10
    assert pair.student.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(weights, pair.student.parameters(), strict=True))
    assert all(p.grad is None for p in pair.student.parameters())


def test_nothing_to_evaluate_on(pair):
    with pytest.raises(DataError, match="no held-out examples"):
        evaluate(pair, pair.student, [], SETTINGS)


def test_a_prompt_that_cannot_be_completed_is_an_error_not_a_zero(pair):
    from dataclasses import replace

    long = replace(toy_examples(1)[0], prompt_ids=[2] * 61, completion_ids=[1])
    with pytest.raises(DataError, match=r"1 of 1 held-out prompts cannot be completed: sample 0: 61 prompt tokens"):
        evaluate(pair, pair.student, [long], SETTINGS)
    assert VOCAB > 2
