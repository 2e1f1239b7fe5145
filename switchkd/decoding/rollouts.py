"""The one record that flows from decoding to training, what decoding it cost, and what a step says of it in ``metrics.jsonl``."""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, NotRequired, TypedDict, cast

import psutil
import torch

from switchkd.base.errors import DataError, NonFiniteError, SwitchKDError
from switchkd.base.plain import TokenId, first, related, shown
from switchkd.data.texts import Text
from switchkd.methods.policy import TEACHER


class RolloutRecord(TypedDict):
    """What ``Rollout.to_json`` writes, by type."""

    sample_id: int
    prompt_ids: list[TokenId]
    completion_ids: list[TokenId]
    speakers: list[Annotated[int, range(2)]]
    divergences: list[float | None]
    thresholds: list[float | None]
    stop_reason: str
    error: str | None
    teacher_prompt_ids: list[TokenId] | None
    teacher_completion_ids: NotRequired[list[TokenId]]
    teacher: str


ENDS = ("eos", "policy", "length")
FAILURES = ("empty_prompt", "prompt_too_long", "invalid_token", "non_finite")
BY_TOKEN = ("speakers", "divergences", "thresholds")


@related(RolloutRecord)
def _by_token(record: Mapping[str, Any]) -> str:
    count, reason = len(record["completion_ids"]), record["stop_reason"]
    problems = {
        f"{name} has {len(record[name])} entries for {count} tokens": len(record[name]) != count for name in BY_TOKEN
    }
    problems[f"stop_reason {shown(reason)} is none of {', '.join(ENDS + FAILURES)}"] = reason not in ENDS + FAILURES
    problems[f"stop_reason is {shown(reason)}, and error is {shown(record['error'])}"] = (reason in ENDS) != (
        record["error"] is None
    )
    return first(problems)


@dataclass(frozen=True)
class Rollout(Text):
    """A decoded text, with what was decided at each of its tokens.

    ``divergences[t]`` is what the policy saw there, in the policy's own divergence and unit, NaN where it did not look;
    ``thresholds[t]`` what it compared that with, NaN where with nothing. ``stop_reason`` is ``eos`` (the last token is an
    end-of-sequence id), ``policy`` (the rule ended the text behind the last token), ``length`` (the budget ran out), or, with the
    words in ``error``, ``empty_prompt``, ``prompt_too_long``, ``invalid_token`` or ``non_finite``.

    ``said``, if it was asked for and the teacher read every token, are the states from which the loss needs no second forward.
    """

    divergences: list[float]
    thresholds: list[float]
    stop_reason: str
    error: str | None = None

    def failure(self, where: str) -> SwitchKDError:
        """The error to raise for a row that could not be decoded; ``where`` says what it was for."""
        error = NonFiniteError if self.stop_reason == "non_finite" else DataError
        return error(f"{where}: {self.error}")

    @property
    def teacher_share(self) -> float:
        """Share of the completion that the teacher wrote; NaN if it is empty."""
        return mean(self.speakers)

    def to_json(self) -> RolloutRecord:
        """A JSON-ready dictionary of everything but what the teacher said; NaN becomes null."""
        record = {name: getattr(self, "id" if name == "sample_id" else name) for name in RolloutRecord.__annotations__}
        record |= {name: [None if math.isnan(v) else v for v in record[name]] for name in _WITH_NAN}
        if self.teacher_completion_ids is None:
            del record["teacher_completion_ids"]
        return cast(RolloutRecord, record)

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> "Rollout":
        """The rollout that ``to_json`` described; what else stands beside it is passed over."""
        own = {name: record[name] for name in RolloutRecord.__annotations__ if name in record}
        own["id"] = own.pop("sample_id")
        return Rollout(**own | {name: [math.nan if v is None else v for v in own[name]] for name in _WITH_NAN})


_WITH_NAN = ("divergences", "thresholds")


