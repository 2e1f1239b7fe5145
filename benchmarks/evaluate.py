"""Completions for an evaluation: the decoding engine against ``generate`` at the same batch, as ``switchkd evaluate`` runs both.

Rows end where the model ends them, so the two are compared by tokens per second. Instructions come from ``--data`` (a JSONL file
such as Dolly's test split) or, without one, from the GSM8K sample.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from matplotlib.figure import Figure

from benchmarks.harness import Row, describe, parse, print_table, publish, random_examples, random_pair, side_by_side
from switchkd.data.settings import DataConfig
from switchkd.data.texts import TokenizedExample
from switchkd.evaluation.evaluate import complete
from switchkd.evaluation.settings import EvalSettings
from switchkd.models.pair import Pair, load_pair
from switchkd.runs.opening import load_task

BACKENDS = ("generate", "engine")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure both backends, print the table, write evaluate.json and evaluate.png."""
    options = parse(argv, "evaluate", __doc__)
    if options.quick:
        pair = random_pair(options.device, quick=True)
        examples, batches, settings = random_examples(pair, 4), (2,), EvalSettings(6, 1.0, (10, 20))
    else:
        pair = load_pair("demo", device=options.device)
        data = DataConfig(template="chat", max_prompt_length=256, max_completion_length=64)
        examples, batches = (
            load_task(data, pair, options.data, 100, quiet=True),
            [b for b in (8, 32) if b <= options.max_batch],
        )
        settings = EvalSettings(64, 1.0, (10, 20, 30, 40, 50))
    rows = [row for batch in batches for row in measure(pair, examples, settings, batch, options.repeats)]
    print_table(f"{len(examples)} examples, seeds {settings.seeds}, {settings.max_new_tokens} new tokens at most", rows)
    publish("evaluate", options, {**settings.to_json(), "pair": describe(pair, examples)}, rows, plot(rows))
    return 0


def measure(
    pair: Pair, examples: Sequence[TokenizedExample], settings: EvalSettings, batch: int, repeats: int
) -> list[Row]:
    """Both backends at one batch size, in turns."""
    tokens: dict[str, float] = {}

    def run(backend: str, chosen: Sequence[TokenizedExample]) -> None:
        own = replace(settings, backend=backend, batch_size=batch)
        completions, _ = complete(pair, pair.student, chosen, own)
        tokens[backend] = float(sum(text.tokens for row in completions for text in row))

    contenders = {backend: partial(run, backend, examples) for backend in BACKENDS}
    warm_up = {backend: partial(run, backend, examples[:2]) for backend in BACKENDS}
    seconds = side_by_side(contenders, repeats, f"batch {batch}", warm_up)
    rows = [Row({"batch": batch}, backend, seconds[backend]) for backend in BACKENDS]
    for row in rows:
        row.numbers["tokens per second"] = tokens[row.contender] / row.median
    return rows


def plot(rows: list[Row]) -> Figure:
    """Tokens per second of each backend by batch."""
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    names = [f"{row.contender}, batch {row.cell['batch']}" for row in rows]
    axes.barh(names, [row.number("tokens per second") for row in rows])
    axes.set_xlabel("completion tokens per second")
    return figure


if __name__ == "__main__":
    sys.exit(main())
