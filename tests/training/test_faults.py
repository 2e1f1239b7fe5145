"""A checkpoint is whole or absent, whatever happens to whichever file operation; what is good stays, and the next save works."""

import errno
import json
import os
import resource
import shutil
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path

import pytest
from faults import HOWS, KILL, Faults, Killed
from test_signals import assert_equal_runs
from test_teacher_store import build, texts
from test_trainer import trainer
from tiny import pair_on_disk, toy_examples, toy_pair

from switchkd.base import storage
from switchkd.base.errors import DiskError, SwitchKDWarning
from switchkd.base.lock import locked
from switchkd.base.manifest import verify
from switchkd.base.storage import append_lines, staged_folder, tidy, write_file
from switchkd.cli.main import main
from switchkd.evaluation.evaluate import evaluate
from switchkd.evaluation.results import write_results
from switchkd.evaluation.settings import EvalSettings
from switchkd.evaluation.tasks import TASKS
from switchkd.methods.mixes import Adaptive
from switchkd.teachers import store as teacher_store
from switchkd.training import checkpoint
from switchkd.training import learner as learner_module
from switchkd.training.checkpoint import MANIFEST, checkpoints
from switchkd.training.optimizer import adamw
from switchkd.training.restoring import whole_checkpoint
from switchkd.training.trainer import Trainer

# --- one save -----------------------------------------------------------------------------------------------------


class Saves:
    """A run that has written checkpoints 1 and 2, and now saves 3, with 4 to follow; each attempt in a copy of it."""

    def __init__(self, folder: Path):
        self.folder, self.first = folder, folder / "first"
        self.trainer = trainer(self.first)
        self.manifests = {}
        for step in (1, 2, 3, 4):
            self.trainer.train_step()
            if step < 3:
                self.trainer.save()
        for step in (3, 4):
            self.save(step, folder / "alone")
        for run, steps in ((self.first, (1, 2)), (folder / "alone", (3, 4))):
            self.manifests |= {step: (run / f"checkpoint-{step}" / MANIFEST).read_text() for step in steps}

    def save(self, step: int, run: Path) -> None:
        self.trainer.step, self.trainer.run = step, run
        self.trainer.save()

    def attempt(self, faults: Faults) -> None:
        """Save checkpoint 3 with a fault in it, and look at what there is then, and at the next save."""
        run = self.folder / "run"
        shutil.copytree(self.first, run)
        ended = False
        try:
            with faults.installed():
                self.save(3, run)
            ended = True
        except DiskError as error:
            assert str(run) in str(error) and "bytes" in str(error)
            # Nothing half made is left; of an old one that could not be removed there may be, under no name of a checkpoint.
            assert all(path.name.startswith(("checkpoint-", ".checkpoint-1.")) for path in run.iterdir())
        except Killed:
            assert faults.how == KILL
        found = self.whole(run)
        assert len(found) >= 2 and found[-1] in ((3,) if ended else (2, 3))
        assert (
            whole_checkpoint(run).name == f"checkpoint-{found[-1]}"
        )  # a warning would fail: nothing had to be passed over
        tidy(run)
        self.save(4, run)
        assert self.whole(run) == [found[-1], 4] and len(list(run.iterdir())) == 2
        shutil.rmtree(run)

    def whole(self, run: Path) -> list[int]:
        """The steps of the run's checkpoints, all of which must be as they are without faults."""
        steps = []
        for folder in checkpoints(run):
            verify(folder)
            steps.append(int(folder.name.removeprefix("checkpoint-")))
            assert (folder / MANIFEST).read_text() == self.manifests[steps[-1]]
        return steps


@pytest.fixture(scope="module")
def saves(tmp_path_factory):
    return Saves(tmp_path_factory.mktemp("saves"))


def operations(saves) -> int:
    """How many file operations a save has."""
    run = shutil.copytree(saves.first, saves.folder / "counted")
    with Faults().installed() as faults:
        saves.save(3, run)
    shutil.rmtree(run)
    return faults.count


