"""Memory that runs out moves time, never tokens or gradients; and memory does not grow over a run."""

import dataclasses
import gc
import warnings

import numpy as np
import pytest
import torch
from test_trainer import gradient_step, lines, trainer, weights
from tiny import POLICIES, assert_same, tiny_model, toy_examples, toy_pair

from switchkd import Switch, decode, decode_reference
from switchkd.base.errors import NoMemoryError, SwitchKDWarning
from switchkd.base.memory import halving, out_of_memory
from switchkd.decoding.board import Board
from switchkd.decoding.engine import BlockEngine
from switchkd.evaluation import evaluate as evaluation
from switchkd.evaluation.evaluate import evaluate
from switchkd.evaluation.settings import EvalSettings
from switchkd.evaluation.tasks import TASKS
from switchkd.methods.mixes import Adaptive, Generated
from switchkd.methods.policy import Policy
from switchkd.runner.runner import Runner
from switchkd.runs.distil import standing
from switchkd.training.checkpoint import checkpoints
from switchkd.training.learner import Learner
from switchkd.training.reading import Reading
from switchkd.training.settings import TrainConfig
from switchkd.training.trainer import Trainer

PROMPTS = [[3, 4, 5], [7], [2, 2, 9, 11, 4, 6, 8], [7, 9], [3, 4, 5], [], [8, 2]]


@pytest.mark.parametrize(
    ("error", "it_did"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("could not execute a primitive"), True),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"
            ),
            True,
        ),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("unable to mmap 8 bytes from file <x>: Cannot allocate memory (12)"), True),
        (RuntimeError("std::bad_alloc"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (OSError(28, "No space left on device"), False),
        (RuntimeError("could not create a primitive descriptor for a matmul primitive"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"), False),
        (ValueError("out of memory"), False),
        (KeyboardInterrupt("out of memory"), False),
    ],
)
def test_memory_that_ran_out_is_known_by_what_libraries_say(error, it_did):
    assert out_of_memory(error) == it_did


def ours(warned):
    """What we said; libraries say things too."""
    return [str(each.message) for each in warned if each.category is SwitchKDWarning]


def short_of_memory(patch, rows, after=0):
    """Caches for more rows than ``rows`` do not fit; the first ``after`` rounds go well."""
    seen, extend = [], Runner.extend

    def limited(self, places, *args, **more):
        seen.append(len(places.host))
        if len(seen) > after and len(places.host) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return extend(self, places, *args, **more)

    patch.setattr(Runner, "extend", limited)
    return seen


def check_tokens(monkeypatch):
    models = tiny_model("llama", 1), tiny_model("llama", 2)
    for name in ("switch_exponential", "adaswitch", "parity"):
        policy: Policy = POLICIES[name]
        expected = decode_reference(*models, PROMPTS, policy, 10, eos_token_ids=[])
        with (
            monkeypatch.context() as patch,
            pytest.warns(SwitchKDWarning, match="with 6 rows at once: from here on 1;") as said,
        ):
            short_of_memory(patch, rows=2, after=9)
            made = decode(*models, PROMPTS, policy, 10, eos_token_ids=[], block_size=3, keep_hidden=True)
        assert len(ours(said)) == 1 and made.rows_that_fit == 1
        assert_same(made, expected)
        assert made.cost.kept_tokens == sum(len(row.completion_ids) for row in expected)
        hidden = decode(*models, PROMPTS, policy, 10, eos_token_ids=[], block_size=3, keep_hidden=True)
        for row, other in zip(made, hidden, strict=True):
            assert (row.said is None) == (other.said is None)
            if row.said is not None:
                torch.testing.assert_close(row.said, other.said, atol=1e-12, rtol=1e-9)


def test_decoding_with_fewer_rows_gives_the_same_tokens_and_one_warning(monkeypatch):
    check_tokens(monkeypatch)


def test_mutant_that_takes_what_was_read_for_read_again(monkeypatch):
    """The caches of the rows that go on are new, and empty."""
    start = BlockEngine._open

    def forgetful(self, places):
        before = [runner.read for runner in self.runners if hasattr(runner, "read")]
        start(self, places)
        for runner, read in zip(self.runners, before, strict=False):
            runner.read = read[:places]

    monkeypatch.setattr(BlockEngine, "_open", forgetful)
    with pytest.raises((AssertionError, RuntimeError, pytest.fail.Exception)):
        check_tokens(monkeypatch)


def test_forwards_before_the_lack_of_memory_are_counted_too(monkeypatch):
    models, done, extend = (tiny_model("llama", 1), tiny_model("llama", 2)), [], Runner.extend

    def limited(self, places, *rest, **more):
        if len(done) > 9 and len(places.host) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        logits = extend(self, places, *rest, **more)
        done.append(len(places.host))
        return logits

    monkeypatch.setattr(Runner, "extend", limited)
    with pytest.warns(SwitchKDWarning, match="from here on"):
        cost = decode(*models, PROMPTS, Switch(), 10, eos_token_ids=[], block_size=3, drafter="student").cost
    assert cost.student_forwards + cost.teacher_forwards == sum(done)


def test_mutant_that_keeps_half_made_rows(monkeypatch):
    """Where memory ran out while a round was written down, texts and states are not of one moment."""
    models, writes = (tiny_model("llama", 1), tiny_model("llama", 2)), []
    expected = decode_reference(*models, PROMPTS, POLICIES["parity"], 10, eos_token_ids=[])
    write = Board.write

    def late(self, rows, verdict):
        write(self, rows, verdict)
        writes.append(rows)
        if len(writes) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def decoded():
        writes.clear()
        with pytest.warns(SwitchKDWarning, match="from here on 3"):
            return decode(*models, PROMPTS, POLICIES["parity"], 10, eos_token_ids=[], block_size=3)

    monkeypatch.setattr(Board, "write", late)
    assert_same(decoded(), expected)
    shrink = BlockEngine.shrink
    monkeypatch.setattr(BlockEngine, "shrink", lambda self: setattr(self, "settled", True) or shrink(self))
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        assert_same(decoded(), expected)


def micro_batches_of(patch, rows):
    """A student that cannot be trained on more rows at once; returns the rows of the forwards that went well."""
    seen, loss = [], Learner.loss

    def limited(self, batch, objective):
        value = loss(self, batch, objective)
        if len(batch) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        seen.append(len(batch))
        return value

    patch.setattr(Learner, "loss", limited)
    return seen


SHORT = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "mix": Generated(1.0)}


def second_too_many(patch):
    """Memory runs out in the second micro-batch and in no other; returns the sizes of all."""
    real, calls = Learner.loss, []

    def late(self, batch, objective):
        calls.append(len(batch))
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, batch, objective)

    patch.setattr(Learner, "loss", late)
    return calls


