"""What a study shows when it is done: what each method cost, curves of its steps, and the comparison."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from switchkd.checkpoint import write_file
from switchkd.compare import compare
from switchkd.compare_report import markdown, save_figure, show, write
from switchkd.report import console, number
from switchkd.rollouts import mean
from switchkd.study import Cell, Plan, Size, joined

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Metrics = list[dict[str, Any]]
# Steps that a curve of step metrics is averaged over; evaluations are drawn as they are.
SMOOTH = 9


def read_metrics(run: Path) -> Metrics:
    """The step metrics of a run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def cost(metrics: Metrics) -> dict[str, float]:
    """What a run took: optimizer steps, response tokens trained on, seconds without evaluation, and the shares of the tokens
    written by the teacher and of the responses it had a part in, over the steps that generated text."""
    return {
        "steps": len(metrics),
        "tokens": metrics[-1]["num_tokens"],
        "seconds": sum(m["seconds"] for m in metrics),
        "teacher share": mean(m["switch/teacher_share"] for m in metrics if "switch/teacher_share" in m),
        "switched responses": mean(m["switch/switched_share"] for m in metrics if "switch/switched_share" in m),
    }


def conclude(plan: Plan, size: Size, grid: Sequence[Cell], output_dir: Path) -> None:
    """Compare the runs of a study, those of each pair and budget with one another, and write ``study.md`` with its figures."""
    parts = [f"# {plan.title}"]
    for group in dict.fromkeys(cell.group for cell in grid):
        mine = [cell for cell in grid if cell.group == group]
        parts += [f"## {group}"] if group else []
        for task in ("", *size.evaluations):
            scores = plan.scores if not task else ()
            paths = [str(output_dir / cell.name) for cell in mine]
            found = compare(paths, task, scores, joined(group, plan.baseline) if plan.baseline else "")
            folder = output_dir / joined("compare", group, task)
            write(found, folder)
            parts += [markdown(found), f"![Scores of each method]({folder.name}/compare.png)"]
            show(found)
        runs = {m: [read_metrics(output_dir / cell.name) for cell in mine if cell.method == m] for m in plan.methods}
        parts += ["## What each method cost", cost_table(runs)]
        if plan.curves:
            name = joined("curves", group)
            save_figure(curves(runs, plan.curves, plan.title), output_dir / name)
            parts.append(f"![{', '.join(plan.curves)} of each method by step]({name}.png)")
    write_file(output_dir / "study.md", "\n\n".join(parts) + "\n")
    console.print(f"written: {output_dir / 'study.md'}", soft_wrap=True)


def cost_table(runs: Mapping[str, Sequence[Metrics]]) -> str:
    """Markdown of what a run of each method took in the mean, and its time relative to the first's."""
    costs = {method: [cost(metrics) for metrics in own] for method, own in runs.items()}
    means = {method: {name: mean(c[name] for c in own) for name in own[0]} for method, own in costs.items()}
    first = next(iter(means.values()))["seconds"]
    lines = ["| method | runs | steps | tokens trained | seconds | relative | teacher's tokens | switched responses |"]
    lines.append("|---|" + "---:|" * 7)
    for method, c in means.items():
        shares = ["–" if math.isnan(c[name]) else f"{c[name]:.0%}" for name in ("teacher share", "switched responses")]
        sizes = [f"{c['steps']:,.0f}", f"{c['tokens']:,.0f}", number(c["seconds"]), f"{c['seconds'] / first:.2f}"]
        lines.append(f"| {method} | {len(costs[method])} | {' | '.join([*sizes, *shares])} |")
    return "\n".join(lines)


def curves(runs: Mapping[str, Sequence[Metrics]], names: Sequence[str], title: str) -> Figure:
    """A panel for each metric by optimizer step: the mean of each method's runs, and the range that they span."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.6 * len(names)), layout="constrained")
    figure.suptitle(title)
    for place, (axes, name) in enumerate(
        zip(np.atleast_1d(figure.subplots(len(names), sharex=True)), names, strict=True)
    ):
        for colour, (method, own) in enumerate(runs.items()):  # the same in every panel
            steps, values = _series(own, name)
            if len(steps):
                [line] = axes.plot(
                    steps,
                    values.mean(0),
                    label=method,
                    color=f"C{colour}",
                    marker="o" if name.startswith("eval/") else "",
                    ms=3,
                )
                axes.fill_between(steps, values.min(0), values.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        if not place:
            axes.legend(fontsize="small", ncols=2)
    axes.set_xlabel("optimizer step")
    return figure


def _series(runs: Sequence[Metrics], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps that every run has the metric at, and its values there, ``[runs, steps]``."""
    found = [{m["step"]: m[name] for m in metrics if m.get(name) is not None} for metrics in runs]
    steps = sorted(set.intersection(*map(set, found))) if found else []
    values = np.array([[own[step] for step in steps] for own in found])
    if not name.startswith("eval/") and len(steps) > SMOOTH:
        values = np.stack([np.convolve(own, np.full(SMOOTH, 1 / SMOOTH), "valid") for own in values])
        steps = steps[SMOOTH // 2 : len(steps) - SMOOTH // 2]
    return np.array(steps), values
