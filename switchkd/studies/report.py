"""What a study shows when it is done: what each method cost, curves of its steps, and the comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from switchkd.base.settings import to_dict
from switchkd.base.storage import write_file
from switchkd.base.terminal import console, number, percent
from switchkd.decoding.rollouts import mean
from switchkd.reports.compare import compare
from switchkd.reports.curves import cost, metric_panels
from switchkd.reports.panels import Metrics, draw
from switchkd.reports.record import read_steps
from switchkd.reports.steps import Steps
from switchkd.reports.tables import markdown, save_figure, show, write
from switchkd.studies.outlook import outlook_markdown, outlooks_of
from switchkd.studies.plan import REPORT, Cell, Plan, Size, joined
from switchkd.studies.progress import Folder


def conclude(plan: Plan, size: Size, grid: Sequence[Cell], output_dir: Path) -> None:
    """Compare the runs of a study, those of each pair and budget with one another, and write ``study.md`` with its figures."""
    parts, stand = [f"# {plan.title}"], Folder(grid, size, output_dir).look().cells
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
        runs: dict[str, list[Steps]] = {method: [] for method in plan.methods}
        for cell in mine:
            runs[cell.method].append(read_steps(output_dir / cell.name, to_dict(cell.config)))
        parts += ["## What each method cost", cost_table(runs)]
        parts += filter(None, [outlook_markdown(outlooks_of(plan, [s for s in stand if s.cell.group == group]))])
        if plan.curves:
            name = joined("curves", group)
            save_figure(draw(metric_panels(runs, plan.curves), plan.title), output_dir / name)
            parts.append(f"![{', '.join(plan.curves)} of each method by step]({name}.png)")
    write_file(output_dir / REPORT, "\n\n".join(parts) + "\n")
    console.print(f"written: {output_dir / REPORT}", soft_wrap=True)


def cost_table(runs: Mapping[str, Sequence[Metrics]]) -> str:
    """Markdown of what a run of each method took in the mean, and its time relative to the first's."""
    costs = {method: [cost(metrics) for metrics in own] for method, own in runs.items()}
    means = {method: {name: mean(c[name] for c in own) for name in own[0]} for method, own in costs.items()}
    first = next(iter(means.values()))["seconds"]
    lines = ["| method | runs | steps | tokens trained | seconds | relative | teacher's tokens | switched responses |"]
    lines.append("|---|" + "---:|" * 7)
    for method, c in means.items():
        shares = ["–" if math.isnan(c[name]) else percent(c[name]) for name in ("teacher share", "switched responses")]
        sizes = [f"{c['steps']:,.0f}", f"{c['tokens']:,.0f}", number(c["seconds"]), number(c["seconds"] / first)]
        lines.append(f"| {method} | {len(costs[method])} | {' | '.join([*sizes, *shares])} |")
    return "\n".join(lines)