def check_gradients(tmp_path, monkeypatch):
    expected, whole, _ = gradient_step(tmp_path, **SHORT)
    with (
        monkeypatch.context() as patch,
        pytest.warns(SwitchKDWarning, match="training with 4 rows at once: from here on 1;") as said,
    ):
        seen = micro_batches_of(patch, 1)
        gradients, metrics, _ = gradient_step(tmp_path, **SHORT)
    assert len(ours(said)) == 1 and seen == [1] * 8
    assert metrics["loss"] == pytest.approx(whole["loss"], abs=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-12, rtol=1e-12)


def test_training_with_smaller_micro_batches_gives_the_same_gradients_and_one_warning(tmp_path, monkeypatch):
    check_gradients(tmp_path, monkeypatch)


def test_mutant_that_keeps_the_gradients_of_a_try_that_was_given_up(tmp_path, monkeypatch):
    """Memory runs out in the second micro-batch, when the first has left its gradient."""
    expected, _, _ = gradient_step(tmp_path, **SHORT)
    for mutant in (False, True):
        with monkeypatch.context() as patch, pytest.warns(SwitchKDWarning, match="from here on 2;"):
            second_too_many(patch)
            if mutant:
                patch.setattr("torch.optim.AdamW.zero_grad", lambda *_, **__: None)
            gradients, _, _ = gradient_step(tmp_path, **SHORT)
        equal = all(torch.allclose(g, expected[name], atol=1e-12, rtol=1e-9) for name, g in gradients.items())
        assert equal is not mutant


