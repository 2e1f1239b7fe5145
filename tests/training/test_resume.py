"""A run that was interrupted anywhere ends in the bytes of the one that was not, from whichever whole checkpoint it goes on."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_trainer import lines, trainer, without_times
from tiny import pair_on_disk, toy_pair

from switchkd.base.errors import CheckpointError, DataError, SwitchKDWarning
from switchkd.base.manifest import verify
from switchkd.cli.main import main
from switchkd.methods.mixes import Adaptive, Generated
from switchkd.training.checkpoint import MANIFEST, checkpoints, load_checkpoint
from switchkd.training.restoring import whole_checkpoint

ROOT = Path(__file__).parents[2]
STEPS = 12
PLACES = (
    "generated",
    "accumulating",
    "told",
)  # before the update, in the middle of its gradient, after it and before its checkpoint


class Dies(Exception):
    """The process ends, and nobody saves."""


def run(folder, dies=None, **changes):
    """Twelve steps of two micro-batches, four epochs in all; ``dies`` says after which step and where in the next."""
    mix = Adaptive(share=0.9, capacity=6, validation_steps=5)
    own = {
        "max_steps": STEPS,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "mix": mix,
    }
    pair = toy_pair("gpt2")
    t = trainer(folder, pair, validation=[*toy_validation()], max_new_tokens=4, **own | changes)
    if t.config.resumes:
        t.resume()
    step, place = dies or (-1, "")
    calls = []

    def dying(where, call):
        def called(*args, **named):
            calls.append((t.step, where))
            if (
                t.step == step
                and where == place
                and calls.count((t.step, where)) == (2 if place == "accumulating" else 1)
            ):
                raise Dies
            return call(*args, **named)

        return called

    t.learner.update = dying("generated", t.learner.update)
    t.learner.loss = dying("accumulating", t.learner.loss)
    with pytest.raises(Dies) if dies else nullcontext():
        t.train(dying("told", lambda *_: None))
    return t


def toy_validation():
    from tiny import toy_examples

    return toy_examples(3)


def contents(run):
    """What equal runs have in common: every file, but for times and what the process held."""
    found = {}
    for folder in checkpoints(run):
        verify(folder)
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["state.json"] = without_times([json.loads((folder / "state.json").read_text())])
        due = manifest["state.json"][0].pop("due")
        found[folder.name] = manifest, due and without_times([due])
    found |= {name: without_times(lines(run, name)) for name in ("metrics.jsonl", "rollouts.jsonl")}
    found["bytes"] = (run / "rollouts.jsonl").read_bytes()
    return found


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "run"
    run(folder)
    found = contents(folder)
    assert [*found][:2] == ["checkpoint-10", "checkpoint-12"] and len(found["metrics.jsonl"]) == STEPS
    sources = {line["source"] for line in found["metrics.jsonl"]}
    assert len(sources) > 1  # it reads data, and text that was kept
    return found


@pytest.mark.parametrize("place", PLACES)
def test_a_run_that_dies_in_any_step_ends_in_the_same_bytes(straight, tmp_path, place):
    """Between generation and update, in the middle of a gradient, before a checkpoint; every third one twice in a row."""
    for step in range(1, STEPS):
        folder = tmp_path / str(step)
        run(folder, (step, place))
        if step % 3 == 0:
            run(folder, (step + 1, PLACES[step // 3 % 3]), resume=True)
        run(folder, resume=True)
        assert contents(folder) == straight


MUTANTS = {
    "replay": lambda state: state | {"replay": []},
    "mix": lambda state: state | {"mix": {**state["mix"], "loss": 0.0, "share": 0.0}},
    "num_tokens": lambda state: state | {"num_tokens": 0},
}


@pytest.mark.parametrize("mistake", [*MUTANTS, "moments", "records"])
def test_mutants_that_forget_something_end_in_other_bytes(straight, tmp_path, monkeypatch, mistake):
    run(tmp_path, (7, "told"))
    if mistake in MUTANTS:
        monkeypatch.setattr(
            "switchkd.training.trainer.load_checkpoint", lambda *args: MUTANTS[mistake](load_checkpoint(*args))
        )
    elif mistake == "moments":
        monkeypatch.setattr("switchkd.training.checkpoint._load_optimizer", lambda *_: None)
    else:
        monkeypatch.setattr("switchkd.training.restoring.keep_until", lambda *_: None)
    run(tmp_path, resume=True)
    assert contents(tmp_path) != straight


# --- damage -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that died after step 9, with checkpoints 6 and 8."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    run(folder, (9, "told"))
    assert [each.name for each in checkpoints(folder)] == ["checkpoint-6", "checkpoint-8"]
    return folder


def page_zeroed(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 64] = bytes(64)
    file.write_bytes(data)


def bit_flipped(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "truncated": ("model.safetensors", lambda file: os.truncate(file, file.stat().st_size - 3)),
    "bit flipped": ("optimizer.safetensors", bit_flipped),
    "page zeroed": ("model.safetensors", page_zeroed),
    "missing": ("tokenizer.json", lambda file: file.unlink()),
    "swapped": ("model.safetensors", lambda file: shutil.copy(file.parents[1] / "checkpoint-6" / file.name, file)),
    "state": (
        "state.json",
        lambda file: file.write_text(file.read_text().replace('"num_tokens": ', '"num_tokens": 1')),
    ),
    "manifest cut": (MANIFEST, lambda file: os.truncate(file, file.stat().st_size - 3)),
    "manifest is no manifest": (MANIFEST, lambda file: file.write_text('{"model.safetensors": [1, 2]}')),
    "a file too many": ("more.safetensors", lambda file: file.write_bytes(b"")),
    "a folder for a file": ("config.json", lambda file: (file.unlink(), file.mkdir())),
}


def check_fallback(stopped, folder, straight, kind):
    """The one before is gone on from, with a word about it; one that was asked for by name is not replaced by another."""
    shutil.copytree(stopped, folder)
    name, damage = DAMAGE[kind]
    file = folder / "checkpoint-8" / name
    damage(file)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(
        CheckpointError, match=rf"{name}.*; there is checkpoint-6: give --resume-from, or --resume for the newest"
    ):
        run(folder, resume_from="checkpoint-8")
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.warns(SwitchKDWarning) as warned:
        run(folder, resume=True)
    first, second = (str(each.message) for each in warned if each.category is SwitchKDWarning)
    assert str(file.parent) in first and name in first
    assert first.endswith(f"The run goes on from {folder / 'checkpoint-6'}")
    assert second.startswith(
        f"{file.parent} is later than the step that the run goes on from: it is now {file.parent}.set-aside"
    )
    assert contents(folder) == straight


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_gone_on_from(stopped, straight, tmp_path, kind):
    check_fallback(stopped, tmp_path / "run", straight, kind)


def test_mutants_that_see_no_damage_or_fall_back_too_readily(stopped, straight, tmp_path, monkeypatch):
    for number, (name, mutant) in enumerate(
        {
            "switchkd.training.restoring._verify_all": lambda *_: None,
            "switchkd.training.restoring._named": lambda run, *_: whole_checkpoint(run),
        }.items()
    ):
        with (
            monkeypatch.context() as patch,
            pytest.raises((AssertionError, pytest.fail.Exception, SwitchKDWarning)),
        ):
            patch.setattr(name, mutant)
            check_fallback(stopped, tmp_path / str(number), straight, "bit flipped")


def test_checkpoints_that_were_swapped_are_refused(stopped, tmp_path):
    folder = shutil.copytree(stopped, tmp_path / "run")
    for source, target in (("8", "x"), ("6", "8"), ("x", "6")):
        (folder / f"checkpoint-{source}").rename(folder / f"checkpoint-{target}")
    with pytest.raises(
        CheckpointError, match=r"checkpoint-8 holds step 6: it was renamed, or swapped .*; .*start without --resume"
    ):
        whole_checkpoint(folder)


def test_a_run_goes_on_from_an_earlier_checkpoint_if_it_is_told_to(stopped, straight, tmp_path):
    for name in ("checkpoint-6", str(tmp_path / "1" / "checkpoint-6")):
        folder = shutil.copytree(stopped, tmp_path / str(len(name) > 12))
        folder = folder.rename(tmp_path / ("1" if "/" in name else "0"))
        with pytest.warns(SwitchKDWarning, match="it is now .*checkpoint-8.set-aside, and may be deleted"):
            run(folder, resume_from=name)
        assert contents(folder) == straight
        with pytest.warns(
            SwitchKDWarning, match="set-aside"
        ):  # once more: the one that was set aside before makes room
            run(folder, resume_from="checkpoint-10")
        assert contents(folder) == straight


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("checkpoint-7", "no such checkpoint; .* holds checkpoint-6, checkpoint-8"),
        ("checkpoint-x", "no such checkpoint"),
        ("other/checkpoint-6", "does not lie in"),
        ("..", "does not lie in|no such checkpoint"),
    ],
)
def test_only_a_checkpoint_of_the_run_can_be_gone_on_from(stopped, name, words):
    with pytest.raises(CheckpointError, match=words):
        run(stopped, resume_from=name)


def test_a_record_that_is_damaged_is_named_and_not_cut_off(stopped, tmp_path):
    folder = shutil.copytree(stopped, tmp_path / "run")
    file = folder / "rollouts.jsonl"
    first, second, *rest = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([first, second.replace(b'"step": ', b'"step" '), *rest]))
    with pytest.raises(DataError, match=r"rollouts.jsonl, line 2 is damaged: broken JSON .*take the line out"):
        run(folder, resume=True)
    assert len(file.read_bytes().splitlines()) == 2 + len(rest)


def write_state(folder, content):
    """Another state, with a manifest that agrees."""
    (folder / "state.json").write_bytes(content)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["state.json"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_a_state_of_another_kind_is_an_error_that_names_the_field(stopped, tmp_path):
    folder = shutil.copytree(stopped / "checkpoint-8", tmp_path / "run" / "checkpoint-8")
    state = json.loads((folder / "state.json").read_text())
    for change, words in (
        (lambda record: record.pop("speakers"), r"replay\[1\] has no 'speakers'"),
        (lambda record: record.update(completion_ids=["a"]), r"replay\[1\].completion_ids\[0\] must be"),
    ):
        other = json.loads(json.dumps(state))
        change(other["replay"][1])
        write_state(folder, json.dumps(other).encode())
        with pytest.raises(CheckpointError, match=rf"state.json is damaged: {words}"):
            whole_checkpoint(folder.parent)


def test_a_manifest_reaches_no_file_outside_its_folder(stopped, tmp_path):
    """Also where size and checksum agree."""
    folder = shutil.copytree(stopped / "checkpoint-8", tmp_path / "run" / "checkpoint-8")
    (tmp_path / "outside.json").write_text("{}")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["../../outside.json"] = {"size": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"names a file outside its folder, '\.\./\.\./outside\.json'"):
        whole_checkpoint(folder.parent)


def test_records_are_on_the_disk_before_a_checkpoint_says_how_far_they_reach(tmp_path, monkeypatch):
    t = trainer(tmp_path, max_steps=1, mix=Generated(1.0))
    synced = []
    monkeypatch.setattr(
        "switchkd.training.records.sync", lambda file: synced.append((file.name, len(checkpoints(tmp_path))))
    )
    t.train()
    assert synced[-2:] == [("metrics.jsonl", 1), ("rollouts.jsonl", 1)] and len(checkpoints(tmp_path)) == 2


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from([MANIFEST, "state.json"]),
    st.binary(max_size=40) | _JSON.map(lambda v: json.dumps(v).encode()),
    st.data(),
)
def test_whatever_stands_in_a_checkpoint_is_an_error_that_names_it(stopped, name, content, data):
    """Also a manifest that agrees with what it should not agree with, and names that lead out of the folder."""
    folder = stopped.parent / "fuzzed" / "checkpoint-8"
    shutil.rmtree(folder.parent, ignore_errors=True)
    shutil.copytree(stopped / "checkpoint-8", folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    outside = data.draw(st.sampled_from(["", "../checkpoint-8/state.json", "/etc/hostname", "\0", "a/../../x"]))
    if name == MANIFEST and outside:
        content = json.dumps(manifest | {outside: manifest["state.json"]}).encode()
    (folder / name).write_bytes(content)
    if name == "state.json":
        write_state(folder, content)
    with suppress(CheckpointError):
        assert whole_checkpoint(folder.parent) == folder and outside.startswith("../checkpoint-8")


# --- the best student ---------------------------------------------------------------------------------------------


def test_the_best_student_of_a_future_that_was_given_up_is_forgotten(tmp_path):
    """Its weights once lay in one folder: a run that went on from before it would have ended with them."""
    scores = dict.fromkeys(range(1, STEPS + 1), 1.0) | {4: 2.0, 8: 3.0}

    def part(**changes):
        t = trainer(tmp_path / "run", eval_steps=1, metric_for_best_model="rouge_l", save_steps=2, **changes)
        if t.config.resumes:
            t.resume()
        t.train(evaluate=lambda _: {"rouge_l": scores[t.step]})
        return t

    def best():
        return [path.name for path in sorted((tmp_path / "run").glob("best-*"))]

    assert part(max_steps=8, save_total_limit=3).best["step"] == 8 and best() == ["best-4", "best-8"]
    scores[8] = 0.0
    with pytest.warns(SwitchKDWarning, match="set-aside"):
        assert part(max_steps=8, resume_from="checkpoint-6").best == {"step": 4, "score": 2.0}
    assert best() == ["best-4"]
    bit_flipped(tmp_path / "run" / "best-4" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"best-4.*model.safetensors is damaged"):
        part(max_steps=9, resume=True)


# --- kill -9 ------------------------------------------------------------------------------------------------------

KILLED = """
import os, shutil, signal, sys, time
sys.path[:0] = [{tests!r}]
import torch
torch.set_num_threads(1)
from switchkd.cli.main import main
from switchkd.training.checkpoint import checkpoints, step_of
from pathlib import Path
run, deaths, until = Path({run!r}), 0, time.monotonic() + 400
def child():
    process = os.fork()
    if process == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        resume = bool(checkpoints(run))
        os._exit(main(["train", str(run) if resume else {recipe!r}, *(["--resume"] if resume else [])]))
    return process
