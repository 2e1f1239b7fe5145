"""What a study asks before its first run, what of its folder it leaves alone, and how it lives with other processes."""

import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml
from tiny import pair_on_disk

from switchkd.base import limits, lock, signals
from switchkd.base.errors import ConfigError, DiskError, SwitchKDWarning
from switchkd.base.lock import locked
from switchkd.cli.main import main
from switchkd.runs.continuation import begun
from switchkd.studies import study
from switchkd.studies.plan import cells, load_plan
from switchkd.studies.study import run_cells


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A sound plan."""
    folder = tmp_path_factory.mktemp("plan")
    settings = {**pair_on_disk(folder), "template": "none", "max_steps": 1, "eval_samples": 2}
    (folder / "broken.jsonl").write_text("{\n")
    small = {"settings": settings, "evaluations": {"references": {"eval_samples": 3, "eval_own_text": True}}}
    return {"methods": {"sft": "sft", "kd": "kd"}, "sizes": {"small": small}}


@pytest.fixture
def study_of(tmp_path, monkeypatch):
    """Runs a plan as a study in which no run may begin; returns the exit code."""
    monkeypatch.setattr(study._Running, "run", lambda *_: pytest.fail("a run was begun"))

    def started(tree, *more):
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
        return main(["study", str(tmp_path / "plan.yaml"), "--output-dir", str(tmp_path / "st"), *more])

    return started


def changed(tree, methods=None, scores=(), **small):
    """The plan with other methods, settings (added), or other parts of its size."""
    size = tree["sizes"]["small"]
    size = size | small | {"settings": size["settings"] | small.get("settings", {})}
    return {"methods": methods or tree["methods"], "sizes": {"small": size}, "scores": list(scores)}


PAIRS = {"pairs": {"a": {}, "a-b": {}}, "budgets": {"b-c": {}, "c": {"max_train_tokens": 9}}}
WRONG = {
    "one name for two runs": (PAIRS, "name 'a-b-c-sft-seed0'"),
    "one name for two results": (
        {"pairs": {"x": {}, "x-math": {}}, "evaluations": {"math": {}, "references": {}}},
        "2 runs or results the name 'compare-x-math'",
    ),
    "a seed twice": ({"seeds": [1, 0, 1]}, "name 'sft-seed1'"),
    "a seed of a method": ({"methods": {"sft": "sft", "too": {"recipe": "sft", "seed": 0}}}, "seed is the study's"),
    "a method by two names": ({"methods": {"sft": "sft", "too": {"recipe": "sft"}}}, "'sft' and 'too' of the plan have"),
    "the study's own setting": ({"settings": {"resume": True}}, "resume is the study's to set"),
    "an unknown recipe": ({"methods": {"sft": "sft", "k": "kdd"}}, "no recipe 'kdd'"),
    "an unknown setting of a method": ({"methods": {"k": {"recipe": "kd", "lr": 1}}}, "unknown setting 'lr'"),
    "an unknown task": ({"evaluations": {"gsm9k": {}}}, "no task 'gsm9k'; did you mean 'gsm8k'"),
    "the task auto": ({"evaluations": {"auto": {}}}, "no task 'auto'"),
    "an unknown setting of an evaluation": ({"evaluations": {"gsm8k": {"eval_sample": 1}}}, "unknown setting 'eval_sample'"),
    "another place for an evaluation": ({"evaluations": {"gsm8k": {"output_file": "x"}}}, "unknown setting 'output_file'"),
    "an evaluation's setting out of range": ({"evaluations": {"gsm8k": {"eval_temperature": -1}}}, "eval_temperature"),
    "an evaluation's task in its settings": ({"evaluations": {"gsm8k": {"task": "math"}}}, "leave `task` out"),
    "an evaluation of other rows": ({"evaluations": {"gsm_plus": {}}}, "task gsm_plus is scored on rows of the layout"),
    "an evaluation of no rows": ({"evaluations": {"gsm8k": {"eval_file": "no.jsonl"}}}, "no.jsonl: no such file"),
    "no rows to train on": ({"methods": {"sft": "sft", "k": {"recipe": "kd", "train_file": "no.jsonl"}}}, "k-seed0 could not"),
    "no rows of plain text": ({"settings": {"lm_file": "no.jsonl"}}, "could not be run: no.jsonl: no such file"),
    "no teacher": ({"methods": {"k": {"recipe": "kd", "teacher_model_name_or_path": "./no"}}}, "./no does not exist"),
    "no student": ({"settings": {"student_model_name_or_path": "./no"}}, "./no does not exist"),
    "no scores": ({"settings": {"eval_samples": 0}}, "eval_samples is 0"),
    "an unknown score": ({"scores": ["rouge_9"]}, "no score 'rouge_9'; did you mean 'rouge_"),
    "an unknown score for the best": (
        {"settings": {"metric_for_best_model": "rouge", "eval_steps": 1}},
        "gives no score 'rouge'",
    ),
    "scores that differ in their data": (
        {"methods": {"sft": "sft", "k": {"recipe": "kd", "eval_samples": 3}}},
        "k-seed0 and sft-seed0 could not be compared: eval_samples is 3 and 2",
    ),
    "divergences to two teachers": (
        {"methods": {"sft": "sft", "k": {"recipe": "kd", "teacher_model_name_or_path": "demo"}}},
        "could not be compared: teacher_model_name_or_path",
    ),
    "a tracker that is not installed": ({"settings": {"report_to": ["wandb"]}}, "wandb is not installed"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_plan_that_could_not_come_to_its_end_is_refused_before_its_first_run(tree, study_of, tmp_path, capsys, what):
    changes, words = WRONG[what]
    assert study_of(changed(tree, **changes)) == 1
    assert words in capsys.readouterr().err and not (tmp_path / "st").exists()


def test_a_file_that_is_damaged_is_found_too(tree, study_of, capsys):
    data = Path(tree["sizes"]["small"]["settings"]["train_file"])
    methods = {"sft": "sft", "kd": {"recipe": "kd", "train_file": str(data.with_name("broken.jsonl"))}}
    assert study_of(changed(tree, methods)) == 1
    assert "kd-seed0 could not be run" in (said := capsys.readouterr().err) and "broken.jsonl:1: broken JSON" in said


# --- what is not the study's own ------------------------------------------------------------------------------------


def put(file, text="mine"):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def link(path):
    path.symlink_to(path.with_name("nowhere"))


def finished(run):
    """A run that came to its end, with scores that cannot be read."""
    put(run / "student" / "model.safetensors", "the work of days")
    put(run / "config.yaml", "{}")
    put(run / "evaluation.json", '{"format":')


def begun_study(st):
    put(st / "cells" / "x.yaml", "{}")
    return st


FOREIGN = {
    "another's file": (lambda st: put(st / "kd-seed0" / "thesis.txt"), "it holds thesis.txt"),
    "another's settings": (lambda st: put(st / "kd-seed0" / "config.yaml") or put(st / "kd-seed0" / "x"), "config.yaml, x"),
    "a file": (lambda st: put(st / "kd-seed0"), "kd-seed0 is no folder"),
    "a link to nothing": (lambda st: link(st / "kd-seed0"), "kd-seed0 is no folder"),
    "a finished student": (lambda st: finished(st / "kd-seed0"), "evaluation.json cannot be read as an evaluation: broken"),
    "a further evaluation": (lambda st: put(st / "kd-seed0" / "evaluation-references.json"), "cannot be read as"),
}  # fmt: skip


def contents(folder):
    """Every file below a folder, and every link."""
    found = {
        path: path.readlink() if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in folder.rglob("*")
    }
    return {str(path): what for path, what in found.items()}


@pytest.mark.parametrize("inside", [True, False], ids=["in a study", "in another folder"])
@pytest.mark.parametrize("what", FOREIGN)
def test_what_no_study_wrote_is_named_and_left_alone(tree, study_of, tmp_path, capsys, what, inside):
    make, words = FOREIGN[what]
    st = tmp_path / "st"
    st.mkdir()
    make(begun_study(st) if inside else st)
    before = contents(st)
    assert study_of(tree) == 1
    assert words in capsys.readouterr().err and contents(st) == before


@pytest.mark.parametrize("name", ["study.md", "curves.png", "compare", "compare-references", "logs"])
def test_a_folder_that_is_no_study_loses_nothing_of_a_result_s_name(tree, study_of, tmp_path, capsys, name):
    put(tmp_path / "st" / name)
    assert study_of(tree) == 1
    assert f"st is no study's folder, and holds {name}, which this one would replace" in capsys.readouterr().err


def test_a_run_of_other_settings_is_not_taken_for_one_of_the_study(tree, study_of, tmp_path, capsys):
    run = tmp_path / "st" / "kd-seed0"
    put(run / "config.yaml", "max_steps: 7")
    put(run / "checkpoint-7" / "manifest.json", "{}")
    assert study_of(tree) == 1
    assert "kd-seed0 was started otherwise: " in (said := capsys.readouterr().err) and "max_steps: 7 -> 1" in said


@pytest.mark.parametrize("early", [[], ["config.yaml", "evaluation.json", "trackers", ".student.switchkd-" + "0" * 32]])
def test_a_run_that_was_killed_before_its_first_checkpoint_starts_anew(tmp_path, early):
    for name in ("origin.json", "lock.json", *early):
        put(tmp_path / name)
    assert not begun(tmp_path)
    put(tmp_path / "thesis.txt")
    assert begun(tmp_path)


def test_an_evaluation_of_other_settings_is_not_taken_for_the_plan_s(tree, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study._Running, "run", lambda *_: 143)
    plan, st = tmp_path / "plan.yaml", str(tmp_path / "st")
    for samples, words in ((3, "not done"), (4, "begun with other settings of evaluations (references: {")):
        evaluations = {"references": {"eval_samples": samples, "eval_own_text": True}}
        plan.write_text(yaml.safe_dump(changed(tree, evaluations=evaluations)))
        assert main(["study", str(plan), "--output-dir", st]) == 1
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("place", ["st", "st/below"])
def test_a_link_to_nothing_is_refused_as_the_folder_of_anything(tmp_path, place):
    link(tmp_path / "st")
    for wait in (False, True):  # a run and a study; a store
        with (
            pytest.raises(DiskError, match=r"st is a link to .*nowhere, which is not there"),
            locked(tmp_path / place, wait),
        ):
            pass


# --- other processes ------------------------------------------------------------------------------------------------


@pytest.fixture
def grid(tree, tmp_path):
    """Two runs, and what is told of them."""
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(changed(tree, evaluations={}), sort_keys=False))
    plan = load_plan(str(tmp_path / "plan.yaml"))
    st = tmp_path / "st"
    (st / "sft-seed0").mkdir(parents=True)
    return cells(plan, plan.sized("small"), st), plan.sized("small"), st


def test_a_run_that_another_process_works_on_comes_last_and_is_not_called_failed(grid, monkeypatch):
    """A killed study leaves such processes behind."""
    told, held = [], ExitStack()
    monkeypatch.setattr(study._Running, "run", lambda self, arguments, log: 0)
    monkeypatch.setattr(lock.time, "sleep", lambda _: held.close())  # the other process ends while it is waited for
    held.enter_context(locked(grid[2] / "sft-seed0"))
    with pytest.warns(SwitchKDWarning, match="waiting: .*sft-seed0 is in use by process"):
        assert run_cells(*grid, 1, lambda line, _: told.append(line)) == {}
    assert told == ["kd-seed0: done", "sft-seed0: done"]


def test_a_run_that_another_process_takes_in_the_same_instant_is_in_use(grid, monkeypatch):
    held = ExitStack()
    run = lambda self, arguments, log: held.enter_context(locked(grid[2] / "sft-seed0")) or 1  # noqa: E731
    monkeypatch.setattr(study._Running, "run", run)
    monkeypatch.setattr(lock.time, "sleep", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    told = []
    with held, pytest.warns(SwitchKDWarning, match="waiting"), pytest.raises(signals.Stopped):
        run_cells(grid[0][:1], *grid[1:], 1, lambda line, _: told.append(line))
    assert told == []


def test_a_log_that_cannot_be_written_fails_its_own_run_alone(grid, monkeypatch):
    (grid[2] / "logs" / "sft-seed0.log").mkdir(parents=True)
    monkeypatch.setattr(study, "command", lambda *_: [sys.executable, "-c", ""])
    told = []
    assert run_cells(*grid, 1, lambda line, _: told.append(line)) == {"sft-seed0": "FAILED"}
    assert "sft-seed0.log cannot be written" in told[0] and told[1] == "kd-seed0: done"


@pytest.mark.parametrize("safe", [True, False])
def test_a_process_of_our_own_imports_nothing_from_the_working_directory(tmp_path, safe):
    put(tmp_path / "difflib.py", "print('sung')\ndef get_close_matches(*_, **__): ...")
    command = [word for word in limits.command("switchkd.base.errors") if safe or word != "-P"]
    said = subprocess.run(command, cwd=tmp_path, env=limits.environment(), capture_output=True, text=True)
    assert (said.stdout, said.returncode) == ("" if safe else "sung\n", 0), said.stderr


# --- one day --------------------------------------------------------------------------------------------------------


def test_all_runs_of_a_study_are_of_the_day_on_which_it_began(tree, tmp_path, monkeypatch):
    """Prompts that name the day are then the same in all of them, also in a run that is added on another day."""

    def days(day, **small):
        monkeypatch.setattr(study, "today", lambda: day)
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump(changed(tree, **small), sort_keys=False))
        plan = load_plan(str(tmp_path / "plan.yaml"))
        size, folder = plan.sized("small"), tmp_path / "st"
        folder.mkdir(exist_ok=True)
        study._write_settings(cells(plan, size, folder), size, folder)
        files = [file for file in (folder / "cells").glob("*-seed*.yaml")]
        return {file.stem: yaml.safe_load(file.read_text())["template_date"] for file in files}

    assert days("2026-02-03") == {"sft-seed0": "2026-02-03", "kd-seed0": "2026-02-03"}
    later = days("2026-02-04", seeds=[0, 1])
    assert set(later) == {"sft-seed0", "kd-seed0", "sft-seed1", "kd-seed1"} and set(later.values()) == {"2026-02-03"}
    with pytest.raises(ConfigError, match="template_date: '2026-02-03' -> '2020-01-01'"):
        days("2026-02-04", settings={"template_date": "2020-01-01"})