def test_the_size_that_fits_is_kept_and_the_run_ends_as_it_would_have(tmp_path, monkeypatch):
    straight = trainer(tmp_path / "straight", **SHORT)
    straight.train()
    short = trainer(tmp_path / "short", **SHORT)
    with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        seen = micro_batches_of(patch, 2)
        decoded = short_of_memory(patch, rows=4)
        short.train()
    assert [text.split(":")[0] for text in ours(said)] == [
        "memory ran out while decoding with 8 rows at once",
        "memory ran out while training with 4 rows at once",
    ]
    assert seen == [2] * 4 * 6 and sum(rows > 4 for rows in decoded) == 1
    for name, weight in weights(straight).items():
        torch.testing.assert_close(weights(short)[name], weight, atol=1e-9, rtol=1e-6)
    texts = ([r["completion_ids"] for r in lines(tmp_path / n, "rollouts.jsonl")] for n in ("straight", "short"))
    assert next(texts) == next(texts)


@pytest.mark.parametrize("where", ["decoding", "training"])
def test_a_single_row_that_does_not_fit_stops_with_a_checkpoint_of_the_step_before(tmp_path, monkeypatch, where):
    t = trainer(tmp_path, **SHORT)
    t.due = None
    t.train_step()
    before = weights(t)
    short_of_memory(monkeypatch, 0) if where == "decoding" else micro_batches_of(monkeypatch, 0)
    with pytest.raises(NoMemoryError, match=f"memory runs out while {where} with a single row .*shorten the text"):
        t.train()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), weights(t).values(), strict=True))
    assert [c.name for c in checkpoints(tmp_path)] == ["checkpoint-1"] and "checkpoint-1 stands" in standing(tmp_path)
    monkeypatch.undo()
    again = trainer(tmp_path, **SHORT)
    again.resume()
    assert again.step == 1


# --- scores of held-out text --------------------------------------------------------------------------------------


def readings_of(patch, rows, after=0):
    """More than ``rows`` references are too many to be read at once, but for the first ``after`` times; returns how many were."""
    seen, read = [], evaluation._token_losses

    def limited(teacher, scored, batch, bridge):
        losses = read(teacher, scored, batch, bridge)
        seen.append(len(batch))
        if len(batch) > rows and len(seen) > after:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return losses

    patch.setattr(evaluation, "_token_losses", limited)
    return seen


def scored(told=None, **changes):
    pair, settings = toy_pair(), dataclasses.replace(EvalSettings(max_new_tokens=2), **changes)
    pair.tokenizer.batch_decode = lambda rows, **_: [str(row) for row in rows]
    progress = (lambda *_: None) if told is None else lambda count, _: told.append(count)
    return evaluate(pair, pair.student, toy_examples(12), TASKS["references"], settings, progress)


def check_scores(tmp_path, monkeypatch):
    expected, told = scored(), []
    with (
        monkeypatch.context() as patch,
        pytest.warns(SwitchKDWarning, match="scoring with") as said,
    ):
        seen = readings_of(patch, 1, after=1)
        found = scored(told)
    assert len(ours(said)) == 1 and seen == [8, 4, 2, 1, 1, 1, 1]
    assert "with 4 rows at once: from here on 1;" in ours(said)[0] and "score_batch_size 1 would" in ours(said)[0]
    assert sum(told) == 24 and told[:5] == [8, 1, 1, 1, 1]  # read once, completed once
    for name, values in expected.scores.items():
        np.testing.assert_allclose(found.scores[name].values, values.values, rtol=0, atol=1e-12)
        np.testing.assert_array_equal(found.scores[name].weights, values.weights)


def check_validation(tmp_path, monkeypatch):
    """Memory runs out in the second batch, when the first has been summed."""
    more = {"mix": Adaptive(validation_steps=1), "validation": toy_examples(5), "per_device_train_batch_size": 4}
    whole, short = trainer(tmp_path, **more), trainer(tmp_path, **more)
    whole._look_at_validation()
    with (
        monkeypatch.context() as patch,
        pytest.warns(SwitchKDWarning, match="validating with 4 rows at once: from here on 2"),
    ):
        calls = second_too_many(patch)
        short._look_at_validation()
    assert calls == [4, 1, 2, 2, 1] and short.learner.micro_rows == 2
    assert short.reading.memory["loss"] == pytest.approx(whole.reading.memory["loss"], abs=1e-12)


