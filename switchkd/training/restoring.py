"""What of a checkpoint's state still means something under the settings that a run goes on with; the rest is dropped, and said.

A rule's memory belongs to that rule, a best score to what it was measured by, and the rows of a step to the run, however many
processes share them.
"""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path
from typing import Any

from switchkd.base.errors import CheckpointError, ConfigError, DataError, SwitchKDWarning
from switchkd.base.manifest import STAMP, json_sha256, put_aside, take_away, verify
from switchkd.base.settings import to_dict
from switchkd.decoding.rollouts import Rollout
from switchkd.evaluation.results import EVALUATION, completions_file, read_results, take_out
from switchkd.methods.rules import name_of
from switchkd.models.saved_student import SCORED, STUDENT, SavedStudent
from switchkd.training.checkpoint import BEST, PREFIX, State, bests, checkpoints, numbered, read_state, step_of
from switchkd.training.records import METRICS, ROLLOUTS, SAMPLES, keep_until
from switchkd.training.settings import TrainConfig

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


# --- from where ---------------------------------------------------------------------------------------------------


def whole_checkpoint(run: Path, resume_from: str = "", with_best: bool = True) -> Path:
    """The checkpoint to go on from: the newest that is whole, with a warning if newer ones are not; or the one that is named.

    ``with_best``: the best student so far, if there is one, must be whole too.

    Raises:
        CheckpointError: there is none that is whole, or the named one is not.
    """
    found = [_named(run, resume_from)] if resume_from else checkpoints(run)[::-1]
    damaged: list[CheckpointError] = []
    for folder in found:
        try:
            _verify_all(folder, with_best)
        except CheckpointError as error:
            damaged.append(error)
            continue
        if damaged:
            warnings.warn(
                f"{'; '.join(map(str, damaged))}. The run goes on from {folder}", SwitchKDWarning, stacklevel=2
            )
        return folder
    others = ", ".join(folder.name for folder in checkpoints(run) if folder not in found)
    out = f"there {'are' if ',' in others else 'is'} {others}: give --resume-from, or --resume for the newest that is whole"
    raise CheckpointError(
        f"{'; '.join(map(str, damaged)) or f'{run} holds no checkpoint to resume from'}; "
        + (out if others else "start without --resume, in another --output-dir")
    )


def _named(run: Path, resume_from: str) -> Path:
    """``run/checkpoint-N`` from its path or name."""
    folder = run / Path(resume_from).name
    if Path(resume_from).name != resume_from and Path(resume_from).resolve() != folder.resolve():
        raise CheckpointError(f"resume_from {resume_from} does not lie in {run}, the run that is to go on")
    if folder not in numbered(run, PREFIX):
        known = ", ".join(each.name for each in checkpoints(run)) or "none"
        raise CheckpointError(f"resume_from {resume_from}: no such checkpoint; {run} holds {known}")
    return folder


def _verify_all(folder: Path, with_best: bool) -> None:
    """Verify a checkpoint, and the best student that goes with it."""
    verify(folder)
    if (best := read_state(folder)["best"]) and with_best:
        try:
            verify(folder.parent / f"{BEST}{best['step']:g}")
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}; {folder.name} is whole, and goes on without that best student if you allow it to be forgotten: "
                "--allow-change metric_for_best_model"
            ) from error


def take_back(run: Path, step: int, told: int, ended: bool) -> None:
    """Make the directory what it was at ``step``, with metrics up to step ``told``: it is from there that the run goes on.

    Later lines of the records go, and so do later best students, which are made again. Later checkpoints are set aside, and so are
    the student and its scores, unless they are of this step and the run has ``ended`` with it.
    """
    for folder in numbered(run, PREFIX):
        if step_of(folder) > step:
            _set_aside(folder, "is later than the step that the run goes on from")
    for folder in bests(run):
        if step_of(folder) > step:
            take_away(folder)
    _take_back_student(run, step, ended)
    for name, last in ((ROLLOUTS, step), (METRICS, told), (SAMPLES, told)):
        keep_until(run / name, last)


def _take_back_student(run: Path, step: int, ended: bool) -> None:
    """Put the student and its scores aside, unless they are what a run that has ``ended`` at this step would write again."""
    try:
        student = SavedStudent.of(run)
    except CheckpointError:
        student = None
    folder = run / STUDENT
    if ended and (student.step == step if student else not (folder / STAMP).exists()):
        return
    if os.path.lexists(folder):
        _set_aside(folder, f"is the student of another step than {step}, from which the run goes on")
    for file in sorted(run.glob("evaluation*.json")):
        if _scores_a_student(file):
            _set_aside(file, f"has scores of another student than that of step {step}, from which the run goes on")
            put_aside(completions_file(file))


def _scores_a_student(file: Path) -> bool:
    """Whether an evaluation is of a run's student; of the run's own, only that part is taken out where there is another."""
    try:
        results = read_results(file)
    except DataError:
        return False  # nobody reads its scores
    scored = any(name in SCORED for name in results)
    return scored and not (file.name == EVALUATION and take_out(file, results, SCORED))


def _set_aside(path: Path, why: str) -> None:
    warnings.warn(f"{path} {why}: it is now {put_aside(path)}, and may be deleted", SwitchKDWarning, stacklevel=4)
