"""One process writes a run directory, and a run goes on with the settings and the text that it was started with."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest
import yaml
from tiny import retold, toy_examples

from switchkd.base import lock
from switchkd.base.errors import ConfigError, DiskError, InUseError
from switchkd.base.lock import LOCK, locked
from switchkd.base.settings import to_dict
from switchkd.runs import continuation
from switchkd.runs.continuation import check_origin, check_run
from switchkd.runs.distil import distil
from switchkd.studies.plan import Size
from switchkd.studies.study import run_cells
from switchkd.training.settings import TrainConfig

ROOT = Path(__file__).parents[2]
HOLD = """
import sys
from pathlib import Path
from switchkd.base.lock import locked
with locked(Path(sys.argv[1])):
    print("in", flush=True)
    input()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of a folder."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "in\n"
    yield process
    process.kill()
    process.communicate()


def check_second_writer(folder, pid):
    with (
        pytest.raises(
            InUseError, match=f"is in use by process {pid} on {socket.gethostname()}, started 20.*; wait for it"
        ),
        locked(folder),
    ):
        pass


def test_a_second_process_is_refused_and_told_of_the_first_until_that_one_is_killed(holder, tmp_path, monkeypatch):
    run = tmp_path / "run"
    check_second_writer(run, holder.pid)
    with monkeypatch.context() as mutant:  # a lock that locks nothing
        mutant.setattr(lock, "_lock", lambda *_: None)
        with pytest.raises(pytest.fail.Exception):
            check_second_writer(tmp_path / "other", holder.pid)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert json.loads((run / LOCK).read_text())["pid"] == holder.pid
    with locked(run):  # what the killed one left is no lock any more
        check_second_writer(run, os.getpid())
    assert not run.exists()


def test_a_run_and_a_study_are_refused_before_anything_is_read(tmp_path):
    missing = TrainConfig(
        output_dir=str(tmp_path), teacher_model_name_or_path="nowhere", student_model_name_or_path="nowhere"
    )
    with locked(tmp_path):
        with pytest.raises(InUseError):
            distil(missing)
        with pytest.raises(InUseError):
            run_cells([], Size(), tmp_path, 1, lambda *_: None)


def test_a_folder_that_holds_something_stays(tmp_path):
    with suppress(KeyError), locked(tmp_path / "run"):
        (tmp_path / "run" / "x").write_text("")
        raise KeyError
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["x"]


def owner(**changes):
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": lock._me()["started"]} | changes


@pytest.mark.parametrize(
    ("left", "refused"),
    [
        (owner(), True),
        (owner(host="elsewhere"), True),
        (owner(pid=2**22 + 1), False),
        (owner(started=1.0), False),  # its pid is another process's now
        ('{"pid": 12, "ho', False),
    ],
)
def test_without_locks_of_the_file_system_a_stale_lock_is_taken_over_or_explained(tmp_path, monkeypatch, left, refused):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    file = tmp_path / LOCK
    file.write_text(json.dumps(left) if isinstance(left, dict) else left)
    if refused:
        with pytest.raises(InUseError, match=rf"No locks available.*has ended, delete {file}"), locked(tmp_path):
            pass
        assert json.loads(file.read_text()) == left
    else:
        with locked(tmp_path):
            assert json.loads(file.read_text()) == owner()


def test_where_nothing_locks_files_the_file_itself_is_the_lock(tmp_path):
    code = f"""if True:
        import sys
        sys.modules["fcntl"] = None
        from pathlib import Path
        from switchkd.base.lock import locked
        with locked(Path({str(tmp_path / "run")!r})):
            try:
                with locked(Path({str(tmp_path / "run")!r})):
                    print("two at a time")
            except BlockingIOError as error:
                print(error)
    """
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "is in use by process" in said and "has no locks" in said and not (tmp_path / "run").exists()


