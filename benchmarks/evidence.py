"""What the studies that ship found, as tables and one picture: from their raw scores in ``benchmarks/results/studies``.

``python -m benchmarks.evidence`` draws ``docs/which_method.svg``; ``python -m benchmarks.tables`` writes the tables into the pages.
``switchkd study NAME --scores benchmarks/results/studies/NAME.json.xz --output-dir FOLDER`` shows everything of one study.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from switchkd.base.terminal import console, decimals, number, percent
from switchkd.decoding.rollouts import mean
from switchkd.evaluation.statistics import Estimate, Runs, bootstrap, difference, lower_is_better, verdict
from switchkd.findings.claims import Judgement, judge
from switchkd.findings.collected import Collected, Run, read_collected
from switchkd.reports.tables import markdown_table, save_figure
from switchkd.studies.plan import Claim, Plan, Size, groups_of, load_plan

ROOT = Path(__file__).parents[1]
STUDIES = ROOT / "benchmarks" / "results" / "studies"
PICTURE = ROOT / "docs" / "which_method"
SCORES = {"right": "right, %", "until_mistake": "until the first mistake, %", "own_forward_kl": "KL on own text, nats"}
MARKS = {"better": " ▲", "worse": " ▼"}


@dataclass(frozen=True)
class Study:
    """A plan, the size that was run, and what its runs came to."""

    name: str
    plan: Plan
    size: Size
    collected: Collected

    @cached_property
    def groups(self) -> list[str]:
        """The pairs and budgets of which there are runs."""
        return [group for group, *_ in groups_of(self.size) if self.collected.of(group)]

    def methods(self, group: str) -> dict[str, list[Run]]:
        """The runs of each method of a group."""
        return {method: runs for method in self.plan.methods if (runs := self.collected.of(group, method))}

    def values(self, score: str, group: str, method: str) -> Runs:
        """A score of a method's runs at the end, by training seed."""
        runs = self.collected.of(group, method)
        return {run.seed: run.results[self.task].student.scores[score] for run in runs}

    @property
    def task(self) -> str:
        """The evaluation at the end: a further one, if the plan has it."""
        return next(iter(self.size.evaluations), "")


@cache
def study(name: str) -> Study:
    """The study of the plan ``name``, in the only size that was run of it."""
    plan = load_plan(name)
    size = next(iter(plan.sizes.values()))
    return Study(name, plan, size, read_collected(STUDIES / f"{name}.json.xz", plan, size))


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the picture."""
    save_figure(picture(), PICTURE)
    console.print(f"written: {PICTURE}.svg", soft_wrap=True)
    return 0


# --- tables -------------------------------------------------------------------------------------------------------


def claims_table(name: str) -> str:
    """One line for each claim of a study: what the source says, what was measured, and the verdict."""
    own = study(name)
    rows, said = [], ""
    for each in judge(own.plan, own.size, own.collected):
        claim = own.plan.claims[each.claim]
        words = "" if each.claim == said else f"{claim.says} *({claim.source})*"
        said = each.claim
        rows.append([words, _who(each, claim), *_measured(each), f"**{each.verdict}**"])
    header = ["claim", "methods", "measured", "gain, 95 % interval", "claimed", "verdict"]
    return markdown_table(header, rows, left=2) + "\n"


def _who(each: Judgement, claim: Claim) -> str:
    who = f"{each.better} / {each.than}" if each.than else each.better
    where = f"{each.group} / {claim.against}" if claim.against else each.group
    rows = f"{claim.rows} / {claim.against_rows} answers" if claim.against_rows else ""
    when = f"after {percent(claim.at)}" if claim.at < 1 else ""
    return ", ".join(part for part in (who, where, rows, when) if part)


def _measured(each: Judgement) -> list[str]:
    """Both means, the gain as a share of the second with its interval, and the gain that was claimed."""
    if each.means is None or each.difference is None:
        return [each.remark or "not run", "", ""]
    places = decimals(each.means)
    means = f"{each.score} {' / '.join(number(value, decimals=places) for value in each.means)}"
    gap, sign = each.difference, -1 if each.lower else 1
    low, high = sorted((sign * (gap.low or 0.0), sign * (gap.high or 0.0)))
    gain, claimed = sign * gap.mean, abs(each.claimed) if each.claimed else None
    places = decimals((gain, low, high), 2)
    shown = f"{_signed(gain, places)} [{_signed(low, places)}, {_signed(high, places)}]"
    return [means, shown, _signed(claimed, places) if claimed else ""]


def _signed(value: float, places: int | None) -> str:
    return ("+" if value > 0 else "−" if value < 0 else "") + number(abs(value), decimals=places)


def scores_table(name: str) -> str:
    """Every method of a study: scores at the end with their spread over seeds, time, and the teacher's share of the tokens."""
    own = study(name)
    header = ["method", "seeds", *SCORES.values(), "seconds", "teacher's tokens"]
    rows = []
    for group in own.groups:
        head = [f"*{group}*"] * bool(group) + ["*before*"] * (not group)
        rows.append([*head, "", *_before(own, group), "", ""])
        rows += [_row(own, group, method, runs) for method, runs in own.methods(group).items()]
    return markdown_table(header, rows) + "\n"


