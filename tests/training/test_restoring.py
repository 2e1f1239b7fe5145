"""What a checkpoint remembers counts for what it was learned from: the same rule, the same measure, the same rows."""

import json
import math
from contextlib import nullcontext

import pytest
from test_resume import bit_flipped, write_state
from test_trainer import lines, trainer
from tiny import toy_examples

from switchkd import StudentOnly
from switchkd.base.errors import CheckpointError, ConfigError, SwitchKDWarning
from switchkd.methods.mixes import Adaptive, Generated
from switchkd.methods.objectives import TAID, DistiLLM2, ForwardKL, Veto
from switchkd.training.restoring import rows_per_step

SCORED = {"eval_steps": 1, "metric_for_best_model": "rouge_l", "save_steps": 2, "max_steps": 4, "save_total_limit": 9}


def scored(folder, scores, scored_on="", **changes):
    """Train to the end, with these scores by step; the best then."""
    t = trainer(folder, **SCORED | changes)
    t.scored_on = scored_on
    if t.config.resumes:
        t.resume()
    t.train(evaluate=lambda _: scores[t.step])
    return t.best


def by(**scores):
    """Scores of steps 1, 2, … by name."""
    return {i + 1: {name: values[i] for name, values in scores.items()} for i in range(6)}


GOOD = [1.0, 5.0, 2.0, 2.0, 3.0, 2.0]
OTHER_MEASURES = {
    "another metric": ({"metric_for_best_model": "perplexity", "allow_change": ("metric_for_best_model",)}, "", 5),
    "no metric": ({"metric_for_best_model": "", "allow_change": ("metric_for_best_model",)}, "", None),
    "other texts": ({}, "others", 5),
    "longer completions": ({"eval_max_new_tokens": 9, "allow_change": ("eval_max_new_tokens",)}, "", 5),
    "the same": ({"eval_steps": 1}, "", 2),
}


@pytest.mark.parametrize("case", OTHER_MEASURES)
def test_a_best_score_counts_for_what_it_was_measured_by(tmp_path, case):
    """Once a ROUGE-L of 5 was taken for a perplexity of 5, and the best student chosen by it."""
    changes, scored_on, expected = OTHER_MEASURES[case]
    assert scored(tmp_path, by(rouge_l=GOOD))["step"] == 2
    said = (
        nullcontext()
        if case == "the same"
        else pytest.warns(SwitchKDWarning, match="of step 2, is forgotten: it was chosen by another")
    )
    with said:
        best = scored(
            tmp_path,
            by(rouge_l=GOOD, perplexity=[0.1] * 4 + [7.0, 8.0]),
            scored_on,
            max_steps=6,
            resume=True,
            **changes,
        )
    assert best.get("step") == expected


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_never_the_best(tmp_path, bad):
    assert scored(tmp_path, by(rouge_l=[bad, 2.0, bad, 1.0, 0.0, 0.0])) == {"step": 2, "score": 2.0}
    assert scored(tmp_path / "none", by(rouge_l=[bad] * 6)) == {}


def test_a_best_student_that_is_damaged_can_be_gone_on_without(tmp_path):
    """One flipped byte made every checkpoint useless."""
    scored(tmp_path, by(rouge_l=GOOD))
    bit_flipped(tmp_path / "best-2" / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"best-2.*checkpoint-4 is whole, and goes on .*--allow-change metric_for_best_model"
    ):
        scored(tmp_path, by(rouge_l=GOOD), max_steps=6, resume_from="checkpoint-4")
    allowed = {"max_steps": 6, "resume_from": "checkpoint-4", "allow_change": ("metric_for_best_model",)}
    with pytest.warns(SwitchKDWarning, match=r"is forgotten: .*best-2/model.safetensors is damaged"):
        assert scored(tmp_path, by(rouge_l=GOOD), **allowed)["step"] == 5


# --- rules ----------------------------------------------------------------------------------------------------------

RULES = {
    "objective": (TAID(), ForwardKL()),
    "objective of equal names": (DistiLLM2(), Veto()),
    "mix": (Adaptive(share=0.0, capacity=6, validation_steps=1), Generated(1.0)),
    "mix that remembers": (Generated(1.0), Adaptive(share=0.9, capacity=6, validation_steps=1)),
}


