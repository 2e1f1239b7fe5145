"""Every rule for who writes: the block engine against a plain loop of two models, and what the rule makes of the text.

Rules are those of the recipes, at a quarter of training where they change over it. Rows write their whole budget, sampled at
temperature 1; a contender is timed from token ids to token ids, reading the prompts included.
"""

import sys
from collections.abc import Sequence
from functools import partial

from matplotlib.figure import Figure

from benchmarks.harness import (
    DISTILLED_STEPS,
    Row,
    decode_cost,
    describe,
    forwards,
    parse,
    print_table,
    publish,
    side_by_side,
    workload,
)
from benchmarks.naive import naive_decode
from switchkd.base.errors import ConfigError
from switchkd.methods.policy import Policy
from switchkd.models.pair import Pair
from switchkd.training.settings import load_recipe

RECIPES = ("switch", "adaswitch", "switch_mix_in", "skd", "ssd", "hysteresis", "ca_opd", "trb", "relay")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every rule, print the table, write methods.json and methods.png."""
    options = parse(argv, "methods", __doc__)
    batch, new_tokens = (2, 6) if options.quick else (8, 64)
    pair, examples = workload(options, batch)
    prompts = [example.prompt_ids for example in examples]
    rows = [row for name in RECIPES for row in measure(name, pair, prompts, new_tokens, options.repeats)]
    print_table(f"{batch} rows, {new_tokens} new tokens each", rows)
    settings = {
        "rows": batch,
        "new_tokens": new_tokens,
        "distilled_steps": DISTILLED_STEPS,
        "pair": describe(pair, examples),
    }
    publish("methods", options, settings, rows, plot(rows))
    return 0


def measure(name: str, pair: Pair, prompts: list[list[int]], new_tokens: int, repeats: int) -> list[Row]:
    """The two contenders of a rule; none if its trigger words are no tokens of this pair."""
    try:
        policy: Policy = load_recipe(name).policy.bind(pair.tokenizer, new_tokens).at(0.25)
    except ConfigError:
        return []
    costs = []

    def engine(tokens: int) -> None:
        costs.append(decode_cost(pair, prompts, tokens, policy))

    plain = partial(naive_decode, pair.student, pair.teacher, prompts, policy, vocab_size=pair.vocab_size)
    contenders = {"plain loop": partial(plain, new_tokens), "block engine": partial(engine, new_tokens)}
    warm_up = {"plain loop": partial(plain, 4), "block engine": partial(engine, 4)}
    seconds = side_by_side(contenders, repeats, name, warm_up)
    rows = [Row({"rule": name}, contender, seconds[contender]) for contender in contenders]
    rows[1].numbers.update(forwards(costs[-1]))
    rows[1].numbers["teacher's tokens"] = costs[-1].summary()["teacher_share"]
    return rows


def plot(rows: list[Row]) -> Figure:
    """Seconds of the engine relative to the plain loop, and the teacher's share of the tokens."""
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    pairs = list(zip(rows[::2], rows[1::2], strict=True))[::-1]
    names = [str(engine.cell["rule"]) for _, engine in pairs]
    left.barh(names, [plain.median / engine.median for plain, engine in pairs], color="tab:blue")
    left.axvline(1, color="tab:gray")
    left.set_xlabel("times faster than the plain loop")
    right.barh(names, [engine.number("teacher's tokens") for _, engine in pairs], color="tab:purple")
    right.set(xlabel="teacher's share of the tokens", xlim=(0, 1))
    return figure


if __name__ == "__main__":
    sys.exit(main())
