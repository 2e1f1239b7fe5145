"""Exact counts, which hold on any machine: operators, Python calls and host waits of decoding, and operators of the loss.

Of a call of ``decode`` that is not the first: operators that reach PyTorch's dispatcher and Python functions entered (those of
switchkd's own files beside), each per kept token, reading the prompts and setting up the call included; and host waits a round
(`benchmarks.waits`), the round of the set-up left out. Rounds are planned by fixed costs, and end tokens do not end a row.
Functions entered differ a little between Python versions.

Of the loss: operators of forward and backward of one JSD over 64 x 1,024 tokens at a vocabulary of 152,064, in pieces of the sizes
for a GPU and of those for a CPU. Tensors are on the meta device, which has shapes and no numbers. Whole pieces are counted one by
one and multiplied; that the count is a straight line in them is checked. Not counted: models, optimizer.

Nothing is timed here: an operator is not a second. But where every operator is small its launch is what it costs.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import switchkd
from benchmarks.harness import Row, decode_cost, parse, print_table, publish
from benchmarks.small_pair import small_examples, small_pair
from benchmarks.waits import Waits, counting_waits
from switchkd.base.terminal import bar
from switchkd.forward.head import CPU_SIZES, DEVICE_SIZES, Head, Sizes
from switchkd.methods.objective import Tokens
from switchkd.methods.objectives import JSD
from switchkd.methods.policies import SKD, AdaSwitch, Switch
from switchkd.methods.policy import Policy, StudentOnly
from switchkd.models.pair import Pair
from switchkd.teachers.said import TeacherStates
from switchkd.training import loss as chunked

POLICIES: dict[str, Policy] = {"StudentOnly": StudentOnly(), "SWITCH": Switch(), "AdaSwitch": AdaSwitch(), "SKD": SKD()}
# Rounds are planned by these, the small pair's on a CPU to one digit: no clock has a say in the plans.
COSTS = (2e-3, 5e-6, 3e-3, 2e-5, 1e-3, 2e-6)
PACKAGE = str(Path(switchkd.__file__).parent)
# Runs once, tells its argument when a round ends (if it can), and returns the tokens that it made.
Run = Callable[[Callable[..., None]], int]

LOSS_TOKENS, LOSS_VOCABULARY = 64 * 1024, 152_064
LOSS_HIDDEN = {"student": 896, "teacher": 3584}
LOSS_SIZES = {"pieces for a GPU": DEVICE_SIZES, "pieces for a CPU": CPU_SIZES}


def main(argv: Sequence[str] | None = None) -> int:
    """Count every cell, print the tables, write counts.json and counts.png."""
    options = parse(argv, "counts", __doc__)
    name, pair = small_pair(options)
    batches, new_tokens = ((2,), 6) if options.quick else ((8, 64), 64)
    examples = small_examples(options, pair, max(batches))
    rows, places = [], {}
    with bar("count", len(batches) * len(POLICIES)) as progress:
        for batch in batches:
            prompts = [example.prompt_ids for example in examples[:batch]]
            for policy in POLICIES:
                numbers, waits = count_decoding(pair, prompts, new_tokens, POLICIES[policy])
                rows.append(Row({"rows": batch}, policy, [], numbers))
                places[f"{policy}, {batch} rows"] = dict(waits.places.most_common())
                progress.advance(1, policy)
    print_table(f"decode, {new_tokens} new tokens a row, pair: {name}", rows)
    losses, operators = measure_loss()
    print_table(f"loss, JSD of {LOSS_TOKENS:,} tokens at a vocabulary of {LOSS_VOCABULARY:,}", losses)
    settings = {"pair": name, "new_tokens": new_tokens, "waits": places, "loss operators": operators}
    publish("counts", options, settings, [*rows, *losses], plot(rows))
    return 0


def count_decoding(
    pair: Pair, prompts: list[list[int]], new_tokens: int, policy: Policy
) -> tuple[dict[str, float], Waits]:
    """The counts of a call of ``decode`` whose plans look at no clock."""

    def run(round_ended: Callable[..., None]) -> int:
        cost = decode_cost(pair, prompts, new_tokens, policy, costs=COSTS, progress=round_ended)
        return cost.kept_tokens

    return count(lambda: run)


def count(prepare: Callable[[], Run]) -> tuple[dict[str, float], Waits]:
    """The counts of a run, as columns of a table, and its waits. Each is counted in a run of its own; ``prepare`` makes equal ones.

    "own" are the calls of switchkd's own functions; "in transformers" is the part of the waits a round that is made there.
    """
    prepare()(_nothing)  # proofs of the models, imports
    run = prepare()
    with Operators() as operators:
        tokens = run(_nothing)
    run = prepare()
    with counting_calls() as calls:
        run(_nothing)
    run = prepare()
    with counting_waits() as waits:
        run(waits.round)
    numbers = {
        "ops/token": operators.counts.total() / tokens,
        "calls/token": calls["all"] / tokens,
        "own calls/token": calls["switchkd"] / tokens,
    }
    if waits.rounds:
        numbers |= {
            "rounds": len(waits.rounds),
            "ops/round": operators.counts.total() / len(waits.rounds),
            "waits/round": waits.per_round(),
            "at most": waits.most(),
            "in transformers": waits.per_round("transformers"),
        }
    return numbers, waits


def _nothing(*_: object) -> None:
    """Who does not want to know when a round ends."""


class Operators(TorchDispatchMode):
    """Counts the operators that reach PyTorch's dispatcher within the context, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counting_calls() -> Iterator[Counter[str]]:
    """Count the Python functions entered by this thread: ``all`` of them, and those in files of ``switchkd``."""
    calls: Counter[str] = Counter()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            calls["all"] += 1
            if frame.f_code.co_filename.startswith(PACKAGE):
                calls["switchkd"] += 1

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield calls
    finally:
        sys.setprofile(before)


