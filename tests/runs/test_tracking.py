"""Trackers see what metrics.jsonl holds, and none of them can end a run."""

import dataclasses
import json
import math
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import yaml
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, TensorBoardTracker
from tiny import pair_on_disk

from switchkd.base.errors import ConfigError
from switchkd.base.settings import to_dict
from switchkd.evaluation.results import read_results
from switchkd.runs import distil as runs
from switchkd.runs import tracking
from switchkd.runs.tracking import Trackers, check_trackers
from switchkd.training.settings import TrainConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A run of seconds: half of its steps generate, one of them is scored."""
    return TrainConfig(
        **pair_on_disk(tmp_path_factory.mktemp("pair")), eval_samples=2, eval_max_new_tokens=4, eval_steps=2, eval_on_start=False,
        max_new_tokens=6, max_completion_length=12, per_device_train_batch_size=2, max_steps=4, save_steps=2,
    )  # fmt: skip


def distil(settings, folder, *report_to, **changes):
    return runs.distil(dataclasses.replace(settings, output_dir=str(folder), report_to=report_to, **changes))


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def stop_after(monkeypatch, step):
    """Interrupt training as Ctrl-C does, once the trackers have seen ``step``."""
    log = Trackers.log

    def stop(self, values, at):
        log(self, values, at)
        if at == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trackers, "log", stop)


def on_tensorboard(folder):
    """What TensorBoard shows: {name: {step: value}}; a step that it shows twice is an error."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "trackers" / "switchkd"), {"scalars": 0, "tensors": 0}).Reload()
    shown = {}
    for name in events.Tags()["scalars"]:
        points = events.Scalars(name)
        shown[name] = {point.step: point.value for point in points}
        assert len(points) == len(shown[name]), name
    for name in events.Tags()["tensors"]:
        texts = events.Tensors(name)
        shown[name.removesuffix("/text_summary")] = {
            text.step: text.tensor_proto.string_val[0].decode() for text in texts
        }
    return shown


def assert_equal_to_the_run(shown, folder):
    """Each value of metrics.jsonl and each final score, at its step, to float32, and nothing else."""
    means = read_results(folder / "evaluation.json")["student after"].means()
    final = {"step": 4} | {f"final/{name}": None if math.isnan(mean) else mean for name, mean in means.items()}
    expected = {}
    for record in [*metrics(folder), final]:
        for name, value in record.items():
            if name != "step" and value is not None:
                expected.setdefault(name, {})[record["step"]] = value
    assert shown.keys() == expected.keys() and shown.pop("source") == expected.pop("source")
    for name, values in expected.items():
        assert shown[name] == pytest.approx(values, rel=1e-6), name


def test_tensorboard_shows_metrics_jsonl_value_by_value(settings, tmp_path):
    distil(settings, tmp_path / "run", "tensorboard")
    shown = on_tensorboard(tmp_path / "run")
    assert set(shown["source"].values()) == {"policy", "examples"}
    assert {
        "completions/mean_length",
        "num_tokens",
        "switch/teacher_share",
        "switch/threshold",
        "eval/rouge_l",
    } <= shown.keys()
    assert_equal_to_the_run(shown, tmp_path / "run")


def test_a_resumed_run_goes_on_in_its_tensorboard_and_shows_no_step_twice(settings, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 3)
        distil(settings, tmp_path / "run", "tensorboard")
    before = on_tensorboard(tmp_path / "run")
    assert before["loss"].keys() == {1, 2, 3}
    distil(settings, tmp_path / "run", "tensorboard", resume=True)
    shown = on_tensorboard(tmp_path / "run")
    assert_equal_to_the_run(shown, tmp_path / "run")
    assert shown["seconds"][2] == before["seconds"][2] and shown["seconds"][3] != before["seconds"][3]


class Flaky(GeneralTracker):
    """A tracker that fails where it is told to, and writes down what it was told."""

    name, requires_logging_directory = "trackio", False
    fails_at = ""

    def __init__(self, *_, **__):
        super().__init__()
        self.told = []

    @property
    def tracker(self):
        return None

    def _told(self, what):
        self.told.append(what)
        if what == self.fails_at:
            raise ConnectionError("no network")

    def start(self):
        self._told("start")

    def log(self, values, step=None, **_):
        self._told(f"log {step}")

    def finish(self):
        self._told("finish")