def last():
    return max([0, *(step_of(folder) for folder in checkpoints(run))])
while deaths < {kills}:
    step, process = last(), child()
    while deaths % 4 and last() < step + 1 + deaths % 2:  # every fourth dies before it has done anything
        assert time.monotonic() < until
        time.sleep(0.002)
    time.sleep(0.004 * (deaths * 7 % 13) if deaths % 4 else 0.04 * deaths)
    os.kill(process, signal.SIGKILL)
    deaths += 1
    assert os.WIFSIGNALED(os.waitpid(process, 0)[1]), "it ended before it was killed often enough"
    if not checkpoints(run):  # before the first checkpoint: the same command starts anew once the folder is gone
        shutil.rmtree(run, ignore_errors=True)
print(deaths, [folder.name for folder in checkpoints(run)])
assert os.waitpid(child(), 0)[1] == 0
"""


def test_twenty_times_killed_a_run_ends_in_the_same_bytes(tmp_path):
    """SIGKILL at times that nobody chose well: while loading, scoring, decoding, training, saving, taking back."""
    import yaml

    recipe = {
        "template": "none", "max_new_tokens": 6, "max_steps": 100, "per_device_train_batch_size": 2, "save_steps": 1, "quiet": True,
        "eval_samples": 2, "eval_max_new_tokens": 4, "sample_steps": 5, "sample_prompts": 2, "eval_steps": 4,
        "metric_for_best_model": "forward_kl", "costs": [1e-3, 1e-5, 1e-3, 1e-5, 1e-3, 1e-5],
    }  # fmt: skip
    recipe |= pair_on_disk(tmp_path)
    for name in ("straight", "killed"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe | {"output_dir": str(tmp_path / name)}))
    assert main(["train", str(tmp_path / "straight.yaml")]) == 0
    own = {
        "tests": str(ROOT / "tests"),
        "run": str(tmp_path / "killed"),
        "recipe": str(tmp_path / "killed.yaml"),
        "kills": 20,
    }
    done = subprocess.run(
        [sys.executable, "-c", KILLED.format(**own)], capture_output=True, text=True, cwd=ROOT, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")
    names = [
        {path.relative_to(tmp_path / run) for path in (tmp_path / run).rglob("*")} for run in ("straight", "killed")
    ]
    assert names[0] == names[1]  # nothing half made is left
    for name in names[0]:
        if name.suffix == ".safetensors":
            assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
