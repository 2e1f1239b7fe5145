"""TensorBoard, trackio and wandb: what a run's steps say, sent on as they happen under the names of ``metrics.jsonl``.

The trackers are accelerate's. They are told one by one, because ``Accelerator.log`` stops at the first that fails, and a tracker
must never end a run.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from switchkd.base.errors import ConfigError
from switchkd.base.storage import write_file
from switchkd.base.terminal import console

PROJECT, FOLDER = "switchkd", "trackers"


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError if the package of a tracker is not installed."""
    if missing := [name for name in names if find_spec(name) is None]:
        raise ConfigError(
            f'report_to: {", ".join(missing)} is not installed; pip install "switchkd[track]", or leave it out'
        )


class Trackers:
    """The trackers of a run, all told the same; to be made by the main process only.

    ``settings`` are the run's and ``step`` the updates done: above 0 the run goes on, in each tracker's own run of before. One that
    fails is named in a warning and told nothing more.
    """

    def __init__(self, names: Sequence[str], run: Path, settings: Mapping[str, Any], step: int):
        self._running: dict[str, GeneralTracker] = {}
        for name in names:
            with self._surviving(name, "starting"):
                tracker = _tracker(name, run, settings, step)
                tracker.start()
                self._running[name] = tracker

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """The values of a step: numbers and text. What has none (None, or NaN) is left out."""
        known = {
            name: value for name, value in values.items() if value is not None and value == value and name != "step"
        }
        self._tell(f"step {step}", lambda tracker: tracker.log(known, step=step))

    def finish(self) -> None:
        """The run has ended well. Of one that does not, wandb sees at exit that it failed."""
        self._tell("finishing", lambda tracker: tracker.finish())

    def _tell(self, moment: str, tell: Callable[[GeneralTracker], None]) -> None:
        for name, tracker in list(self._running.items()):
            with self._surviving(name, moment):
                tell(tracker)

    @contextmanager
    def _surviving(self, name: str, moment: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each has errors of its own: a network, a full disk, a missing login
            self._running.pop(name, None)
            console.print(
                f"warning: {name} failed at {moment} ({type(error).__name__}: {error}) and is told nothing more; "
                "the run goes on, and metrics.jsonl has everything",
                style="yellow",
                soft_wrap=True,
            )


def _tracker(name: str, run: Path, settings: Mapping[str, Any], step: int) -> GeneralTracker:
    """A tracker that has not been started."""
    folder, title = run / FOLDER, run.resolve().name
    key = _key(folder)
    continued = {"resume": "allow", "config": dict(settings)}
    arguments: dict[str, dict[str, Any]] = {
        "tensorboard": {"logging_dir": folder, "purge_step": step + 1 if step else None},  # no step is shown twice
        "trackio": {"name": f"{title}-{key}", **continued},
        # A run of this process that failed may still be open.
        "wandb": {"name": title, "id": key, "dir": str(folder), "reinit": "finish_previous", **continued},
    }
    return LOGGER_TYPE_TO_CLASS[name](PROJECT, **arguments[name])


def _key(folder: Path) -> str:
    """The id of a run in trackers that keep many: made once, so that a resumed run finds its own and a new one never another's."""
    file = folder / "id"
    if not file.is_file():
        folder.mkdir(exist_ok=True)
        write_file(file, uuid4().hex[:8])
    return file.read_text(encoding="utf-8")
