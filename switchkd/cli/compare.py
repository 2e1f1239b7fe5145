"""The commands on several runs: `compare`, `report` and `plot` look at runs that are there, and `study` makes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from switchkd.base.errors import ConfigError, DataError, SwitchKDError, nearest
from switchkd.base.settings import Settings, shipped
from switchkd.base.storage import write_file, write_output
from switchkd.base.terminal import bar, console

if TYPE_CHECKING:
    from switchkd.studies.plan import Cell, Plan, Size
    from switchkd.studies.study import Executor

_OF_RAY = ("ray_", "cpus_", "gpus_", "memory_")  # how settings begin that only that executor has


@dataclass(frozen=True)
class CompareConfig(Settings):
    """Compare evaluated runs, example by example, and say what can be told apart."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Run directories, or files that `switchkd evaluate` wrote. Runs that differ in their training seed alone are one method."""
    task: str = ""
    """Compare evaluation-TASK.json; without it, evaluation.json."""
    score: tuple[str, ...] = ()
    """Scores to compare, the first also pair by pair and as a plot; default the task's primary score and all others in common."""
    baseline: str = ""
    """The method, teacher or `student before` that differences are taken to; default the first method."""
    output_dir: str | None = None
    """Write compare.md, compare.json, compare.svg and compare.png here."""


@dataclass(frozen=True)
class ReportConfig(Settings):
    """Write runs as one HTML page that needs no network: summary, who wrote what, scores, curves."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Run directories, whatever their state."""
    output_file: str = ""
    """The page; default report.html in the run, or here for several runs."""


@dataclass(frozen=True)
class PlotConfig(Settings):
    """Draw the papers' figures of trained runs, each as SVG and PNG."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Run directories. Runs that differ in their training seed alone are one method."""
    figure: str = "all"
    """lambda, divergence, switch_rate, length, progress or cost; `all` draws those that the runs allow."""
    output_dir: str = "figures"
    """Folder of the figures."""


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
    """Runs at a time on this machine, each with its share of the cores; with ray, the cluster's resources say how many."""
    executor: Literal["local", "ray"] = "local"
    """Where runs are run: in processes of this machine, or as tasks of a Ray cluster whose nodes all see the output_dir."""
    ray_address: str = ""
    """The cluster to join; default what RAY_ADDRESS says, else a Ray of this machine that is started and stopped again."""
    cpus_per_run: int = 1
    """CPUs that Ray keeps for a run, which has so many threads."""
    gpus_per_run: float | None = None
    """GPUs that Ray keeps for a run, such as 0.5 for two runs on one; default 1 if the cluster has any."""
    memory_gib_per_run: float = 0.0
    """Memory that Ray keeps for a run, in GiB; 0 keeps none."""
    set: tuple[str, ...] = ()
    """Settings of every run over the plan's, as NAME=VALUE, such as max_train_tokens=20000; VALUE is read as YAML."""
    scores: str = ""
    """Run nothing: judge and show what is in this `scores.json.xz`, or what is done of the study in this folder."""
    dry_run: bool = False
    """List the runs and stop."""


def compare(config: CompareConfig) -> None:
    from switchkd.reports.compare import compare as compare_runs
    from switchkd.reports.tables import show, write

    with bar("resample", None) as progress:
        comparison = compare_runs(
            config.runs, config.task, config.score, config.baseline, lambda score: progress.advance(1, score)
        )
    show(comparison)
    if config.output_dir:
        console.print(f"written: {', '.join(map(str, write(comparison, Path(config.output_dir))))}", soft_wrap=True)


def report(config: ReportConfig) -> None:
    from switchkd.reports.page import page

    if not config.runs:
        raise ConfigError("no run to report on; give run directories: switchkd report runs/demo-switch")
    only = Path(config.runs[0]) if len(config.runs) == 1 else Path()
    file = Path(config.output_file) if config.output_file else only / "report.html"
    with bar("report", None) as progress:
        html = page([Path(run) for run in config.runs], lambda part: progress.advance(1, part))
    (write_output if config.output_file else write_file)(file, html)
    console.print(f"report in {file}", soft_wrap=True)


