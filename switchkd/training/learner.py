"""How the student learns from the rows of one step: their loss, its gradient, and the update of its weights, all or nothing."""

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from switchkd.base import signals
from switchkd.base.errors import NonFiniteError, SwitchKDWarning
from switchkd.base.memory import halving
from switchkd.data.texts import Batch, Text, collate
from switchkd.decoding.pace import Stopwatch
from switchkd.forward.head import Head, response_hidden
from switchkd.forward.sharding import clip, is_sharded, local, reduce_in_next_backward, shard, whole
from switchkd.forward.text_path import freeze_beside_text, frozen_note
from switchkd.methods.objective import Objective, PlainText
from switchkd.methods.sampling import Use, noise_key
from switchkd.models.pair import Pair
from switchkd.runner.modes import evaluating, restoring_modes
from switchkd.teachers.across import Voice, check_across
from switchkd.teachers.asked import Rows, Teachers
from switchkd.training.loss import balance_coefficient, balancing, response_tokens, total
from switchkd.training.optimizer import Masters, adamw
from switchkd.training.settings import TrainConfig


@dataclass(frozen=True)
class Part:
    """Rows of a step and what is lowered on them: the objective's mean, times a weight."""

    rows: Rows
    objective: Objective
    weight: float = 1.0


class Learner:
    """The student of a pair with what moves its weights: masters, optimizer, the teachers that are asked.

    ``micro_rows`` are the rows of one forward: fewer than the settings say once memory ran out. ``watch`` times the teachers.
    """

    def __init__(self, pair: Pair, config: TrainConfig, accelerator: Accelerator):
        self.pair, self.config, self.accelerator = pair, config, accelerator
        self.watch = Stopwatch(accelerator.device)
        self.micro_rows = config.per_device_train_batch_size
        if config.gradient_checkpointing:
            pair.student.gradient_checkpointing_enable({"use_reentrant": False})
        self.head = Head.of(pair.student, pair.vocab_size, pair.ends)
        if beside := freeze_beside_text(pair.student):
            warnings.warn(frozen_note(beside), SwitchKDWarning, stacklevel=3)
        self.balance = balance_coefficient(pair.student, config.router_aux_loss_coef)
        self.student = pair.student.to(accelerator.device)
        # None: what the student was loaded in.
        compute = None if config.dtype == "auto" else getattr(torch, config.dtype)
        if config.fsdp and accelerator.num_processes > 1:
            shard(self.student, accelerator, compute or self.student.dtype)
        self.masters = Masters(self.student, compute)
        self.optimizer = adamw(list(self.masters.named.values()), config)
        self.teachers = Teachers(pair, accelerator.device, config.alignment)
        if pair.bridges:
            check_across(config.objective, config.alignment)

    def update(self, parts: Sequence[Part], step: int, rate: float) -> tuple[list[float], int, float]:
        """Gradient over the window, finite check, clip, AdamW at the learning rate ``rate``, behind ``step`` updates.

        Returns (means as of ``_gradients``, response tokens of the first part, gradient norm).

        Raises:
            NonFiniteError: a loss or the gradient is not finite; the weights are as they were.
        """
        accelerator = self.accelerator
        lengths = [[self._trained(row, part.objective) for row in part.rows] for part in parts]
        texts = [self._by_text(part.objective) for part in parts]
        own = [[sum(each) for each in lengths], [sum(map(bool, each)) for each in lengths]]
        tokens, rows = accelerator.reduce(torch.tensor(own, device=accelerator.device), "sum").tolist()
        counts = [row if text else token for text, row, token in zip(texts, rows, tokens, strict=True)]
        sums = self._fitting(partial(self._gradients, parts, counts, tokens, step), "training")
        self.masters.sum_gradients(accelerator)
        losses = accelerator.reduce(sums, "sum").tolist()
        grad_norm = clip(list(self.masters.named.values()), self.config.max_grad_norm or math.inf)
        self._check_finite(parts, losses, grad_norm, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.masters.publish()
        return losses, tokens[0], grad_norm

    def _gradients(
        self, parts: Sequence[Part], counts: Sequence[int], tokens: Sequence[int], step: int, size: int
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
            dropout = self._keyed_dropout(step, accelerator.process_index * len(micros) + micro)
            with dropout, balancing(self.student, self.balance > 0) as balance:
                rows = parts[i].rows[start : start + size]
                loss = self.loss(rows, parts[i].objective) / max(counts[i], 1)
                share = sum(self._trained(row, parts[i].objective) for row in rows) / max(tokens[i], 1)
                aux = torch.stack(balance).sum() * share if balance else loss.new_zeros(())
                ((loss + self.balance * aux) * (parts[i].weight * averaged)).backward()
            sums[i] += loss.detach()
            if i == 0 and self.balance:
                sums[-1] += aux.detach()
        return sums

    def loss(self, rows: Rows, objective: Objective) -> torch.Tensor:
        """Sum of the objective over the response tokens of one micro-batch, or of its mean over each text."""
        hidden, batch, voices = self.read(rows, objective)
        tokens = response_tokens(batch, [r.speakers for r in rows])
        if not voices:
            return total(objective, None, self.head, hidden, tokens.by_text() if self._by_text(objective) else tokens)
        losses = []
        for voice in voices:
            own = voice.of(tokens)
            own = own.by_text() if self._by_text(objective) else own
            losses.append(total(objective, voice.teacher, self.head, voice.states(hidden), own))
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _trained(self, row: Text, objective: Objective) -> int:
        """Tokens of a row that have a loss."""
        return self.teachers.trained(row) if objective.reads_teacher else len(row.completion_ids)

    def read(self, rows: Rows, objective: Objective) -> tuple[torch.Tensor, Batch, list[Voice]]:
        """What enters the student's output layer at the rows' response tokens, the batch of them, and what the teachers say."""
        batch = collate([(row.prompt_ids, row.completion_ids) for row in rows]).to(self.accelerator.device)
        start = self.watch.now()
        voices = self.teachers.voices(rows) if objective.reads_teacher else []
        self.watch.lap(len(rows), start)
        return response_hidden(self.student, batch), batch, voices

    def negative_log_likelihood(self, texts: Sequence[Text]) -> tuple[float, int]:
        """Sum of the negative log-likelihood (nats) of all completions, over all ranks, and their tokens."""
        sums = self._fitting(partial(self._likelihood_sums, texts), "validating")
        total_loss, tokens = self.accelerator.reduce(sums, "sum").tolist()
        return total_loss, int(tokens)

    @torch.no_grad()
    def _likelihood_sums(self, texts: Sequence[Text], size: int) -> torch.Tensor:
        """Negative log-likelihood (nats) and tokens of this rank's completions ``[2]``, ``size`` rows at a time."""
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        batches = [texts[start : start + size] for start in range(0, len(texts), size)]
        sums = torch.zeros(2, dtype=self._wide, device=self.accelerator.device)
        with evaluating(self.student):
            # Every rank runs as many forwards as any other: a wrapped model may wait for all in each.
            for place in range(rank, math.ceil(len(batches) / ranks) * ranks, ranks):
                signals.check()
                rows = batches[min(place, len(batches) - 1)]
                loss = self.loss(rows, PlainText())
                if place < len(batches):
                    sums[0] += loss
                    sums[1] += sum(len(row.completion_ids) for row in rows)
        return sums

    def _fitting(self, work: Callable[[int], torch.Tensor], what: str) -> torch.Tensor:
        """``work`` with as many rows at a time as memory allows."""
        if self.accelerator.num_processes > 1:  # a rank alone must not change how often it meets the others
            return work(self.micro_rows)
        result, self.micro_rows = halving(work, self.micro_rows, what, "per_device_train_batch_size")
        return result

    def broken_weight(self) -> str:
        """A weight or moment that is not finite, on whichever rank; "" if all are."""
        return max(gather_object([_broken_weight(self.masters, self.optimizer)]))

    def _by_text(self, objective: Objective) -> bool:
        """Whether this objective's mean is one over texts."""
        return self.config.loss_over == "sequences" and not objective.over_tokens

    @property
    def _wide(self) -> torch.dtype:
        """The dtype of losses. float64, which not every device has, only where the student is that wide."""
        return torch.promote_types(self.pair.student.dtype, torch.float32)

    def _check_finite(self, parts: Sequence[Part], losses: Sequence[float], grad_norm: float, step: int) -> None:
        if all(map(math.isfinite, [*losses, grad_norm])):
            return
        with whole(self.student):
            cause = blame(self, parts)
        raise NonFiniteError(
            f"step {step + 1}: {cause} (loss {' and '.join(map(str, losses))}, gradient norm {grad_norm}); the weights are "
            "those of the step before. Lower learning_rate, or look for broken values in the models"
        )

    @contextmanager
    def _keyed_dropout(self, step: int, micro: int) -> Iterator[None]:
        """Training mode with dropout keyed by (seed, step, micro-batch of all ranks); the caller's random state is left alone."""
        key = noise_key(self.config.seed, step, micro, Use.DROPOUT)
        with torch.random.fork_rng():
            torch.default_generator.manual_seed(key % 2**63)
            if torch.cuda.is_available():
                torch.cuda.manual_seed_all(key % 2**63)
            with restoring_modes(self.student):
                if not self.student.training:  # else some of its layers may be frozen in evaluation mode
                    self.student.train()
                yield


# --- what is not finite -------------------------------------------------------------------------------------------


@torch.no_grad()
def blame(learner: Learner, parts: Sequence[Part]) -> str:
    """What is not finite in a step and on which samples, found by reading its rows one by one."""
    found: dict[str, list[str]] = defaultdict(list)
    every = []
    with evaluating(learner.student):
        for part in parts:
            for row in part.rows:
                found[_broken(learner, row, part.objective)].append(row.name)
                every.append(row.name)
    found.pop("", None)
    if not found:
        return f"the student's gradient is not finite on {', '.join(every)}"
    return "; ".join(f"{what} on {', '.join(samples)}" for what, samples in found.items())


def _broken(learner: Learner, row: Text, objective: Objective) -> str:
    # Both are asked for whatever the first one shows, or the row holds: other ranks may need this one to run their teacher.
    hidden, _, voices = learner.read([row], objective)
    loss = learner.loss([row], objective)
    if not row.completion_ids:
        return ""
    logq = learner.head.log_probs(learner.head(hidden))
    # Log-softmax spreads one NaN or +inf over its whole row; a log-probability of −inf is a masked token.
    for voice in voices:
        own = voice.states(logq)
        if voice.teacher.at(slice(0, len(own)))(slice(None), own)[0].isnan().any():
            return "the teacher's logits are not finite"
    if logq.isnan().any():
        return "the student's logits are not finite"
    return "" if loss.isfinite() else "the loss is not finite"


@torch.no_grad()
def _broken_weight(masters: Masters, optimizer: torch.optim.Optimizer) -> str:
    """The first trained weight, or moment of the optimizer, that is not finite, in words; "" if all that this rank has are."""
    for name, weight in masters.named.items():
        values = {"": weight} | optimizer.state.get(weight, {})
        for key, value in values.items():
            if not local(value).isfinite().all():
                return f"the optimizer's {key} of {name}" if key else f"the student's weight {name}"
    return ""
