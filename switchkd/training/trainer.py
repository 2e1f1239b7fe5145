"""One training loop, and all the state that moves: step, optimizer, tokens seen, replay buffer, memories of the rules.

Each optimizer step takes the next prompts, gets their text from where the mix says, and lowers the objective at every
response token. All choices come from (seed, step), so a run that stops and resumes is the run that did not stop.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedModel

from switchkd.base import signals
from switchkd.base.errors import ConfigError, NoMemoryError, NonFiniteError, SwitchKDWarning
from switchkd.base.lock import Check
from switchkd.base.memory import halving
from switchkd.base.storage import append_lines
from switchkd.data.texts import Batch, TokenizedExample, batch_indices, collate
from switchkd.decoding.examples import decode_examples
from switchkd.decoding.metrics import Metrics, memory_bytes, or_none, rollout_metrics
from switchkd.decoding.pace import Stopwatch
from switchkd.decoding.rollouts import DecodeCost, Rollout, Rollouts
from switchkd.evaluation.statistics import lower_is_better
from switchkd.forward.head import Head, response_hidden
from switchkd.forward.modes import evaluating, restoring_modes
from switchkd.forward.sharding import clip, gather, is_sharded, reduce_in_next_backward, shard, whole
from switchkd.forward.text_path import freeze_beside_text, frozen_note
from switchkd.methods.mixes import Source
from switchkd.methods.objective import Objective, PlainText
from switchkd.methods.sampling import Use, keyed_uniform, noise_key
from switchkd.models.adapters import check_trainable, has_adapter
from switchkd.models.pair import Pair
from switchkd.models.settings import dtype_name
from switchkd.teachers.asked import Rows, Teachers
from switchkd.teachers.said import Teacher
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
from switchkd.training.loss import balance_coefficient, balancing, response_tokens, total
from switchkd.training.nonfinite import blame, broken_weight
from switchkd.training.optimizer import Masters, adamw, learning_rate, schedule_progress, total_steps
from switchkd.training.processes import (
    all_rollouts,
    from_main,
    new_accelerator,
    slowest,
    stop_together,
    with_launchers_settings,
)
from switchkd.training.records import METRICS, ROLLOUTS, SAMPLES, sync_records
from switchkd.training.restoring import take_back, whole_checkpoint
from switchkd.training.settings import TrainConfig

OnStep = Callable[[Metrics, Rollouts], None]  # told of a step's metrics and the rollouts made in it
OnRound = Callable[[DecodeCost], None]  # told of what decoding has cost so far in the step


@dataclass(frozen=True)
class _Part:
    """Rows of a step and what is lowered on them: the objective's mean, times a weight."""

    rows: Rows
    objective: Objective
    weight: float = 1.0


