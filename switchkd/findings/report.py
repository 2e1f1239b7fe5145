"""What a study shows: its claims with their verdicts, the comparison of its methods, what each cost, and curves.

All of it is made from what ``collected`` holds, and so the same whether that comes from the runs or from a file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from switchkd.base.storage import write_output
from switchkd.base.terminal import console, decimals, number, percent
from switchkd.decoding.rollouts import mean
from switchkd.findings.claims import (
    CANNOT_TELL,
    HOLDS,
    MOST_SEEDS,
    NO_GAIN,
    NOT_JUDGED,
    NOT_RUN,
    WINDOW,
    Judgement,
    changes,
    ends,
    judge,
)
from switchkd.findings.collected import Collected, Run, write_collected
from switchkd.findings.outlook import outlook_markdown, outlooks
from switchkd.reports.compare import compare_results
from switchkd.reports.curves import metric_panels
from switchkd.reports.panels import draw, has
from switchkd.reports.steps import ELAPSED, SCORE, Steps
from switchkd.reports.tables import difference_text, markdown, markdown_table, save_figure, show, signed, write
from switchkd.studies.plan import (
    ALL,
    JUDGEMENTS,
    LONG,
    REPORT,
    SCORES,
    SHORT,
    Claim,
    Plan,
    Size,
    groups_of,
    is_about,
    joined,
)

_ROWS = {
    ALL: "all rows",
    SHORT: "the third of the rows with the shortest references",
    LONG: "the third of the rows with the longest references",
}


def conclude(plan: Plan, size: Size, collected: Collected, output_dir: Path) -> None:
    """Judge the claims, compare the runs of each pair and budget with one another, and write ``study.md``, figures and data."""
    judgements = judge(plan, size, collected)
    parts = [f"# {plan.title}", *_claims(plan, size, collected, judgements)]
    for group, *_ in groups_of(size):
        parts += [f"## {group}"] if group else []
        parts += _group(plan, size, collected, group, output_dir)
    for judgement in judgements:
        who = " ".join(part for part in (judgement.claim, judgement.than, judgement.group) if part)
        console.print(
            f"claim {who}: {judgement.verdict}. {words(judgement, plan.claims[judgement.claim], size)}", soft_wrap=True
        )
    write_collected(collected, output_dir / SCORES)
    record = {"changed": dict(changes(plan, collected.claims)), "judgements": [each.to_json() for each in judgements]}
    write_output(output_dir / JUDGEMENTS, json.dumps(record, indent=1, allow_nan=False) + "\n")
    write_output(output_dir / REPORT, "\n\n".join(parts) + "\n")
    console.print(f"written: {output_dir / REPORT}", soft_wrap=True)


def _group(plan: Plan, size: Size, collected: Collected, group: str, output_dir: Path) -> Iterator[str]:
    """The comparison, the costs and the curves of one pair and budget, as paragraphs; its figures are written beside them."""
    runs = {method: own for method in plan.methods if (own := collected.of(group, method))}
    if not runs:
        yield "No run of it is done yet."
        return
    for task in ("", *size.evaluations):
        results = [run.results[task] for own in runs.values() for run in own]
        baseline = joined(group, plan.baseline) if plan.baseline in runs else ""
        found = compare_results(results, () if task else plan.scores, baseline)
        folder = output_dir / joined("compare", group, task)
        write(found, folder)
        yield markdown(found, f"{folder.name}/compare.png")
        show(found)
    yield "## What each method cost"
    yield cost_table({method: [run.cost for run in own] for method, own in runs.items()})
    yield from filter(None, [_outlook(plan, runs)])
    steps = {method: [run.steps for run in own] for method, own in runs.items()}
    if plan.curves:
        name = joined("curves", group)
        save_figure(draw(metric_panels(steps, plan.curves), plan.title), output_dir / name)
        yield f"![{', '.join(plan.curves)} of each method by step]({name}.png)"
    if scores := _along(plan, steps):
        name = joined("progress", group)
        by = [metric_panels(steps, scores, x) for x in ("num_tokens", ELAPSED)]
        panels = [panel for row in zip(*by, strict=True) for panel in row]
        save_figure(draw(panels, plan.title, columns=2), output_dir / name)
        yield f"![{', '.join(scores)} of each method by tokens and by seconds]({name}.png)"


def _outlook(plan: Plan, runs: Mapping[str, Sequence[Run]]) -> str:
    """What further seeds would be worth to the methods of a group."""
    students = {method: {run.seed: run.results[""].student for run in own} for method, own in runs.items()}
    first = next(student for own in students.values() for student in own.values())
    score = next(iter(plan.scores), first.primary)
    values = {
        method: {seed: s.scores[score] for seed, s in own.items() if score in s.scores}
        for method, own in students.items()
    }
    seconds = {method: mean(run.cost["seconds"] for run in own) for method, own in runs.items()}
    return outlook_markdown(outlooks(score, plan.baseline or next(iter(plan.methods)), values, seconds))


def _along(plan: Plan, steps: Mapping[str, Sequence[Steps]]) -> list[str]:
    """The scores along the way that are shown: the main one, and those that the plan draws or claims something of."""
    runs = [run for own in steps.values() for run in own]
    claimed = [claim.score for claim in plan.claims.values() if claim.along and claim.score]
    wanted = [SCORE + run.primary for run in runs] + [*plan.curves, *claimed, *(SCORE + score for score in claimed)]
    return [name for name in dict.fromkeys(wanted) if name.startswith(SCORE) and any(has(run, name) for run in runs)]


def cost_table(costs: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Markdown of what a run of each method took in the mean, and its time relative to the first's."""
    means = {method: {name: mean(c[name] for c in own) for name in own[0]} for method, own in costs.items()}
    first = next(iter(means.values()))["seconds"]
    rows = []
    for method, c in means.items():
        shares = ["–" if math.isnan(c[name]) else percent(c[name]) for name in ("teacher share", "switched responses")]
        sizes = [f"{c['steps']:,.0f}", f"{c['tokens']:,.0f}", number(c["seconds"]), number(c["seconds"] / first)]
        rows.append([method, str(len(costs[method])), *sizes, *shares])
    header = [
        "method",
        "runs",
        "steps",
        "tokens trained",
        "seconds",
        "relative",
        "teacher's tokens",
        "switched responses",
    ]
    return markdown_table(header, rows)


