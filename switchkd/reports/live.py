"""What a person sees while models work: a training run that moves on, and one rollout being written."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from rich.cells import cell_len, chop_cells
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from switchkd.base.terminal import SAY_EVERY, console, duration, harmless, number, percent, visible
from switchkd.decoding.rollouts import DecodeCost, Rollout, Rollouts, mean
from switchkd.decoding.settings import DecodeSettings
from switchkd.reports.tables import scores_line, step_line
from switchkd.reports.viewer import SPEAKERS, Sides, bars, drawn, spoken
from switchkd.writing.examples import decode_examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from switchkd.data.texts import TokenizedExample
    from switchkd.decoding.rollouts import Metrics
    from switchkd.models.pair import Pair
    from switchkd.training.reading import OnRound
from switchkd.training.trainer import OnStep, Trainer

UNKNOWN = "–"
HISTORY = 40  # steps that a sparkline shows
SAMPLE_LINES = 4  # of the newest text
NEWLINE = "↵"

# What a run does now, in words.
PHASES = {
    "writing": "writing text",
    "reading": "reading the data",
    "updating": "updating the student",
    "validating": "measuring the validation loss",
    "evaluating": "evaluating on the held-out questions",
    "sampling": "answering the watched prompts",
    "saving": "saving a checkpoint",
}
IN_A_STEP = ("writing", "reading", "updating")  # said in lines only where they take long

# What a run shows of its steps: name, metric, how a value is written, and the ends of the sparkline, by default the least
# and the most.
CURVES: tuple[tuple[str, str, Callable[[float], str], float | None, float | None], ...] = (
    ("loss", "loss", partial(number, digits=4), None, None),
    ("by teacher", "switch/teacher_share", percent, 0.0, 1.0),
    ("divergence", "switch/divergence_mean", partial(number, digits=2), 0.0, None),
    ("tokens/s", "tokens_per_second", partial(number, digits=2), 0.0, None),
)


KEY = Text.assemble(
    "by teacher: share of the tokens that the teacher wrote (",
    ("in this colour", SPEAKERS[1]),
    "); divergence: how far the two models disagree about the next token",
    style="dim",
)


def train(trainer: Trainer, primary: str, run: Callable[[OnStep, OnRound | None], None]) -> None:
    """A training run, shown: a view that moves on a terminal, a line a step elsewhere, and in the end what decoding cost.

    ``run`` trains, as ``trainer.train`` does, and tells of each step and round; ``primary`` names the score that is shown first.
    """
    cost = DecodeCost()

    def told(show: OnStep, on_round: OnRound | None = None) -> None:
        def on_step(metrics: Metrics, rollouts: Rollouts) -> None:
            nonlocal cost
            cost += rollouts.cost
            show(metrics, rollouts)

        run(on_step, on_round)

    if console.is_terminal:
        with Live(console=console) as live:
            view = TrainView(trainer, primary, live.update)
            trainer.on_phase = harmless("the view", view.on_phase)
            told(harmless("the view", view.on_step), harmless("the view", view.on_round))
            harmless("the view", view.end)()
    else:
        lines = TrainLines(trainer, primary)
        trainer.on_phase = harmless("the lines of a run", lines.on_phase)
        told(harmless("the lines of a run", lines.on_step), harmless("the lines of a run", lines.on_round))
    if cost.kept_tokens:
        console.print(f"generated {cost_line(cost)}", soft_wrap=True)


class TrainLines:
    """How a run goes, in lines, for where there is no terminal: one a step, one where something else begins, and in steps that
    take long one every SAY_EVERY seconds."""

    def __init__(self, trainer: Trainer, primary: str, clock: Callable[[], float] = time.monotonic):
        self.trainer, self.primary, self.clock = trainer, primary, clock
        self._say("train …")

    def _say(self, line: str) -> None:
        self.said = self.clock()
        console.print(line, soft_wrap=True)

    def on_phase(self, phase: str) -> None:
        """Something begins. What belongs to a step is said where nothing was for long."""
        in_a_step = phase in IN_A_STEP
        if not in_a_step or self.clock() - self.said >= SAY_EVERY:
            step = self.trainer.step + in_a_step
            self._say(f"step {_of(step, self.trainer)}: {PHASES[phase]} …")

    def on_round(self, cost: DecodeCost) -> None:
        """The step's text has grown."""
        if self.clock() - self.said >= SAY_EVERY:
            self._say(f"step {_of(self.trainer.step + 1, self.trainer)}: {_written_so_far(cost)}")

    def on_step(self, metrics: Metrics, rollouts: Rollouts) -> None:
        """A step is done."""
        took = duration(metrics["seconds"])
        self._say(f"step {_of(metrics['step'], self.trainer)}: {step_line(metrics)} ({took})")
        if scores := scores_line(metrics, self.primary):
            self._say(f"step {metrics['step']}: {scores}")


