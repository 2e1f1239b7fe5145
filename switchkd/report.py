"""What a person sees while something runs and when it is done: progress bars and tables."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from switchkd.config import NOUNS, plain_values, to_dict
from switchkd.statistics import FEW_EXAMPLES
from switchkd.terminal import console
from switchkd.text import spoken

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from switchkd.config import TrainConfig
    from switchkd.harness_eval import Metric
    from switchkd.results import Evaluation
    from switchkd.rollouts import DecodeCost, Rollout
    from switchkd.statistics import Estimate
    from switchkd.tasks import Task

FEW = "†"  # marks a score over few examples


class Bar:
    """A progress bar with time left and a line of numbers that changes; plain lines where there is no terminal."""

    def __init__(self, progress: Progress, title: str, total: int | None):
        self._progress, self._task = progress, progress.add_task(title, total=total, numbers="")

    def advance(self, amount: int = 1, numbers: str | None = None) -> None:
        """Move on by ``amount``, and show ``numbers`` if given."""
        self._progress.update(self._task, advance=amount)
        if numbers is not None:
            self._progress.update(self._task, numbers=numbers)

    def line(self, text: str) -> None:
        """A line that stays, for logs that are not a terminal."""
        if not console.is_terminal:
            console.print(text, soft_wrap=True)


@contextmanager
def bar(title: str, total: int | None, quiet: bool = False) -> Iterator[Bar]:
    """Show a progress bar while the block runs, or nothing if ``quiet``."""
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[numbers]}"),
    )  # fmt: skip
    if not console.is_terminal and not quiet:
        console.print(f"{title} …")
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as progress:
        yield Bar(progress, title, total)


def step_line(metrics: dict[str, Any]) -> str:
    """One training step in a line: loss, tokens per second and, where text was generated, who spoke."""
    parts = [f"loss {number(metrics['loss'], 4)}", f"{number(metrics['tokens_per_second'], 2)} tok/s"]
    if "switch/teacher_share" in metrics:
        parts.append(f"teacher {percent(metrics['switch/teacher_share'])}")
        if metrics["switch/divergence_mean"] is not None:
            parts.append(f"divergence {number(metrics['switch/divergence_mean'], 2)}")
    else:
        parts.append(metrics["source"])
    return " · ".join(parts)


def scores_line(metrics: dict[str, Any], primary: str) -> str:
    """The main scores of a step after which the student was evaluated; "" for another."""
    names = [name for name in (primary, "forward_kl", "perplexity") if metrics.get(f"eval/{name}") is not None]
    return " · ".join(f"{name} {number(metrics[f'eval/{name}'])}" for name in names)


def print_results(results: Mapping[str, Evaluation], settings: Mapping[str, Any]) -> None:
    """Scores of some models side by side, by group where there are groups, and every setting that they depend on."""
    console.print(score_table(results))
    some = next(iter(results.values()))
    if some.by_group:
        columns = {name: result.by_group for name, result in results.items()}
        console.print(_score_columns(f"{some.primary} by group", columns, list(some.by_group)))
    for name, result in results.items():
        for band, found in result.length_correlation.items():
            console.print(
                f"{name}: Spearman correlation of ROUGE-L with the divergence on its own text, {band} tokens: "
                f"{number(found['spearman'])} (over {found['completions']} completions)", soft_wrap=True,
            )  # fmt: skip
    given = "; ".join(f"{name} {value}" for name, value in settings.items())
    console.print(f"settings: {given}", style="dim", soft_wrap=True)


def score_table(results: Mapping[str, Evaluation]) -> Table:
    """Every score, a row each, of some models, a column each: mean, deviation over seeds, 95 % interval."""
    some = next(iter(results.values()))
    names = [some.primary, *(name for name in some.scores if name != some.primary)]
    examples = some.scores[some.primary].values.shape[1]
    return _score_columns(
        f"{examples} held-out examples", {name: result.summary for name, result in results.items()}, names
    )


def _score_columns(title: str, columns: Mapping[str, Mapping[str, Estimate]], rows: Sequence[str]) -> Table:
    """Estimates as a table. Those over few examples carry a mark, which a caption explains."""
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("score", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right")
    shown = [found[row] for row in rows for found in columns.values()]
    for row in rows:
        table.add_row(row, *(estimate_text(found[row]) for found in columns.values()))
    if any(estimate.few for estimate in shown):
        table.caption = f"{FEW} over fewer than {FEW_EXAMPLES} examples"
    return table


def estimate_text(estimate: Estimate) -> str:
    """Mean ± deviation over seeds where there are several, and the 95 % interval."""
    deviation = "" if estimate.std is None else f" ± {number(estimate.std)}"
    interval = (
        "" if estimate.low is None or estimate.high is None else f" [{number(estimate.low)}, {number(estimate.high)}]"
    )
    return f"{number(estimate.mean)}{deviation}{FEW if estimate.few else ''}{interval}"


def method_table(recipes: dict[str, TrainConfig]) -> Table:
    """The recipes by name: who writes, what is trained, on which text, and where the method is from."""
    table = Table("recipe", "who writes", "what is trained", "on which text", "method and source", title_justify="left")
    for name, config in recipes.items():
        rules = to_dict(config)
        policy = settings_text(rules, "policy") if config.mix.generates else "–"
        table.add_row(name, policy, settings_text(rules, "objective"), settings_text(rules, "mix"), config.method)
    return table


def benchmark_table(metrics: Iterable[Metric]) -> Table:
    """A harness's numbers, a line each; a group of tasks has no examples of its own."""
    table = Table("task", "metric", title_justify="left")
    for name in ("shots", "value", "stderr", "n"):
        table.add_column(name, justify="right")
    for m in metrics:
        stderr = "-" if m.stderr is None else f"{m.stderr:.4f}"
        shots, samples = ("-" if count is None else str(count) for count in (m.shots, m.samples))
        table.add_row(m.task, m.name, shots, f"{m.value:.4f}", stderr, samples)
    return table


