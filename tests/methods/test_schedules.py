"""What changes over training: its first value in the first step, its last in the last; learning rates by transformers' names."""

import dataclasses
import math

import pytest
import torch
from test_trainer import SETTINGS, lines, trainer, weights, without_times
from tiny import toy_examples
from transformers import get_scheduler

from switchkd import StudentOnly
from switchkd.base.errors import ConfigError
from switchkd.decoding.rollouts import Rollouts
from switchkd.methods.mixes import Adaptive, Generated, GroundTruth
from switchkd.methods.objectives import TAID, DistiLLM2, Veto
from switchkd.methods.policies import CAOPD, TRB
from switchkd.training.optimizer import learning_rate, schedule_progress


@pytest.mark.parametrize("steps", [2, 3, 4, 7, 471])
def test_the_first_step_is_at_0_and_the_last_at_1(steps):
    seen = [schedule_progress(step, steps) for step in range(steps)]
    assert seen[0] == 0.0 and seen[-1] == 1.0
    assert seen == pytest.approx([step / (steps - 1) for step in range(steps)])
    assert schedule_progress(steps, steps) == 1.0  # what is written at the end of a run is as in its last step


def test_runs_whose_length_is_an_estimate():
    assert schedule_progress(0, math.inf) == schedule_progress(9, math.inf) == 0.0
    assert schedule_progress(0, 1) == 0.0 and schedule_progress(1, 1) == 1.0
    assert schedule_progress(3, 3 / (300 / 700)) == pytest.approx(0.5)  # 7.000000000000001 steps are 7
    assert schedule_progress(2, 4.2) == 0.5  # the fifth step is the last
    tokens = [sum(range(10, 10 + step)) for step in range(9)]  # texts grow; 100 tokens are spent in the eighth step
    seen = [schedule_progress(step, step * 100 / tokens[step] if step else math.inf) for step in range(8)]
    assert seen[0] == 0.0 and seen[-1] == 1.0 and all(0 < x < 1 for x in seen[1:-1])


def policies_of(t, steps):
    """The rules that a run of so many steps decodes with, without one word decoded."""
    used = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "switchkd.training.reading.decode_examples", lambda *given, **_: used.append(given[2]) or Rollouts()
        )
        for t.step in range(steps):
            t.reading.generate([], t.step, t.schedule, None)
    return [(settings.policy, settings.max_new_tokens) for settings in used]


def test_every_schedule_of_a_run_reaches_its_end(tmp_path):
    """The kind: 4 steps of CA-OPD once ended at alpha 0.287, a budget that grows to 32 at 25."""
    settings = {"mix": Generated(1.0), "max_steps": 4, "max_new_tokens": 32, "max_new_tokens_start": 4}
    used = policies_of(trainer(tmp_path, policy=CAOPD(), **settings), 4)
    assert [rule.alpha for rule, _ in (used[0], used[-1])] == [0.5, 0.25]
    assert [budget for _, budget in used] == [4, 13, 23, 32]
    used = policies_of(trainer(tmp_path, policy=TRB(0.03, warmup=3), **settings), 4)
    assert [rule.budget for rule, _ in used] == pytest.approx([0.03, 0.02, 0.01, 0.0])


@pytest.mark.parametrize(
    "objective,name,ends",
    [
        (Veto(beta=0.8), "beta", (0.8, 0.0)),
        (TAID(s=0.2, step=0.0), "s", (0.2, 1.0)),
        (DistiLLM2(rise=0.5), "beta", (1.0, 1.5)),
    ],
)
@pytest.mark.parametrize("steps", [2, 5])
def test_objectives_reach_their_end_in_the_last_step(tmp_path, objective, name, ends, steps):
    t = trainer(tmp_path, mix=GroundTruth(), objective=objective, max_steps=steps)
    used, loss = [], t.learner.loss
    t.learner.loss = lambda rows, own: used.append(getattr(own, name)) or loss(rows, own)
    t.train()
    assert (used[0], used[-1]) == ends and len(used) == steps
    assert lines(tmp_path, "metrics.jsonl")[-1]["schedule"] == 1.0


