"""A study on a Ray cluster of two nodes on this machine: a node dies, a signal comes, one cannot take part."""

import json
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import yaml
from tiny import pair_on_disk

from switchkd.base import __version__, signals
from switchkd.base.errors import ConfigError, SwitchKDWarning
from switchkd.cli.main import main
from switchkd.studies import ray_cluster
from switchkd.studies.plan import CELLS, cells, load_plan
from switchkd.studies.ray_cluster import RETRIES, RayCluster, _follow, _made_for_nodes
from switchkd.studies.study import Run, _Running, run_cells
from switchkd.training.checkpoint import checkpoints

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """Two runs of enough steps to be stopped in, and one whose data is missing."""
    folder = tmp_path_factory.mktemp("plan")
    settings = {
        **pair_on_disk(folder), "template": "none", "max_steps": 150, "per_device_train_batch_size": 2, "eval_samples": 4,
        "eval_max_new_tokens": 6, "eval_steps": 0, "save_steps": 10, "sample_prompts": 1,
    }  # fmt: skip
    methods = {"kd": "kd", "sft": "sft", "bad": {"recipe": "sft", "train_file": str(folder / "nowhere.jsonl")}}
    file = folder / "plan.yaml"
    file.write_text(yaml.safe_dump({"title": "A plan", "methods": methods, "sizes": {"small": {"settings": settings}}}))
    return file


@pytest.fixture(scope="module")
def cluster():
    """A head that takes no run, and two nodes that take one each; one of these has a GPU, if it is asked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("RAY_worker_niceness", "0")  # else workers wait for whatever else the machine has to do
        ray_cluster._ray()
        from ray.cluster_utils import Cluster

        head = {
            "num_cpus": 0,
            "num_gpus": 0,
            "include_dashboard": False,
            "object_store_memory": ray_cluster._STORE_BYTES,
        }
        made = Cluster(initialize_head=True, head_node_args=head)
        for gpus in (0, 1):
            made.add_node(num_cpus=1, num_gpus=gpus, object_store_memory=ray_cluster._STORE_BYTES)
        yield made
        made.shutdown()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Paths are relative to a folder that the nodes were not started in."""
    monkeypatch.chdir(tmp_path)


def laid_out(plan, *methods, folder="st"):
    read = load_plan(str(plan))
    size = read.sized("small")
    return [cell for cell in cells(read, size, Path(folder)) if cell.method in methods], size, Path(folder)