@dataclass
class DecodeCost:
    """What decoding cost. A forward counts once for each row in it; ``prefill`` counts prompt and catch-up tokens.

    ``blocks`` counts a round once for each row in it, and ``block_positions`` the positions that those blocks had; at
    ``compared`` positions both models ran, and at ``equal`` of them both, given one noise, would have written the same token.
    ``words`` counts those of texts that models with different tokenizers write together, else it is 0.
    """

    seconds: float = 0.0
    kept_tokens: int = 0
    teacher_tokens: int = 0
    student_forwards: int = 0
    teacher_forwards: int = 0
    student_prefill_tokens: int = 0
    teacher_prefill_tokens: int = 0
    rounds: int = 0
    blocks: int = 0
    block_positions: int = 0
    compared: int = 0
    equal: int = 0
    words: int = 0

    def __add__(self, other: "DecodeCost") -> "DecodeCost":
        return DecodeCost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def summary(self) -> dict[str, float]:
        """Ratios a person wants to see: forwards of each model per kept token, teacher share, tokens per second, how often the
        two models agree, and how many positions a block has and how many of them it keeps."""
        kept, blocks = self.kept_tokens or math.nan, self.blocks or math.nan
        return {
            "student_forwards_per_token": self.student_forwards / kept,
            "teacher_forwards_per_token": self.teacher_forwards / kept,
            "teacher_share": self.teacher_tokens / kept,
            "tokens_per_second": self.kept_tokens / self.seconds if self.seconds else math.nan,
            "agreement": self.equal / self.compared if self.compared else math.nan,
            "block_length": self.block_positions / blocks,
            "kept_per_block": self.kept_tokens / blocks,
        }


class Rollouts(list[Rollout]):
    """The rollouts of one ``decode`` call, in the order of its prompts, with the ``cost`` of making them.

    ``rows_that_fit`` is how many rows memory held at a time where it ran out with more; None where it did not.
    """

    def __init__(
        self, rollouts: Iterable[Rollout] = (), cost: DecodeCost | None = None, rows_that_fit: int | None = None
    ):
        super().__init__(rollouts)
        self.cost, self.rows_that_fit = cost or DecodeCost(), rows_that_fit


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean without NaNs; NaN if nothing is left."""
    kept = [v for v in values if not math.isnan(v)]
    return sum(kept) / len(kept) if kept else math.nan


# --- metrics ------------------------------------------------------------------------------------------------------

Metrics = dict[str, Any]
# Bands of response positions, from 0, in which divergences are averaged: the first and the last of each.
BANDS = {"0-10": (0, 10), "11-50": (11, 50), "51+": (51, sys.maxsize - 1)}


def rollout_metrics(rollouts: Rollouts) -> Metrics:
    """What a generated step shows: lengths, who spoke, where the teacher first took over, and what decoding cost."""
    cost: DecodeCost = rollouts.cost
    firsts = [float(r.speakers.index(TEACHER)) for r in rollouts if TEACHER in r.speakers]
    summary = cost.summary()
    return {
        "completions/mean_length": mean(float(len(r.completion_ids)) for r in rollouts),
        "completions/eos_share": mean(float(r.stop_reason == "eos") for r in rollouts),
        **_ended_by_the_policy(rollouts),
        "switch/teacher_share": summary.pop("teacher_share"),
        "switch/switched_share": len(firsts) / len(rollouts),
        "switch/first_switch": or_none(mean(firsts)),
        "switch/divergence_mean": or_none(mean(d for r in rollouts for d in r.divergences)),
        "switch/threshold": or_none(mean(d for r in rollouts for d in r.thresholds)),
        **divergence_bands(rollouts),
        **{f"decode/{name}": or_none(value) for name, value in summary.items()},
    }


def _ended_by_the_policy(rollouts: Rollouts) -> Metrics:
    """The share of such texts, where there are any: few rules end a text."""
    share = mean(float(r.stop_reason == "policy") for r in rollouts)
    return {"completions/policy_end_share": share} if share else {}


def divergence_bands(rollouts: Sequence[Rollout]) -> Metrics:
    """Mean divergence in each band of response positions in which the policy looked."""
    means = {
        band: mean(d for r in rollouts for d in r.divergences[first : last + 1])
        for band, (first, last) in BANDS.items()
    }
    return {f"switch/divergence_{band}": value for band, value in means.items() if not math.isnan(value)}


def or_none(value: float) -> float | None:
    return None if math.isnan(value) else value  # JSON has no NaN


def memory_bytes(device: torch.device) -> int:
    """The most that a device has held since this was asked last, or on a CPU what the process holds now."""
    if device.type != "cuda":
        return psutil.Process().memory_info().rss
    most = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return most