@pytest.mark.parametrize("how", HOWS)
def test_a_save_that_fails_at_any_file_operation_loses_nothing(saves, how):
    count = operations(saves)
    assert count > 50
    for at in range(1, count + 1):
        saves.attempt(Faults(at, how))


@contextmanager
def in_place(target, replace=False, needs=None):
    with storage.written(target):
        target.mkdir()
        yield target


def passed_over(tensors, path, save=checkpoint.save_file):
    with suppress(Exception):
        save(tensors, path)


def prune_first(run, state, *rest, save=checkpoint.save_checkpoint):
    for old in checkpoints(run)[:-1]:
        storage.discard(old)
    return save(run, state, *rest)


MUTANTS = {
    "a checkpoint is written where it belongs": ("switchkd.training.checkpoint.staged_folder", in_place),
    "the oldest goes before the newest is there": ("switchkd.training.trainer.save_checkpoint", prune_first),
    "a checkpoint is taken away under its name": ("switchkd.base.manifest.discard", shutil.rmtree),
    "what fails is passed over": ("switchkd.training.checkpoint.save_file", passed_over),
    "errors of libraries are not told apart": ("switchkd.base.storage.written", lambda *_: nullcontext()),
    "what is half made stays": ("switchkd.base.storage.tidy", lambda _: None),
}


@pytest.mark.parametrize("mistake", MUTANTS)
def test_mutants_lose_something_at_some_file_operation(saves, monkeypatch, mistake):
    name, mutant = MUTANTS[mistake]
    monkeypatch.setattr(name, mutant)
    monkeypatch.setitem(globals(), "tidy", storage.tidy)
    try:
        saves.attempt(Faults())  # without faults nothing is wrong
        with pytest.raises((AssertionError, OSError, SwitchKDWarning)):
            for how in ("ENOSPC", KILL):
                for at in range(1, 100):
                    saves.attempt(Faults(at, how))
    finally:
        shutil.rmtree(saves.folder / "run", ignore_errors=True)


def test_all_is_on_the_disk_before_it_gets_its_name(saves, tmp_path, monkeypatch):
    """A name that survives a power cut must not stand for contents that did not."""
    synced, named = set(), []
    sync, replace = storage.sync, os.replace

    def renamed(source, target):
        if Path(target).name == "checkpoint-3":
            named.extend(path for path in [source, *source.rglob("*")] if path not in synced)
            synced.clear()
        replace(source, target)

    def check():
        named.clear()
        saves.save(3, tmp_path / "run")
        assert named == [] and tmp_path / "run" in synced
        shutil.rmtree(tmp_path / "run")

    monkeypatch.setattr(storage, "sync", lambda path: (synced.add(path), sync(path)))
    monkeypatch.setattr(os, "replace", renamed)
    check()
    monkeypatch.setattr(storage, "sync", lambda path: path.is_dir() and synced.add(path))
    with pytest.raises(AssertionError):
        check()


# --- a whole run --------------------------------------------------------------------------------------------------


def run(folder, resume=False):
    """Three steps with everything that a run writes."""
    pair = toy_pair()
    pair.tokenizer.batch_decode = lambda rows, **_: [str(row) for row in rows]
    mix = Adaptive(share=0.9, capacity=6, validation_steps=2)
    settings = {"save_steps": 1, "eval_steps": 1, "sample_steps": 1, "metric_for_best_model": "forward_kl", "mix": mix}
    t = trainer(folder, pair, max_steps=3, per_device_train_batch_size=2, validation=toy_examples(3), **settings)
    if resume:
        t.resume()

    def scores(student):
        return evaluate(pair, student, toy_examples(2), TASKS["references"], EvalSettings(max_new_tokens=2)).means()

    return t, lambda: t.train(evaluate=scores, sample=lambda progress: [{"progress": progress}])


