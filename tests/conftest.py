import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from switchkd.decoding import pace

TESTS = Path(__file__).parent
# `from tiny import …`, and what one file of tests takes from another.
sys.path[:0] = [str(TESTS), *(str(folder) for folder in TESTS.iterdir() if folder.is_dir())]
sys.path.append(str(TESTS.parent))  # `from benchmarks.waits import …`, which is in no package that is installed


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tiny tensors gain nothing from threads, and pytest-xdist already uses the cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def hangups() -> Iterator[None]:
    """A hangup is listened to, also where these tests are run under `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(autouse=True, scope="session")
def costs() -> Iterator[None]:
    """Rounds are planned by the same costs in every run of a test; what is timed is run once."""

    def line(work: Callable[[int], object], sizes: tuple[int, int], device: torch.device) -> tuple[float, float]:
        work(sizes[0])
        return 1e-3, 1e-5

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pace, "line", line)
        yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is marked slow is run where the marker is asked for."""
    if "slow" not in config.getoption("markexpr", ""):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))
