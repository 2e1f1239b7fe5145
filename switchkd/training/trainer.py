"""One training loop, and all the state that moves: step, optimizer, tokens seen, replay buffer, memories of the rules.

Each optimizer step takes the next prompts, gets their text from where the mix says, and lowers the objective at every
response token. All choices come from (seed, step), so a run that stops and resumes is the run that did not stop.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from switchkd.base import signals
from switchkd.base.errors import ConfigError, NoMemoryError, NonFiniteError, ServerError
from switchkd.base.lock import Check
from switchkd.base.storage import append_lines
from switchkd.base.terminal import console
from switchkd.data.texts import TokenizedExample
from switchkd.decoding.rollouts import Metrics, Rollouts, memory_bytes, or_none, rollout_metrics
from switchkd.evaluation.statistics import lower_is_better
from switchkd.forward.sharding import gather, whole
from switchkd.methods.objective import PlainText
from switchkd.models.adapters import check_trainable, has_adapter
from switchkd.models.pair import Pair
from switchkd.models.settings import dtype_name
from switchkd.teachers.states import TeacherCache
from switchkd.training import restoring
from switchkd.training.checkpoint import (
    State,
    Weights,
    check_room,
    load_best,
    load_checkpoint,
    moments_of,
    prune,
    save_best,
    save_checkpoint,
)
from switchkd.training.learner import Learner, Part
from switchkd.training.optimizer import learning_rate, schedule_progress, total_steps, with_learning_rate
from switchkd.training.processes import (
    from_main,
    in_first_group,
    new_accelerator,
    slowest,
    stop_together,
    with_launchers_settings,
)
from switchkd.training.reading import OnRound, Reading
from switchkd.training.records import METRICS, ROLLOUTS, SAMPLES, sync_records
from switchkd.training.restoring import take_back, whole_checkpoint
from switchkd.training.settings import TrainConfig

OnStep = Callable[[Metrics, Rollouts], None]  # told of a step's metrics and the rollouts made in it
# Told what begins now: writing, reading, updating, validating, evaluating, sampling, saving.
OnPhase = Callable[[str], None]


def _say(loud: bool, line: str) -> None:
    if loud:
        console.print(line, soft_wrap=True)


class Trainer:
    """Distils ``pair.student`` on ``examples`` as ``config`` says; ``step`` is the number of updates done.

    ``teacher_cache`` is of ``examples``, ``validation`` for a mix that looks at a validation loss, ``corpus`` for a
    language-modelling loss beside the objective. ``check_place`` is called before anything is written, and raises if the run
    directory is not the one any more that the run began in. ``scored_on`` is a checksum of what evaluations score on.
    ``on_phase`` may be set to follow what the trainer does.
    """

    def __init__(
        self,
        pair: Pair,
        examples: Sequence[TokenizedExample],
        config: TrainConfig,
        accelerator: Accelerator | None = None,
        *,
        teacher_cache: TeacherCache | None = None,
        validation: Sequence[TokenizedExample] = (),
        corpus: Sequence[TokenizedExample] = (),
        check_place: Check = lambda: None,
        scored_on: str = "",
    ):
        self.accelerator = accelerator or new_accelerator()
        config = with_launchers_settings(self.accelerator, config)
        check_trainable(pair.student, config.merge)
        loud = self.accelerator.is_main_process and not config.quiet
        self.config = config = with_learning_rate(config, pair.student, partial(_say, loud))
        self.pair, self.examples, self.validation, self.corpus = pair, examples, validation, corpus
        self.check_place, self.scored_on = check_place, scored_on
        self.on_phase: OnPhase = lambda phase: None
        if config.mix.validation_steps and not validation:
            raise ConfigError(
                "the adaptive mix looks at a validation loss: give validation_file, or eval_file with eval_samples"
            )
        self.reading = Reading(pair, examples, config, self.accelerator, teacher_cache)
        self.objective_memory = config.objective.memory()
        self.step = self.num_tokens = 0
        self.seconds = 0.0
        self.best: dict[str, float] = {}
        # What the files do not say yet of the last step: its metrics ({} before the first step), None if they say all.
        self.due: Metrics | None = {}
        self.run = Path(config.output_dir)
        self.learner = Learner(pair, config, self.accelerator)
        with whole(self.student):
            self.config = self.reading.config = replace(config, costs=self.reading.costs())

    @property
    def total_steps(self) -> float:
        """Steps of the whole run, if no budget ends it before."""
        return total_steps(self.config, len(self.examples), self.reading.rows_per_step)

    @property
    def student(self) -> PreTrainedModel:
        """The student as it is."""
        return self.learner.student

    def train(
        self,
        on_step: OnStep = lambda *_: None,
        on_round: OnRound | None = None,
        evaluate: Callable[[PreTrainedModel], dict[str, float]] | None = None,
        sample: Callable[[float], list[dict[str, Any]]] | None = None,
    ) -> None:
        """Run to the last step: a line in ``metrics.jsonl`` for every step, rollouts, checkpoints.

        ``on_step`` is told of every step's metrics and the rollouts made in it, ``on_round`` of every decoding round's cost so far
        in its step. ``evaluate`` gives the student's scores every ``eval_steps``. ``sample``, which is told ``schedule``, gives
        records of its text before the first step, every ``sample_steps`` and at the end. Both must leave the student and random
        states as they are.

        Raises:
            NonFiniteError: a loss or gradient is not finite; the weights stay as they were before that step.
            NoMemoryError: one row is too much for the memory.
            ServerError: a teacher behind a server gives no usable answer any more.
            Stopped: a signal asked for an end. The step in which it came is dropped.
            DiskError: something cannot be written. The last checkpoint stands.

        Except for DiskError, a checkpoint of the last finished step is saved, from which ``resume`` goes on.
        """
        rollouts = Rollouts()
        try:
            if self.step == 0:
                self._prove_room()
            while self.due is not None or self.progress < 1:
                if self.due is None:
                    stop_together(self.accelerator)
                    self.due, rollouts = self.train_step(on_round)
                    if self.accelerator.is_main_process:
                        self.check_place()
                        append_lines(self.run / ROLLOUTS, [{"step": self.step, **r.to_json()} for r in rollouts])
                self._tell(rollouts, on_step, evaluate, sample)
        except (signals.Stopped, NonFiniteError, NoMemoryError, ServerError) as stop:
            # Of several processes one may have failed alone; a signal is obeyed by all at once.
            if self.accelerator.num_processes == 1 or isinstance(stop, signals.Stopped):
                if broken := self.learner.broken_weight():
                    stop.add_note(f"{broken} is not finite since step {self.step}, which is not saved")
                else:
                    self.save()
            raise

    def _tell(
        self,
        rollouts: Rollouts,
        on_step: OnStep,
        evaluate: Callable[[PreTrainedModel], dict[str, float]] | None,
        sample: Callable[[float], list[dict[str, Any]]] | None,
    ) -> None:
        """Evaluate, sample and save where that is due after a step, and write what there is to say of it, all or nothing."""
        assert self.due is not None
        metrics, steps, records = dict(self.due), self.config.eval_steps, []
        main, sampling = self.accelerator.is_main_process, self._every(self.config.sample_steps)
        asks = in_first_group(self.accelerator, self.reading.together)
        scoring = bool(metrics and steps) and self.step % steps == 0
        weights = self.learner.masters.whole() if scoring and self.config.metric_for_best_model else {}
        with whole(self.student) if scoring or sampling else nullcontext():
            if asks and scoring and evaluate:
                self.on_phase("evaluating")
                metrics |= self._evaluated(evaluate, weights)
            if asks and sampling and sample:
                self.on_phase("sampling")
                records = [{"step": self.step, **record} for record in sample(self.schedule)]
        if main:
            self.check_place()
            append_lines(self.run / SAMPLES, records)
            if metrics:
                append_lines(self.run / METRICS, [metrics])
                on_step(metrics, rollouts)
        self.due = None
        if metrics and self._every(self.config.save_steps, at_end=True):
            self.save()

    def _every(self, steps: int, at_end: bool = False) -> bool:
        """Whether something is due now that happens every so many steps (0: never) and at the end (``at_end``: in any case)."""
        ended = self.progress >= 1 and (at_end or steps > 0)
        return ended or (steps > 0 and self.step % steps == 0)

    def train_step(self, on_round: OnRound | None = None) -> tuple[Metrics, Rollouts]:
        """One optimizer step; returns its metrics and the rollouts it made (none for a step on the data).

        A step that does not come to its update leaves no trace in the trainer's state.
        """
        before = self.reading.replay, self.reading.memory
        try:
            return self._train_step(on_round)
        except BaseException:
            self.reading.replay, self.reading.memory = before
            raise

    def _train_step(self, on_round: OnRound | None) -> tuple[Metrics, Rollouts]:
        start = time.perf_counter()
        gather(self.student)
        self._look_at_validation()
        source = self.reading.source(self.step, self.schedule)
        self.on_phase("reading" if source in ("examples", "replay") else "writing")
        rows, rollouts = self.reading.rows(source, self.step, self.schedule, on_round)
        read_at = time.perf_counter()
        objective = self.config.objective.at(self.objective_memory)
        parts = [Part(rows, objective)]
        if self.corpus:
            parts.append(Part(self.reading.next(self.corpus), PlainText(), self.config.lm_weight))
        rate = learning_rate(self.config, self.step, self.expected_steps)
        self.on_phase("updating")
        losses, tokens, grad_norm = self.learner.update(parts, self.step, rate)
        self.step += 1
        self.reading.rows_read += self.reading.rows_per_step
        teacher_seconds = sum(lap for _, lap in self.learner.watch.take())
        self.num_tokens += tokens
        seconds = slowest(self.accelerator, time.perf_counter() - start)
        self.seconds += seconds
        self.objective_memory = self.config.objective.remember(self.objective_memory, losses[0], self.schedule)
        metrics = {
            "step": self.step,
            "loss": losses[0],
            "grad_norm": grad_norm,
            "learning_rate": rate,
            "source": source,
            "progress": self.progress,
            "schedule": self.schedule,
            "num_tokens": self.num_tokens,
            "seconds": seconds,
            "seconds/generate": read_at - start,
            "seconds/teacher": teacher_seconds,
            "seconds/update": max(seconds - (read_at - start) - teacher_seconds, 0.0),
            "memory_gib": memory_bytes(self.accelerator.device) / 2**30,
            "tokens_per_second": tokens / seconds,
        }
        if self.corpus:
            metrics["lm_loss"] = losses[1]
        if self.learner.balance:
            metrics["aux_loss"] = losses[-1]
        metrics |= self.learner.teachers.tally.take()
        for name, memory in (("objective", self.objective_memory), ("mix", self.reading.memory)):
            metrics |= {f"{name}/{key}": value for key, value in memory.items()}
        if rollouts:
            metrics |= rollout_metrics(rollouts)
        return metrics, rollouts

    @property
    def progress(self) -> float:
        """Share of the run that is done: of its steps, or of the tokens or the time that it may take; 1 at the end."""
        shares = [self.step / self.total_steps if self.total_steps else 1.0]
        if self.config.max_train_tokens:
            shares.append(self.num_tokens / self.config.max_train_tokens)
        if self.config.max_train_seconds:
            shares.append(self.seconds / self.config.max_train_seconds)
        return min(max(shares), 1.0)

    @property
    def expected_steps(self) -> float:
        """Steps that the run will have had, as far as its budgets tell by now; infinite before the first step."""
        budget = self.config.max_train_tokens or self.config.max_train_seconds
        return self.step / self.progress if budget and self.step else self.total_steps

    @property
    def schedule(self) -> float:
        """How far everything that changes over training is in the coming step: 0 in the first, 1 in the last."""
        return schedule_progress(self.step, self.expected_steps)

    def _evaluated(self, evaluate: Callable[[PreTrainedModel], dict[str, float]], weights: Weights) -> Metrics:
        """The student's scores now; the best student so far is kept, with its masters, ``weights``."""
        start = time.perf_counter()
        scores = evaluate(self.student)
        if name := self.config.metric_for_best_model:
            sign = -1 if lower_is_better(name) else 1
            better = not self.best or sign * scores[name] > sign * self.best["score"]
            if better and math.isfinite(scores[name]):
                self.check_place()
                self.best = {"step": self.step, "score": scores[name]}
                if self.accelerator.is_main_process:
                    save_best(self.run, self.step, self.student, self.pair.tokenizer, weights)
        shown = {f"eval/{score}": or_none(value) for score, value in scores.items()}
        return {**shown, "seconds/evaluate": time.perf_counter() - start}

    def _prove_room(self) -> None:
        """Save before the first step: that proves that a checkpoint can be written, and says now if there is no room for more."""
        self.save()
        if self.accelerator.is_main_process:
            students = 3 if self.config.metric_for_best_model else 1
            check_room(self.run, self.pair.student, self.config.save_total_limit, students)

    def save(self) -> None:
        """Write a checkpoint of this step, whole or not at all; raises NonFiniteError and writes none if a weight is not finite."""
        self.on_phase("saving")
        if broken := self.learner.broken_weight():
            since = "after the update; lower learning_rate" if self.step else "before training; take another student"
            raise NonFiniteError(f"step {self.step}: {broken} is not finite {since}")
        weights, moments = self.learner.masters.whole(), moments_of(self.learner.masters, self.learner.optimizer)
        with whole(self.student):
            if self.accelerator.is_main_process:
                self.check_place()
                sync_records(self.run)
                keep, tokenizer = self.config.save_total_limit, self.pair.tokenizer
                save_checkpoint(self.run, self._state(), self.student, tokenizer, weights, moments, keep)
            self.accelerator.wait_for_everyone()

    def _state(self) -> State:
        return {
            "step": self.step,
            "num_tokens": self.num_tokens,
            "seconds": self.seconds,
            "best": self.best,
            "due": self.due,
            "objective": self.objective_memory,
            "mix": self.reading.memory,
            "replay": [rollout.to_json() for rollout in self.reading.replay],
            "best_of": restoring.best_of(self.config, self.scored_on),
            "rules": restoring.rules_of(self.config),
            "rows": self.reading.rows_read,
            "rows_per_step": self.reading.rows_per_step,
            "rows_per_rank": self.reading.rows_by_settings,
        }

    def resume(self) -> None:
        """Continue from the newest whole checkpoint, or from ``resume_from``; what is later in the directory is taken back.

        What the state says of other rules, or of another measure, than the run has now is dropped, with a warning. Raises
        CheckpointError if the run cannot go on, ConfigError if these processes cannot share the rows of a step.
        """
        config, reading, ranks = self.config, self.reading, self.accelerator.num_processes
        with_best = restoring.BEST_SETTING not in config.allow_change
        folder = from_main(self.accelerator, partial(whole_checkpoint, self.run, config.resume_from, with_best))
        state = load_checkpoint(folder, self.student, self.learner.masters, self.learner.optimizer)
        self.step, self.num_tokens, self.seconds = state["step"], state["num_tokens"], state["seconds"]
        self.due, self.best = state["due"], restoring.best(state, config, self.scored_on, self.run)
        self.objective_memory = restoring.memory(state, "objective", config)
        reading.memory = restoring.memory(state, "mix", config)
        reading.replay = restoring.replay(state, config)
        reading.rows_read = state.get("rows", self.step * reading.rows_per_step)
        reading.share(restoring.rows_per_step(state, reading.rows_per_step, reading.rows_by_settings, ranks))
        if self.accelerator.is_main_process:
            told = self.due is None
            take_back(self.run, self.step, self.step if told else self.step - 1, ended=told and self.progress >= 1)
            prune(self.run, self.config.save_total_limit)

    def load_best(self) -> None:
        """Take the weights of the best student that evaluations saw, if they looked for one, on every rank."""
        self.best = from_main(self.accelerator, lambda: self.best)
        if self.best:
            load_best(self.run, int(self.best["step"]), self.student, self.learner.masters)

    @property
    def save_dtype(self) -> torch.dtype:
        """The dtype that the student is saved in at the end."""
        name: str = self.config.save_dtype
        if name == "auto":
            own = has_adapter(self.student) and not self.config.merge  # an adapter stays as it was trained
            name = dtype_name(self.learner.masters.dtype) if own else self.pair.folder_dtype
        dtype: torch.dtype = getattr(torch, name)
        return dtype

    def final_weights(self) -> Weights:
        """The masters, whole, rounded now to the dtype that they are saved in. All ranks must ask."""
        self.learner.masters.round_to(self.save_dtype)
        return self.learner.masters.whole()

    def _look_at_validation(self) -> None:
        """Tell the mix, where it wants to know, the mean negative log-likelihood (nats) of the validation completions."""
        every = self.config.mix.validation_steps
        if not every or self.step % every:
            return
        self.on_phase("validating")
        total_loss, tokens = self.learner.negative_log_likelihood(self.validation)
        self.reading.memory = self.config.mix.remember(self.reading.memory, total_loss / max(tokens, 1))
