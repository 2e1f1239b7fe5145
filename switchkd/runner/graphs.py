"""Work on a device that is recorded once and replayed: a GPU is then told what to do in one launch instead of hundreds.

A recording holds on to the tensors that it was made with, so it takes inputs of one shape, and batches of 5 to 8 rows are one
shape: rows that have ended ride along until a smaller size is reached.
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Work = Callable[..., tuple[Tensor, ...]]


def bucket(rows: int, places: int) -> int:
    """The number of rows that a recording is of: the next of 1, 2, 4 …, but no more than there are places."""
    return min(1 << (rows - 1).bit_length(), places)


class _Recording(NamedTuple):
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    replay: Callable[[], object]


class Graphs:
    """Recordings by their name. On CUDA each is a CUDA graph; elsewhere the work is done anew, on the same tensors, which is how
    it is tested without a GPU."""

    def __init__(self) -> None:
        self.made: dict[Hashable, _Recording] = {}
        self._memory: Any = None

    def __call__(self, name: Hashable, work: Work, *inputs: Tensor) -> tuple[Tensor, ...]:
        """``work(*inputs)``. What it returns may be written over by the next call of this name."""
        if name not in self.made:
            self.made[name] = self._record(work, tuple(each.clone() for each in inputs))
        recording = self.made[name]
        for own, new in zip(recording.inputs, inputs, strict=True):
            own.copy_(new)
        recording.replay()
        return recording.outputs

    def forget(self) -> None:
        """Let go of all recordings: what they read or write has moved."""
        self.made.clear()

    def _record(self, work: Work, inputs: tuple[Tensor, ...]) -> _Recording:
        outputs = tuple(each.clone() for each in self._warm(work, inputs))
        if inputs[0].device.type != "cuda":

            def again() -> None:
                for own, new in zip(outputs, work(*inputs), strict=True):
                    own.copy_(new)

            return _Recording(inputs, outputs, again)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            outputs = work(*inputs)
        self._memory = graph.pool()
        return _Recording(inputs, outputs, graph.replay)

    @staticmethod
    def _warm(work: Work, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A run before the recording, outside the main stream, which prepares kernels and buffers."""
        if inputs[0].device.type != "cuda":
            return work(*inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            outputs = work(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        return outputs