# --- claims in words ----------------------------------------------------------------------------------------------


def _claims(plan: Plan, size: Size, collected: Collected, judgements: Sequence[Judgement]) -> Iterator[str]:
    """The claims with their verdicts, as paragraphs; none of a plan that claims nothing."""
    if plan.claims:
        yield "## What was claimed, and what holds"
    rows, said = [], set()
    for each in judgements:
        claim = plan.claims[each.claim]
        source = f" ({claim.source})" if claim.source else ""
        hypothesis = "" if each.claim in said else f": {claim.says}{source}"
        said.add(each.claim)
        rows.append({
            "claim": f"**{each.claim}**{hypothesis}",
            "methods": f"{each.better} / {each.than}" if each.than else each.better,
            **({"pair, budget": each.group} if each.group else {}),
            "verdict": f"**{each.verdict}**",
            "what was measured": words(each, claim, size),
        })  # fmt: skip
    if rows:
        yield markdown_table(list(rows[0]), [list(row.values()) for row in rows], left=len(rows[0]))
        yield (
            "A claim holds where the whole 95 % interval is on its side of 0. The interval is over training seeds, and of scores "
            "at the end over rows too; runs of one seed are compared as a pair. Each verdict is for itself: of forty claims with "
            "nothing to them, one is expected to hold by chance."
        )
    if others := [name for name, claim in plan.claims.items() if not is_about(claim, size)]:
        yield f"Not about this size of the plan, which lacks their groups or evaluations: {', '.join(others)}."
    if changed := list(changes(plan, collected.claims)):
        yield "**The claims are not those that the study began with:**"
        yield "\n".join(f"- {name}: {what}" for name, what in changed)


def words(judgement: Judgement, claim: Claim, size: Size) -> str:
    """What was measured and what came of it, in plain sentences."""
    return " ".join(_sentences(judgement, claim, size))


