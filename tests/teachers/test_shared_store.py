"""Processes that want the same work of the teacher: one does it, the others wait, and find it done."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from test_teacher_store import KINDS, build, files, silent, texts
from tiny import toy_pair

from switchkd.base import lock, signals
from switchkd.base.errors import SwitchKDWarning
from switchkd.base.lock import LOCK, locked
from switchkd.base.signals import Stopped
from switchkd.teachers import store as teacher_store

ROOT = Path(__file__).parents[2]
# A process that fills a store. With "hold" it stops within the work, when its first part is written and not yet in place, until it
# is told to go on.
FILL = """
import sys
from contextlib import nullcontext
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path[:0] = ["tests", *map(str, Path("tests").iterdir())]
from test_teacher_store import build, texts
from tiny import toy_pair
from switchkd.base import storage
from switchkd.teachers import states as teacher_cache, store as teacher_store

kind, folder, role, guard = sys.argv[1:]
sync, teacher_cache.PART_BYTES = storage.sync, 1000

def held(path):
    sync(path)
    if path.name.startswith(".part-"):
        storage.sync = sync
        print("at work", flush=True)
        input()

if role == "hold":
    storage.sync = held
if guard == "unguarded":
    teacher_store.locked = lambda *_, **__: nullcontext(lambda: None)
pair, calls = toy_pair(), []
pair.teacher.register_forward_pre_hook(lambda *_: calls.append(1))
texts(Path(folder), pair) if kind == "texts" else build(Path(folder), kind, pair, batch_size=2)
print("forwards of the teacher:", len(calls))
"""
STORES = ["texts", *KINDS]
RACES = ["texts", "hidden"]  # each takes seconds, and all kinds are written by the same lines


def fill(kind, folder):
    return texts(folder) if kind == "texts" else build(folder, kind, batch_size=2)


def started(kind, folder, role, guard):
    command = [sys.executable, "-c", FILL, kind, str(folder), role, guard]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, text=True, **pipes)


def race(kind, folder, guard="locked"):
    """Two processes fill a store, and the first goes on when the second waits or has ended.

    Returns what the second said of waiting, the first's pid, the exit codes, what was printed at the end, and the files.
    """
    first = started(kind, folder, "hold", guard)
    second = None
    try:
        assert first.stdout.readline() == "at work\n", first.communicate()[1]
        second = started(kind, folder, "go", guard)
        waiting = next((line for line in second.stderr if "waiting" in line), "")
        printed = [first.communicate("\n", timeout=120)[0], second.communicate(timeout=120)[0]]
    finally:
        for process in filter(None, (first, second)):
            process.kill()
            process.wait()
    return waiting, first.pid, [first.returncode, second.returncode], printed, files(folder)


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr("switchkd.teachers.states.PART_BYTES", 1000)


@pytest.mark.parametrize("kind", RACES)
def test_a_second_process_waits_and_finds_the_work_done(tmp_path, small_parts, kind):
    fill(kind, tmp_path / "alone")
    waiting, first, codes, printed, made = race(kind, tmp_path / "shared")
    assert f"waiting: {tmp_path / 'shared'} is in use by process {first} on " in waiting
    assert codes == [0, 0] and made == files(tmp_path / "alone")
    assert printed[1] == "forwards of the teacher: 0\n" != printed[0]


@pytest.mark.parametrize("kind", RACES)
def test_mutant_without_a_lock(tmp_path, small_parts, kind):
    fill(kind, tmp_path / "alone")
    waiting, _, codes, _, made = race(kind, tmp_path / "shared", "unguarded")
    assert waiting == "" and (codes != [0, 0] or made != files(tmp_path / "alone"))


@pytest.mark.parametrize("kind", STORES)
def test_a_whole_store_is_read_without_the_lock(tmp_path, kind, monkeypatch):
    """By ranks that find it done, from a folder that may not be written to, and while another process has it."""
    made = fill(kind, tmp_path)
    with locked(tmp_path), monkeypatch.context() as patch:
        patch.setattr(teacher_store, "locked", lambda *_, **__: pytest.fail("locked"))
        there = files(tmp_path)
        pair = silent(toy_pair())
        assert (texts(tmp_path, pair) if kind == "texts" else build(tmp_path, kind, pair)) == made
        assert files(tmp_path) == there


@pytest.mark.parametrize("polled", [True, False])  # of one process, of several
@pytest.mark.parametrize("kind", STORES)
def test_a_signal_ends_the_wait(tmp_path, monkeypatch, kind, polled):
    monkeypatch.setattr(lock.time, "sleep", lambda _: signal.raise_signal(signal.SIGTERM))
    with (
        locked(tmp_path),
        pytest.warns(SwitchKDWarning, match="waiting: ") as said,
        pytest.raises(Stopped),
        signals.deferred(polled),
    ):
        fill(kind, tmp_path)
    assert len(said) == 1 and not tmp_path.exists()  # nothing was made; the folder went with the lock


def test_many_that_wait_work_one_at_a_time(tmp_path, monkeypatch):
    """The folder, which stays empty, and the lock's file come and go while others look at them."""
    monkeypatch.setattr(lock, "_POLL_SECONDS", 0.0)
    monkeypatch.setattr(lock.warnings, "warn", lambda *_, **__: None)
    inside, most, failed = [], [], []

    def work():
        try:
            for _ in range(100):
                with locked(tmp_path / "store", wait=True):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and most == [1] * 400 and not (tmp_path / "store" / LOCK).exists()