def task_table(tasks: Iterable[Task]) -> Table:
    """The tasks by name: what is scored, the main score, where the data comes from by default, and the source."""
    table = Table("task", "what is scored", "main score", "data by default", "source")
    for task in tasks:
        table.add_row(f"{task.name} ({task.version})", task.description, task.primary, task.hub or "–", task.source)
    return table


def settings_text(settings: Mapping[str, Any], noun: str) -> str:
    """The name of the policy, objective or mix in plain settings, with what is set otherwise than by default; of one that does
    not ship with the package, which is not imported, with all that is set."""
    known = NOUNS[noun][1].get(settings[noun]["name"])
    default = plain_values(dataclasses.asdict(known())) if known else {}
    own = {name: value for name, value in settings[noun].items() if name != "name"}
    given = ", ".join(f"{name}={value}" for name, value in own.items() if name not in default or value != default[name])
    return settings[noun]["name"] + (f" ({given})" if given else "")


def cost_line(cost: DecodeCost) -> str:
    """What decoding cost: tokens, who wrote them, forwards of each model per kept token, speed."""
    s = cost.summary()
    return (
        f"{cost.kept_tokens} tokens ({percent(1 - s['teacher_share'])} student, {percent(s['teacher_share'])} teacher), "
        f"{number(s['tokens_per_second'], 2)} tokens/s; forwards per kept token: "
        f"student {number(s['student_forwards_per_token'])}, teacher {number(s['teacher_forwards_per_token'])}"
    )


def print_rollout(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> None:
    """The completion, the teacher's words in colour (in brackets where there is no terminal), or why there is none."""
    text = Text()
    text.append(f"#{rollout.sample_id} ({rollout.stop_reason}) ", style="dim")
    if rollout.error:
        text.append(rollout.error, style="red")
    console.print(text + spoken(rollout, tokenizer, brackets=not console.is_terminal), soft_wrap=True)


def number(value: float, digits: int = 3) -> str:
    """So many significant digits, or all before the point, without an exponent for everyday sizes; "-" for NaN, "0" for 0 alone."""
    if math.isnan(value) or not value:
        return "-" if value else "0"
    rounded = float(f"{value:.{digits - 1}e}")  # first, as 9.996 has one digit more before the point than it seems
    place = math.floor(math.log10(abs(rounded))) if math.isfinite(value) else 0
    if not -7 < place < 15:
        return f"{rounded:.{digits - 1}e}"
    return f"{value:,.{max(digits - 1 - place, 0)}f}"


def percent(share: float) -> str:
    """A share from 0 to 1 in whole percent, or in as many digits as it takes not to be taken for none or all."""
    whole = f"{share:.0%}"
    if whole in ("0%", "100%") and share not in (0, 1):
        return f"{number(100 * share, 2)}%" if share < 0.5 else f"{100 - float(f'{100 - 100 * share:.1g}'):.9g}%"
    return whole
