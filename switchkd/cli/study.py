"""TODO."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from switchkd.base.errors import SwitchKDError
from switchkd.base.settings import Settings, shipped

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class StudyConfig(Settings):
    """Run a grid of methods, seeds, pairs and budgets, and compare them. Goes on where it was stopped."""

    plan: tyro.conf.Positional[str] = "list"
    """A plan's YAML file, or the name of one that ships with the package; `list` lists them."""
    size: str = "small"
    """Which of the plan's sizes."""
    output_dir: str = ""
    """Folder of runs and results; default studies/PLAN-SIZE."""
    jobs: int = 1
    """Runs at a time, each with its share of the cores."""
    set: tuple[str, ...] = ()
    """Settings of every run over the plan's, as NAME=VALUE, such as max_train_tokens=20000; VALUE is read as YAML."""
    dry_run: bool = False
    """List the runs and stop."""


def study(config: StudyConfig) -> None:
    from switchkd.base.terminal import bar, console
    from switchkd.studies.plan import cells, load_plan, with_settings

    if config.plan == "list":
        for name in shipped("plans"):
            plan = load_plan(name)
            console.print(f"{name}: {plan.title} ({', '.join(plan.methods)})", soft_wrap=True)
        return
    plan = load_plan(config.plan)
    size = with_settings(plan.sized(config.size), config.set)
    output_dir = Path(config.output_dir or f"studies/{Path(config.plan).stem}-{config.size}")
    grid = cells(plan, size, output_dir)
    console.print(f"{plan.title}: {len(grid)} runs in {output_dir}", soft_wrap=True)
    if config.dry_run:
        for cell in grid:
            console.print(f"  {cell.name}: {cell.config.method}", soft_wrap=True)
        return
    from switchkd.studies.check import check_study
    from switchkd.studies.study import run_cells

    check_study(plan, size, grid, output_dir)
    with bar("study", len(grid)) as progress:

        def done(line: str, seconds: float) -> None:
            progress.advance(1)
            console.print(f"{line} ({seconds:.0f} s)", soft_wrap=True)

        left = run_cells(grid, size, output_dir, config.jobs, done)
    if left:
        states = ", ".join(f"{name} {state}" for name, state in left.items())
        raise SwitchKDError(
            f"{len(left)} of {len(grid)} runs are not done ({states}): see {output_dir}/logs; the same command goes on"
        )
    from switchkd.studies.report import conclude

    conclude(plan, size, grid, output_dir)