@pytest.mark.parametrize("how", [KILL, "ENOSPC"])
def test_a_run_in_which_any_file_operation_fails_goes_on_bit_for_bit(tmp_path, how):
    expected, train = run(tmp_path / "straight")
    with Faults().installed() as faults:
        train()
    count = faults.count
    assert count > 300
    for at in range(3, count + 1, 11):
        folder = tmp_path / f"{how}-{at}"
        with suppress(Killed, DiskError), Faults(at, how).installed() as faults:
            run(folder)[1]()
        assert faults.count == at or how != KILL
        tidy(folder)
        again, train = run(folder, resume=bool(checkpoints(folder)))
        train()
        assert_equal_runs(again, expected)
        assert {path.name for path in folder.iterdir()} == {path.name for path in expected.run.iterdir()}


# --- a disk that is full ------------------------------------------------------------------------------------------


@contextmanager
def largest_file(size):
    """The system itself refuses to write more than this to a file, whoever writes it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_the_system_refuses_to_write_is_an_error_with_path_and_bytes(saves):
    largest = max(path.stat().st_size for path in saves.first.rglob("*"))
    for size in (0, 100, 3000, largest // 2, largest - 1):
        refused = pytest.raises(
            DiskError, match=r"checkpoint-3 cannot be written: .*; it takes about [\d,]+ bytes, and"
        )
        with refused, largest_file(size):
            saves.save(3, saves.first)
        assert saves.whole(saves.first) == [1, 2] and len(list(saves.first.iterdir())) == 2


def test_a_run_whose_disk_is_full_says_what_stands_and_goes_on_when_there_is_room(tmp_path, capsys):
    arguments = [
        "train",
        "switch",
        "--template",
        "none",
        "--max-new-tokens",
        "4",
        "--max-steps",
        "3",
        "--save-steps",
        "1",
    ]
    for name, value in pair_on_disk(tmp_path).items():
        arguments += [f"--{name.replace('_', '-')}", value]
    arguments += ["--mix", "generated", "--eval-samples", "2", "--quiet", "--output-dir", str(tmp_path / "run")]
    written = []

    def full(path, records, append=append_lines):
        written.append(path)
        with Faults(path="rollouts.jsonl" if len(written) > 4 else "\0").installed():
            append(path, records)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("switchkd.training.trainer.append_lines", full)
        assert main(arguments) == 1
    said = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'run' / 'rollouts.jsonl'} cannot be written: [Errno 28] No space left on device" in said[-2]
    assert "; it takes about " in said[-2]
    assert said[-1].endswith(f"checkpoint-1 stands; go on with: switchkd train {tmp_path / 'run'} --resume")
    assert main(["train", str(tmp_path / "run"), "--resume"]) == 0
    for name in ("rollouts.jsonl", "metrics.jsonl"):
        steps = [json.loads(line)["step"] for line in (tmp_path / "run" / name).read_text().splitlines()]
        assert sorted(set(steps)) == [1, 2, 3] and (name[0] == "r" or len(steps) == 3)


def check_room(folder, patch):
    """Too little room for what is to come is refused before the first step, and what there is by then is whole."""
    usage, t = shutil.disk_usage(folder), trainer(folder, save_total_limit=3, max_steps=1)
    moments = checkpoint.moments_of(t.learner.masters, t.learner.optimizer).values()
    size = sum(tensor.nbytes for tensor in [*t.pair.student.parameters(), *moments])
    with patch.context() as small:
        small.setattr(storage.shutil, "disk_usage", lambda _: usage._replace(free=3 * size))
        words = rf"3 more checkpoints and 1 students need about [\d,]+ bytes, and {3 * size:,} are free"
        with pytest.raises(DiskError, match=words):
            t.train()
    assert t.step == 0 and [c.name for c in checkpoints(folder)] == ["checkpoint-0"]
    t.train()
    first, last = (sum(p.stat().st_size for p in c.glob("*.safetensors")) for c in checkpoints(folder))
    # Else the first would prove nothing: moments are two thirds of a checkpoint.
    assert first == last and size <= first < size + 10_000


def test_a_disk_without_room_for_the_checkpoints_to_come_is_refused_before_the_first_step(tmp_path, monkeypatch):
    check_room(tmp_path, monkeypatch)


def without_moments(model, config):
    optimizer = adamw(model, config)
    optimizer.state.clear()
    return optimizer


@pytest.mark.parametrize(
    "mistake", [(Trainer, "_prove_room", lambda _: None), (learner_module, "adamw", without_moments)]
)
def test_mutants_that_save_nothing_or_too_little_before_the_first_step(tmp_path, monkeypatch, mistake):
    monkeypatch.setattr(*mistake)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check_room(tmp_path, monkeypatch)


# --- every writer -------------------------------------------------------------------------------------------------


one_pair = cache(toy_pair)
WRITERS = {
    "teacher's text": lambda folder: texts(folder, one_pair(), toy_examples(1), max_new_tokens=1),
    "what a teacher says": lambda folder: build(folder, "hidden", one_pair(), toy_examples(1)),
    "an evaluation": lambda folder: write_results(folder / "evaluation.json", {}, {}, {}, {}),
    "records": lambda folder: append_lines(folder / "lines", [{"a": 1}], durable=True),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_whatever_cannot_be_written_is_named_and_written_later(tmp_path, monkeypatch, writer):
    write = WRITERS[writer]
    monkeypatch.setattr(teacher_store, "locked", lambda *_, **__: nullcontext(lambda: None))  # below
    with Faults().installed() as faults:
        write(tmp_path / "straight")
    assert faults.count >= 3
    for at in range(1, faults.count + 1):
        folder = tmp_path / str(at)
        with Faults(at).installed():
            try:
                write(folder)
            except OSError as error:
                assert str(folder) in str(error)
        write(folder)
        found, straight = (sorted(p.relative_to(f) for p in f.rglob("*")) for f in (folder, tmp_path / "straight"))
        assert found == straight


def test_a_lock_that_cannot_be_written_is_named_and_let_go(tmp_path, monkeypatch):
    with monkeypatch.context() as full, pytest.raises(DiskError, match=r"run/lock.json cannot be written: .*No space"):
        full.setattr("switchkd.base.lock.json.dump", lambda *_: Faults(1).hit(""))
        with locked(tmp_path / "run"):
            pass
    with locked(tmp_path / "run"):
        pass


@pytest.mark.parametrize("number", ["EINVAL", "ENOTSUP", "ENOSYS", "EIO"])
@pytest.mark.parametrize("writer", ["teacher's text", "an evaluation", "records"])
def test_a_file_system_that_cannot_push_to_the_disk_is_written_to_and_one_that_fails_is_not(
    tmp_path, monkeypatch, number, writer
):
    def fsync(_):
        raise OSError(getattr(errno, number), "no fsync")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(DiskError, match="no fsync") if number == "EIO" else nullcontext():
        WRITERS[writer](tmp_path)


# --- single pieces ------------------------------------------------------------------------------------------------


def test_tidy_takes_away_what_a_killed_process_left_and_nothing_else(tmp_path):
    (tmp_path / ".notes").write_text("mine")
    (tmp_path / ".git").mkdir()
    for write in (lambda: write_file(tmp_path / "a.json", "{}"), lambda: _staged(tmp_path / "b")):
        with pytest.raises(Killed), Faults(4, KILL).installed():
            write()
    left = {path.name for path in tmp_path.iterdir()}
    assert len(left) == 4 and {name.rpartition(".")[0] for name in left} == {".a.json", ".b", ""}
    tidy(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".notes", ".git"}


def _staged(target):
    with staged_folder(target) as folder:
        (folder / "one").write_text("1")


@pytest.mark.parametrize("how", HOWS)
def test_a_folder_that_is_replaced_is_the_old_or_the_new_one(tmp_path, how):
    """After a kill it may be neither; then the new one lies beside, and a run makes it again. Never is it half of one."""
    for at in range(1, 40):
        target = tmp_path / str(at) / "student"
        _staged(target)
        (target / "old").write_text("")
        try:
            with Faults(at, how).installed(), staged_folder(target, replace=True) as folder:
                (folder / "new").write_text("")
        except (Killed, DiskError):
            pass
        names = [path.name for path in target.glob("*")]
        assert sorted(names) in (["new"], ["old", "one"]) or (how == KILL and names == [] and not target.exists())