@pytest.fixture
def as_on_windows(monkeypatch):
    """No open file is removed, and no flag keeps a link from being followed."""
    unlink = Path.unlink

    def of_closed_files(path, missing_ok=False):
        if str(path) in [file.path for file in psutil.Process().open_files()]:
            raise PermissionError(errno.EACCES, "in use by another process", str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(lock, "_WINDOWS", True)
    monkeypatch.setattr(Path, "unlink", of_closed_files)
    monkeypatch.delattr(os, "O_NOFOLLOW")


def test_on_windows_a_lock_is_removed_when_it_is_closed_unless_it_is_the_next_ones_by_then(tmp_path, as_on_windows):
    with locked(tmp_path / "run"):
        check_second_writer(tmp_path / "run", os.getpid())
    assert not (tmp_path / "run").exists()
    with ExitStack() as next_one, locked(tmp_path / "run"):
        next_one.enter_context((tmp_path / "run" / LOCK).open())
    assert (tmp_path / "run" / LOCK).exists()


def test_on_windows_a_link_is_no_lock(tmp_path, as_on_windows):
    (tmp_path / "thesis.txt").write_text("thesis")
    (tmp_path / LOCK).symlink_to(tmp_path / "thesis.txt")
    with pytest.raises(DiskError, match="is a link to"), locked(tmp_path):
        pass
    assert (tmp_path / "thesis.txt").read_text() == "thesis"


def test_the_owner_is_told_though_windows_lets_nobody_read_the_byte_that_is_locked(tmp_path):
    (tmp_path / LOCK).write_text("?" + json.dumps(owner())[1:])
    assert lock._owner(tmp_path / LOCK) == owner()


# --- what has the name of a folder or lock, and is none ------------------------------------------------------------


def a_link(path, target):
    target.write_text("thesis")
    path.symlink_to(target)


def another_name(path, target):
    target.write_text("thesis")
    os.link(target, path)


def own_contents(path, target):
    target.write_text("thesis")
    path.write_text('{"packages": ["thesis"]}')


@pytest.mark.parametrize("make", [a_link, another_name, own_contents, lambda path, _: os.mkfifo(path)])
def test_a_file_that_is_no_lock_is_neither_written_over_nor_deleted(tmp_path, make):
    folder, target = tmp_path / "run", tmp_path / "thesis.txt"
    folder.mkdir()
    make(folder / LOCK, target)
    with (
        pytest.raises(DiskError, match=rf"{folder / LOCK} is .*, and no lock that switchkd wrote: move it away"),
        locked(folder),
    ):
        pass
    assert os.path.lexists(folder / LOCK) and not (target.exists() and target.read_text() != "thesis")
    assert "thesis" in (folder / LOCK).read_text() if make is own_contents else True


def test_a_link_that_leads_nowhere_is_no_lock_and_makes_no_file(tmp_path):
    (tmp_path / LOCK).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DiskError, match=f"a link to {tmp_path / 'elsewhere'}"), locked(tmp_path):
        pass
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("place", ["link", "link/run", "loop/run"])
@pytest.mark.parametrize("wait", [True, False])  # as a store waits, and a run or study does not
def test_a_folder_behind_a_link_that_leads_nowhere_is_an_error_at_once(tmp_path, place, wait):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with (
        pytest.raises((DiskError, OSError), match=r"which is not there: make that folder|Too many levels"),
        locked(tmp_path / place, wait),
    ):
        pass


def moved(folder):
    folder.rename(folder.with_name("moved"))


def replaced(folder):
    moved(folder)
    shutil.copytree(folder.with_name("moved"), folder)


@pytest.mark.parametrize("how", [moved, replaced, shutil.rmtree, lambda folder: (folder / LOCK).unlink()])
def test_a_folder_that_is_not_the_one_any_more_is_noticed_and_its_lock_left_alone(tmp_path, how):
    folder = tmp_path / "run"
    with locked(folder) as check:
        (folder / "x").write_text("")
        check()
        how(folder)
        with pytest.raises(DiskError, match=f"{folder} is not the folder that the work began in"):
            check()
    assert (folder / LOCK).exists() == (how is replaced)


# --- the same run -------------------------------------------------------------------------------------------------


MODELS = {"teacher_model_name_or_path": "1" * 64, "student_model_name_or_path": "2" * 64}