@pytest.mark.parametrize("moment", ["start", "log 2", "finish"])
def test_a_tracker_that_fails_is_named_once_and_neither_the_run_nor_another_tracker_ends(
    settings, tmp_path, monkeypatch, capsys, moment
):
    made = []
    monkeypatch.setattr(tracking, "find_spec", lambda name: object())  # trackio itself is not needed
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "trackio", lambda *_, **__: made.append(Flaky()) or made[-1])
    monkeypatch.setattr(Flaky, "fails_at", moment)
    distil(settings, tmp_path / "run", "trackio", "tensorboard")
    assert made[0].told[-1] == moment and made[0].told.count(moment) == 1
    assert capsys.readouterr().out.count("warning: trackio failed at") == 1
    assert_equal_to_the_run(on_tensorboard(tmp_path / "run"), tmp_path / "run")


def test_a_full_disk_under_tensorboard_does_not_end_a_run(settings, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorBoardTracker, "log", full)
    distil(settings, tmp_path / "run", "tensorboard")
    assert len(metrics(tmp_path / "run")) == 4 and (tmp_path / "run" / "student" / "config.json").is_file()
    assert (
        "warning: tensorboard failed at step 1 (OSError: [Errno 28] No space left on device)" in capsys.readouterr().out
    )


def test_values_that_are_none_or_nan_are_left_out_and_text_is_kept(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Flaky, "log", lambda self, values, step: seen.append((values, step)))
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "trackio", Flaky)
    trackers = Trackers(["trackio"], tmp_path, {}, 0)
    trackers.log({"step": 7, "loss": 0.5, "source": "policy", "switch/first_switch": None, "eval/x": math.nan}, 7)
    assert seen == [({"loss": 0.5, "source": "policy"}, 7)]


def test_a_missing_package_is_an_error_before_anything_is_made(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None if name == "wandb" else object())
    with pytest.raises(ConfigError, match=r'wandb is not installed; pip install "switchkd\[track\]"'):
        distil(settings, tmp_path / "run", "tensorboard", "wandb")
    assert not (tmp_path / "run").exists()
    check_trackers(["tensorboard", "trackio"])


def test_only_the_main_process_reports(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "is_main_process", property(lambda self: False))
    distil(settings, tmp_path / "run", "tensorboard")
    assert not (tmp_path / "run").exists()


def test_a_run_without_trackers_writes_none(settings, tmp_path):
    distil(settings, tmp_path / "run")
    assert not (tmp_path / "run" / "trackers").exists()


STOPPED = """
import sys
from switchkd.cli.main import main
from switchkd.runs.tracking import Trackers
log = Trackers.log
def stop(self, values, step):
    log(self, values, step)
    if step == 3: raise KeyboardInterrupt
Trackers.log = stop
sys.exit(main())
"""


def stop_and_resume(settings, folder, tracker, **environment):
    """A run in processes of its own that is stopped after step 3, and goes on from the checkpoint of step 2."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(to_dict(dataclasses.replace(settings, output_dir=str(folder / "run")))))
    for code, arguments in ((130, []), (0, ["--resume"])):
        start = ["-c", STOPPED] if code else ["-m", "switchkd.cli"]
        done = subprocess.run(
            [sys.executable, *start, "train", str(recipe), "--report-to", tracker, *arguments],
            env=os.environ | environment, cwd=ROOT, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        assert "warning" not in done.stdout
    return folder / "run"


def test_trackio_keeps_a_resumed_run_as_one_and_needs_no_network(settings, tmp_path):
    pytest.importorskip("trackio")
    run = stop_and_resume(settings, tmp_path, "trackio", TRACKIO_DIR=str(tmp_path / "trackio"), HF_HUB_OFFLINE="1")
    with closing(sqlite3.connect(tmp_path / "trackio" / "switchkd.db")) as database:
        rows = database.execute("SELECT run_name, step, metrics, run_id FROM metrics ORDER BY id").fetchall()
    key = (run / "trackers" / "id").read_text()
    assert {row[0] for row in rows} == {f"run-{key}"} and len({row[3] for row in rows}) == 1
    # The step after the checkpoint was made twice, and trackio keeps both; the scores come last.
    assert [row[1] for row in rows] == [1, 2, 3, 3, 4, 4]
    shown = {}
    for _, step, text, _ in rows:
        for name, value in json.loads(text).items():
            shown.setdefault(name, {})[step] = value
    assert_equal_to_the_run(shown, run)


def test_wandb_offline_keeps_a_resumed_run_under_one_id(settings, tmp_path):
    pytest.importorskip("wandb")
    run = stop_and_resume(settings, tmp_path, "wandb", WANDB_MODE="offline", WANDB_SILENT="true")
    key = (run / "trackers" / "id").read_text()
    written = sorted((run / "trackers" / "wandb").glob("offline-run-*/*.wandb"))
    assert [file.name for file in written] == [f"run-{key}.wandb"] * 2
    assert all(b"switch/teacher_share" in file.read_bytes() for file in written)
