"""A value that is not finite stops the run before the update; the message names model, step and samples; what is saved is sound."""

import math
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file
from test_trainer import lines, trainer, weights
from tiny import toy_examples

from switchkd.base.errors import NonFiniteError
from switchkd.methods.mixes import Generated
from switchkd.training.checkpoint import checkpoints
from switchkd.training.learner import Learner

TOKEN = 7  # some of the rows have it where a model reads it


def started(folder, lmbda=0.0, **changes):
    """A trainer after its first step."""
    t = trainer(folder, mix=Generated(lmbda), **changes)
    t.due = None
    t.train_step()
    return t


def poisoned(model):
    with torch.no_grad():
        model.get_input_embeddings().weight[TOKEN] = math.nan


def endless_loss(t):
    loss = t.learner.loss
    t.learner.loss = lambda rows, objective: loss(rows, objective) * (math.inf if bad_rows(rows) else 1.0)


def bad_rows(rows):
    return [row.source for row in rows if TOKEN in [*row.prompt_ids, *row.completion_ids[:-1]]]


CAUSES = {
    "the teacher's logits are": lambda t: poisoned(t.pair.teacher),
    "the student's logits are": lambda t: poisoned(t.pair.student),
    "the loss is": endless_loss,
    "the student's gradient is": lambda t: t.pair.student.lm_head.weight.register_hook(lambda g: g * math.inf),
}


def check_stop(folder, cause, lmbda=0.0):
    """The weights stay, no line is written for the step, and the step before is saved if it is sound."""
    t = started(folder, lmbda)
    CAUSES[cause](t)
    rows = t.reading.next(t.examples)
    broken = [row.source for row in rows] if "gradient" in cause else bad_rows(rows)
    assert broken
    before = weights(t)
    with pytest.raises(NonFiniteError) as stopped:
        t.train()
    for name, weight in weights(t).items():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=0, equal_nan=True)
    assert not (folder / "metrics.jsonl").exists() and t.step == 1
    if "student's logits" in cause:  # here the weights themselves are broken
        assert (
            checkpoints(folder) == [] and "weight model.embed_tokens.weight is not finite" in stopped.value.__notes__[0]
        )
    else:
        [saved] = checkpoints(folder)
        assert saved.name == "checkpoint-1"
        assert all(torch.equal(value, before[name]) for name, value in load_file(saved / "model.safetensors").items())
    return str(stopped.value), broken


@pytest.mark.parametrize("cause", CAUSES)
def test_a_step_on_data_stops_before_the_update_and_says_why(tmp_path, cause):
    said, broken = check_stop(tmp_path, cause)
    assert said.startswith(f"step 2: {cause} not finite on {', '.join(broken)} (loss "), said


@pytest.mark.parametrize("cause", list(CAUSES)[:2])
def test_a_generated_step_stops_and_says_why(tmp_path, cause):
    said, _ = check_stop(tmp_path, cause, lmbda=1.0)
    model = cause.split("'")[0]
    assert said.startswith("step 2, toy:") and f"{model}'s logits are not finite at sample " in said, said


@pytest.mark.parametrize("cause", CAUSES)
def test_mutant_that_does_not_check(tmp_path, monkeypatch, cause):
    monkeypatch.setattr(Learner, "_check_finite", lambda *_: None)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check_stop(tmp_path, cause)


def overflowing(folder, step, **changes):
    """A trainer whose update ``step`` makes a weight infinite."""
    t = trainer(folder, mix=Generated(0.0), max_steps=4, **changes)

    def overflow(*_):
        if t.step == step - 1:
            with torch.no_grad():
                t.pair.student.lm_head.weight[3, 1] = math.inf

    t.learner.optimizer.register_step_post_hook(overflow)
    return t


def check_overflow(folder):
    with pytest.raises(
        NonFiniteError, match=r"step 3: the student's weight lm_head.weight is not finite after the update"
    ):
        overflowing(folder, 3, save_steps=1).train()
    assert [each.name for each in checkpoints(folder)] == ["checkpoint-1", "checkpoint-2"]


def test_weights_that_overflow_in_an_update_are_not_saved(tmp_path):
    check_overflow(tmp_path)
    with pytest.raises(NonFiniteError, match="step 3: the student's logits") as stopped:
        overflowing(tmp_path / "later", 2, save_steps=0).train()
    assert stopped.value.__notes__ == [
        "the student's weight lm_head.weight is not finite since step 2, which is not saved"
    ]
    assert [c.name for c in checkpoints(tmp_path / "later")] == ["checkpoint-0"]
    assert len(lines(tmp_path / "later", "metrics.jsonl")) == 2


def test_moments_that_overflow_are_not_saved(tmp_path):
    t = started(tmp_path)
    parameter = next(p for name, p in t.pair.student.named_parameters() if name == "lm_head.weight")
    t.learner.optimizer.state[parameter]["exp_avg_sq"][0] = math.inf
    with pytest.raises(NonFiniteError, match=r"the optimizer's exp_avg_sq of lm_head.weight is not finite"):
        t.save()


def test_mutant_that_saves_what_overflowed(tmp_path, monkeypatch):
    monkeypatch.setattr("switchkd.training.learner._broken_weight", lambda *_: "")
    with pytest.raises((AssertionError, pytest.fail.Exception)), suppress(KeyError):
        check_overflow(tmp_path)


def test_the_toy_rows_are_told_apart():
    assert 0 < len(bad_rows(toy_examples())) < len(toy_examples())