def test_the_adaptive_mix_writes_nothing_new_in_the_last_step(tmp_path):
    """Its share of fresh text falls to 0 with the last step, and is whole in the first."""
    asked = []

    @dataclasses.dataclass(frozen=True)
    class Watched(Adaptive):
        def source(self, chance, progress, buffered, memory):
            asked.append(progress)
            return super().source(chance, progress, buffered, memory)

    mix = Watched(share=1.0, capacity=4, validation_steps=1)
    trainer(tmp_path, mix=mix, validation=toy_examples(2), max_steps=5).train()
    assert asked == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_schedules_of_a_run_with_a_token_budget_end_with_it(tmp_path):
    """And a run that was stopped goes on where it was, bit for bit."""
    settings = {
        "mix": Generated(1.0), "policy": CAOPD(0.9, 0.1), "objective": Veto(), "max_steps": -1, "max_train_tokens": 150,
        "max_new_tokens_start": 2, "save_steps": 1,
    }  # fmt: skip
    straight = trainer(tmp_path / "straight", **settings)
    straight.train()
    part = trainer(tmp_path / "parts", **settings)
    for _ in range(3):
        part.train_step()
    part.due = None
    part.save()
    again = trainer(tmp_path / "parts", **settings)
    again.resume()
    again.train()
    metrics = lines(tmp_path / "straight", "metrics.jsonl")
    assert without_times(lines(tmp_path / "parts", "metrics.jsonl")) == without_times(metrics)[3:]
    assert all(torch.equal(a, b) for a, b in zip(weights(straight).values(), weights(again).values(), strict=True))
    seen = [0.0] + [m["schedule"] for m in metrics]
    assert seen[-2] == pytest.approx(1.0, abs=0.25) and seen[-1] == 1.0 and len(seen) > 5


# --- learning rates ---------------------------------------------------------------------------------------------------

NAMES = ["linear", "cosine", "cosine_with_min_lr", "constant", "constant_with_warmup"]
FLOORS = [{}, {"min_lr": 2e-5}, {"min_lr_rate": 0.3}]
SCHEDULES = [(n, f) for n in NAMES for f in FLOORS if bool(f) == (n == "cosine_with_min_lr")]


def transformers_rates(name, floor, warmup, steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler = get_scheduler(name, optimizer, warmup, steps, floor or None)
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("name,floor", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 4])
@pytest.mark.parametrize("steps", [1, 2, 12])
def test_rates_are_transformers(name, floor, warmup, steps):
    """To the digit behind warm-up; in it ours are theirs of the step behind, so that none is 0."""
    config = dataclasses.replace(SETTINGS, lr_scheduler_type=name, learning_rate=1e-3, warmup_steps=warmup, **floor)
    rates = [learning_rate(config, step, steps) for step in range(steps)]
    # theirs warms up by this name alone
    theirs = transformers_rates(
        "constant_with_warmup" if name == "constant" else name, floor, warmup, max(steps, warmup + 1)
    )
    if not warmup and name == "constant":
        assert theirs == transformers_rates("constant", {}, 0, steps)
    assert rates[warmup:] == pytest.approx(theirs[warmup:steps], rel=1e-12)
    assert rates[:warmup] == pytest.approx(theirs[1 : warmup + 1][:steps], rel=1e-12)


def test_warm_up_as_a_ratio():
    config = dataclasses.replace(
        SETTINGS, learning_rate=1.0, warmup_ratio=0.25, lr_scheduler_type="constant_with_warmup"
    )
    assert [learning_rate(config, step, 10) for step in range(5)] == pytest.approx([1 / 3, 2 / 3, 1, 1, 1])  # 2.5 are 3
    steps = dataclasses.replace(config, warmup_steps=2)
    assert [learning_rate(steps, step, 10) for step in range(3)] == [0.5, 1.0, 1.0]  # steps go before a ratio
    assert learning_rate(config, 0, math.inf) == 0.0  # nobody can tell yet how many steps a quarter is
    assert learning_rate(config, 1, 10.4) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "needs its floor once, got min_lr 0 and min_lr_rate 0; give one"),
        ({"lr_scheduler_type": "cosine_with_min_lr", "min_lr": 1e-6, "min_lr_rate": 0.1}, "needs its floor once"),
        ({"lr_scheduler_type": "cosine_with_min_lr", "min_lr": 0.5}, "above learning_rate 0.003; lower it"),
        ({"min_lr": 1e-6}, "cosine falls to 0, below min_lr 1e-06, .*; use lr_scheduler_type cosine_with_min_lr"),
        ({"lr_scheduler_type": "linear", "min_lr_rate": 0.1}, "linear falls to 0"),
        ({"warmup_ratio": 1.0}, "warmup_ratio is a share of the steps, below 1, got 1.0"),
        ({"warmup_ratio": -0.1}, "warmup_ratio must be at least 0"),
    ],
)
def test_schedules_that_cannot_be_are_explained(changes, words):
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(SETTINGS, **changes)


def test_the_rate_reaches_the_optimizer(tmp_path):
    settings = {"lr_scheduler_type": "linear", "warmup_ratio": 0.3, "max_steps": 6, "mix": GroundTruth()}
    trainer(tmp_path, policy=StudentOnly(), **settings).train()
    rates = [line["learning_rate"] for line in lines(tmp_path, "metrics.jsonl")]
    assert rates == pytest.approx([3e-3 * x for x in (0.5, 1.0, 1.0, 0.75, 0.5, 0.25)])
