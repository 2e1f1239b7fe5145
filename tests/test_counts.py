"""What counts operators, calls and host waits does count them, each once, and leaves torch as it was."""

import pytest
import torch
from transformers import activations

from benchmarks.counts import DEVICE_SIZES, Operators, counted_loss, counting_calls, loss_operators
from benchmarks.waits import counting_waits
from switchkd.base import signals
from switchkd.forward.head import Sizes

# What waits, and how often, for a tensor of three numbers.
WAITS = {
    "two": (lambda x: (torch.tensor([1, 2]), x.sum().item()), 2),
    "one within another": (lambda x: x.cpu().tolist(), 1),
    "an index by bools": (lambda x: x[x > 0], 1),
    "written by bools": (lambda x: x.clone().index_put_((x > 0,), x), 1),
    "where by one argument": (lambda x: torch.where(x > 0), 1),
    "a condition": (lambda x: 1 if x.sum() > 0 else 0, 1),
    "a slice up to a tensor": (lambda x: x[: x.long()[0]], 1),
    "asked for in Python": (lambda x: 2 in x, 1),
    "made like another": (lambda x: x.new_tensor([1.0]), 1),
    "moved": (lambda x: x.to("meta"), 1),
    "nothing": (lambda x: (torch.as_tensor(x), x.to(torch.float64), x.masked_fill(x > 0, 0.0), torch.arange(3) + x), 0),
}


@pytest.mark.parametrize("name", WAITS)
def test_waits_are_counted_once(name):
    act, expected = WAITS[name]
    x = torch.ones(3)
    with counting_waits() as waits:
        act(x)
    assert waits.total == expected, waits.places
    assert sum(waits.places.values()) == expected
    x.sum().item()
    torch.tensor([1])
    assert waits.total == expected, "it goes on counting"
    assert not {"tolist", "item", "to"} & vars(torch.Tensor).keys()


def test_waits_are_told_by_round_and_by_whose_code_made_them(monkeypatch):
    monkeypatch.setattr(activations, "__name__", "transformers.activations")
    ask = eval("lambda x: x.sum().item()", vars(activations))  # a function that stands in a module of transformers
    with counting_waits() as waits:
        torch.tensor([1])  # the first round sets things up
        waits.round()
        for extra in (0, 2):
            ask(torch.ones(3))
            for _ in range(extra):
                torch.tensor([1])
            waits.round()
    assert [sum(counts.values()) for counts in waits.rounds] == [1, 1, 3]
    assert (waits.per_round(), waits.most(), waits.per_round("transformers"), waits.per_round("other")) == (2, 3, 1, 1)


def test_calls_and_operators_are_counted():
    with counting_calls() as calls:
        signals.check()
        (lambda: None)()
    assert calls["switchkd"] == 1
    assert calls["all"] >= 2
    with Operators() as operators:
        torch.ones(3) + 1
    assert operators.counts == {"aten.ones.default": 1, "aten.add.Tensor": 1}


def test_operators_of_a_loss_are_the_same_with_and_without_numbers():
    sizes, vocabulary = Sizes(chunk=4 * 50 * 4, piece=2 * 50 * 4), 50
    meta, real = (
        counted_loss(11, sizes, torch.float32, vocabulary=vocabulary, device=device) for device in ("meta", "cpu")
    )
    assert meta == real


def test_a_loss_at_sizes_for_a_gpu_takes_less_than_ten_thousand_operators():
    for dtype in (torch.float32, torch.bfloat16):
        assert loss_operators(64 * 1024, DEVICE_SIZES, dtype).total() < 10_000
