"""A study on the machines of a Ray cluster: Ray decides which node a run goes to, and tries it again if that one dies.

Runs and results lie in the study's folder, which all nodes must see under one path. So a run that is tried again goes on from its
newest checkpoint, and the lock on its folder keeps two nodes from writing there. Nodes are sent plain data only.
"""

from __future__ import annotations

import os
import signal
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from switchkd.base import __version__, signals
from switchkd.base.errors import ConfigError, SwitchKDWarning
from switchkd.base.storage import scratch_folder, tidy
from switchkd.studies.study import FAILED, POLL_SECONDS, WAITING, Outcome, Run

RETRIES = 3  # of a run whose node dies: one that takes its nodes along is not tried for ever
_LOCAL = "local"
# Of a Ray that is started here and has next to nothing to store; the least it takes is 75 MiB.
_STORE_BYTES = 80 * 2**20
_REACH_SECONDS = 20.0
_UNITS = {"CPU": "CPUs", "GPU": "GPUs", "memory": "bytes of memory"}


@dataclass(frozen=True)
class RayCluster:
    """The executor of a study that makes each run a task of Ray, with a share of a node that is its own.

    Raises:
        ConfigError: Ray is not installed, or cannot be joined; this machine's Ray has less to give than a run is to have; a node
            has another switchkd, or does not see the study's folder.
    """

    address: str = ""
    """Of the cluster. Without one: what RAY_ADDRESS says, else a Ray of this machine alone, which is stopped at the end."""
    cpus: int = 1
    """Of a run, which has so many threads."""
    gpus: float | None = None
    """Of a run; a part of one is shared with others. None: 1 if the cluster has any."""
    memory_gib: float = 0.0
    """Of a run, in GiB; 0 reserves none."""

    def __post_init__(self) -> None:
        gpus = self.gpus or 0
        if self.cpus < 1 or gpus < 0 or (gpus > 1 and gpus % 1) or self.memory_gib < 0:
            raise ConfigError(
                f"a run cannot have {self.cpus} CPUs, {self.gpus} GPUs and {self.memory_gib} GiB of memory: it needs a CPU at "
                "least, GPUs are whole ones or a part of one, and memory is not negative"
            )
        _ray()

    def __call__(self, runs: Sequence[Run], wait: bool, tell: Callable[[str, Outcome], None]) -> None:
        folder, address = runs[0].folder.absolute(), self.address or os.environ.get("RAY_ADDRESS") or _LOCAL
        variables = {"OMP_NUM_THREADS": str(self.cpus)} | ({"CUDA_VISIBLE_DEVICES": ""} if self.gpus == 0 else {})
        if wait:
            said = (
                f"waiting for {', '.join(run.name for run in runs)}: another process has the lock on its folder. One that died "
                "with its node lets go of it; if this file system has no locks, delete lock.json there"
            )
            warnings.warn(said, SwitchKDWarning, stacklevel=3)
        tidy(folder, "scratch")
        with scratch_folder(folder) as token, _joined(address) as ray:
            expected = (__version__, str(token), str(Path.cwd()))
            needs, task = self._needs(ray.nodes()), ray.remote(_made_for_nodes())
            _check_nodes(ray, task, expected, _fitting(ray.nodes(), needs, address))
            share = {"num_cpus": needs["CPU"], "num_gpus": needs["GPU"], "memory": needs["memory"] or None}
            work = {}
            for run in runs:
                plain = ((run.name, str(folder), run.evaluations), wait, str(Path.cwd()), variables)
                own = task.options(name=run.name, max_retries=RETRIES, **share)
                work[own.remote(*expected, plain)] = run.name
            try:
                _follow(ray, work, tell)
            except BaseException:
                for left in work:
                    ray.cancel(left, force=True)
                raise

    def _needs(self, nodes: Sequence[dict[str, Any]]) -> dict[str, float]:
        """What a run needs, in Ray's names."""
        some = any(node["Resources"].get("GPU") for node in nodes)
        return {
            "CPU": self.cpus,
            "GPU": float(some) if self.gpus is None else self.gpus,
            "memory": self.memory_gib * 2**30,
        }


def _ray() -> Any:
    # Ray reads these when it is imported: it tells its makers nothing, and takes no folder along for those who start with `uv run`.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            f"the executor ray needs the package ray, which cannot be imported ({error}): pip install 'switchkd[cluster]'"
        ) from error
    return ray


