"""Watched prompts: what both models say of each token is what they say, and looking moves nothing."""

import dataclasses
import json
import math

import pytest
import torch
from tiny import toy_pair

from switchkd.data.texts import TokenizedExample
from switchkd.decoding.decode import decode_reference
from switchkd.evaluation.samples import TOP, Reader, samples, trace
from switchkd.evaluation.tasks import TASKS
from switchkd.methods.divergences import LN2, jsd
from switchkd.methods.mixes import Generated, GroundTruth
from switchkd.methods.policies import Switch
from switchkd.methods.policy import STUDENT, TEACHER, StudentOnly
from switchkd.runs.distil import sample_policy
from switchkd.training.settings import TrainConfig
from switchkd.training.trainer import Trainer

EXAMPLES = [TokenizedExample(i, [3 + i, 4, 5], [6, 7, 1], [2] * 3, ("2 0",), False, f"row {i}") for i in range(4)]


def config(folder, **changes):
    own = {"output_dir": str(folder), "max_new_tokens": 8, "max_steps": 5, "policy": Switch(decay=0.5), "save_steps": 2}
    return TrainConfig(**own | {"per_device_train_batch_size": 2, "mix": Generated(lmbda=1.0)} | changes)


def lines(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("teacher_prompt", [None, [9, 8, 7, 6]])
def test_a_trace_is_what_two_plain_forwards_say(teacher_prompt):
    pair = toy_pair()
    own = None if teacher_prompt is None else [teacher_prompt]
    [rollout] = decode_reference(
        pair.student, pair.teacher, [[3, 4, 5]], Switch(decay=0.5), 8, eos_token_ids=[], teacher_prompt_ids=own
    )
    found = trace(Reader(pair), rollout)
    logs = {}
    for who, model, prompt in (
        (STUDENT, pair.student, [3, 4, 5]),
        (TEACHER, pair.teacher, teacher_prompt or [3, 4, 5]),
    ):
        for t, token in enumerate(rollout.completion_ids):
            logits = model(torch.tensor([prompt + rollout.completion_ids[:t]])).logits[0, -1, : pair.vocab_size]
            logs[who, t] = logits.log_softmax(-1)
            assert found.log_probs[who][t] == pytest.approx(logs[who, t][token].item(), abs=1e-10)
            ids, values = zip(*found.top[who][t], strict=True)
            assert len(ids) == TOP and list(values) == sorted(values, reverse=True)
            assert values[0] == pytest.approx(logs[who, t].max().item(), abs=1e-10)
            assert logs[who, t][list(ids)].tolist() == pytest.approx(values, abs=1e-10)
    for t in range(len(rollout.completion_ids)):
        assert found.jsd[t] == pytest.approx(jsd(logs[TEACHER, t], logs[STUDENT, t]).item() / LN2, abs=1e-10)
        assert found.jsd[t] == pytest.approx(rollout.divergences[t], abs=1e-10)
        # The policy compared exactly these.
        assert rollout.speakers[t] == (rollout.divergences[t] > math.exp(-0.5 * t))


def test_samples_are_the_policys_text_with_scores_where_there_are_references(tmp_path):
    pair, settings = toy_pair(), config(tmp_path)
    records = samples(pair, EXAMPLES, settings.decoding(seed=settings.seed), TASKS["references"])
    expected = decode_reference(
        pair.student, pair.teacher, [e.prompt_ids for e in EXAMPLES], settings.policy, 8,
        eos_token_ids=pair.eos_token_ids, vocab_size=pair.vocab_size,
    )  # fmt: skip
    assert [r["completion_ids"] for r in records] == [r.completion_ids for r in expected]
    assert [r["speakers"] for r in records] == [r.speakers for r in expected]
    assert all(set(r["scores"]) >= {"rouge_l"} and r["reference"] == "2 0" for r in records)
    assert samples(pair, EXAMPLES[:1], settings.decoding(seed=settings.seed), None)[0]["scores"] == {}
    json.dumps(records, allow_nan=False)


def test_a_run_that_generates_nothing_shows_the_student_alone(tmp_path):
    fixed = config(tmp_path, mix=GroundTruth(), policy=StudentOnly())
    assert sample_policy(dataclasses.replace(fixed, policy=Switch()), Switch(), 0.5) == StudentOnly()
    assert sample_policy(config(tmp_path), Switch(), 0.5) == Switch()


def run(folder, look, **changes):
    settings = config(folder, **changes)
    trainer = Trainer(toy_pair(), EXAMPLES, settings)
    sample = lambda progress: samples(trainer.pair, EXAMPLES[:2], settings.decoding(seed=settings.seed), None)  # noqa: E731
    trainer.train(sample=sample if look else None)
    return trainer


def test_looking_moves_nothing_and_happens_at_the_start_every_so_many_steps_and_at_the_end(tmp_path):
    looked, blind = run(tmp_path / "a", True, sample_steps=2), run(tmp_path / "b", False, sample_steps=2)
    for mine, other in zip(looked.pair.student.parameters(), blind.pair.student.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert lines(tmp_path / "a", "rollouts") == lines(tmp_path / "b", "rollouts")
    found = lines(tmp_path / "a", "samples")
    assert [(s["step"], s["sample_id"]) for s in found] == [(step, i) for step in (0, 2, 4, 5) for i in (0, 1)]
    assert not (tmp_path / "b" / "samples.jsonl").exists()
    run(tmp_path / "c", True, sample_steps=0)
    assert not (tmp_path / "c" / "samples.jsonl").exists()


def test_a_resumed_run_has_the_samples_of_the_straight_one(tmp_path):
    run(tmp_path / "a", True, sample_steps=1)
    settings = config(tmp_path / "b", sample_steps=1)

    def sample(trainer):
        return lambda progress: samples(trainer.pair, EXAMPLES[:2], settings.decoding(seed=settings.seed), None)

    def stop(metrics, _):
        if metrics["step"] == 3:
            raise KeyboardInterrupt

    first = Trainer(toy_pair(), EXAMPLES, settings)
    with pytest.raises(KeyboardInterrupt):
        first.train(stop, sample=sample(first))
    second = Trainer(toy_pair(), EXAMPLES, settings)
    second.resume()
    assert second.step == 2 and [s["step"] for s in lines(tmp_path / "b", "samples")] == [0, 0, 1, 1, 2, 2]
    second.train(sample=sample(second))
    assert lines(tmp_path / "b", "samples") == lines(tmp_path / "a", "samples")