@pytest.fixture
def run(tmp_path):
    """A run directory as one leaves it that was stopped."""
    config = TrainConfig(output_dir=str(tmp_path / "run"), learning_rate=1e-4)
    folder = tmp_path / "run"
    folder.mkdir()
    check_origin(folder, config, {"train_file": toy_examples(4), "eval_file": toy_examples(2)}, MODELS, {})
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    return folder


def resumed(run, **changes):
    return dataclasses.replace(TrainConfig(output_dir=str(run)), resume=True, **changes)


def check_settings(run):
    check_run(run, resumed(run, save_steps=7))
    with pytest.raises(ConfigError) as refused:
        check_run(run, resumed(run, seed=5, learning_rate=0.5))
    for words in ("seed: 0 -> 5", "learning_rate: 0.0001 -> 0.5", "--allow-change seed learning_rate"):
        assert words in str(refused.value)
    check_run(run, resumed(run, seed=5, allow_change=("seed",)))
    with pytest.raises(ConfigError, match=r"learning_rate: .* --allow-change learning_rate$"):
        check_run(run, resumed(run, seed=5, learning_rate=0.5, allow_change=("seed",)))


def check_contents(run):
    same = {"train_file": toy_examples(4), "eval_file": toy_examples(2)}
    check_origin(run, resumed(run), same, MODELS, {})
    first, *rest = same["train_file"]
    for other in (
        dataclasses.replace(first, prompt_ids=[9, 9]),
        retold(first, completion_ids=[9, 1]),
        dataclasses.replace(first, teacher="math"),
        dataclasses.replace(first, teacher_prompt_ids=[3]),
    ):
        with pytest.raises(ConfigError, match=r"train_file: other contents \(4 examples, sha256 .* -> 4 examples"):
            check_origin(run, resumed(run), same | {"train_file": [other, *rest]}, MODELS, {})
    with pytest.raises(ConfigError, match=r"2 examples, .* -> 3 examples.* --allow-change eval_file$"):
        check_origin(run, resumed(run, allow_change=("train_file",)), {k: toy_examples(3) for k in same}, MODELS, {})
    check_origin(run, resumed(run, allow_change=("eval_file",)), same | {"eval_file": toy_examples(3)}, MODELS, {})
    # What was allowed once is the run's own now.
    check_origin(run, resumed(run), same | {"eval_file": toy_examples(3)}, MODELS, {})
    for name in MODELS:
        with pytest.raises(ConfigError, match=rf"{name}: other contents \(sha256 .* --allow-change {name}$"):
            check_origin(run, resumed(run), {}, MODELS | {name: "3" * 64}, {})
    check_origin(run, resumed(run, allow_change=tuple(MODELS)), {}, dict.fromkeys(MODELS, "3" * 64), {})


def test_other_settings_are_refused_with_all_that_differs_and_allowed_one_by_one(run):
    check_settings(run)


def test_other_text_or_models_are_refused_and_allowed_by_the_setting_that_names_them(run):
    check_contents(run)


def test_mutants_that_let_a_run_go_on_otherwise(run, monkeypatch):
    monkeypatch.setattr(continuation, "_refuse", lambda *_: None)
    for check in (check_settings, check_contents):
        with pytest.raises(pytest.fail.Exception):
            check(run)
    monkeypatch.undo()
    monkeypatch.setattr(continuation, "_fingerprint", lambda examples: {"examples": len(examples), "sha256": "?"})
    check_origin(run, TrainConfig(), {"train_file": toy_examples(4), "eval_file": toy_examples(2)}, MODELS, {})
    with pytest.raises(pytest.fail.Exception):
        check_contents(run)


def test_what_is_allowed_must_be_a_setting_of_a_run_that_goes_on():
    with pytest.raises(ConfigError, match="unknown setting 'learning_rat'; did you mean 'learning_rate'"):
        TrainConfig(resume=True, allow_change=("learning_rat",))
    with pytest.raises(ConfigError, match="give resume too"):
        TrainConfig(allow_change=("seed",))
