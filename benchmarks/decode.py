"""Tokens per second of decoding: the block engine against a plain loop of two models and Hugging Face ``generate``.

Every row writes its whole budget (end tokens do not end it), sampled at temperature 1 from the full distribution. Models are
loaded before; a contender is timed from token ids to token ids, reading the prompts included.
"""

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.harness import (
    DISTILLED_STEPS,
    Contender,
    Options,
    Row,
    Workload,
    decode_cost,
    describe,
    distilled_pair,
    forwards,
    parse,
    print_table,
    publish,
    question_examples,
    random_examples,
    random_pair,
    side_by_side,
)
from benchmarks.naive import left_padded, naive_decode
from switchkd.decoding.rollouts import DecodeCost
from switchkd.methods.policies import SKD, AdaSwitch, Switch
from switchkd.methods.policy import Policy, StudentOnly, TeacherOnly
from switchkd.models.pair import Pair
from switchkd.runner.fast_layers import FastLayers

POLICIES: dict[str, Policy] = {"SWITCH": Switch(), "AdaSwitch": AdaSwitch(), "SKD": SKD()}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every cell, print the table, write decode.json and decode.png."""
    options = parse(argv, "decode", __doc__)
    new_tokens = 6 if options.quick else 128
    rows: list[Row] = []
    pairs: dict[str, Any] = {}
    for name, (pair, examples), batches in _workloads(options):
        pairs[name] = describe(pair, examples)
        for batch in [batch for batch in batches if batch <= options.max_batch]:
            prompts = [example.prompt_ids for example in examples[:batch]]
            rows += measure({"pair": name, "batch": batch}, pair, prompts, new_tokens, options.repeats)
    print_table(f"{new_tokens} new tokens a row", rows)
    settings = {"new_tokens": new_tokens, "distilled_steps": DISTILLED_STEPS, "pairs": pairs}
    publish("decode", options, settings, rows, plot(rows))
    return 0


def _workloads(options: Options) -> Iterator[tuple[str, Workload, tuple[int, ...]]]:
    """Name, pair with prompts, and the batches it is measured at; one pair in memory at a time."""
    if not options.quick:
        pair = distilled_pair(DISTILLED_STEPS, options.device)
        yield "demo", (pair, question_examples(pair, 32)), (1, 8, 32)
    pair = random_pair(options.device, options.quick)
    yield "random", (pair, random_examples(pair, 8)), (1, 2) if options.quick else (1,)


def measure(cell: dict[str, Any], pair: Pair, prompts: list[list[int]], new_tokens: int, repeats: int) -> list[Row]:
    """Rows of one pair and batch: all policies and contenders in one alternation."""
    grid = contenders(pair, prompts, new_tokens)
    names = {f"{policy}: {name}": (policy, name) for policy, group in grid.items() for name in group}
    results: dict[str, object] = {}

    def run(key: str) -> None:
        policy, name = names[key]
        results[key] = grid[policy][name]()

    title = " ".join(f"{key} {value}" for key, value in cell.items())
    short = contenders(pair, prompts, 8)
    warm_up = {key: short[policy][name] for key, (policy, name) in names.items()}
    seconds = side_by_side({key: partial(run, key) for key in names}, repeats, title, warm_up)
    rows = []
    for key, (policy, name) in names.items():
        row = Row({**cell, "policy": policy}, name, seconds[key])
        row.numbers["tokens/s"] = len(prompts) * new_tokens / row.median
        if isinstance(cost := results[key], DecodeCost):
            row.numbers.update(forwards(cost))
        rows.append(row)
    return rows


def contenders(pair: Pair, prompts: list[list[int]], new_tokens: int) -> dict[str, dict[str, Contender]]:
    """Contenders by policy, the baseline of each first; a new contender is a line here."""
    plain = partial(naive_decode, pair.student, pair.teacher, prompts)
    generate = partial(hf_generate, prompts=prompts, new_tokens=new_tokens)
    block = partial(decode_cost, pair, prompts, new_tokens)
    grid: dict[str, dict[str, Contender]] = {
        name: {
            "plain loop": partial(plain, policy, new_tokens, pair.vocab_size),
            "plain loop, packed weights": packed_loop(pair, partial(plain, policy, new_tokens, pair.vocab_size)),
            "block engine": partial(block, policy),
        }
        for name, policy in POLICIES.items()
        if len(prompts) <= 8 or name == "SWITCH"  # the widest batch takes minutes a run
    }
    grid["student only"] = {
        "generate": partial(generate, pair.student),
        "block engine": partial(block, StudentOnly()),
    }
    grid["teacher only"] = {
        "generate": partial(generate, pair.teacher),
        "block engine": partial(block, TeacherOnly()),
    }
    if len(prompts) == 1:  # assisted generation takes one row
        grid["teacher only"] |= {
            "assisted generate": partial(generate, pair.teacher, assistant_model=pair.student),
            "block engine, student drafts": partial(block, TeacherOnly(), drafter="student"),
        }
    return grid


def packed_loop(pair: Pair, loop: Contender) -> Contender:
    """The plain loop with the engine's CPU layers: what is left is the gain of drafting and verifying."""

    student, teacher = FastLayers(pair.student), FastLayers(pair.teacher)

    def run() -> object:
        with student(), teacher():
            return loop()

    return run


def hf_generate(model: PreTrainedModel, prompts: list[list[int]], new_tokens: int, **settings: Any) -> Tensor:
    """Sampling by transformers with no cut of the distribution; the global random state is put back."""
    ids, mask = left_padded(prompts, model.device)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model.generate(
            ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            min_new_tokens=new_tokens, max_new_tokens=new_tokens, pad_token_id=0, **settings,
        )  # fmt: skip


def plot(rows: list[Row]) -> Figure:
    """Tokens per second of every contender, one panel for each pair and batch."""
    cells = list(dict.fromkeys((row.cell["pair"], row.cell["batch"]) for row in rows))
    figure = Figure(figsize=(4.2 * len(cells), 5), layout="constrained")
    for axis, (pair, batch) in zip(figure.subplots(1, len(cells), squeeze=False)[0], cells, strict=True):
        shown = [row for row in rows if (row.cell["pair"], row.cell["batch"]) == (pair, batch)][::-1]
        colors = ["tab:blue" if row.contender.startswith("block") else "tab:gray" for row in shown]
        labels = [f"{row.cell['policy']}: {row.contender}" for row in shown]
        axis.barh(labels, [row.number("tokens/s") for row in shown], color=colors)
        axis.tick_params(axis="y", labelsize=7)
        axis.set(title=f"{pair}, batch {batch}", xlabel="tokens/s")
    return figure


if __name__ == "__main__":
    sys.exit(main())
