"""Several processes of a run, as a launcher starts them: they find each other, stop after the same step, and wait long enough."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import pair_on_disk

from switchkd.base.errors import SwitchKDWarning
from switchkd.base.settings import to_dict
from switchkd.runs.distil import distil
from switchkd.training.checkpoint import checkpoints
from switchkd.training.processes import PATIENCE
from switchkd.training.settings import TrainConfig

ROOT = Path(__file__).parents[2]
# What each process runs. PLOT is what happens to it.
SCRIPT = """
import os, signal, sys, time
from datetime import timedelta
from pathlib import Path
import torch
torch.set_num_threads(1)
from switchkd.runs import distil as runs
from switchkd.cli.main import main
from switchkd.training import processes, trainer
from switchkd.base import signals
from switchkd.training.trainer import Trainer

def await_(condition):
    until = time.monotonic() + 120
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)

folder, rank = Path(__file__).parent, int(os.environ["RANK"])
save, train_step = Trainer.save, Trainer.train_step

def noted(trainer):
    save(trainer)
    (folder / f"saved-{{rank}}").write_text(str(trainer.step))

def eventful(trainer, on_round=None):
    if trainer.step == 2:
        in_the_third_step()
    return train_step(trainer, on_round)

def in_the_third_step():
    pass

Trainer.save, Trainer.train_step = noted, eventful
{plot}
sys.exit(main(["train", str(folder / "recipe.yaml")]))
"""
# The launcher is told, and tells both.
LAUNCHER = """
def in_the_third_step():
    (folder / f"arrived-{rank}").touch()
    await_(signals.received)
"""
# One process is told.
ONE = """
def in_the_third_step():
    if rank == 1:
        signal.raise_signal(signal.SIGTERM)
"""
# A process that is told stops by itself.
ALONE = """
processes.PATIENCE = timedelta(seconds=5)
def stop(accelerator):
    if signals.received():
        raise signals.Stopped(signals.received())
trainer.stop_together = stop
"""
# The first process takes long over the first evaluation: until the other has given up, if it does.
IMPATIENT = """
processes.PATIENCE = timedelta(seconds=1)
before = runs._before
def slow(*arguments):
    await_((folder / "gave up").exists)
    return before(*arguments)
def distil(config):
    try:
        return real(config)
    except BaseException as error:
        if rank:
            (folder / "gave up").write_text(repr(error))
        raise
real, runs.distil, runs._before = runs.distil, distil, slow
"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A short run in float64; its step has four rows."""
    return TrainConfig(
        **pair_on_disk(tmp_path_factory.mktemp("pair")), template="none", dtype="float64", max_new_tokens=6, max_steps=5,
        per_device_train_batch_size=4, learning_rate=3e-3, eval_samples=0, save_steps=0, sample_steps=0, seed=3, quiet=True,
        costs=(1e-3, 1e-5) * 3,
    )  # fmt: skip


def launched(folder, settings, plot):
    """Two processes on two rows each."""
    folder.mkdir()
    config = dataclasses.replace(settings, output_dir=str(folder / "run"), per_device_train_batch_size=2)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
    (folder / "script.py").write_text(SCRIPT.format(plot=plot))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*command, str(folder / "script.py")], cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment
    )


def ended(process):
    """Exit code and stderr."""
    _, said = process.communicate(timeout=240)
    return process.returncode, said


def student(run):
    return load_file(run / "student" / "model.safetensors")


def check_stop(folder, settings, plot):
    process = launched(folder, settings, plot)
    if plot == LAUNCHER:
        while not all((folder / f"arrived-{rank}").exists() for rank in (0, 1)):
            assert process.poll() is None, ended(process)
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
    code, said = ended(process)
    run = folder / "run"
    assert code != 0 and [(folder / f"saved-{rank}").read_text() for rank in (0, 1)] == ["3", "3"], said
    assert [each.name for each in checkpoints(run)][-1] == "checkpoint-3"
    for words in ("stopped by SIGTERM", f"checkpoint-3 stands; go on with: switchkd train {run} --resume"):
        assert words in said
    assert not (run / "lock.json").exists()


@pytest.mark.parametrize("plot", [LAUNCHER, ONE], ids=["launcher", "one"])
def test_two_processes_stop_after_the_same_step_and_one_goes_on(tmp_path, settings, plot):
    check_stop(tmp_path / "two", settings, plot)
    straight = dataclasses.replace(settings, output_dir=str(tmp_path / "straight"))
    changes = {"resume": True, "allow_change": ("per_device_train_batch_size",)}
    distil(straight)
    with pytest.warns(SwitchKDWarning, match="other conditions .processes: 2 -> 1."):
        distil(dataclasses.replace(settings, output_dir=str(tmp_path / "two" / "run"), **changes))
    expected, found = student(tmp_path / "straight"), student(tmp_path / "two" / "run")
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=1e-10, rtol=1e-8)


def test_mutant_in_which_the_process_that_is_told_stops_alone(tmp_path, settings):
    with pytest.raises((AssertionError, FileNotFoundError)):
        check_stop(tmp_path / "two", settings, ONE + ALONE)


def test_processes_wait_for_the_first_as_long_as_they_are_told(tmp_path, settings):
    """A second here, so that the other gives up; a day in a run."""
    code, said = ended(launched(tmp_path / "two", dataclasses.replace(settings, eval_samples=1), IMPATIENT))
    assert code != 0 and "imed out" in (tmp_path / "two" / "gave up").read_text(), said
    assert PATIENCE.days >= 1