# --- the loss -----------------------------------------------------------------------------------------------------


def measure_loss() -> tuple[list[Row], dict[str, dict[str, int]]]:
    """A row for each size of pieces and width of the output layers' weights, and the operators by name."""
    rows, operators = [], {}
    for dtype in (torch.float32, torch.bfloat16):
        for name, sizes in LOSS_SIZES.items():
            counts = loss_operators(LOSS_TOKENS, sizes, dtype)
            weights = str(dtype).removeprefix("torch.")
            rows.append(Row({"weights": weights}, name, [], {"ops": counts.total()}))
            operators[f"{name}, {weights}"] = dict(counts.most_common())
    return rows, operators


def loss_operators(tokens: int, sizes: Sizes, dtype: torch.dtype) -> Counter[str]:
    """Operators of a loss and its gradient, where one and two chunks, and what is left behind them, are counted."""
    chunk = max(1, sizes.chunk // (4 * LOSS_VOCABULARY))
    chunks, rest = divmod(tokens, chunk)
    if chunks <= 3:
        return counted_loss(tokens, sizes, dtype)
    one, two, three = (counted_loss(rest + n * chunk, sizes, dtype) for n in (1, 2, 3))
    assert all(three[name] - two[name] == two[name] - one[name] for name in three), "not a straight line in the chunks"
    return Counter({name: one[name] + (chunks - 1) * (two[name] - one[name]) for name in two})


def counted_loss(
    tokens: int, sizes: Sizes, dtype: torch.dtype, *, vocabulary: int = LOSS_VOCABULARY, device: str = "meta"
) -> Counter[str]:
    """Operators of a loss and its gradient, counted one by one, on tensors without numbers if nothing else is said."""
    heads, hidden = {}, {}
    for who, width in LOSS_HIDDEN.items():
        heads[who] = Head(nn.Linear(width, vocabulary, bias=False, device=device, dtype=dtype), vocabulary)
        hidden[who] = torch.empty(tokens, width, device=device, dtype=dtype)
    heads["teacher"].linear.requires_grad_(False)
    none = torch.zeros(tokens, dtype=torch.int64, device=device)  # the JSD looks at no token
    teacher = TeacherStates(heads["teacher"], hidden["teacher"])
    with patch.object(chunked, "sizes_on", lambda _: sizes), Operators() as operators:
        student = hidden["student"].requires_grad_()
        chunked.total(JSD(), teacher, heads["student"], student, Tokens(none, none, none)).backward()
    return operators.counts


def plot(rows: list[Row]) -> Figure:
    """Operators and calls a token and waits a round, by policy and number of rows."""
    columns = ("ops/token", "calls/token", "waits/round")
    figure = Figure(figsize=(4 * len(columns), 3.4), layout="constrained")
    names = [f"{row.contender}, {row.cell['rows']} rows" for row in rows][::-1]
    for axis, column in zip(figure.subplots(1, len(columns), sharey=True), columns, strict=True):
        axis.barh(names, [row.number(column) for row in rows][::-1])
        axis.set(xlabel=column)
    return figure


if __name__ == "__main__":
    sys.exit(main())
