"""What a step says of the text that it generated, against counts by hand."""

import dataclasses
import math
import time

import pytest
from tiny import toy_examples, toy_pair

from switchkd.decoding.decode import decode
from switchkd.decoding.rollouts import DecodeCost, Rollout, Rollouts, divergence_bands, rollout_metrics
from switchkd.methods.mixes import Generated
from switchkd.methods.policies import Switch
from switchkd.methods.policy import StudentOnly, TeacherOnly
from switchkd.training.settings import TrainConfig
from switchkd.training.trainer import Trainer

NAN = math.nan


def row(divergences, thresholds, speakers=None):
    count = len(divergences)
    return Rollout(0, [3], [4] * count, speakers or [0] * count, divergences, thresholds, "length")


def test_divergences_are_averaged_by_where_they_are_in_the_response():
    long = row([float(t) for t in range(266)], [NAN] * 266)
    short = row([100.0] * 16 + [NAN] * 2, [NAN] * 18)
    assert divergence_bands([long, short]) == {
        "switch/divergence_0-10": (5.0 + 100.0) / 2,
        "switch/divergence_11-50": (sum(range(11, 51)) + 5 * 100.0) / 45,
        "switch/divergence_51+": 158.0,
    }  # fmt: skip
    assert divergence_bands([short]) == {
        "switch/divergence_0-10": 100.0,
        "switch/divergence_11-50": 100.0,
    }  # nothing is shown of where nobody looked
    assert divergence_bands([row([NAN] * 20, [NAN] * 20)]) == {}


def test_a_step_says_its_mean_threshold_and_none_where_there_is_none():
    compared = Rollouts([row([0.5, 0.5], [1.0, 0.5], [0, 1]), row([0.5, 0.5], [NAN, 0.0])], DecodeCost(1.0, 4, 1))
    assert rollout_metrics(compared)["switch/threshold"] == pytest.approx(0.5)
    assert rollout_metrics(Rollouts([row([NAN], [NAN])], DecodeCost(1.0, 1)))["switch/threshold"] is None


def test_texts_that_the_policy_ended_are_counted_where_there_are_some():
    ended = dataclasses.replace(row([0.5], [1.0]), stop_reason="policy")
    some = rollout_metrics(Rollouts([ended, row([0.5], [1.0])], DecodeCost(1.0, 2)))
    assert some["completions/policy_end_share"] == 0.5 and some["completions/eos_share"] == 0
    assert "completions/policy_end_share" not in rollout_metrics(Rollouts([row([0.5], [1.0])], DecodeCost(1.0, 1)))


def test_agreement_and_blocks_are_counted_by_row_and_position():
    pair = toy_pair()
    same = decode(pair.student, pair.student, [[3, 4], [5, 6]], Switch(), 12, block_size=4, eos_token_ids=[])
    assert (same.cost.blocks, same.cost.block_positions) == (6, 24) and same.cost.compared == same.cost.equal == 24
    summary = same.cost.summary()
    assert (summary["agreement"], summary["block_length"], summary["kept_per_block"]) == (1.0, 4.0, 4.0)
    apart = decode(pair.student, pair.teacher, [[3, 4], [5, 6]], Switch(), 12, block_size=4, eos_token_ids=[]).cost
    assert apart.equal < apart.compared <= apart.block_positions and apart.blocks > 6
    assert apart.summary()["kept_per_block"] == 24 / apart.blocks < apart.summary()["block_length"]
    # The student drafts, and the rule does not ask it: the models can be compared all the same.
    drafted = decode(pair.student, pair.teacher, [[3, 4]], TeacherOnly(), 12, block_size=4, drafter="student").cost
    assert drafted.compared > 0
    alone = decode(pair.student, pair.teacher, [[3, 4]], StudentOnly(), 12, eos_token_ids=[]).cost
    assert alone.compared == 0 and math.isnan(alone.summary()["agreement"])


def test_the_parts_of_a_steps_time_are_all_of_it(tmp_path):
    config = TrainConfig(
        policy=Switch(), mix=Generated(1.0), max_new_tokens=6, max_steps=2, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, output_dir=str(tmp_path),
    )  # fmt: skip
    trainer = Trainer(toy_pair(), toy_examples(), config)
    read, laps = trainer.learner.teachers.voices, []

    def slow(*arguments):
        laps.append(0.05)
        time.sleep(0.05)
        return read(*arguments)

    trainer.learner.teachers.voices = slow
    metrics, _ = trainer.train_step()
    parts = [metrics[f"seconds/{part}"] for part in ("generate", "teacher", "update")]
    assert sum(parts) == pytest.approx(metrics["seconds"]) and min(parts) > 0
    assert len(laps) == 2 and parts[1] >= sum(laps)
    assert metrics["memory_gib"] > 0.01 and metrics["progress"] == 0.5
