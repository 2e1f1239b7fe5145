"""Whether what a run wrote down is true: its texts, read again, give the same speakers, divergences and log-probabilities.

A checkpoint holds the student that wrote the samples of its step and the rollouts of the next; the student that the run began
with wrote those of step 0 and 1. Texts of other steps were written by weights that are gone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from switchkd.base.manifest import verify
from switchkd.base.plain import Lines, iter_lines
from switchkd.data.texts import TokenizedExample, batch_indices
from switchkd.decoding.rollouts import Rollout
from switchkd.evaluation.evaluate import scored_otherwise
from switchkd.evaluation.samples import TOP, Reader, judged, trace
from switchkd.evaluation.tasks import Task
from switchkd.methods.divergences import LN2, jsd
from switchkd.methods.policy import STUDENT, TEACHER, Policy
from switchkd.methods.sampling import keys_tensor, noise_key, speakers
from switchkd.models.pair import Pair
from switchkd.reports.record import RunRecord, TextLine
from switchkd.runs.distil import sample_policy
from switchkd.training.checkpoint import State, checkpoints, load_weights, read_state, step_of
from switchkd.training.records import ROLLOUTS
from switchkd.training.settings import TrainConfig
from switchkd.writing.turn_replay import replayed_turns

# How far a number may be from the one written down, relative to the larger of it and 1; another batch rounds otherwise.
TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 0.2, "float16": 0.05}
# Tokens at which, where numbers round, another speaker or end may be found: a divergence within rounding of its threshold.
MOST_SPEAKERS = {"float64": 0.0, "float32": 0.01, "bfloat16": 0.05, "float16": 0.05}


@dataclass(frozen=True)
class Finding:
    """What reading the texts of one student again found; ``largest`` is the largest relative difference of a number.

    ``other_speakers`` counts the tokens that someone else would have written, and those behind which the policy would have ended
    the text where it went on, or not where it ended. ``wrong`` are fields that are not what they must be, whatever rounds.
    """

    what: str
    texts: int
    tokens: int
    other_speakers: int
    largest: float
    wrong: tuple[str, ...] = ()

    def holds(self, *dtypes: str) -> bool:
        """Whether the records are true, as far as numbers of these ``dtypes`` can tell; ``auto``, in old runs, was float32."""
        known = [name if name in TOLERANCE else "float32" for name in dtypes]
        most = max(MOST_SPEAKERS[name] for name in known) * self.tokens
        near = self.largest <= max(TOLERANCE[name] for name in known) and self.other_speakers <= most
        return near and not self.wrong

    def __str__(self) -> str:
        wrong = f"; wrong: {', '.join(self.wrong)}" if self.wrong else ""
        return (
            f"{self.what}: {self.texts} texts, {self.tokens} tokens read again; {self.other_speakers} speakers differ, numbers by "
            f"at most {self.largest:.1e}{wrong}"
        )


@dataclass(frozen=True)
class Texts:
    """The text that a run is on: the examples that it trains on, those that it completes again and again, and their task."""

    train: Sequence[TokenizedExample]
    watched: Sequence[TokenizedExample]
    task: Task | None


def check_records(
    run: RunRecord,
    pair: Pair,
    most: int = 16,
    progress: Callable[[str], None] = lambda what: None,
    texts: Texts | None = None,
) -> Iterator[Finding]:
    """Read texts again, at most ``most`` of each kind and student; ``pair`` is the run's, as it began, and changes.

    With the ``texts`` that the run is on, prompts, references and scores are looked at too, those of its own evaluation among them.
    Raises CheckpointError for a checkpoint that is damaged.
    """
    policy = run.config.policy.bind(pair.tokenizer, run.config.max_new_tokens)
    done = {line["step"]: line.get("schedule", 0.0) for line in run.metrics}
    students: dict[int, Path | None] = {0: None} | {step_of(folder): folder for folder in checkpoints(run.path)}
    for saved in checkpoints(run.path):
        verify(saved)
    if wrong := out_of_order(run, students):
        yield Finding("steps and texts in order", 0, 0, 0, 0.0, tuple(wrong))
    if texts is not None and texts.task:
        for model, result in run.evaluations.get("evaluation", {}).items():
            wrong = scored_otherwise(result, texts.watched, texts.task)
            tokens = sum(text.tokens for text in result.completions)
            yield Finding(f"scores of {model}", len(result.completions), tokens, 0, 0.0, tuple(wrong))
    rollouts, read = run.rollouts_of([step + 1 for step in students], most), Reader(pair)
    for step, folder in students.items():
        if folder is not None:
            load_weights(folder, pair.student)
        now = done.get(step, 0.0)
        samples = [sample for sample in run.samples if sample["step"] == step][:most]
        kinds = {
            f"samples of step {step}": (
                samples,
                sample_policy(run.config, policy, now, step),
                run.config.max_new_tokens,
            ),
            f"rollouts of step {step + 1}": (rollouts[step + 1], policy.at(now, step), run.config.token_budget(now)),
        }
        for what, (records, rule, budget) in kinds.items():
            if records:
                progress(what)
                wrong = [
                    f"{name} of text {r['sample_id']}"
                    for r in records
                    for name in _wrong(r, pair, run.config, budget, texts)
                ]
                sound = [record for record in records if _readable(record, pair)]
                yield replace(_finding(what, read, rule, sound, run.config.seed), wrong=tuple(wrong))


def _readable(record: Mapping[str, Any], pair: Pair) -> bool:
    """Whether the models can read a text: tokens that they know, with teachers that they are."""
    if record["teacher"] not in pair.named_teachers or not record["prompt_ids"]:
        return False
    own, theirs = [*record["prompt_ids"], *record["completion_ids"]], record["teacher_prompt_ids"] or []
    bridge = pair.bridges.get(record["teacher"])
    if bridge is None:
        return max([*own, *theirs]) < pair.vocab_size and "teacher_completion_ids" not in record
    read = record.get("teacher_completion_ids")
    if read is None or max(own) >= pair.vocab_size or max([0, *theirs, *read]) >= bridge.teacher.vocab_size:
        return False
    mine, other = (
        b"".join(s.bytes_of(i)) for s, i in ((bridge.student, record["completion_ids"]), (bridge.teacher, read))
    )
    return mine.startswith(other)


def _wrong(
    record: Mapping[str, Any], pair: Pair, config: TrainConfig, budget: int, texts: Texts | None
) -> Iterator[str]:
    """The fields of a text that are not what they must be."""
    if not _readable(record, pair):
        yield "prompt_ids, completion_ids, teacher_prompt_ids or teacher"
        return
    ids, reason = record["completion_ids"], record["stop_reason"]
    ended = bool(ids) and ids[-1] in pair.ends.ids
    # Of two readings of a text the longer one may have reached the budget.
    longest = max(len(ids), len(record.get("teacher_completion_ids", ())))
    cut = longest >= budget >= len(ids) if reason == "length" else len(ids) <= budget
    if (reason == "eos") != ended or not cut or any(token in pair.ends.ids for token in ids[:-1]):
        yield "stop_reason"
    if texts is None:
        return
    place, rollout = record["sample_id"], Rollout.from_json(record)
    if "scores" in record:
        example = texts.watched[place] if place in range(len(texts.watched)) else None
        own = judged(pair, example, rollout, texts.task) if example else {"sample_id": None}
    else:
        [index] = batch_indices(len(texts.train), 1, max(place, 0), config.seed)
        example, own = texts.train[index], {}
    if example:
        own |= {name: getattr(example, name) for name in ("prompt_ids", "teacher", "teacher_prompt_ids")}
    yield from (name for name, value in own.items() if record[name] != value)


def _finding(what: str, read: Reader, policy: Policy, records: Lines, seed: int) -> Finding:
    others, largest = 0, 0.0
    for record in records:
        rollout = Rollout.from_json(record)
        logs, bridge = read(rollout), read.pair.bridges.get(rollout.teacher)
        found = (
            replayed(logs, policy, rollout, seed) if bridge is None else _replayed_across(read, policy, rollout, logs)
        )
        others += sum(a != b for a, b in zip(found["speakers"], record["speakers"], strict=True))
        # A text goes on until the policy ends it; where it ends with an end token too, the token is the reason.
        others += sum(found["ends"][:-1])
        others += found["ends"][-1:] == [record["stop_reason"] != "policy"] and record["stop_reason"] != "eos"
        numbers = {name: record[name] for name in found if name not in ("speakers", "ends") and name in record}
        largest = max([largest, *(_difference(found[name], stored) for name, stored in numbers.items())])
        if "top" in record and bridge is None:
            largest = max([largest, *(_top_difference(*both) for both in zip(logs, record["top"], strict=True))])
    tokens = sum(len(record["completion_ids"]) for record in records)
    return Finding(what, len(records), tokens, others, largest)


def _replayed_across(read: Reader, policy: Policy, rollout: Rollout, logs: Sequence[Tensor]) -> dict[str, list[Any]]:
    """``replayed`` of a text whose teacher has a tokenizer of its own."""
    known = replayed_turns(logs, policy, rollout, read.pair.bridges[rollout.teacher])
    found = trace(read, rollout)
    numbers: dict[str, list[Any]] = {
        "log_probs": [_with_nan(own) for own in found.log_probs],
        "jsd": _with_nan(found.jsd),
    }
    return known | numbers | {"ends": [False] * len(rollout.completion_ids)}


def _with_nan(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _top_difference(logs: Tensor, stored: Sequence[Sequence[Sequence[float]]]) -> float:
    """How far what stands as the likeliest tokens at each position, with their log-probabilities, is from what is likeliest."""
    worst = 0.0
    for row, best in zip(logs, stored, strict=True):
        ids, values = [int(token) for token, _ in best], [value for _, value in best]
        if len(set(ids)) < len(ids) or max(ids) >= len(row):
            return math.inf
        likeliest = row.topk(min(TOP, len(row))).values.tolist()
        worst = max(worst, _difference(likeliest, values), _difference(row[ids].tolist(), values))
    return worst


@torch.no_grad()
def replayed(logs: Sequence[Tensor], policy: Policy, rollout: Rollout, seed: int) -> dict[str, list[Any]]:
    """What ``policy`` says along a text that is written: speakers, divergences, thresholds, after which tokens the text ends, and
    of both models ``log_probs`` and ``jsd``.

    Lists as in a `Rollout` and a `Trace`; ``logs`` are what a `Reader` says of it.
    """
    logq, logp = logs
    state = policy.init(1)
    found: dict[str, list[Any]] = {
        "speakers": [],
        "divergences": [],
        "thresholds": [],
        "ends": [],
        "log_probs": [[], []],
        "jsd": (jsd(logp, logq) / LN2).clamp(0.0, 1.0).tolist(),
    }
    for t, token in enumerate(torch.tensor(rollout.completion_ids).unsqueeze(1)):
        decision = policy.step(state, logq[t : t + 1], logp[t : t + 1], torch.tensor([t]))
        speaker = speakers(decision, token, keys_tensor([noise_key(seed, rollout.id, t)]))
        found["speakers"] += speaker.tolist()
        found["divergences"] += decision.divergence.tolist()
        found["thresholds"] += decision.thresholds.tolist()
        for who, own in ((STUDENT, logq), (TEACHER, logp)):
            found["log_probs"][who].append(own[t, token].item())
        state = policy.spoke(policy.observe(decision.state, token), speaker)
        found["ends"].append(bool(policy.ends(state)))
    return found


def _difference(found: Sequence[Any], stored: Sequence[Any]) -> float:
    """The largest relative difference of two nested lists; infinite where only one has a number, or they have other sizes."""
    if len(found) != len(stored):
        return math.inf
    worst = 0.0
    for a, b in zip(found, stored, strict=True):
        if isinstance(a, list):
            worst = max(worst, _difference(a, b))
        elif math.isnan(a) or b is None:
            worst = max(worst, 0.0 if math.isnan(a) and b is None else math.inf)
        elif a != b:
            worst = max(worst, abs(a - b) / max(abs(a), abs(b), 1.0))
    return worst


# --- all of it, and in order --------------------------------------------------------------------------------------

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
        most = tokens.get(line["step"], told)
        # With two tokenizers those are trained on that match.
        few = told <= most if "cross/coverage" in line else told == most
        if line.get("source") == "policy" and not few:
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
