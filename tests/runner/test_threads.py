"""The number of threads follows what other processes leave; no test here looks at a clock."""

import pytest
import torch
from tiny import tiny_model
from torch import nn

from switchkd import Switch, decode
from switchkd.runner import threads
from switchkd.runner.fast_layers import FastLayers
from switchkd.runner.threads import FittingThreads

COSTS = (1e-3, 1e-5) * 3


@pytest.fixture(autouse=True)
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


class Machine:
    """Processors whose work a test tells."""

    def __init__(self, monkeypatch, processors):
        self.clock = self.all = self.own = 0.0
        monkeypatch.setattr(threads.time, "monotonic", lambda: self.clock)
        monkeypatch.setattr(threads, "_work", lambda: (self.all, self.own))
        monkeypatch.setattr(threads, "_allowed", lambda: set(range(processors)))

    def passes(self, seconds, others, own=1.0):
        self.clock += seconds
        self.all += seconds * (others + own)
        self.own += seconds * own


def test_the_number_follows_what_others_leave(monkeypatch):
    machine = Machine(monkeypatch, 4)
    fitting = FittingThreads()
    with fitting() as fit:
        assert fit() == 4
        for others, number in ((1.0, 3), (0.2, 4), (0.5, 3), (2.9, 1), (4.0, 1), (9.0, 1), (0.0, 4)):
            machine.passes(1, others)
            assert fit() == torch.get_num_threads() == number
    machine.passes(1, 1.0)
    with fitting():
        assert torch.get_num_threads() == 3  # by the time since the last context
    assert torch.get_num_threads() == 4


def test_own_work_takes_nothing_away_whatever_it_is(monkeypatch):
    machine = Machine(monkeypatch, 4)
    with FittingThreads()() as fit:
        for own in (0.0, 1.0, 4.0):
            machine.passes(1, 0.0, own)
            assert fit() == 4


def test_a_moment_is_too_short_to_choose_by_and_moments_add_up(monkeypatch):
    machine = Machine(monkeypatch, 4)
    with FittingThreads()() as fit:
        machine.passes(0.2, 2.0)
        assert fit() == 4
        machine.passes(0.2, 2.0)
        assert fit() == 2


def test_it_takes_no_more_than_the_caller_and_puts_that_back_after_an_error(monkeypatch):
    machine = Machine(monkeypatch, 64)
    fitting = FittingThreads()
    with pytest.raises(KeyboardInterrupt), fitting() as fit:
        machine.passes(1, 0.0)
        assert fit() == 4
        machine.passes(1, 62.0)
        assert fit() == 2
        raise KeyboardInterrupt
    assert torch.get_num_threads() == 4


def test_one_thread_is_left_alone(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(threads, "_work", lambda: pytest.fail("looked"))
    with FittingThreads()() as fit:
        assert fit() == 1


@pytest.mark.parametrize(
    ("family", "dtype", "costs", "looks"),
    [
        ("llama", torch.float64, (), True),
        ("llama", torch.float64, COSTS, False),
        ("llama", torch.float32, COSTS, True),  # of whose products no bit depends on the number
        ("gpt2", torch.float32, COSTS, False),  # whose layers are not packed
    ],
)
def test_decoding_looks_between_rounds_unless_its_text_might_depend_on_it(family, dtype, costs, looks, monkeypatch):
    looked = []
    monkeypatch.setattr(FittingThreads, "_look", lambda self: looked.append(1))
    pair = [tiny_model(family, seed, dtype) for seed in (1, 2)]
    cost = decode(*pair, [[3, 4]], Switch(), max_new_tokens=6, eos_token_ids=[], costs=costs).cost
    assert len(looked) == (1 + cost.rounds if looks else 0)  # at first, and before every round


@torch.no_grad()
def test_no_bit_of_packed_products_depends_on_the_number():
    """Of torch's own products of the last four shapes some bits do, on the processor that this was written on."""
    generator = torch.Generator().manual_seed(0)
    for size, out, rows in (
        (576, 1536, 8),
        (1536, 576, 1),
        (576, 192, 40),
        (640, 5000, 300),
        (576, 192, 8),
        (640, 5000, 1),
        (2048, 64, 16),
        (1024, 1024, 64),
    ):
        layer, x = nn.Linear(size, out), torch.randn(rows, size, generator=generator)
        said = []
        for number in (1, 2, 4):
            torch.set_num_threads(number)
            with FastLayers(layer)():
                said.append(layer(x))
        assert torch.equal(said[0], said[1]) and torch.equal(said[0], said[2])


def test_where_nobody_tells_the_number_stays(monkeypatch):
    machine = Machine(monkeypatch, 1)
    monkeypatch.setattr(threads, "_work", lambda: None)
    with FittingThreads()() as fit:
        machine.passes(1, 1.0)
        assert fit() == 4


def test_the_work_of_the_processors_that_are_ours(tmp_path, monkeypatch):
    file = tmp_path / "stat"
    lines = [
        "cpu  9 9 9 9 9 9 9 9 9 9",
        "cpu0 100 20 30 5000 7000 4 5 6 80 90",
        "cpu1 1000 0 0 1 1 0 0 0 0 0",
        "intr 1 2 3",
    ]
    file.write_text("\n".join(lines))
    monkeypatch.setattr(threads, "_allowed", lambda: {0})
    monkeypatch.setattr(threads.os, "sysconf", lambda name: 100)
    assert threads._work(file)[0] == 1.65
    assert threads._work(tmp_path / "none") is None
