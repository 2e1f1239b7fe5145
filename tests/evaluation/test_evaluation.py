"""Scores against values worked out another way, and evaluation that leaves training alone."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from tiny import VOCAB, retold, toy_examples, toy_pair

from switchkd import StudentOnly, TeacherOnly, decode
from switchkd.base.errors import ConfigError, DataError
from switchkd.evaluation import evaluate as evaluation
from switchkd.evaluation.evaluate import evaluate, score_names, work
from switchkd.evaluation.results import Question, completions_file, read_results, take_out, write_results
from switchkd.evaluation.settings import EvalConfig, EvalSettings
from switchkd.evaluation.statistics import spearman
from switchkd.evaluation.tasks import TASKS, Task

TASK = TASKS["references"]
SETTINGS = EvalSettings(max_new_tokens=5, batch_size=4, score_batch_size=3)
SAMPLED = dataclasses.replace(SETTINGS, temperature=1.0, seeds=(10, 20, 30))


@pytest.fixture
def pair():
    made = toy_pair()
    made.tokenizer.batch_decode = lambda rows, **_: [words(row) for row in rows]
    return made


def words(ids):
    return " ".join(f"w{i}" for i in ids)


@torch.no_grad()
def log_probs(model, prompt, completion):
    return model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)


def kl_and_nll(pair, model, prompt, completion):
    """Per token, by the definition."""
    p, q = log_probs(pair.teacher, prompt, completion), log_probs(model, prompt, completion)
    return (p.exp() * (p - q)).sum(-1).numpy(), -q[range(len(q)), completion].numpy()


def long_example(id, length, rng):
    prompt, completion = rng.integers(2, VOCAB, 4).tolist(), rng.integers(2, VOCAB, length).tolist()
    return retold(toy_examples(1)[0], id=id, prompt_ids=prompt, completion_ids=completion)


def test_divergence_by_position_and_perplexity_are_per_reference_token(pair):
    rng = np.random.default_rng(0)
    examples = [long_example(i, length, rng) for i, length in enumerate([55, 3, 20, 11, 12, 51, 52])]
    result = evaluate(pair, pair.student, examples, TASK, SETTINGS)
    found = [kl_and_nll(pair, pair.student, e.prompt_ids, e.completion_ids) for e in examples]
    kl, nll = (np.concatenate(part) for part in zip(*found, strict=True))
    position = np.concatenate([np.arange(len(e.completion_ids)) for e in examples])
    means = result.means()
    assert means["forward_kl"] == pytest.approx(kl.mean())
    assert means["perplexity"] == pytest.approx(math.exp(nll.mean()))
    for band, inside in {
        "0-10": position <= 10,
        "11-50": (position > 10) & (position <= 50),
        "51+": position > 50,
    }.items():
        assert means[f"forward_kl@{band}"] == pytest.approx(kl[inside].mean()), band
        assert result.scores[f"forward_kl@{band}"].weights.sum() == inside.sum()
    assert result.summary["forward_kl@51+"].examples == 2
    of_teacher = evaluate(pair, pair.teacher, examples, TASK, SETTINGS).means()
    assert {v for k, v in of_teacher.items() if k.startswith("forward_kl")} == {0.0}
    assert 1 < of_teacher["perplexity"] != means["perplexity"]


def test_no_token_of_a_position_band_is_no_score_rather_than_zero(pair):
    result = evaluate(pair, pair.student, toy_examples(4), TASK, SETTINGS)
    assert math.isnan(result.means()["forward_kl@51+"]) and result.summary["forward_kl@51+"].low is None


def test_the_evaluated_models_own_text_is_scored(pair):
    examples = toy_examples(3)
    assert evaluate(pair, pair.student, examples, TASK, SETTINGS).means()["rouge_l"] == 0.0
    own = own_text(pair, examples, 0.0, 0)
    examples = [
        dataclasses.replace(e, references=(words(r.completion_ids),)) for e, r in zip(examples, own, strict=True)
    ]
    scores = evaluate(pair, pair.student, examples, TASK, SETTINGS).means()
    assert scores["rouge_l"] == scores["exact_match"] == pytest.approx(100.0)
    assert scores["length"] == np.mean([len(r.completion_ids) for r in own])
    assert scores["eos"] == pytest.approx(100 * np.mean([r.stop_reason == "eos" for r in own]))
    assert evaluate(pair, pair.teacher, examples, TASK, SETTINGS).means()["rouge_l"] < 100.0


def own_text(pair, examples, temperature, seed, policy=StudentOnly()):  # noqa: B008
    ids = [e.id for e in examples]
    prompts = [e.prompt_ids for e in examples]
    return decode(pair.student, pair.teacher, prompts, policy, 5, temperature, seed, sample_ids=ids, eos_token_ids=(1,))


def test_sampled_text_is_that_of_each_seed(pair):
    examples = toy_examples(4)
    result = evaluate(pair, pair.student, examples, TASK, SAMPLED)
    assert result.scores["rouge_l"].values.shape == (3, 4)
    expected = [words(r.completion_ids) for seed in SAMPLED.seeds for r in own_text(pair, examples, 1.0, seed)]
    assert [c.text for c in result.completions] == expected
    assert [(c.seed, c.example) for c in result.completions] == [(s, e.id) for s in SAMPLED.seeds for e in examples]
    assert result.summary["length"].std > 0


def test_all_seeds_are_one_job_which_keeps_the_batch_full(pair, monkeypatch):
    """Rows that end late under one seed stand beside rows of the next; in passes of their own each would end alone."""
    calls, decode_job = [], evaluation.decode_job
    monkeypatch.setattr(evaluation, "decode_job", lambda job, *rest: calls.append(decode_job(job, *rest)) or calls[-1])
    examples = toy_examples(6)
    evaluate(pair, pair.student, examples, TASK, dataclasses.replace(SAMPLED, batch_size=9, max_new_tokens=12))
    alone = [
        evaluate(
            pair,
            pair.student,
            examples,
            TASK,
            dataclasses.replace(SAMPLED, seeds=(seed,), batch_size=9, max_new_tokens=12),
        )
        for seed in SAMPLED.seeds
    ]
    together, *passes = calls
    assert len(passes) == len(alone) == 3
    assert [r.completion_ids for r in together] == [r.completion_ids for each in passes for r in each]
    assert together.cost.rounds < sum(each.cost.rounds for each in passes)


def test_neither_batch_size_nor_the_other_examples_move_a_score(pair):
    examples = toy_examples(6)
    one, many = (
        evaluate(pair, pair.student, part, TASK, dataclasses.replace(SAMPLED, batch_size=b, score_batch_size=b))
        for b, part in ((1, examples), (6, examples[::-1]))
    )
    for name in one.scores:
        np.testing.assert_allclose(one.scores[name].values, many.scores[name].values[:, ::-1], rtol=1e-10, atol=1e-12)
    assert {(c.example, c.seed, c.text) for c in one.completions} == {
        (c.example, c.seed, c.text) for c in many.completions
    }


def test_divergence_on_its_own_text_and_its_correlation_with_rouge(pair):
    examples = [dataclasses.replace(e, references=(words(range(2, 9)),)) for e in toy_examples(12)]
    result = evaluate(pair, pair.student, examples, TASK, dataclasses.replace(SAMPLED, own_text=True))
    kls = [
        [
            kl_and_nll(pair, pair.student, e.prompt_ids, r.completion_ids)[0].mean()
            for e, r in zip(examples, own_text(pair, examples, 1.0, seed), strict=True)
        ]
        for seed in SAMPLED.seeds
    ]
    np.testing.assert_allclose(result.scores["own_forward_kl"].values, kls, rtol=1e-9)
    short = result.length_correlation["1-10"]
    assert short["completions"] == 36
    assert short["spearman"] == pytest.approx(spearman(np.ravel(kls), result.scores["rouge_l"].values.ravel()))
    assert math.isnan(result.length_correlation["51+"]["spearman"])
    assert evaluate(pair, pair.student, examples, TASK, SAMPLED).length_correlation == {}


def test_a_policy_may_write_the_text(pair):
    examples = toy_examples(4)
    result = evaluate(
        pair, pair.student, examples, TASK, dataclasses.replace(SAMPLED, policy=TeacherOnly(), seeds=(7,))
    )
    assert [c.text for c in result.completions] == [
        words(r.completion_ids) for r in own_text(pair, examples, 1.0, 7, TeacherOnly())
    ]


def test_generate_is_a_second_opinion(pair):
    by = {backend: dataclasses.replace(SETTINGS, backend=backend) for backend in ("engine", "generate")}
    texts = [[c.text for c in evaluate(pair, pair.student, toy_examples(7), TASK, s).completions] for s in by.values()]
    assert texts[0] == texts[1]
    with pytest.raises(ConfigError, match="'generate' knows no policies"):
        settings = dataclasses.replace(by["generate"], policy=TeacherOnly())
        evaluate(pair, pair.student, toy_examples(1), TASK, settings)


def test_groups_and_the_total_without_one_of_them(pair):
    task = Task(
        "t", 1, lambda text, references, group: {"hit": float(len(group))}, "hit", "", "", leave_out=("none at all",)
    )
    groups = ["ab", "none at all", "ab", "c"]
    examples = [dataclasses.replace(e, group=group) for e, group in zip(toy_examples(4), groups, strict=True)]
    result = evaluate(pair, pair.student, examples, task, SETTINGS)
    assert {name: found.mean for name, found in result.by_group.items()} == {"ab": 2.0, "none at all": 11.0, "c": 1.0}
    assert (result.means()["hit"], result.means()["hit_without_none_at_all"]) == (4.0, pytest.approx(5 / 3))
    assert evaluate(pair, pair.student, toy_examples(4), task, SETTINGS).by_group == {}


@pytest.mark.parametrize("own_text", [False, True])
def test_names_and_work_are_known_beforehand(pair, own_text):
    settings, counts = dataclasses.replace(SAMPLED, own_text=own_text), []
    result = evaluate(pair, pair.student, toy_examples(5), TASK, settings, lambda count, _: counts.append(count))
    assert sum(counts) == work(toy_examples(5), settings) == 5 * (1 + 3 + 3 * own_text)
    assert set(score_names(TASK, toy_examples(5))) == result.scores.keys() - {"own_forward_kl"}


def test_what_is_written_can_be_read_back(pair, tmp_path):
    settings = dataclasses.replace(SAMPLED, own_text=True)  # no text is long, so that a correlation is NaN
    results = {"student": evaluate(pair, pair.student, toy_examples(4), TASK, settings)}
    file = tmp_path / "new" / "evaluation.json"
    task = {"name": "references", "version": 1, "primary": "rouge_l"}
    write_results(file, task, {"ids": [0, 1, 2, 3], "groups": [""] * 4}, SAMPLED.to_json(), results)
    again = read_results(file)["student"]
    assert (
        again.completions == tuple(results["student"].completions)
        or again.completions == results["student"].completions
    )
    asked = [Question(pair.tokenizer.decode(e.prompt_ids), tuple(e.references)) for e in toy_examples(4)]
    assert list(again.questions) == list(results["student"].questions) == asked
    for name, values in results["student"].scores.items():
        assert np.array_equal(again.scores[name].values, values.values)
        assert np.array_equal(again.scores[name].weights, values.weights)
    record = json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    summary = record["results"]["student"]["summary"]
    assert summary["length"]["mean"] == pytest.approx(results["student"].means()["length"])
    assert summary["forward_kl@51+"]["mean"] is None
    settings = record["settings"]
    assert (
        settings["seeds"] == [10, 20, 30] and settings["temperature"] == 1.0 and settings["no_repeat_ngram_size"] == 0
    )
    file.write_text(file.read_text().replace('"format": 1', '"format": 0'))
    with pytest.raises(DataError, match=r"format 0, this is 1.*switchkd evaluate"):
        read_results(file)
    completions_file(file).unlink()
    with pytest.raises(DataError, match="cannot be read as an evaluation"):
        read_results(file)


def test_questions_stay_when_results_go_and_must_be_those_of_the_examples(pair, tmp_path):
    file, task = tmp_path / "evaluation.json", {"name": "references", "version": 1, "primary": "rouge_l"}
    own = evaluate(pair, pair.student, toy_examples(4), TASK, SAMPLED)
    write_results(file, task, {"ids": [0, 1, 2, 3], "groups": []}, {}, {"teacher": own, "student after": own})
    assert take_out(file, read_results(file), ["student after"])
    assert list(read_results(file)["teacher"].questions) == list(own.questions)
    record = json.loads(file.read_text())
    record["data"]["references"].pop()
    file.write_text(json.dumps(record))
    with pytest.raises(DataError, match="there are 4 prompts and 3 references for 4 examples"):
        read_results(file)
    del record["data"]["references"], record["data"]["prompts"]  # a version that did not keep them
    file.write_text(json.dumps(record))
    assert read_results(file)["teacher"].questions == []


def test_evaluating_changes_neither_mode_nor_weights_nor_random_state(pair):
    pair.student.train()
    state, weights = torch.get_rng_state(), [p.clone() for p in pair.student.parameters()]
    for backend in ("engine", "generate"):
        evaluate(pair, pair.student, toy_examples(5), TASK, dataclasses.replace(SAMPLED, backend=backend))
    assert pair.student.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(weights, pair.student.parameters(), strict=True))
    assert all(p.grad is None for p in pair.student.parameters())


def test_a_reference_that_cannot_be_scored_is_named_before_anything_is_decoded(pair, monkeypatch):
    monkeypatch.setattr("switchkd.evaluation.evaluate.decode_job", lambda *_, **__: pytest.fail("decoded"))
    examples = [dataclasses.replace(e, references=("#### 3",)) for e in toy_examples(3)]
    examples[2] = dataclasses.replace(examples[2], references=("three",))
    with pytest.raises(DataError, match=rf"{examples[2].source}: task gsm8k: .*no '#### N'"):
        evaluate(pair, pair.student, examples, TASKS["gsm8k"], SETTINGS)


def test_nothing_to_evaluate_on(pair):
    with pytest.raises(DataError, match="no held-out examples"):
        evaluate(pair, pair.student, [], TASK, SETTINGS)


@pytest.mark.parametrize("backend", ["engine", "generate"])
def test_a_prompt_that_cannot_be_completed_is_an_error_not_a_zero(pair, backend):
    long = retold(toy_examples(1)[0], prompt_ids=[2] * 61, completion_ids=[1])
    with pytest.raises(DataError, match=r"61 (prompt )?tokens \+ max_new_tokens 5 exceed"):
        evaluate(pair, pair.student, [long], TASK, dataclasses.replace(SETTINGS, backend=backend))


def test_a_model_that_never_stops_is_counted(pair):
    with torch.no_grad():
        pair.student.lm_head.weight[1] = -100 * pair.student.lm_head.weight.abs().max()
    result = evaluate(pair, pair.student, toy_examples(3), TASK, dataclasses.replace(SETTINGS, max_new_tokens=9))
    assert {c.stop_reason for c in result.completions} <= {"length", "eos"}
    assert result.means()["eos"] == pytest.approx(100 * np.mean([c.stop_reason == "eos" for c in result.completions]))
    assert {c.tokens for c in result.completions if c.stop_reason == "length"} <= {9}


@pytest.mark.parametrize(
    "changes",
    [{"eval_seeds": (1, 1)}, {"eval_seeds": (-1,)}, {"eval_samples": -2}, {"eval_temperature": 1.0, "eval_seeds": ()}],
)
def test_settings_that_make_no_sense(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        EvalConfig(**changes)
