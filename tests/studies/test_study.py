"""A study on a tiny pair: its grid, its runs in processes of their own, going on where it stopped, and what it concludes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from tiny import pair_on_disk

from switchkd.base.errors import ConfigError, InUseError
from switchkd.base.lock import locked
from switchkd.base.settings import shipped
from switchkd.cli.main import main
from switchkd.findings.report import cost_table
from switchkd.reports.curves import cost
from switchkd.studies.plan import Plan, Size, cells, load_plan, with_settings
from switchkd.studies.study import _Running, flags
from switchkd.training.checkpoint import checkpoints

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    settings = {
        **pair_on_disk(folder), "template": "none", "max_new_tokens": 8, "max_steps": 2,
        "per_device_train_batch_size": 2, "eval_samples": 4, "eval_max_new_tokens": 6, "eval_steps": 1, "save_steps": 1,
    }  # fmt: skip
    file = folder / "plan.yaml"
    small = {"settings": settings, "evaluations": {"references": {"eval_samples": 3, "eval_max_new_tokens": 4}}}
    tree = {
        "title": "A plan",
        "methods": {"sft": "sft", "soft": {"recipe": "on_policy", "learning_rate": 1e-3}},
        "baseline": "sft",
        "curves": ["eval/rouge_l", "switch/teacher_share"],
        "sizes": {"small": small, "none": {}},
    }
    file.write_text(yaml.safe_dump(tree))
    return file


@pytest.fixture
def in_process(monkeypatch):
    """Runs of a study one after the other in this process, which spares them the imports."""
    one = threading.Lock()

    def run(self, arguments, log):
        with one:
            return main(arguments)

    monkeypatch.setattr(_Running, "run", run)


def test_a_study_runs_goes_on_and_concludes(plan, tmp_path, capsys, monkeypatch, in_process):
    """One run fails at first and is told of; the second time the rest is done and the first is not done again."""
    output = tmp_path / "study"
    arguments = ["study", str(plan), "--output-dir", str(output), "--jobs", "2"]
    run = _Running.run
    with monkeypatch.context() as failing:
        failing.setattr(_Running, "run", lambda self, a, log: 1 if "soft-seed0.yaml" in a[1] else run(self, a, log))
        assert main(arguments) == 1
    said = capsys.readouterr()
    assert "1 of 2 runs are not done (soft-seed0 FAILED)" in said.err and "sft-seed0: done" in said.out
    assert "1 of 2 runs done" in (output / "progress.html").read_text()
    before = (output / "sft-seed0" / "metrics.jsonl").stat().st_mtime_ns
    assert main(arguments) == 0
    assert (output / "sft-seed0" / "metrics.jsonl").stat().st_mtime_ns == before
    page = (output / "study.md").read_text()
    assert "## What the next seeds would be worth" in page and "soft against sft: with 1 seed in common" in page
    assert "all runs are done" in (output / "progress.html").read_text()
    assert page.startswith("# A plan") and "| soft |" in page and "tokens trained" in page
    for folder in ("compare", "compare-references"):
        found = json.loads((output / folder / "compare.json").read_text())
        assert found["baseline"] == "sft"
        assert f"{folder}/compare.png" in page and (output / folder / "compare.png").stat().st_size > 5000
    assert (output / "curves.png").stat().st_size > 5000
    config = yaml.safe_load((output / "soft-seed0" / "config.yaml").read_text())
    assert (config["seed"], config["learning_rate"], config["eval_on_start"]) == (0, 1e-3, False)
    models = [json.loads((output / f"{m}-seed0" / "evaluation.json").read_text())["results"] for m in ("sft", "soft")]
    assert list(models[0]) == ["teacher", "student before", "student after"] and list(models[1]) == ["student after"]
    cell = output / "cells" / "sft-seed0.yaml"
    cell.write_text(
        "".join(line for line in cell.read_text().splitlines(True) if not line.startswith("sample_prompts"))
    )  # as an older version
    assert main(arguments) == 0
    assert main([*arguments, "--set", "max_steps=3"]) == 1
    assert "begun with other settings" in capsys.readouterr().err


def test_a_study_passes_a_signal_on_and_goes_on_where_it_was_stopped(plan, tmp_path):
    """The run that goes on has saved and is not called failed; the one behind it was not begun."""
    output = tmp_path / "study"
    arguments = ["study", str(plan), "--output-dir", str(output)]
    command = [
        sys.executable,
        "-m",
        "switchkd.cli",
        *arguments,
        "--set",
        "max_steps=100000",
        "eval_steps=0",
        "save_steps=1000",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    run, until = output / "sft-seed0", time.monotonic() + 300
    while not (run / "metrics.jsonl").exists():
        assert process.poll() is None and time.monotonic() < until, f"no step: {process.communicate()}"
        time.sleep(0.05)
    with pytest.raises(InUseError, match=f"{output} is in use by process {process.pid} on "), locked(output):
        pass
    process.send_signal(signal.SIGTERM)
    said, wrong = process.communicate(timeout=300)
    assert process.returncode == 143, wrong
    assert "sft-seed0: stopped" in said and "FAILED" not in said and "soft-seed0" not in said
    assert wrong.splitlines()[-2:][0] == "stopped by SIGTERM" and "the same command goes on" in wrong
    assert len(checkpoints(run)) == 2 and not (output / "soft-seed0").exists()
    log = (output / "logs" / "sft-seed0.log").read_text()
    assert f"{checkpoints(run)[-1]} stands; go on with" in log


def test_a_run_that_is_ended_by_itself_is_not_called_failed(plan, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("switchkd.studies.study._Running.run", lambda *_: 143)
    assert main(["study", str(plan), "--output-dir", str(tmp_path / "study")]) == 1
    assert "2 of 2 runs are not done (sft-seed0 stopped, soft-seed0 stopped)" in capsys.readouterr().err


def test_a_grid_is_every_combination_and_a_method_keeps_its_own_settings():
    size = Size(
        {"max_steps": 5, "learning_rate": 0.1, "policy": "switch"}, (0, 1), {"a": {"dtype": "float64"}, "b": {}},
        {"short": {"max_train_tokens": 10}, "long": {"max_train_tokens": 99}},
    )  # fmt: skip
    plan = Plan("t", {"kd": "kd", "hot": {"recipe": "on_policy", "temperature": 2.0, "policy": "skd"}}, {"s": size})
    grid = cells(plan, size, Path("out"))
    assert len(grid) == len({cell.name for cell in grid}) == 16
    one = next(cell for cell in grid if cell.name == "a-long-hot-seed1")
    assert (one.group, one.method, one.config.seed, one.config.dtype) == ("a-long", "hot", 1, "float64")
    assert (one.config.max_train_tokens, one.config.temperature, one.config.learning_rate) == (99, 2.0, 0.1)
    assert type(one.config.policy).__name__ == "SKD" and one.config.output_dir == "out/a-long-hot-seed1"
    assert {cell.name for cell in grid if cell.config.eval_on_start} == {
        f"{pair}-{budget}-kd-seed0" for pair in "ab" for budget in ("short", "long")
    }
    assert [cell.name for cell in cells(plan, Size(), Path("out"))] == ["kd-seed0", "hot-seed0"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("methods: {kd: kd}", "needs `title`, `methods` by name and `sizes`"),
        ("{methods: {kd: kd}, sizes: {s: {sets: {}}}}", "unknown setting 'sets'"),
        ("{methods: {kd: kd}, sizes: {s: {}}, baseline: kb}", "baseline 'kb' is no method; known: kd"),
        ("[", "not valid YAML"),
    ],
)
def test_a_plan_that_is_none_says_what_is_wrong(tmp_path, text, message):
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_plan(str(tmp_path / "plan.yaml"))


def test_wrong_names(plan, capsys):
    assert main(["study", "swich_main"]) == 1 and "no plan 'swich_main'" in capsys.readouterr().err
    assert main(["study", str(plan), "--size", "smal"]) == 1 and "did you mean 'small'" in capsys.readouterr().err
    assert main(["study", str(plan), "--set", "max_steps"]) == 1 and "NAME=VALUE" in capsys.readouterr().err
    assert main(["study", str(plan), "--set", "max_stepz=1"]) == 1 and "'max_steps'" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="names no recipe"):
        cells(Plan("t", {"m": {"seed": 1}}, {}), Size(), Path("out"))


def test_settings_become_flags():
    assert flags({"eval_seeds": (1, 2), "task": "gsm8k"}) == ["--eval-seeds", "1", "2", "--task", "gsm8k"]
    assert with_settings(Size({"a": 1}), ["b=[1, 2]", "a=2"]).settings == {"a": 2, "b": [1, 2]}


@pytest.mark.parametrize(
    ("name", "size"), [(name, size) for name in shipped("plans") for size in load_plan(name).sizes]
)
def test_every_plan_that_ships_can_be_laid_out(name, size, capsys):
    assert main(["study", name, "--size", size, "--dry-run"]) == 0
    assert f"{load_plan(name).title}: " in capsys.readouterr().out.replace("\n", " ")


def metrics(seconds, share):
    made = [{"step": s, "num_tokens": 10 * s, "seconds": seconds, "eval/x": float(s)} for s in (1, 2, 3, 4)]
    made[1]["switch/teacher_share"] = made[1]["switch/switched_share"] = share
    return made


def test_costs_are_of_the_runs_in_the_mean():
    assert cost(metrics(2.0, 0.25)) == {
        "steps": 4, "tokens": 40, "seconds": 8.0, "teacher share": 0.25, "switched responses": 0.25,
    }  # fmt: skip
    costs = {"a": [cost(metrics(1.0, 0.2)), cost(metrics(3.0, 0.4))], "b": [cost(metrics(4.0, 0.0))]}
    table = cost_table(costs).splitlines()
    assert table[2] == "| a | 2 | 4 | 40 | 8.00 | 1.00 | 30% | 30% |"
    assert table[3] == "| b | 1 | 4 | 40 | 16.0 | 2.00 | 0% | 0% |"
