"""What a training step says of the text that it generated, under the names of ``metrics.jsonl``."""

import math
import sys
from collections.abc import Sequence
from typing import Any

import psutil
import torch

from switchkd.decoding.rollouts import DecodeCost, Rollout, Rollouts, mean
from switchkd.methods.policy import TEACHER

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