def training(name):
    """The process that trains the run of that name now."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = process.cmdline()
            if "train" in words and any(Path(word) == Path.cwd() / "st" / CELLS / f"{name}.yaml" for word in words):
                return process
    raise LookupError(name)


@contextmanager
def meanwhile(work):
    """``work`` in a thread; what goes wrong there ends the block, and is raised here."""
    wrong, over = [], threading.Event()

    def watched():
        try:
            work()
        except BaseException as error:
            wrong.append(error)
            if not over.is_set():
                os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=watched, daemon=True)
    thread.start()
    try:
        yield
        thread.join()
    finally:
        over.set()
        if wrong:
            raise wrong[0]


def until(found, seconds=300):
    end = time.monotonic() + seconds
    while not (what := found()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return what


def test_a_signal_stops_runs_with_a_checkpoint_and_begins_no_other(plan, cluster):
    """By default a run takes a GPU where there is one: the second run waits for it."""
    told, seen = [], {}

    def stop():
        until(lambda: len(checkpoints(Path("st/kd-seed0"))) > 1)
        seen.update(training("kd-seed0").environ())
        os.kill(os.getpid(), signal.SIGTERM)

    with meanwhile(stop), pytest.raises(signals.Stopped) as stopped:
        run_cells(*laid_out(plan, "kd", "sft"), 1, lambda line, _: told.append(line), RayCluster(cluster.address))
    assert told == ["kd-seed0: stopped"] and stopped.value.signal == signal.SIGTERM
    assert f"{checkpoints(Path('st/kd-seed0'))[-1]} stands; go on with" in Path("st/logs/kd-seed0.log").read_text()
    assert sorted(path.name for path in Path("st").iterdir()) == ["cells", "kd-seed0", "logs"]
    assert (seen["CUDA_VISIBLE_DEVICES"], seen["OMP_NUM_THREADS"]) == ("0", "1")


def test_a_node_that_does_not_see_the_folder_ends_the_study_before_a_run_begins(plan, cluster, monkeypatch):
    """Nor is it left unsaid that others are waited for."""

    @contextmanager
    def on_another_disk(folder):
        yield folder / "token"

    monkeypatch.setattr(ray_cluster, "scratch_folder", on_another_disk)
    message = f"the node .* does not see {Path.cwd()}/st, where runs and results lie; name"
    with (
        pytest.raises(ConfigError, match=message),
        pytest.warns(SwitchKDWarning, match="waiting for kd-seed0: another"),
    ):
        RayCluster(cluster.address)([Run("kd-seed0", Path("st"), {})], True, lambda *_: pytest.fail("it was begun"))


def test_a_run_whose_node_dies_goes_on_elsewhere_and_ends_as_if_it_had_not(plan, cluster, monkeypatch):
    """The node goes as in a power cut, but for the process that trains, which nobody is left to end. An error is no such thing."""
    told, gone, run = [], [], Path("st/kd-seed0")

    def kill():
        until(lambda: len(checkpoints(run)) > 1)
        process = training("kd-seed0")
        assert process.environ()["CUDA_VISIBLE_DEVICES"] == ""
        for each in (process.parent().parent(), process.parent()):
            each.kill()
        gone.extend(psutil.wait_procs([process], timeout=20)[0])
        gone.append(int(checkpoints(run)[-1].name.rpartition("-")[2]))

    with meanwhile(kill):
        executor = RayCluster(cluster.address, gpus=0)
        left = run_cells(*laid_out(plan, "kd", "bad"), 1, lambda line, _: told.append(line), executor)
    assert left == {"bad-seed0": "FAILED"} and sorted(told)[1:] == ["kd-seed0: done"]
    assert told[0] == f"bad-seed0: FAILED, see {Path.cwd()}/st/logs/bad-seed0.log"
    assert len(gone) == 2, "the process that trained outlived its node"
    commands = [
        Path(f"st/logs/{name}.log").read_text().split("$ switchkd train")[1:] for name in ("kd-seed0", "bad-seed0")
    ]
    assert [len(each) for each in commands] == [2, 1]
    assert "step 1/150: loss" in commands[0][0] and "step 1/150: loss" not in commands[0][1]
    assert f"step {gone[1] + 1}/150: loss" in commands[0][1]
    assert sorted(path.name for path in Path("st").iterdir()) == ["cells", "kd-seed0", "logs"]
    monkeypatch.setattr(_Running, "run", lambda self, arguments, log: main(arguments))
    assert run_cells(*laid_out(plan, "kd", folder="here"), 1, lambda *_: None) == {}
    runs = [Path(folder, "kd-seed0") for folder in ("st", "here")]
    students = [(folder / "student" / "model.safetensors").read_bytes() for folder in runs]
    scores = [json.loads((folder / "evaluation.json").read_text())["results"] for folder in runs]
    assert students[0] == students[1] and scores[0] == scores[1]


# --- without a cluster --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("missing", "changes", "message"),
    [
        ("", {"version": "0.0.1"}, f"has switchkd {__version__}, and this study is of 0.0.1; install one version"),
        (
            "",
            {"token": "st/.token"},
            "does not see st, where runs and results lie; name an --output-dir on a file system",
        ),
        ("", {"directory": "nowhere"}, "has no nowhere, from which paths in settings count"),
        ("switchkd.base", {}, f"has no switchkd in its environment .*; install {__version__} there"),
        ("", {}, None),
    ],
)
def test_a_node_says_why_it_cannot_take_part(monkeypatch, missing, changes, message):
    """What is sent there needs no module of ours to be read."""
    from ray import cloudpickle

    sent = cloudpickle.dumps(_made_for_nodes())
    monkeypatch.setitem(sys.modules, "switchkd.studies.ray_cluster", None)
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)
    given = {"version": __version__, "token": ".", "directory": ".", "work": None} | changes
    said = cloudpickle.loads(sent)(**given)
    assert said is None if message is None else said.startswith("the node ")
    if message:
        with pytest.raises(ConfigError, match=message):
            raise ConfigError(said)


@pytest.fixture
def answers():
    """Ray, whose tasks have ended as this says, by their names; and which were told to stop."""
    from ray import exceptions

    made = SimpleNamespace(exceptions=exceptions, of={}, stopped=[])

    def get(name):
        if isinstance(made.of[name], Exception):
            raise made.of[name]
        return made.of[name]

    made.get, made.cancel = get, made.stopped.append
    made.wait = lambda names, timeout: ([name for name in names if made.of[name]][:1], [])
    return made


def test_a_run_that_takes_its_nodes_along_fails_and_the_others_go_on(answers):
    answers.of = {"a": answers.exceptions.WorkerCrashedError(), "b": ("done", "", 2.0)}
    told = {}
    _follow(answers, {"a": "a", "b": "b"}, lambda name, outcome: told.update({name: outcome}))
    assert told["a"].state == "FAILED" and f"died {RETRIES + 1} times" in told["a"].note
    assert told["b"] == ("done", "", 2.0) and not answers.stopped


def test_a_node_that_joins_and_cannot_take_part_ends_the_study_once_the_others_have_stopped(answers):
    answers.of = {"a": "the node x has no switchkd", "b": (), "c": ()}
    told = {}

    def cancel(name):
        answers.stopped.append(name)
        answers.of[name] = {"b": ("stopped", "", 1.0), "c": answers.exceptions.TaskCancelledError()}[name]

    answers.cancel = cancel
    with pytest.raises(ConfigError, match="the node x has no switchkd"):
        _follow(answers, {name: name for name in "abc"}, lambda name, outcome: told.update({name: outcome.state}))
    assert answers.stopped == ["b", "c"] and told == {"b": "stopped", "c": "waiting"}


def test_a_run_that_has_room_nowhere_is_refused_or_waits_for_a_node():
    nodes = [{"NodeID": "x", "Alive": True, "Resources": {"CPU": 2.0, "memory": 2.0**30}}, {"Alive": False}]
    assert ray_cluster._fitting(nodes, {"CPU": 2, "GPU": 0, "memory": 5e8}, "local") == ["x"]
    with pytest.raises(
        ConfigError, match=r"to have 4 CPUs, 0 GPUs, 0 .* has 2 CPUs, 0 GPUs, 1,073,741,824 bytes of memory"
    ):
        ray_cluster._fitting(nodes, {"CPU": 4, "GPU": 0, "memory": 0}, "local")
    with pytest.warns(SwitchKDWarning, match="waiting for one that joins"):
        assert ray_cluster._fitting(nodes, {"CPU": 1, "GPU": 0.5, "memory": 0}, "10.0.0.1:6379") == []


def test_a_cluster_that_is_not_there_is_said_at_once(plan):
    with pytest.raises(ConfigError, match=r"the Ray cluster at 127\.0\.0\.1:1 cannot be joined: .*refused"):
        run_cells(*laid_out(plan, "kd"), 1, lambda *_: None, RayCluster("127.0.0.1:1"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cpus-per-run", "2"], "--cpus-per-run says nothing to --executor local"),
        (["--gpus-per-run", "0"], "--gpus-per-run says nothing to --executor local"),
        (["--memory-gib-per-run", "2"], "--memory-gib-per-run says nothing to --executor local"),
        (["--ray-address", "auto"], "--ray-address says nothing to --executor local"),
        (["--executor", "ray", "--jobs", "2"], "--jobs says nothing to --executor ray"),
        (["--executor", "ray", "--cpus-per-run", "0"], "cannot have 0 CPUs"),
        (["--executor", "ray", "--gpus-per-run", "1.5"], "GPUs are whole ones or a part of one"),
        (["--executor", "ray", "--memory-gib-per-run", "-1"], "memory is not negative"),
    ],
)
def test_settings_that_say_nothing_or_make_no_sense_are_refused(plan, capsys, flags, message):
    assert main(["study", str(plan), "--dry-run", *flags]) == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_without_ray_the_way_to_it_is_told(plan, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["study", str(plan), "--executor", "ray"]) == 1
    assert "pip install 'switchkd[cluster]'" in capsys.readouterr().err
    assert not Path("studies").exists()