def plot(config: PlotConfig) -> None:
    from switchkd.reports.figures import FIGURES, load_methods
    from switchkd.reports.tables import save_figure

    if config.figure not in ("all", *FIGURES):
        raise ConfigError(f"no figure {config.figure!r}{nearest(config.figure, ('all', *FIGURES))}")
    methods = load_methods(config.runs)
    written: list[Path] = []
    for name in FIGURES if config.figure == "all" else (config.figure,):
        try:
            figure, notes = FIGURES[name](methods)
        except DataError as error:
            if config.figure != "all":
                raise
            console.print(f"{name}: not drawn: {error}", soft_wrap=True)
            continue
        written += save_figure(figure, Path(config.output_dir) / name)
        console.print(f"{name}: {written[-1]} and .svg. {notes}", soft_wrap=True)
    if not written:
        raise DataError("no figure could be drawn of these runs")


def _executor(config: StudyConfig) -> Executor | None:
    """What `run_cells` takes; raises ConfigError for a setting of the other executor."""
    others = ["jobs"] if config.executor == "ray" else [name for name in vars(config) if name.startswith(_OF_RAY)]
    for name in others:
        if getattr(config, name) != getattr(StudyConfig, name):
            raise ConfigError(
                f"--{name.replace('_', '-')} says nothing to --executor {config.executor}: local runs --jobs at a time, each with "
                "its share of the cores; ray as many as have room with --cpus-per-run and the like"
            )
    if config.executor == "local":
        return None
    from switchkd.studies.ray_cluster import RayCluster

    return RayCluster(config.ray_address, config.cpus_per_run, config.gpus_per_run, config.memory_gib_per_run)


def study(config: StudyConfig) -> None:
    from switchkd.studies.plan import cells, load_plan, with_settings

    if config.plan == "list":
        for name in shipped("plans"):
            plan = load_plan(name)
            console.print(f"{name}: {plan.title} ({', '.join(plan.methods)})", soft_wrap=True)
        return
    executor, plan = _executor(config), load_plan(config.plan)
    size = with_settings(plan.sized(config.size), config.set)
    output_dir = Path(config.output_dir or f"studies/{Path(config.plan).stem}-{config.size}")
    grid = cells(plan, size, output_dir)
    console.print(f"{plan.title}: {len(grid)} runs in {output_dir}", soft_wrap=True)
    if config.dry_run:
        for cell in grid:
            console.print(f"  {cell.name}: {cell.config.method}", soft_wrap=True)
        return
    source = Path(config.scores) if config.scores else output_dir
    if not config.scores:
        _run(plan, size, grid, output_dir, config.jobs, executor)
    _show(plan, size, grid, output_dir, source)


def _run(plan: Plan, size: Size, grid: Sequence[Cell], output_dir: Path, jobs: int, executor: Executor | None) -> None:
    """Run what is not done yet of a study; raises SwitchKDError where a run comes to no end."""
    from switchkd.findings.claims import register
    from switchkd.findings.page import followed
    from switchkd.studies.check import check_study
    from switchkd.studies.plan import PAGE
    from switchkd.studies.study import run_cells

    check_study(plan, size, grid, output_dir)
    register(plan, output_dir)
    console.print(f"open {output_dir / PAGE} to see how it goes", soft_wrap=True)

    def done(line: str, seconds: float) -> None:
        console.print(f"{line} ({seconds:.0f} s)", soft_wrap=True)

    with bar("study", 1, share=True) as shown, followed(plan, size, grid, output_dir, jobs, shown.reach):
        left = run_cells(grid, size, output_dir, jobs, done, executor)
    if left:
        states = ", ".join(f"{name} {state}" for name, state in left.items())
        raise SwitchKDError(
            f"{len(left)} of {len(grid)} runs are not done ({states}): see {output_dir}/logs; the same command goes on"
        )


def _show(plan: Plan, size: Size, grid: Sequence[Cell], output_dir: Path, source: Path) -> None:
    """Judge and show what is done of a study, as its folder or its file of scores has it."""
    from switchkd.findings.claims import registered
    from switchkd.findings.collected import collect, read_collected
    from switchkd.findings.report import conclude
    from switchkd.studies.check import check_place

    if source != output_dir:
        check_place(size, grid, output_dir)
    folder = source.is_dir()
    found = collect(plan, size, grid, source, registered(source)) if folder else read_collected(source, plan, size)
    conclude(plan, size, found, output_dir)
