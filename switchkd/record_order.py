"""Whether a run's records are all there, once and in order: what re-reading a single text cannot tell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path

from switchkd.checkpoint import State, read_state
from switchkd.plain import iter_lines
from switchkd.run_record import ROLLOUTS, RunRecord, TextLine

GENERATED = ("policy", "pairs")  # sources of a step that writes text


def out_of_order(run: RunRecord, students: Mapping[int, Path | None]) -> list[str]:
    """What is missing, there twice, or in another place, in words; ``students`` are checkpoints by step (None: no folder)."""
    return [*_metrics(run), *_samples(run), *_rollouts(run, students)]


def _metrics(run: RunRecord) -> Iterator[str]:
    for place, line in enumerate(run.metrics, start=1):
        if line["step"] != place:
            yield f"metrics.jsonl: line {place} is of step {line['step']}"
            return


def _samples(run: RunRecord) -> Iterator[str]:
    ids: dict[int, list[int]] = {}
    for sample in run.samples:
        ids.setdefault(sample["step"], []).append(sample["sample_id"])
    steps = {0, *(line["step"] for line in run.metrics)}
    sizes = [len(own) for own in ids.values()]
    if sizes and sizes[-1] not in (run.config.sample_prompts, max(sizes)):
        yield f"samples.jsonl: the last step has {sizes[-1]} samples, and another one {max(sizes)}"
    for step, own in ids.items():
        if own != list(range(len(own))) or step not in steps:
            yield f"samples.jsonl: the samples of step {step} are numbered {own}, not from 0 in order, or there is no such step"


def _rollouts(run: RunRecord, students: Mapping[int, Path | None]) -> Iterator[str]:
    """Each step's texts follow those of the step before; of a step behind a checkpoint, it is known which they are."""
    ids: dict[int, list[int]] = {}
    tokens: dict[int, int] = {}
    for record in iter_lines(run.path / ROLLOUTS, TextLine):
        ids.setdefault(record["step"], []).append(record["sample_id"])
        tokens[record["step"]] = tokens.get(record["step"], 0) + len(record["completion_ids"])
    for step, own in ids.items():
        if own != list(range(own[0], own[0] + len(own))):
            yield f"rollouts.jsonl: the texts of step {step} are {own}, not in order"
    for (step, before), (later, behind) in pairwise(ids.items()):
        if before[-1] >= behind[0]:
            yield f"rollouts.jsonl: text {behind[0]} of step {later} is behind text {before[-1]} of step {step}"
    for step, first, count in _expected(students):
        own, wanted = ids.get(step + 1, []), list(range(first, first + count))
        there = len(run.metrics) > step and run.metrics[step].get("source") in GENERATED
        if (own or there) and own != wanted:
            yield f"rollouts.jsonl: step {step + 1} has the texts {own}, not {first} to {first + count - 1}"
    for last, line in pairwise([{"num_tokens": 0}, *run.metrics]):
        told = line["num_tokens"] - last["num_tokens"]
        if line.get("source") == "policy" and line["step"] in tokens and told != tokens[line["step"]]:
            yield f"metrics.jsonl: step {line['step']} counts {told} tokens, and its texts have {tokens[line['step']]}"


def _expected(students: Mapping[int, Path | None]) -> Iterator[tuple[int, int, int]]:
    """By step that is done: the number of the next text, and how many the next step writes."""
    states: list[State] = [read_state(folder) for folder in students.values() if folder is not None]
    for state in states:
        if "rows" in state and "rows_per_step" in state:
            yield state["step"], state["rows"], state["rows_per_step"]
    alike = {
        state.get("rows_per_step")
        for state in states
        if state.get("rows") == state["step"] * state.get("rows_per_step", 0)
    }
    if students.get(0, "") is None and len(alike) == 1 and (count := alike.pop()):
        yield 0, 0, count
