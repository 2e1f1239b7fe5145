"""TODO."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from switchkd.base.errors import ConfigError, DataError, nearest
from switchkd.base.settings import Settings
from switchkd.base.storage import write_file, write_output

if TYPE_CHECKING:
    pass


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


def compare(config: CompareConfig) -> None:
    from switchkd.base.terminal import bar, console
    from switchkd.reports.compare import compare as compare_runs
    from switchkd.reports.tables import show, write

    with bar("resample", None) as progress:
        comparison = compare_runs(
            config.runs, config.task, config.score, config.baseline, lambda score: progress.advance(1, score)
        )
    show(comparison)
    if config.output_dir:
        written = write(comparison, Path(config.output_dir))
        console.print(f"written: {', '.join(map(str, written))}", soft_wrap=True)


def report(config: ReportConfig) -> None:
    from switchkd.base.terminal import bar, console
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
    from switchkd.base.terminal import console
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