def _sentences(judgement: Judgement, claim: Claim, size: Size) -> Iterator[str]:
    if judgement.verdict == NOT_RUN:
        yield f"Not done: {_named(judgement.lacking)}."
        return
    if judgement.lacking:
        yield f"So far {len(judgement.seeds)} of {len(size.seeds)} seeds (not done: {_named(judgement.lacking)})."
    if judgement.verdict == NOT_JUDGED:
        yield f"This cannot be judged: {judgement.remark}."
        return
    yield _measured(judgement, claim)
    yield from _of_size(judgement, claim)
    if judgement.remark:
        yield f"Mind that {judgement.remark}."


def _measured(judgement: Judgement, claim: Claim) -> str:
    """The two figures, their difference with its interval, and over what."""
    assert judgement.means is not None and judgement.difference is not None
    better, than, gap = judgement.better, judgement.than, judgement.difference
    held_against = claim.against or claim.against_rows
    places = decimals(judgement.means)
    first, second = (
        signed(v, places) if held_against and than else number(v, decimals=places) for v in judgement.means
    )
    aim = "lower" if judgement.lower else "higher"
    if claim.change:
        aim = "a fall" if judgement.lower else "a rise"
        figures = f"{better} {second} {_point(claim.since, claim)}, {first} {_point(claim.at, claim)}"
    elif held_against:
        here, there = (
            (f"in {judgement.group}", f"in {claim.against}")
            if claim.against
            else (f"on {_ROWS[claim.rows]}", f"on {_ROWS[claim.against_rows]}")
        )
        aim += f", and more so {here}" if than else f" {here}"
        figures = f"{better}{f' less {than}' if than else ''} {first} {here}, {second} {there}"
    else:
        figures = f"{better} {first}, {than} {second}"
    over = f"{len(judgement.seeds)} seeds" + ("" if claim.along else f", {gap.examples} rows")
    return f"{judgement.score}{_where(claim)} (claimed: {aim}): {figures}; difference {difference_text(gap)}, {over}."


def _of_size(judgement: Judgement, claim: Claim) -> Iterator[str]:
    """What the interval says of 0 and of the size that the claim names."""
    verdict, claimed = judgement.verdict, judgement.claimed
    if claimed is None:
        if verdict == CANNOT_TELL:
            yield "0 is inside the interval, and the claim names no size."
        return
    assert judgement.difference is not None
    low, high = ends(judgement.difference, -1 if claimed < 0 else 1)
    share = f"{'−' if claimed < 0 else '+'}{percent(claim.expected)}"
    size = f"claimed {share} ({signed(claimed)})"
    if verdict == HOLDS:
        where = (
            "less than that"
            if abs(claimed) < low
            else "more than that"
            if abs(claimed) > high
            else "inside the interval"
        )
        yield f"The {size} is {where}."
    elif verdict == NO_GAIN:
        yield f"0 is inside the interval, the {size} is outside."
    elif verdict == CANNOT_TELL:
        yield f"0 and the {size} are both inside the interval."
        if judgement.seeds_to_tell:
            yield f"About {judgement.seeds_to_tell} seeds would tell."
        else:
            yield f"Even {MOST_SEEDS:,} seeds would not tell" + ("." if claim.along else ": it takes more rows.")


def _where(claim: Claim) -> str:
    """Of which evaluation, on which rows, and when."""
    parts = [f" of {claim.task}"] * bool(claim.task)
    parts += [f" on {_ROWS[claim.rows]}"] * (claim.rows != ALL and not claim.against_rows)
    return "".join([*parts, *([f" {_point(claim.at, claim)}"] * (claim.along and not claim.change))])


def _point(at: float, claim: Claim) -> str:
    """When something was measured: at one point, or a metric of the steps over the stretch that ends there."""
    if claim.of_steps and claim.score != "seconds" and not claim.score.startswith(SCORE):
        if at <= WINDOW:
            return f"in the first {percent(at)} of the tokens"
        return (
            f"in the last {percent(WINDOW)} of the tokens"
            if at == 1
            else f"in the {percent(WINDOW)} of the tokens before {percent(at)}"
        )
    return "at the end" if at == 1 else f"after {percent(at)} of the tokens"


def _named(names: Sequence[str], most: int = 3) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
