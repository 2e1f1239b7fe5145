"""SIGTERM and SIGINT end a run between two blocks with a checkpoint to go on from bit for bit; a second ends it at once."""

import dataclasses
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from test_trainer import lines, trainer, weights, without_times
from tiny import pair_on_disk, toy_examples, toy_pair

from switchkd.base import signals
from switchkd.base.signals import Interrupted, Stopped
from switchkd.cli.main import main
from switchkd.evaluation.evaluate import evaluate
from switchkd.evaluation.samples import samples
from switchkd.evaluation.settings import EvalSettings
from switchkd.evaluation.tasks import TASKS
from switchkd.methods.mixes import Adaptive
from switchkd.runs.distil import distil, sample_policy
from switchkd.training.checkpoint import checkpoints
from switchkd.training.settings import TrainConfig
from switchkd.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
SHORT = {
    "max_steps": 3, "save_steps": 0, "eval_steps": 2, "sample_steps": 2, "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 2, "mix": Adaptive(share=0.9, capacity=6, validation_steps=2), "max_new_tokens": 4,
}  # fmt: skip


class Polls:
    """Stands for ``check``: counts its calls, and takes the one numbered ``stop`` for the moment at which a signal comes."""

    def __init__(self, stop: int = -1):
        self.calls, self.stop = 0, stop

    def __call__(self) -> None:
        self.calls += 1
        if self.calls == self.stop:
            raise Stopped(signal.SIGTERM)


def train(folder, monkeypatch, stop=-1, resume=False):
    """A short run with everything that polls, stopped at a poll; returns the trainer and how often it polled."""
    pair, polls = toy_pair(), Polls(stop)
    pair.tokenizer.batch_decode = lambda rows, **_: [str(row) for row in rows]
    pair.tokenizer.decode = lambda row, **_: str(row)
    t = trainer(folder, pair, validation=toy_examples(3), **SHORT)
    if resume:
        t.resume()

    def scores(student):
        return evaluate(pair, student, toy_examples(3), TASKS["references"], EvalSettings(max_new_tokens=3)).means()

    def sample(progress):
        return samples(
            pair,
            toy_examples(2),
            t.config.decoding(policy=sample_policy(t.config, t.reading.policy, progress), seed=t.config.seed),
            None,
        )

    monkeypatch.setattr(signals, "check", polls)
    try:
        t.train(evaluate=scores, sample=sample)
    except Stopped:
        assert polls.calls == stop
    return t, polls.calls


def assert_equal_runs(ours, theirs):
    mine, other = weights(ours), weights(theirs)
    assert all(torch.equal(mine[name], other[name]) for name in other)
    for a, b in zip(ours.pair.student.parameters(), theirs.pair.student.parameters(), strict=True):
        for key, moment in theirs.learner.optimizer.state[b].items():
            assert torch.equal(moment, ours.learner.optimizer.state[a][key])
    assert ours.num_tokens == theirs.num_tokens
    assert (ours.reading.replay, ours.reading.memory) == (theirs.reading.replay, theirs.reading.memory)
    for name in ("metrics.jsonl", "rollouts.jsonl", "samples.jsonl"):
        assert without_times(lines(ours.run, name)) == without_times(lines(theirs.run, name)), name


@pytest.fixture
def straight(tmp_path, monkeypatch):
    t, polls = train(tmp_path / "straight", monkeypatch)
    assert polls > 20
    return t, polls


def test_a_run_stopped_at_any_poll_goes_on_bit_for_bit(straight, tmp_path, monkeypatch):
    """While sampling before the first step, validating, decoding, accumulating, evaluating, sampling; and twice in a row."""
    expected, polls = straight
    for stop in range(1, polls + 1):
        check_stop(tmp_path / str(stop), monkeypatch, stop, expected, again=stop % 3 == 0)


def check_stop(folder, monkeypatch, stop, expected, again=False):
    stopped, _ = train(folder, monkeypatch, stop)
    assert [c.name for c in checkpoints(folder)][-1:] == [f"checkpoint-{stopped.step}"], stop
    if again:
        train(folder, monkeypatch, stop=2, resume=True)
    assert_equal_runs(train(folder, monkeypatch, resume=True)[0], expected)


MUTANTS = {
    "the save forgets what the files do not say yet": (
        "save",
        lambda save: lambda t: (setattr(t, "due", None), save(t)),
    ),
    "a dropped step leaves its text and its validation loss": ("train_step", lambda _: Trainer._train_step),
    "nothing is saved": ("save", lambda save: lambda t: t.step % 2 or save(t)),
}


@pytest.mark.parametrize("mistake", MUTANTS)
def test_mutants_do_not_go_on_bit_for_bit(straight, tmp_path, monkeypatch, mistake):
    name, mutated = MUTANTS[mistake]
    monkeypatch.setattr(Trainer, name, mutated(getattr(Trainer, name)))
    with pytest.raises(AssertionError):
        for stop in range(1, straight[1]):
            check_stop(tmp_path / f"m{stop}", monkeypatch, stop, straight[0])


# --- handlers -----------------------------------------------------------------------------------------------------


