"""Whether what a run wrote down is true: its texts, read again, give the same speakers, divergences and log-probabilities.

A checkpoint holds the student that wrote the samples of its step and the rollouts of the next; the student that the run began
with wrote those of step 0 and 1. Texts of other steps were written by weights that are gone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from switchkd.checkpoint import checkpoints, load_weights, step_of, verify
from switchkd.models import Pair
from switchkd.policies import STUDENT, TEACHER, Policy
from switchkd.rollouts import Rollout
from switchkd.run_record import Lines, RunRecord
from switchkd.samples import Reader, sample_policy
from switchkd.sampling import noise_key, speakers

# How far a number may be from the one written down, relative to the larger of it and 1; another batch rounds otherwise.
TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 0.2, "float16": 0.05}
# Tokens at which, where numbers round, another speaker or end may be found: a divergence within rounding of its threshold.
MOST_SPEAKERS = {"float64": 0.0, "float32": 0.01, "bfloat16": 0.05, "float16": 0.05}


@dataclass(frozen=True)
class Finding:
    """What reading the texts of one student again found; ``largest`` is the largest relative difference of a number.

    ``other_speakers`` counts the tokens that someone else would have written, and those behind which the policy would have ended
    the text where it went on, or not where it ended.
    """

    what: str
    texts: int
    tokens: int
    other_speakers: int
    largest: float

    def holds(self, *dtypes: str) -> bool:
        """Whether the records are true, as far as numbers of these ``dtypes`` can tell; ``auto``, in old runs, was float32."""
        known = [name if name in TOLERANCE else "float32" for name in dtypes]
        most = max(MOST_SPEAKERS[name] for name in known) * self.tokens
        return self.largest <= max(TOLERANCE[name] for name in known) and self.other_speakers <= most

    def __str__(self) -> str:
        return (
            f"{self.what}: {self.texts} texts, {self.tokens} tokens read again; {self.other_speakers} speakers differ, numbers by "
            f"at most {self.largest:.1e}"
        )


def check_records(
    run: RunRecord, pair: Pair, most: int = 16, progress: Callable[[str], None] = lambda what: None
) -> Iterator[Finding]:
    """Read texts again, at most ``most`` of each kind and student; ``pair`` is the run's, as it began, and changes.

    Raises CheckpointError for a checkpoint that is damaged.
    """
    read = Reader(pair)
    policy = run.config.policy.bind(pair.tokenizer, run.config.max_new_tokens)
    done = {line["step"]: line.get("schedule", 0.0) for line in run.metrics}
    students: dict[int, Path | None] = {0: None} | {step_of(folder): folder for folder in checkpoints(run.path)}
    rollouts = run.rollouts_of([step + 1 for step in students], most)
    for step, folder in students.items():
        if folder is not None:
            verify(folder)
            load_weights(folder, pair.student)
        now = done.get(step, 0.0)
        samples = [sample for sample in run.samples if sample["step"] == step][:most]
        written = {
            f"samples of step {step}": (samples, sample_policy(run.config, policy, now, step)),
            f"rollouts of step {step + 1}": (rollouts[step + 1], policy.at(now, step)),
        }
        for what, (records, rule) in written.items():
            if records:
                progress(what)
                yield _finding(what, read, rule, records, run.config.seed)


def _finding(what: str, read: Reader, policy: Policy, records: Lines, seed: int) -> Finding:
    others, largest = 0, 0.0
    for record in records:
        found = replayed(read, policy, Rollout.from_json(record), seed)
        others += sum(a != b for a, b in zip(found["speakers"], record["speakers"], strict=True))
        # A text goes on until the policy ends it; where it ends with an end token too, the token is the reason.
        others += sum(found["ends"][:-1]) + (record["stop_reason"] == "policy" and not found["ends"][-1])
        numbers = {name: record[name] for name in found if name not in ("speakers", "ends") and name in record}
        largest = max([largest, *(_difference(found[name], stored) for name, stored in numbers.items())])
    tokens = sum(len(record["completion_ids"]) for record in records)
    return Finding(what, len(records), tokens, others, largest)


@torch.no_grad()
def replayed(read: Reader, policy: Policy, rollout: Rollout, seed: int) -> dict[str, list[Any]]:
    """What ``policy`` says along a text that is written: speakers, divergences, thresholds, of both models ``log_probs``, and
    after which tokens the text ends.

    Lists as in a `Rollout` and a `Trace`; both models read the whole text at once.
    """
    logq, logp = read(rollout)
    state = policy.init(1)
    found: dict[str, list[Any]] = {
        "speakers": [],
        "divergences": [],
        "thresholds": [],
        "ends": [],
        "log_probs": [[], []],
    }
    for t, token in enumerate(torch.tensor(rollout.completion_ids).unsqueeze(1)):
        decision = policy.step(state, logq[t : t + 1], logp[t : t + 1], torch.tensor([t]))
        speaker = speakers(decision, token, [noise_key(seed, rollout.sample_id, t)])
        found["speakers"] += speaker.tolist()
        found["divergences"] += decision.divergence.tolist()
        found["thresholds"] += decision.thresholds.tolist()
        for who, logs in ((STUDENT, logq), (TEACHER, logp)):
            found["log_probs"][who].append(logs[t, token].item())
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