class Trainer:
    """Distils ``pair.student`` on ``examples`` as ``config`` says; ``step`` is the number of updates done.

    ``teacher_cache`` is of ``examples``, ``validation`` for a mix that looks at a validation loss, ``corpus`` for a
    language-modelling loss beside the objective. ``check_place`` is called before anything is written, and raises if the run
    directory is not the one any more that the run began in. ``scored_on`` is a checksum of what evaluations score on.
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
        self.config = config = with_launchers_settings(self.accelerator, config)
        check_trainable(pair.student, config.merge)
        self.pair, self.examples = pair, examples
        self.teacher_cache, self.validation, self.corpus = teacher_cache, validation, corpus
        self.check_place, self.scored_on = check_place, scored_on
        if config.mix.validation_steps and not validation:
            raise ConfigError(
                "the adaptive mix looks at a validation loss: give validation_file, or eval_file with eval_samples"
            )
        self.policy = config.policy.bind(pair.tokenizer, config.max_new_tokens)
        self.objective_memory, self.mix_memory = config.objective.memory(), config.mix.memory()
        self.replay: list[Rollout] = []
        self.share_rows(self._rows_by_settings * self.accelerator.num_processes)
        self.step = self.num_tokens = self.rows_read = 0
        self.seconds = 0.0
        self.watch = Stopwatch(self.accelerator.device)  # of the teacher's forwards in updates
        self.best: dict[str, float] = {}
        # What the files do not say yet of the last step: its metrics ({} before the first step), None if they say all.
        self.due: Metrics | None = {}
        # Fewer than the settings say, for the rest of the run, once memory ran out.
        self.generation_rows, self.micro_rows = config.generation_batch_size, config.per_device_train_batch_size
        self.run = Path(config.output_dir)
        if config.gradient_checkpointing:
            pair.student.gradient_checkpointing_enable({"use_reentrant": False})
        self.head = Head.of(pair.student, pair.vocab_size, pair.ends)
        if beside := freeze_beside_text(pair.student):
            warnings.warn(frozen_note(beside), SwitchKDWarning, stacklevel=2)
        self.balance = balance_coefficient(pair.student, config.router_aux_loss_coef)
        self.student = pair.student.to(self.accelerator.device)
        # None: what the student was loaded in.
        compute = None if config.dtype == "auto" else getattr(torch, config.dtype)
        if config.fsdp and self.accelerator.num_processes > 1:
            shard(self.student, self.accelerator, compute or self.student.dtype)
        self.masters = Masters(self.student, compute)
        self.optimizer = adamw(list(self.masters.named.values()), config)
        self.teachers = Teachers(pair, self.accelerator.device)

    def share_rows(self, rows: int) -> None:
        """Read so many rows in a step, an equal part of them on every rank."""
        self.rows_per_step, self.rows_per_rank = rows, rows // self.accelerator.num_processes
        self.total_steps = total_steps(self.config, len(self.examples), rows)

    @property
    def _rows_by_settings(self) -> int:
        """Rows of a step on one rank, as the settings say."""
        return self.config.per_device_train_batch_size * self.config.gradient_accumulation_steps

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
            Stopped: a signal asked for an end. The step in which it came is dropped.
            In each of these cases a checkpoint of the last finished step is saved, from which ``resume`` goes on.
            DiskError: something cannot be written. The last checkpoint stands.
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
        except (signals.Stopped, NonFiniteError, NoMemoryError) as stop:
            # Of several processes one may have failed alone; a signal is obeyed by all at once.
            if self.accelerator.num_processes == 1 or isinstance(stop, signals.Stopped):
                if broken := self._broken_weight():
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
        scoring = bool(metrics and steps) and self.step % steps == 0
        weights = self.masters.whole() if scoring and self.config.metric_for_best_model else {}
        with whole(self.student) if scoring or sampling else nullcontext():
            if main and scoring and evaluate:
                metrics |= self._evaluated(evaluate, weights)
            if main and sampling and sample:
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
        before = self.replay, self.mix_memory
        try:
            return self._train_step(on_round)
        except BaseException:
            self.replay, self.mix_memory = before
            raise

    def _train_step(self, on_round: OnRound | None) -> tuple[Metrics, Rollouts]:
        start = time.perf_counter()
        gather(self.student)
        self._look_at_validation()
        source = self._source()
        rows, rollouts = self._rows(source, on_round)
        read_at = time.perf_counter()
        objective = self.config.objective.at(self.objective_memory)
        parts = [_Part(rows, objective)]
        if self.corpus:
            parts.append(_Part(self._next(self.corpus), PlainText(), self.config.lm_weight))
        losses, tokens, grad_norm = self._update(parts)
        teacher_seconds = sum(lap for _, lap in self.watch.take())
        self.num_tokens += tokens
        seconds = slowest(self.accelerator, time.perf_counter() - start)
        self.seconds += seconds
        self.objective_memory = self.config.objective.remember(self.objective_memory, losses[0], self.schedule)
        metrics = {
            "step": self.step,
            "loss": losses[0],
            "grad_norm": grad_norm,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
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
        if self.balance:
            metrics["aux_loss"] = losses[-1]
        for name, memory in (("objective", self.objective_memory), ("mix", self.mix_memory)):
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
        if broken := self._broken_weight():
            since = "after the update; lower learning_rate" if self.step else "before training; take another student"
            raise NonFiniteError(f"step {self.step}: {broken} is not finite {since}")
        weights, moments = self.masters.whole(), moments_of(self.masters, self.optimizer)
        with whole(self.student):
            if self.accelerator.is_main_process:
                self.check_place()
                sync_records(self.run)
                keep, tokenizer = self.config.save_total_limit, self.pair.tokenizer
                save_checkpoint(self.run, self._state(), self.student, tokenizer, weights, moments, keep)
            self.accelerator.wait_for_everyone()

    def _broken_weight(self) -> str:
        """A weight or moment that is not finite, on whichever rank; "" if all are."""
        return max(gather_object([broken_weight(self.masters, self.optimizer)]))

    def _state(self) -> State:
        return {
            "step": self.step,
            "num_tokens": self.num_tokens,
            "seconds": self.seconds,
            "best": self.best,
            "due": self.due,
            "objective": self.objective_memory,
            "mix": self.mix_memory,
            "replay": [rollout.to_json() for rollout in self.replay],
            "best_of": restoring.best_of(self.config, self.scored_on),
            "rules": restoring.rules_of(self.config),
            "rows": self.rows_read,
            "rows_per_step": self.rows_per_step,
            "rows_per_rank": self._rows_by_settings,
        }

    def resume(self) -> None:
        """Continue from the newest whole checkpoint, or from ``resume_from``; what is later in the directory is taken back.

        What the state says of other rules, or of another measure, than the run has now is dropped, with a warning. Raises
        CheckpointError if the run cannot go on, ConfigError if these processes cannot share the rows of a step.
        """
        config, ranks = self.config, self.accelerator.num_processes
        with_best = restoring.BEST_SETTING not in config.allow_change
        folder = from_main(self.accelerator, partial(whole_checkpoint, self.run, config.resume_from, with_best))
        state = load_checkpoint(folder, self.student, self.masters, self.optimizer)
        self.step, self.num_tokens, self.seconds = state["step"], state["num_tokens"], state["seconds"]
        self.due, self.best = state["due"], restoring.best(state, config, self.scored_on, self.run)
        self.objective_memory, self.mix_memory = (
            restoring.memory(state, noun, config) for noun in ("objective", "mix")
        )
        self.replay = restoring.replay(state, config)
        self.rows_read = state.get("rows", self.step * self.rows_per_step)
        self.share_rows(restoring.rows_per_step(state, self.rows_per_step, self._rows_by_settings, ranks))
        if self.accelerator.is_main_process:
            told = self.due is None
            take_back(self.run, self.step, self.step if told else self.step - 1, ended=told and self.progress >= 1)
            prune(self.run, self.config.save_total_limit)

    def load_best(self) -> None:
        """Take the weights of the best student that evaluations saw, if they looked for one, on every rank."""
        self.best = from_main(self.accelerator, lambda: self.best)
        if self.best:
            load_best(self.run, int(self.best["step"]), self.student, self.masters)

    @property
    def save_dtype(self) -> torch.dtype:
        """The dtype that the student is saved in at the end."""
        name: str = self.config.save_dtype
        if name == "auto":
            own = has_adapter(self.student) and not self.config.merge  # an adapter stays as it was trained
            name = dtype_name(self.masters.dtype) if own else self.pair.folder_dtype
        dtype: torch.dtype = getattr(torch, name)
        return dtype

    def final_weights(self) -> Weights:
        """The masters, whole, rounded now to the dtype that they are saved in. All ranks must ask."""
        self.masters.round_to(self.save_dtype)
        return self.masters.whole()

    def _next(self, examples: Sequence[TokenizedExample]) -> list[TokenizedExample]:
        """This rank's examples of the step; the data cursor is the number of rows that were read before."""
        indices = batch_indices(len(examples), self.rows_per_step, self.rows_read, self.config.seed)[self._mine]
        if self.teacher_cache is None or examples is not self.examples:
            return [examples[i] for i in indices]
        return [self.teacher_cache.attached(examples[i], i) for i in indices]

    @property
    def _mine(self) -> slice:
        """This rank's part of a step's rows."""
        first = self.accelerator.process_index * self.rows_per_rank
        return slice(first, first + self.rows_per_rank)

    def _source(self) -> Source:
        """Where this step's text comes from; the same on every rank."""
        chance = keyed_uniform(self.config.seed, self.step, 0, Use.CHOICE)
        return self.config.mix.source(chance, self.schedule, len(self.replay), self.mix_memory)

    def _rows(self, source: Source, on_round: OnRound | None) -> tuple[Rows, Rollouts]:
        """This rank's rows, and what all ranks generated now."""
        examples = self._next(self.examples)
        if source == "examples":
            return examples, Rollouts()
        if source == "replay":
            return self._replayed(), Rollouts()
        mine = self._generate(examples, on_round)
        rollouts = all_rollouts(mine)
        if self.config.mix.capacity:  # for replay; the oldest go first
            self.replay = [*self.replay, *rollouts][-self.config.mix.capacity :]
        return ([*examples, *mine] if source == "pairs" else mine), rollouts

    def _replayed(self) -> list[Rollout]:
        """Rollouts of earlier steps, drawn by (seed, step) without replacement while there are enough."""
        keys = [noise_key(self.config.seed, self.step, i, Use.REPLAY) for i in range(len(self.replay))]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        return [self.replay[order[i % len(order)]] for i in range(self.rows_per_step)[self._mine]]

    def _look_at_validation(self) -> None:
        """Tell the mix, where it wants to know, the mean negative log-likelihood (nats) of the validation completions."""
        every = self.config.mix.validation_steps
        if not every or self.step % every:
            return
        sums = self._fitting(self._validation_sums, "validating")
        total_loss, tokens = self.accelerator.reduce(sums, "sum").tolist()
        self.mix_memory = self.config.mix.remember(self.mix_memory, total_loss / max(tokens, 1))

    @torch.no_grad()
    def _validation_sums(self, size: int) -> torch.Tensor:
        """Negative log-likelihood (nats) and tokens of this rank's validation completions ``[2]``, ``size`` rows at a time."""
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        batches = [self.validation[start : start + size] for start in range(0, len(self.validation), size)]
        sums = torch.zeros(2, dtype=self._wide, device=self.accelerator.device)
        with evaluating(self.student):
            # Every rank runs as many forwards as any other: a wrapped model may wait for all in each.
            for place in range(rank, math.ceil(len(batches) / ranks) * ranks, ranks):
                signals.check()
                rows = batches[min(place, len(batches) - 1)]
                loss = self._loss(rows, PlainText())
                if place < len(batches):
                    sums[0] += loss
                    sums[1] += sum(len(row.completion_ids) for row in rows)
        return sums

    @property
    def _wide(self) -> torch.dtype:
        """The dtype of losses. float64, which not every device has, only where the student is that wide."""
        return torch.promote_types(self.pair.student.dtype, torch.float32)

    def _fitting(self, work: Callable[[int], torch.Tensor], what: str) -> torch.Tensor:
        """``work`` with as many rows at a time as memory allows."""
        if self.accelerator.num_processes > 1:  # a rank alone must not change how often it meets the others
            return work(self.micro_rows)
        result, self.micro_rows = halving(work, self.micro_rows, what, "per_device_train_batch_size")
        return result

    def _generate(self, examples: Sequence[TokenizedExample], on_round: OnRound | None) -> Rollouts:
        """Complete the prompts of the whole accumulation window at once."""
        first = self.rows_read + self.accelerator.process_index * self.rows_per_rank
        settings = self.config.decoding(
            policy=self.policy.at(self.schedule, self.step),
            max_new_tokens=self.config.token_budget(self.schedule),
            seed=self.config.seed,
            keep_hidden=self.config.objective.reads_teacher,
            batch_size=self.generation_rows,
        )
        rollouts = decode_examples(self.pair, examples, settings, range(first, first + len(examples)), on_round)
        self.generation_rows = rollouts.rows_that_fit or self.generation_rows
        for rollout, example in zip(rollouts, examples, strict=True):
            if rollout.error:
                raise rollout.failure(f"step {self.step + 1}, {example.source}")
        return rollouts

    def _update(self, parts: Sequence[_Part]) -> tuple[list[float], int, float]:
        """Gradient over the window, finite check, clip, AdamW: (means as of ``_gradients``, tokens of the first, gradient norm)."""
        accelerator = self.accelerator
        lengths = [[len(row.completion_ids) for row in part.rows] for part in parts]
        texts = [self._by_text(part.objective) for part in parts]
        own = [[sum(each) for each in lengths], [sum(map(bool, each)) for each in lengths]]
        tokens, rows = accelerator.reduce(torch.tensor(own, device=accelerator.device), "sum").tolist()
        counts = [row if text else token for text, row, token in zip(texts, rows, tokens, strict=True)]
        sums = self._fitting(partial(self._gradients, parts, counts, tokens), "training")
        self.masters.sum_gradients(accelerator)
        losses = accelerator.reduce(sums, "sum").tolist()
        grad_norm = clip(list(self.masters.named.values()), self.config.max_grad_norm or math.inf)
        self._check_finite(parts, losses, grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step, self.expected_steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.masters.publish()
        self.step += 1
        self.rows_read += self.rows_per_step
        return losses, tokens[0], grad_norm

    def _gradients(
        self, parts: Sequence[_Part], counts: Sequence[int], tokens: Sequence[int], size: int
    ) -> torch.Tensor:
        """Gradients of the window's loss, from nothing, ``size`` rows at a time; returns this rank's share of each part's mean.

        Behind the parts stands the balancing loss of the first, if it has one, the mean of its micro-batches by their tokens. The
        size moves rounding alone, but for that loss, and for dropout, whose masks are those of a micro-batch.
        """
        accelerator = self.accelerator
        micros = [(i, start) for i, part in enumerate(parts) for start in range(0, len(part.rows), size)]
        sums = torch.zeros(len(parts) + (self.balance > 0), device=accelerator.device, dtype=self._wide)
        # The loss is a sum over all ranks' tokens, divided once; shards get the mean of all ranks' gradients.
        averaged = accelerator.num_processes if is_sharded(self.student) else 1
        self.optimizer.zero_grad()  # of a try that was given up
        for micro, (i, start) in enumerate(micros):
            signals.check()
            reduce_in_next_backward(self.student, last=micro == len(micros) - 1)
            dropout = self._keyed_dropout(accelerator.process_index * len(micros) + micro)
            with dropout, balancing(self.student, self.balance > 0) as balance:
                rows = parts[i].rows[start : start + size]
                loss = self._loss(rows, parts[i].objective) / max(counts[i], 1)
                share = sum(len(row.completion_ids) for row in rows) / max(tokens[i], 1)
                aux = torch.stack(balance).sum() * share if balance else loss.new_zeros(())
                ((loss + self.balance * aux) * (parts[i].weight * averaged)).backward()
            sums[i] += loss.detach()
            if i == 0 and self.balance:
                sums[-1] += aux.detach()
        return sums

    def _loss(self, rows: Rows, objective: Objective) -> torch.Tensor:
        """Sum of the objective over the response tokens of one micro-batch, or of its mean over each text."""
        hidden, batch, teacher = self.read(rows, objective)
        tokens = response_tokens(batch, [r.speakers for r in rows])
        return total(objective, teacher, self.head, hidden, tokens.by_text() if self._by_text(objective) else tokens)

    def _by_text(self, objective: Objective) -> bool:
        """Whether this objective's mean is one over texts."""
        return self.config.loss_over == "sequences" and not objective.over_tokens

    def read(self, rows: Rows, objective: Objective) -> tuple[torch.Tensor, Batch, Teacher | None]:
        """What enters the student's output layer at the rows' response tokens, the batch of them, and what the teacher says."""
        batch = collate([(row.prompt_ids, row.completion_ids) for row in rows]).to(self.accelerator.device)
        start = self.watch.now()
        teacher = self.teachers(rows) if objective.reads_teacher else None
        self.watch.lap(len(rows), start)
        return response_hidden(self.student, batch), batch, teacher

    def _check_finite(self, parts: Sequence[_Part], losses: Sequence[float], grad_norm: float) -> None:
        if all(map(math.isfinite, [*losses, grad_norm])):
            return
        with whole(self.student):
            cause = blame(self, [(part.rows, part.objective) for part in parts])
        raise NonFiniteError(
            f"step {self.step + 1}: {cause} (loss {' and '.join(map(str, losses))}, gradient norm {grad_norm}); the weights are "
            "those of the step before. Lower learning_rate, or look for broken values in the models"
        )

    @contextmanager
    def _keyed_dropout(self, micro: int) -> Iterator[None]:
        """Training mode with dropout keyed by (seed, step, micro-batch of all ranks); the caller's random state is left alone."""
        key = noise_key(self.config.seed, self.step, micro, Use.DROPOUT)
        with torch.random.fork_rng():
            torch.random.default_generator.manual_seed(key % 2**63)
            if torch.cuda.is_available():
                torch.cuda.manual_seed_all(key % 2**63)
            with restoring_modes(self.student):
                if not self.student.training:  # else some of its layers may be frozen in evaluation mode
                    self.student.train()
                yield
