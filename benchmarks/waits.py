"""Host waits: the places where the processor would have to wait for a GPU, counted on a CPU.

A GPU works through a queue that the processor fills. Whenever the processor wants to know a number that lies on the GPU, or copies
a Python list there, it has to wait until the queue is empty, and the GPU then waits for it in turn. Such places can be counted
without a GPU, since the calls are the same:

- a tensor becomes a Python or NumPy value: ``tolist``, ``item``, ``cpu``, ``numpy``, ``bool()``, ``int()``, ``float()``, an index;
- a tensor is made of Python numbers: ``torch.tensor``, ``torch.as_tensor``, ``new_tensor``;
- a result is as long as the numbers say: ``nonzero``, ``masked_select``, ``unique``, an index by a tensor of bools;
- ``to`` another device.

A call within a call is one wait, and so is ``tolist`` of what ``cpu`` gave. What is counted is an upper bound: a tensor that lies
on the host on purpose is taken for one on the GPU. What is not seen are waits inside of an operator's C++ code, and names that
were imported from torch (``from torch import tensor``) before.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

TO_HOST = ("tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")
FROM_LISTS = ("tensor", "as_tensor")
SIZED_BY_NUMBERS = (
    "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero", "aten::masked_select",
    "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::repeat_interleave",
)  # fmt: skip
# A wait is the engine's own, or made inside of the models' code, or of somebody else, such as the caller.
OWNERS = ("switchkd", "transformers")


@dataclass
class Waits:
    """The waits of each round that ended, of the time since, and where they were. Owners are `OWNERS` and "other"."""

    rounds: list[Counter[str]] = field(default_factory=list)
    now: Counter[str] = field(default_factory=Counter)
    places: Counter[str] = field(default_factory=Counter)

    def round(self, *_: object) -> None:
        """A round ended here; to be given to ``decode`` as its ``progress``."""
        self.rounds.append(self.now)
        self.now = Counter()

    @property
    def total(self) -> int:
        """All waits, in rounds or not."""
        return sum((*self.rounds, self.now), Counter()).total()

    def per_round(self, *owners: str) -> float:
        """The mean over the rounds, of these owners or of all; the first, in which a call sets itself up, is left out."""
        return mean(self._of(owners))

    def most(self, *owners: str) -> int:
        """The most of a round, but for the first."""
        return max(self._of(owners))

    def _of(self, owners: tuple[str, ...]) -> list[int]:
        rounds = self.rounds[1:] or self.rounds
        return [sum(counts[owner] for owner in owners or counts) for counts in rounds]


@contextmanager
def counting_waits() -> Iterator[Waits]:
    """Count the host waits of this thread within the context."""
    counter = _Counter()
    with ExitStack() as stack:
        for name in TO_HOST:
            stack.enter_context(patch.object(Tensor, name, counter.to_host(getattr(Tensor, name))))
        for name in FROM_LISTS:
            stack.enter_context(patch.object(torch, name, counter.from_lists(getattr(torch, name), 0)))
        stack.enter_context(patch.object(Tensor, "new_tensor", counter.from_lists(Tensor.new_tensor, 1)))
        stack.enter_context(patch.object(Tensor, "to", counter.moved(Tensor.to)))
        stack.enter_context(_Operators(counter))
        yield counter.waits


class _Counter:
    """Makes counting functions of torch's; ``depth`` is above 0 inside of one that is counted already."""

    def __init__(self) -> None:
        self.waits, self.depth = Waits(), 0

    def count(self, what: str) -> None:
        owner, place = _caller()
        self.waits.now[owner] += 1
        self.waits.places[f"{owner}: {what} at {place}"] += 1

    def within(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.depth += 1
        try:
            return call(*args, **kwargs)
        finally:
            self.depth -= 1

    def to_host(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not self.depth and not hasattr(tensor, "came_home"):
                self.count(original.__name__)
            found = self.within(original, tensor, *args, **kwargs)
            if original.__name__ == "cpu":  # on a CPU it is the very tensor, which is not to be marked
                found = self.within(Tensor.view_as, found, found)
                found.came_home = True
            return found

        return counted

    def from_lists(self, original: Callable[..., Any], place: int) -> Callable[..., Any]:
        """``place`` is that of the data among the arguments."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            data = kwargs["data"] if "data" in kwargs else args[place]
            if not self.depth and not isinstance(data, Tensor):
                self.count(original.__name__)
            return self.within(original, *args, **kwargs)

        return counted

    def moved(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            found = self.within(original, tensor, *args, **kwargs)
            if not self.depth and found.device != tensor.device:
                self.count("to")
            return found

        return counted


class _Operators(TorchDispatchMode):
    """Sees the operators of `SIZED_BY_NUMBERS`, and an index by bools, where no counted function called them."""

    def __init__(self, counter: _Counter):
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if not self.counter.depth and (name in SIZED_BY_NUMBERS or _by_bools(name, args)):
            self.counter.count(name)
        return self.counter.within(func, *args, **(kwargs or {}))


def _by_bools(name: str, args: Any) -> bool:
    if name not in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"):
        return False
    if name != "aten::index" and args[2].dim() == 0:
        return False  # x[mask] = number fills, and asks for no places
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])


def _caller() -> tuple[str, str]:
    """Whose code asked, and its file and line: the nearest frame of one of the owners."""
    frame, nearest = sys._getframe(2), ""
    while frame is not None:
        package, file = frame.f_globals.get("__name__", "").partition(".")[0], frame.f_code.co_filename
        place = f"{Path(file).name}:{frame.f_lineno}"
        if package in OWNERS:
            return package, place
        if not nearest and package != "torch" and file != __file__:
            nearest = place
        frame = frame.f_back
    return "other", nearest