CHECKS = [check_scores, check_validation]


@pytest.mark.parametrize("check", CHECKS)
def test_held_out_text_read_with_fewer_rows_has_the_same_scores_and_one_warning(tmp_path, monkeypatch, check):
    check(tmp_path, monkeypatch)


MUTANTS = {
    "the size that fits is forgotten": lambda work, rows, *words: (halving(work, rows, *words)[0], rows),
    "nothing is tried again": lambda work, rows, *_: (work(rows), rows),
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("mistake", MUTANTS)
def test_mutants_read_held_out_text_otherwise(tmp_path, monkeypatch, check, mistake):
    for module in ("evaluation.evaluate", "training.learner"):
        monkeypatch.setattr(f"switchkd.{module}.halving", MUTANTS[mistake])
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(tmp_path, monkeypatch)


def test_a_single_reference_that_does_not_fit_is_explained(monkeypatch):
    seen = readings_of(monkeypatch, 0)
    with pytest.raises(NoMemoryError, match=r"memory runs out while scoring with a single row .*shorten"):
        scored()
    assert seen == [8, 4, 2, 1]


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    calls = []

    def broken(rows):
        calls.append(rows)
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        halving(broken, 8, "training", "per_device_train_batch_size")
    assert calls == [8]
    assert halving(lambda rows: rows, 3, "x", "y") == (3, 3)


# --- 200 steps ----------------------------------------------------------------------------------------------------


def held():
    """What this process holds: Python objects that the collector sees, and bytes of tensors."""
    gc.collect()
    objects = gc.get_objects()
    tensors = [each for each in objects if type(each) in (torch.Tensor, torch.nn.Parameter)]
    return len(objects), sum(each.numel() * each.element_size() for each in tensors)


def growth(folder, first, last):
    """Objects and bytes that a step leaves behind: from step ``first``, when buffers and caches have filled, to ``last``."""
    mix = Adaptive(share=0.9, capacity=8, validation_steps=10)
    t = trainer(
        folder, toy_pair(), toy_examples(), mix=mix, validation=toy_examples(2), corpus=toy_examples(3), max_steps=last,
        max_new_tokens=4, per_device_train_batch_size=2, save_steps=100,
    )  # fmt: skip
    seen = {}

    def on_step(metrics, _):
        if metrics["step"] in (first, last):
            seen[metrics["step"]] = held()

    t.train(on_step)
    return [(after - before) / (last - first) for before, after in zip(seen[first], seen[last], strict=True)]


# Of a step's text, the states alone are more bytes.
FEW_OBJECTS, FEW_BYTES = 1, 67


def test_memory_is_flat_over_200_steps(tmp_path):
    objects, size = growth(tmp_path, 50, 200)
    assert objects < FEW_OBJECTS and size < FEW_BYTES


def test_mutant_that_keeps_each_steps_text(tmp_path, monkeypatch):
    kept, generate = [], Reading.generate

    def hoarding(self, *args):
        rollouts = generate(self, *args)
        kept.append(rollouts[0])
        return rollouts

    monkeypatch.setattr(Reading, "generate", hoarding)
    objects, size = growth(tmp_path, 20, 60)
    assert objects >= FEW_OBJECTS and size >= FEW_BYTES


def test_measuring_what_rounds_cost_goes_on_with_fewer_rows_too(monkeypatch, tmp_path):
    """A run measures before its first step: a lack of memory there is the one that decoding knows."""
    pair, config = toy_pair(), TrainConfig(output_dir=str(tmp_path), max_new_tokens=6, **SHORT)
    seen = short_of_memory(monkeypatch, rows=2)
    assert len(Trainer(pair, toy_examples(), config).config.costs) == 6
    assert seen[0] == 12 and max(seen[-2:]) <= 2