@pytest.mark.parametrize("case", RULES)
def test_another_rule_begins_with_its_own_memory(tmp_path, case):
    """Which was a KeyError, or a schedule in the middle of another's."""
    noun = case.split()[0]
    before, now = RULES[case]
    own = {"max_steps": 2, "save_steps": 2, "validation": toy_examples(2)}
    trainer(tmp_path, **own, **{noun: before}).train()
    t = trainer(tmp_path, **own | {"max_steps": 3}, resume=True, allow_change=(noun,), **{noun: now})
    with (
        pytest.warns(SwitchKDWarning, match=f"another {noun} .*learned is dropped")
        if before.memory()
        else nullcontext()
    ):
        t.resume()
    assert (t.objective_memory, t.reading.memory)[noun == "mix"] == now.memory()
    t.train()
    assert t.step == 3


def test_texts_of_another_policy_are_not_replayed(tmp_path):
    own = {
        "mix": Adaptive(share=1.0, capacity=6, validation_steps=9),
        "validation": toy_examples(2),
        "max_steps": 2,
        "save_steps": 2,
    }
    trainer(tmp_path, **own).train()
    same = trainer(tmp_path, **own, resume=True)
    same.resume()
    other = trainer(tmp_path, **own, resume=True, policy=StudentOnly(), allow_change=("policy",))
    with pytest.warns(SwitchKDWarning, match="kept for replay are dropped: they are of other rules .switch -> student"):
        other.resume()
    assert same.reading.replay and not other.reading.replay


@pytest.mark.parametrize("memory", [{}, {"s": 0.5, "loss": 1.0}, {"s": "0.5", "loss": 1.0, "fall": 0.0}])
def test_a_memory_that_the_rule_did_not_write_is_refused(tmp_path, memory):
    trainer(tmp_path, objective=TAID(), max_steps=1, save_steps=1).train()
    state = json.loads((tmp_path / "checkpoint-1" / "state.json").read_text())
    write_state(tmp_path / "checkpoint-1", json.dumps(state | {"objective": memory}).encode())
    with pytest.raises(CheckpointError, match=r"checkpoint of step 1 has no memory of the objective taid"):
        trainer(tmp_path, objective=TAID(), resume=True).resume()


# --- rows -----------------------------------------------------------------------------------------------------------


def test_the_rows_of_a_step_are_the_runs_however_many_processes_share_them():
    """Half of the processes read half of the rows, and gave noise keys of other steps to them."""
    state = {"step": 4, "rows_per_step": 8, "rows_per_rank": 4}
    with pytest.warns(SwitchKDWarning, match="with 1 processes; together they still read 8 rows a step"):
        assert rows_per_step(state, own=4, rows_per_rank=4, processes=1) == 8
    with pytest.raises(
        ConfigError, match=r"reads 8 rows, which 3 processes cannot share evenly; .*--allow-change gradient"
    ):
        rows_per_step(state, own=12, rows_per_rank=4, processes=3)
    # Settings that were allowed to change say how many; two processes of half a batch each are one of a whole.
    assert rows_per_step(state, own=2, rows_per_rank=2, processes=1) == 2
    assert rows_per_step(state, own=8, rows_per_rank=8, processes=1) == 8


@pytest.mark.parametrize("rows", [2, 3])
def test_no_noise_key_is_used_twice_and_no_row_is_skipped_where_a_step_reads_other_rows(tmp_path, rows):
    own = {"mix": Generated(1.0), "max_steps": 3, "save_steps": 3}
    trainer(tmp_path, **own).train()
    more = {
        "max_steps": 6,
        "resume": True,
        "per_device_train_batch_size": rows,
        "allow_change": ("per_device_train_batch_size",),
    }
    t = trainer(tmp_path, **own | more)
    t.resume()
    t.train()
    ids = [record["sample_id"] for record in lines(tmp_path, "rollouts.jsonl")]
    assert ids == list(range(3 * 4 + 3 * rows)) and t.reading.rows_read == len(ids)
    prompts = [record["prompt_ids"] for record in lines(tmp_path, "rollouts.jsonl")]
    known = [example.prompt_ids for example in toy_examples()]
    assert sorted(prompts[:12]) == sorted(known)  # the first epoch, of which the next begins where it ended