@pytest.fixture
def interruptible():
    """A shell may start what runs in the background so that it ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", signals.STOPPING)
def test_the_first_signal_is_noted_and_the_second_does_what_it_did_before(monkeypatch, number, interruptible):
    before = [signal.getsignal(each) for each in signals.STOPPING]
    with signals.terminable():
        with pytest.raises(KeyboardInterrupt) as caught, signals.deferred():
            signal.raise_signal(number)
            signal.raise_signal(number)  # a launcher passes on what its terminal told all: not a second one
            with pytest.raises(Stopped) as stopped:
                signals.check()
            assert 128 + stopped.value.signal == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}[number]
            monkeypatch.setattr(signals, "ONE_SIGNAL_SECONDS", 0.0)
            signal.raise_signal(number)
        assert not isinstance(caught.value, Stopped)
    assert [signal.getsignal(each) for each in signals.STOPPING] == before
    signals.check()  # what was noted is forgotten


def test_a_hangup_that_nohup_has_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.terminable(), signals.deferred():
            signal.raise_signal(signal.SIGHUP)
            assert not signals.received()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_processes_that_can_only_stop_together_are_not_stopped_by_a_poll():
    with signals.deferred(polled=False):
        signal.raise_signal(signal.SIGTERM)
        signals.check()
        assert signals.received() == signal.SIGTERM


def test_another_thread_changes_no_handlers():
    before, seen = signal.getsignal(signal.SIGINT), []

    def work():
        with signals.deferred(), signals.terminable():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.parametrize(("error", "code"), [(Interrupted(signal.SIGTERM), 143), (KeyboardInterrupt(), 130)])
def test_exit_codes(monkeypatch, capsys, error, code):
    monkeypatch.setattr("switchkd.cli.main._command", lambda _: (_ for _ in ()).throw(error))
    assert main(["train"]) == code
    assert capsys.readouterr().err in ("stopped by SIGTERM\n", "interrupted\n")


# --- processes ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A run on a tiny pair that would take minutes."""
    return TrainConfig(
        **pair_on_disk(tmp_path_factory.mktemp("pair")), template="none", max_new_tokens=8, max_steps=5000,
        per_device_train_batch_size=2, eval_samples=2, eval_max_new_tokens=4, save_steps=1000, sample_steps=0,
        costs=(1e-3, 1e-5) * 3,
    )  # fmt: skip


def started(settings, run, saving="pass"):
    """A training process that runs; ``saving`` is code that a save runs first, once a step was told of."""
    import yaml

    from switchkd.base.settings import to_dict

    recipe = run.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(to_dict(dataclasses.replace(settings, output_dir=str(run))), sort_keys=False))
    code = (
        "import os, sys, time; from switchkd.training import checkpoint, trainer\n"
        "from switchkd.cli import main as cli\nsave = checkpoint._write_model\n"
        f"def slow(*args):\n    if os.path.exists({str(run / 'metrics.jsonl')!r}):\n        {saving}\n    save(*args)\n"
        "checkpoint._write_model = slow\nsys.exit(cli.main())"
    )
    arguments = [sys.executable, "-c", code, "train", str(recipe)]
    return subprocess.Popen(
        arguments, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=dict(os.environ)
    )


def wait_for(path, process, seconds=300):
    until = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < until, f"no {path}"
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_process_that_is_told_to_stop_saves_and_says_how_to_go_on(settings, tmp_path, number, code):
    run = tmp_path / "run"
    process = started(settings, run)
    wait_for(run / "metrics.jsonl", process)
    process.send_signal(number)
    _, said = process.communicate(timeout=3000)
    assert process.returncode == code, said
    *_, saved = checkpoints(run)
    step = int(saved.name.removeprefix("checkpoint-"))
    assert step == len(lines(run, "metrics.jsonl")) and 0 < step < 5000
    assert said.splitlines()[-2:] == [
        f"stopped by {signal.Signals(number).name}",
        f"{saved} stands; go on with: switchkd train {run} --resume",
    ]
    assert {path.name for path in run.iterdir() if path.name.startswith((".", "lock"))} == set()


def test_a_second_signal_leaves_at_once_and_nothing_half_written(settings, tmp_path):
    """It comes while the save that the first one asked for hangs; without it the save is finished, as seen above."""
    run = tmp_path / "run"
    process = started(settings, run, saving=f"open({str(tmp_path / 'saving')!r}, 'w'); time.sleep(600)")
    wait_for(run / "metrics.jsonl", process)
    process.send_signal(signal.SIGTERM)
    wait_for(tmp_path / "saving", process)
    time.sleep(signals.ONE_SIGNAL_SECONDS + 0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    assert process.returncode == 143
    assert {path.name for path in run.iterdir()} == {
        "config.yaml", "origin.json", "evaluation.json", "evaluation.completions.jsonl", "metrics.jsonl", "rollouts.jsonl",
        "checkpoint-0",
    }  # fmt: skip


# --- before the first step ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place",
    [
        "switchkd.models.loading.load_config",
        "switchkd.runs.distil.weights_sha256",
        "switchkd.runs.distil.save_student",
    ],
)
def test_a_run_stopped_before_or_after_training_says_what_stands(settings, tmp_path, monkeypatch, capsys, place):
    """While loading, scoring the untrained student, and saving the trained one."""
    config = dataclasses.replace(settings, output_dir=str(tmp_path / "run"), max_steps=2)
    path, name = place.rsplit(".", 1)
    module = importlib.import_module(path)
    original = getattr(module, name)

    def told(*args, **more):
        signal.raise_signal(signal.SIGTERM)
        return original(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, told)
        with pytest.raises(Stopped) as stopped:
            distil(config)
    [note] = stopped.value.__notes__
    if name == "save_student":
        assert note.startswith(str(tmp_path / "run" / "checkpoint-2 stands; go on with: switchkd train"))
        config = dataclasses.replace(config, resume=True)
    else:
        assert note == "the same command starts anew" and (tmp_path / "run").exists() == (name == "weights_sha256")
    assert set(distil(config)) == {"teacher", "student before", "student after"}
    assert len(lines(tmp_path / "run", "metrics.jsonl")) == 2