def _written_so_far(cost: DecodeCost) -> str:
    return f"{PHASES['writing']}: {cost.kept_tokens} tokens, {number(cost.kept_tokens / cost.seconds, 2)} tokens/s"


def _of(step: int, trainer: Trainer) -> str:
    """A step's number, and that of the last one if a number of steps ends the run."""
    return f"{step}" if math.isinf(trainer.total_steps) else f"{step}/{int(trainer.total_steps)}"


class TrainView:
    """How a run goes. ``show`` gets a new picture after every step and round; the picture is safe to draw in another thread."""

    def __init__(
        self,
        trainer: Trainer,
        primary: str,
        show: Callable[[RenderableType], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self.trainer, self.primary, self.show = trainer, primary, show
        self.steps: deque[Metrics] = deque(maxlen=HISTORY)
        self.scores, self.sample = UNKNOWN, Text(UNKNOWN)
        columns = (
            TextColumn("train"), BarColumn(bar_width=24), TaskProgressColumn(), TextColumn("step {task.fields[step]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        # A run may end by steps, tokens or time: its share that is done tells the time left in any case.
        self.bar = Progress(*columns, get_time=clock, speed_estimate_period=3600)
        self.task = self.bar.add_task("", total=1.0)
        now = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
        self.now = Progress(*now, get_time=clock)
        self.doing = self.now.add_task("starting", total=None)
        self._draw()

    def on_phase(self, phase: str) -> None:
        """Something begins."""
        self.now.reset(self.doing, description=PHASES[phase])
        self._draw()

    def end(self) -> None:
        """All is done."""
        self.now.update(self.doing, description="done", total=1.0, completed=1.0)
        self._draw()

    def on_step(self, metrics: Metrics, rollouts: Rollouts) -> None:
        """A step is done."""
        self.steps.append(metrics)
        if scores := scores_line(metrics, self.primary):
            self.scores = f"step {metrics['step']}: {scores}"
        if rollouts:
            newest = rollouts[-1]
            head = f"#{newest.id} ({newest.stop_reason}) ", "dim"
            self.sample = Text.assemble(head, spoken(newest, self.trainer.pair.tokenizer))
        self._draw()

    def on_round(self, cost: DecodeCost) -> None:
        """The step's text has grown."""
        self.now.update(self.doing, description=_written_so_far(cost))
        self._draw()

    def _draw(self) -> None:
        self.bar.update(self.task, completed=self.trainer.progress, step=_of(self.trainer.step, self.trainer))
        rows = Table.grid(padding=(0, 2))
        rows.add_column(style="dim")
        for name, metric, form, low, high in CURVES:
            values = [math.nan if step.get(metric) is None else step[metric] for step in self.steps]
            rows.add_row(name, _curve(values, form, low, high))
        rows.add_row("a step takes", self._seconds())
        rows.add_row("scores", self.scores)
        rows.add_row("newest text", _Head(self.sample, SAMPLE_LINES))
        rows.add_row("now", self.now)
        self.show(Group(self.bar, rows, KEY))

    def _seconds(self) -> str:
        """Of a step, on average, and of its parts."""
        if not self.steps:
            return UNKNOWN
        whole, *parts = (
            mean(step[name] for step in self.steps)
            for name in ("seconds", "seconds/generate", "seconds/teacher", "seconds/update")
        )
        shares = zip(("writing", "teacher reads", "updating"), parts, strict=True)
        return f"{duration(whole)}: " + " · ".join(f"{name} {duration(part)}" for name, part in shares)


def _curve(values: Sequence[float], form: Callable[[float], str], low: float | None, high: float | None) -> str:
    """The newest number that is known, and all of them as a sparkline."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return UNKNOWN
    ends = min(known) if low is None else low, max(known) if high is None else high
    return f"{form(known[-1]):>7}  {bars(values, *ends)}"


@dataclass(frozen=True)
class _Head:
    """The first ``lines`` lines of a text."""

    text: Text
    lines: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wrapped = self.text.wrap(console, options.max_width)
        yield from wrapped[: self.lines]
        if len(wrapped) > self.lines:
            yield Text("…", style="dim")


PLAY_KEY = (
    "; under each {} a bar: the divergence, how far the two models disagree about it, and below that the threshold of the rule"
)  # fmt: skip


def play(pair: Pair, example: TokenizedExample, settings: DecodeSettings, sample_id: int) -> Rollout:
    """Show one rollout being written and return it; where there is no terminal, print it and its bars when it is done.

    ``settings`` are those of ``decode_examples``, and so are the tokens.
    """
    tokenizer, sides = pair.tokenizer, _sides(pair, example)
    decoded = _watched if console.is_terminal else decode_examples
    rollouts = decoded(pair, [example], settings, [sample_id])
    [rollout] = rollouts
    if console.is_terminal and not rollout.error:
        console.print(*written(rollout, tokenizer, console.width, sides), f"({rollout.stop_reason})", sep="\n")
    else:
        print_rollout(rollout, tokenizer)
        for line in mark_lines(rollout, [unit.places.start for unit in drawn(rollout, tokenizer, sides)]):
            console.print(line, soft_wrap=True)
    console.print(cost_line(rollouts.cost), soft_wrap=True)
    return rollout


def _watched(
    pair: Pair, examples: Sequence[TokenizedExample], settings: DecodeSettings, sample_ids: Sequence[int]
) -> Rollouts:
    """``decode_examples`` of one example, drawn after every round until it is done."""
    tokenizer, sides = pair.tokenizer, _sides(pair, examples[0])
    console.print(visible(tokenizer.decode(examples[0].prompt_ids)), style="dim", soft_wrap=True)
    key = PLAY_KEY.format("word" if sides else "token")
    console.print(Text.assemble(("the teacher's words", SPEAKERS[1]), key, style="dim"))
    with Live(console=console, auto_refresh=False, transient=True) as live:

        def watch(rows: Rollouts) -> None:
            lines = [*written(rows[0], tokenizer, console.width, sides), state_line(rows, settings.max_new_tokens)]
            live.update(Group(*lines[-console.height + 1 :]), refresh=True)

        return decode_examples(pair, examples, settings, sample_ids, watch=watch)


def _sides(pair: Pair, example: TokenizedExample) -> Sides | None:
    """How both models spell text, where they do not spell it alike."""
    bridge = pair.bridges.get(example.teacher)
    return bridge.sides if bridge else None


def state_line(rows: Rollouts, budget: int) -> Text:
    """The newest divergence and its threshold, who has spoken so far, and how fast."""
    row, cost = rows[0], rows.cost
    if not row.completion_ids:
        return Text(UNKNOWN)
    return Text.assemble(
        "divergence ",
        (_compared(row), SPEAKERS[row.speakers[-1]]),
        f" · teacher {percent(row.teacher_share)} · {len(row.completion_ids)} of {budget} tokens"
        f" · {number(cost.kept_tokens / cost.seconds, 2)} tokens/s",
        no_wrap=True,
        overflow="ellipsis",
    )


def _compared(row: Rollout) -> str:
    """What the policy saw at the newest token, of words at the beginning of the newest, and what it compared that with."""
    newest = -1
    if row.teacher_completion_ids is not None:
        newest = max((t for t, value in enumerate(row.divergences) if not math.isnan(value)), default=-1)
    divergence, threshold = row.divergences[newest], row.thresholds[newest]
    if math.isnan(divergence):
        return UNKNOWN
    if math.isnan(threshold):
        return number(divergence, 2)
    return f"{number(divergence, 2)} {'>' if divergence > threshold else '≤'} {number(threshold, 2)}"


def _marks(rollout: Rollout, firsts: Sequence[int]) -> tuple[dict[str, str], float]:
    """Divergences and thresholds at these tokens, where there are any, as bars; and what the highest bar stands for."""
    both = {"divergence": rollout.divergences, "threshold": rollout.thresholds}
    seen = {name: [values[t] for t in firsts] for name, values in both.items()}
    known = [value for values in seen.values() for value in values if math.isfinite(value)]
    top = max([1.0, *known])  # most divergences never pass 1: the bars of a text that grows then keep their heights
    return {name: bars(values, 0.0, top) for name, values in seen.items() if not all(map(math.isnan, values))}, top


def mark_lines(rollout: Rollout, firsts: Sequence[int] | None = None) -> list[str]:
    """The bars as plain lines, one character a token, or a word where ``firsts`` are the first tokens of the words."""
    marks, top = _marks(rollout, range(len(rollout.completion_ids)) if firsts is None else firsts)
    return [f"{name:<10} {line}  █ is {number(top)}" for name, line in marks.items()]


def written(rollout: Rollout, tokenizer: PreTrainedTokenizerBase, width: int, sides: Sides | None = None) -> list[Text]:
    """The completion in lines of at most ``width`` cells; under each the divergences of its tokens, and then their thresholds.

    With ``sides``, the words of two tokenizers take the place of tokens.
    """
    units = drawn(rollout, tokenizer, sides)
    marks, _ = _marks(rollout, [unit.places.start for unit in units])
    page = _Page(width, list(marks))
    for place, unit in enumerate(units):
        style, own = SPEAKERS[rollout.speakers[unit.places.start]], [line[place] for line in marks.values()]
        for words in visible(unit.text).expandtabs(4).replace("\n", f"{NEWLINE}\n").split("\n"):
            page.put(words, style, own)
    return page.lines


class _Page:
    """Lines of text as wide as ``width`` cells, each with lines of marks under it."""

    def __init__(self, width: int, marks: Sequence[str]):
        self.width, self.marks = width, marks
        self.lines: list[Text] = []
        self._end_line()

    def _end_line(self) -> None:
        self.lines += [Text(), *(Text(style="dim" if mark == "threshold" else "") for mark in self.marks)]

    def put(self, words: str, style: str, marks: Sequence[str]) -> None:
        """Add words, and a character under each of their cells in every line of marks."""
        rows = 1 + len(self.marks)
        for part in chop_cells(words, self.width):
            text = self.lines[-rows]
            # Newlines that follow each other stay on one line, which saves three.
            ended = text.plain.endswith(NEWLINE) and not part.startswith(NEWLINE)
            if ended or text.cell_len + cell_len(part) > self.width:
                self._end_line()
            text, *below = self.lines[-rows:]
            text.append(part, style)
            for line, mark in zip(below, marks, strict=True):
                line.append(mark * cell_len(part), line.style or style)


# --- when it is done ----------------------------------------------------------------------------------------------


def cost_line(cost: DecodeCost) -> str:
    """What decoding cost: tokens, who wrote them, passes through each model per token that was kept, speed."""
    s = cost.summary()
    return (
        f"{cost.kept_tokens} tokens ({percent(1 - s['teacher_share'])} student, {percent(s['teacher_share'])} teacher), "
        f"{number(s['tokens_per_second'], 2)} tokens/s; passes through the models per token: "
        f"student {number(s['student_forwards_per_token'])}, teacher {number(s['teacher_forwards_per_token'])}"
    )


def print_rollout(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> None:
    """The completion, the teacher's words in colour (in brackets where there is no terminal), or why there is none."""
    text = Text()
    text.append(f"#{rollout.id} ({rollout.stop_reason}) ", style="dim")
    if rollout.error:
        text.append(rollout.error, style="red")
    console.print(text + spoken(rollout, tokenizer, brackets=not console.is_terminal), soft_wrap=True)