def _before(own: Study, group: str) -> list[str]:
    """The student's scores before training, from the group's first run: of its own evaluation, if the one at the end has none."""
    found = [
        run.results[task].models.get("student before") for run in own.collected.of(group) for task in (own.task, "")
    ]
    means = next((before.means() for before in found if before), {})
    return [number(means[score]) if score in means else "" for score in SCORES]


def _row(own: Study, group: str, method: str, runs: Sequence[Run]) -> list[str]:
    cells = []
    for score in SCORES:
        values = own.values(score, group, method)
        found = bootstrap(score, values).estimate()
        mark = "" if method == own.plan.baseline else MARKS.get(_against(own, score, group, method), "")
        cells.append(f"{number(found.mean)}{'' if found.std is None else f' ± {number(found.std, 2)}'}{mark}")
    share = mean(run.cost["teacher share"] for run in runs)
    name = f"**{method}**" if method == own.plan.baseline else method
    seconds = f"{mean(run.cost['seconds'] for run in runs):,.0f}"
    return [name, str(len(runs)), *cells, seconds, "–" if np.isnan(share) else percent(share)]


def _against(own: Study, score: str, group: str, method: str) -> str:
    """Better, worse or not distinguishable from the baseline, on the seeds that both have."""
    gap = _gap(own, score, group, method)
    return verdict(gap, lower_is_better(score)) if gap else ""


def _gap(own: Study, score: str, group: str, method: str) -> Estimate | None:
    """A method's score less the baseline's on the seeds that both have; None with fewer than two."""
    ours, theirs = (dict(own.values(score, group, name)) for name in (method, own.plan.baseline))
    seeds = sorted(ours.keys() & theirs.keys())
    if len(seeds) < 2:
        return None
    return difference(score, {seed: ours[seed] for seed in seeds}, {seed: theirs[seed] for seed in seeds})


TABLES: dict[str, Callable[[str], str]] = {"claims": claims_table, "scores": scores_table}


# --- the picture --------------------------------------------------------------------------------------------------

SCORE = "until_mistake"
GAINS = ("starts_and_gaps", "prompts")  # studies whose groups are compared


def picture() -> Figure:
    """Scores and times of all methods from one start, and what methods gain over the baseline elsewhere."""
    gains = [name for name in GAINS if (STUDIES / f"{name}.json.xz").is_file()]
    figure = Figure(figsize=(9, 3.6 * (1 + (len(gains) + 1) // 2)), layout="constrained")
    axes = figure.subplots(1 + (len(gains) + 1) // 2, 2, squeeze=False).ravel()
    _scores(axes[0], study("which_method"))
    _times(axes[1], study("which_method"))
    for axis, name in zip(axes[2:], gains, strict=False):
        _gains(axis, study(name))
    for axis in axes[2 + len(gains) :]:
        axis.axis("off")
    return figure


def _scores(axis: Axes, own: Study) -> None:
    """A method a line, the best on top: its score with its interval."""
    [group] = own.groups
    found = {method: bootstrap(SCORE, own.values(SCORE, group, method)).estimate() for method in own.methods(group)}
    for place, (method, each) in enumerate(sorted(found.items(), key=lambda item: item[1].mean)):
        _dot(axis, each, place, "C0")
        axis.text(-0.02, place, method, ha="right", va="center", transform=axis.get_yaxis_transform(), fontsize=8)
    axis.set(title=f"{own.name}: at the end", xlabel=SCORES[SCORE], yticks=[])


def _times(axis: Axes, own: Study) -> None:
    """What a run took, and what came of it."""
    [group] = own.groups
    for method, runs in own.methods(group).items():
        seconds = mean(run.cost["seconds"] for run in runs)
        score = bootstrap(SCORE, own.values(SCORE, group, method)).mean
        axis.plot(seconds, score, "o", color="C0")
        axis.annotate(method, (seconds, score), xytext=(4, 3), textcoords="offset points", fontsize=8)
    axis.set(
        title=f"{own.name}: for the time of a run", xlabel="seconds of training", ylabel=SCORES[SCORE], xlim=(0, None)
    )


def _gains(axis: Axes, own: Study) -> None:
    """A group of lines for each pair or budget: what each method has more than the baseline, with the interval."""
    methods = [method for method in own.plan.methods if method != own.plan.baseline]
    for number_, group in enumerate(reversed(own.groups)):
        for offset, method in enumerate(methods):
            if method in own.methods(group) and (gap := _gap(own, SCORE, group, method)):
                place = number_ + 0.6 * (offset / max(len(methods) - 1, 1) - 0.5)
                _dot(axis, gap, place, f"C{offset}", method if number_ == 0 else "")
        axis.text(-0.02, number_, group, ha="right", va="center", transform=axis.get_yaxis_transform(), fontsize=8)
    axis.axvline(0, color="0.5", linewidth=0.8)
    axis.set(title=own.name, xlabel=f"{SCORES[SCORE]}: more than {own.plan.baseline}", yticks=[])
    axis.legend(fontsize=7)


def _dot(axis: Axes, each: Estimate, place: float, colour: str, label: str = "") -> None:
    axis.plot(each.mean, place, "o", color=colour, label=label or None, markersize=4)
    if each.low is not None and each.high is not None:
        axis.plot([each.low, each.high], [place, place], color=colour, linewidth=1.2)


if __name__ == "__main__":
    sys.exit(main())
