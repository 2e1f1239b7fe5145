"""What of a checkpoint's state still means something under the settings that a run goes on with; the rest is dropped, and said.

A rule's memory belongs to that rule, a best score to what it was measured by, and the rows of a step to the run, however many
processes share them.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

from switchkd.checkpoint import BEST, State
from switchkd.config import TrainConfig, name_of, to_dict
from switchkd.errors import CheckpointError, ConfigError, SwitchKDWarning
from switchkd.manifest import verify
from switchkd.rollouts import Rollout
from switchkd.teacher_store import json_sha256

RULES = ("policy", "objective", "mix")
BEST_SETTING = "metric_for_best_model"
_MOVE_NO_SCORE = {"eval_steps", "eval_on_start"}


def rules_of(config: TrainConfig) -> dict[str, str]:
    """The names of a run's rules."""
    return {noun: name_of(getattr(config, noun)) for noun in RULES}


def best_of(config: TrainConfig, scored_on: str) -> str:
    """A checksum of what a best score is measured by: the metric, ``scored_on`` (texts and teacher), and how it is evaluated."""
    how = {k: v for k, v in to_dict(config).items() if k.startswith("eval_") and k not in _MOVE_NO_SCORE}
    return json_sha256([config.metric_for_best_model, config.task, scored_on, how])


def memory(state: State, noun: str, config: TrainConfig) -> dict[str, Any]:
    """What the objective or mix (``noun``) remembers; a new memory if the checkpoint is of another rule.

    Raises CheckpointError for a memory that this rule did not write.
    """
    rule, kept = getattr(config, noun), state[noun]  # type: ignore[literal-required]
    fresh = rule.memory()
    if changed := _other_rule(state, noun, config):
        if kept:
            _warn(f"the run goes on with another {noun} ({changed}): what the one before had learned is dropped")
        return fresh
    if kept.keys() != fresh.keys() or not all(_is_number(value) for value in kept.values()):
        raise CheckpointError(
            f"the checkpoint of step {state['step']} has no memory of the {noun} {name_of(rule)}: {kept}"
        )
    return kept


def replay(state: State, config: TrainConfig) -> list[Rollout]:
    """The rollouts kept for replay; none if another policy wrote them, or another mix kept them."""
    changed = [words for noun in ("policy", "mix") if (words := _other_rule(state, noun, config))]
    if changed and state["replay"]:
        _warn(f"texts that were kept for replay are dropped: they are of other rules ({', '.join(changed)})")
    return [] if changed else [Rollout.from_json(record) for record in state["replay"]]


def best(state: State, config: TrainConfig, scored_on: str, run: Path) -> dict[str, float]:
    """The best student so far; {} if none was looked for, or it was measured by something else, or may be forgotten."""
    found = state["best"]
    if not found:
        return {}
    if (
        state.get("best_of", best_of(config, scored_on)) != best_of(config, scored_on)
        or not config.metric_for_best_model
    ):
        _warn(
            f"the best student so far, of step {found['step']}, is forgotten: it was chosen by another measure than now"
        )
        return {}
    if BEST_SETTING in config.allow_change:
        try:
            verify(run / f"{BEST}{found['step']:g}")
        except CheckpointError as error:
            _warn(f"the best student so far is forgotten: {error}")
            return {}
    return found if math.isfinite(found["score"]) else {}


def rows_per_step(state: State, own: int, rows_per_rank: int, processes: int) -> int:
    """Rows of a step: those that the checkpoint's steps had, unless settings changed (``own`` and ``rows_per_rank`` are theirs).

    Raises ConfigError where the processes cannot share them evenly.
    """
    before = state.get("rows_per_step", own)
    if before == own or state.get("rows_per_rank", rows_per_rank) != rows_per_rank:
        return own
    if before % processes:
        raise ConfigError(
            f"a step of this run reads {before} rows, which {processes} processes cannot share evenly; go on with a number of "
            "processes that divides it, or give other rows: --gradient-accumulation-steps N --allow-change "
            "gradient_accumulation_steps"
        )
    _warn(
        f"the run goes on with {processes} processes; together they still read {before} rows a step, as those before did"
    )
    return before


def _other_rule(state: State, noun: str, config: TrainConfig) -> str:
    """The name of the checkpoint's rule and of this one, where they differ."""
    before, now = state.get("rules", {}).get(noun), rules_of(config)[noun]
    if before is None and noun in ("objective", "mix"):  # of a version that did not write them down
        same = state[noun].keys() == getattr(config, noun).memory().keys()  # type: ignore[literal-required]
        return "" if same else f"unknown -> {now}"
    return f"{before} -> {now}" if before not in (None, now) else ""


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, (int, float))


def _warn(words: str) -> None:
    warnings.warn(words, SwitchKDWarning, stacklevel=3)