@contextmanager
def _joined(address: str) -> Iterator[Any]:
    """Ray, as long as the block runs."""
    ray, before = _ray(), signal.getsignal(signal.SIGTERM)
    own = {"include_dashboard": False, "object_store_memory": _STORE_BYTES} if address == _LOCAL else {}
    try:
        try:
            _reach(address)
            ray.init(address, log_to_driver=False, logging_level="ERROR", **own)
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(f"the Ray cluster at {address} cannot be joined: {error}") from error
        finally:
            if signal.getsignal(signal.SIGTERM) != before:  # Ray takes it for itself
                signal.signal(signal.SIGTERM, before)
        yield ray
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Raise OSError if nobody listens at host:port, which Ray itself tries for minutes; its words, such as auto, it knows best."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), _REACH_SECONDS).close()


def _fitting(nodes: Sequence[dict[str, Any]], needs: dict[str, float], address: str) -> list[str]:
    """The ids of the nodes that have what a run needs, whether or not it is free now."""
    alive = [node for node in nodes if node["Alive"]]
    found = [node["NodeID"] for node in alive if all(node["Resources"].get(name, 0) >= needs[name] for name in needs)]
    if not found:
        words, had = _words(needs), "; ".join(_words(node["Resources"]) for node in alive)
        if address == _LOCAL:
            raise ConfigError(f"a run is to have {words}, and this machine has {had}: give it less")
        said = f"no node has the {words} that a run is to have ({had}); waiting for one that joins"
        warnings.warn(said, SwitchKDWarning, stacklevel=3)
    return found


def _words(resources: dict[str, float]) -> str:
    return ", ".join(f"{resources.get(name, 0):,.12g} {unit}" for name, unit in _UNITS.items())


def _check_nodes(ray: Any, task: Any, expected: tuple[str, str, str], nodes: Sequence[str]) -> None:
    """Raise ConfigError for a node that cannot take part: better now than when the first run comes there, maybe after days."""
    pinned = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    there = [task.options(num_cpus=0, scheduling_strategy=pinned(node, soft=False)) for node in nodes]
    for answer in [each.remote(*expected, None) for each in there]:
        with suppress(ray.exceptions.TaskUnschedulableError, ray.exceptions.NodeDiedError):  # it has just gone
            if problem := ray.get(answer):
                raise ConfigError(problem)


def _follow(ray: Any, work: dict[Any, str], tell: Callable[[str, Outcome], None]) -> None:
    """Take the runs out of ``work`` as they end, and ``tell``; all are told to stop by a signal that comes, or a node's problem."""
    problem, told = "", False
    while work:
        for ended in ray.wait(list(work), timeout=POLL_SECONDS)[0]:
            answer = _answer(ray, ended)
            name = work.pop(ended)
            if isinstance(answer, str):
                problem = answer
            else:
                tell(name, answer)
        if (problem or signals.received()) and not told:
            for left in work:
                ray.cancel(left)
            told = True
    if problem:
        raise ConfigError(problem)


def _answer(ray: Any, ended: Any) -> Outcome | str:
    try:
        answer = ray.get(ended)
    except ray.exceptions.TaskCancelledError:
        return Outcome(WAITING)
    except ray.exceptions.RayTaskError:  # a mistake in what the task calls
        raise
    except ray.exceptions.RayError as error:
        return Outcome(FAILED, f": its node or worker died {RETRIES + 1} times: {error}")
    return answer if isinstance(answer, str) else Outcome(*answer)


def _made_for_nodes() -> Callable[..., Any]:
    """The task. It is made here, and names nothing outside, so that Ray sends its code: a node without this module can answer."""

    def on_node(version: str, token: str, directory: str, work: tuple[Any, ...] | None) -> Any:
        """Says why this node cannot take part, else what came of ``work``."""
        import os
        import socket
        import sys
        from pathlib import Path

        node = f"the node {socket.gethostname()}"
        try:
            from switchkd.base import __version__ as own
        except ImportError as error:
            return f"{node} has no switchkd in its environment ({sys.executable}: {error}); install {version} there"
        if own != version:
            return f"{node} has switchkd {own}, and this study is of {version}; install one version on all nodes"
        if not os.path.isdir(token):
            return (
                f"{node} does not see {os.path.dirname(token)}, where runs and results lie; name an --output-dir on a file system "
                "that all nodes have under the same path"
            )
        if not os.path.isdir(directory):
            return f"{node} has no {directory}, from which paths in settings count; start the study in a folder that all nodes have"
        if work is None:
            return None
        from switchkd.studies.study import Run, work_on

        (name, folder, evaluations), *rest = work
        return tuple(work_on(Run(name, Path(folder), evaluations), *rest))

    return on_node
