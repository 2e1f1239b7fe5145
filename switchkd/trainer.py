"""One training loop, and all the state that moves: the step, the optimizer, the tokens seen.

Each optimizer step takes the next prompts, completes them under the policy or takes their reference completions, and lowers
the divergence to the teacher at every response token. All choices come from (seed, step), so a run that stops and resumes
is the run that did not stop.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from switchkd.checkpoint import checkpoints, load_checkpoint, save_checkpoint, write_file
from switchkd.config import TrainConfig
from switchkd.data import TokenizedExample, batch_indices, collate
from switchkd.decoding import decode
from switchkd.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from switchkd.models import Pair
from switchkd.objectives import Head, Objective, response_hidden
from switchkd.policies import STUDENT, TEACHER
from switchkd.rollouts import DecodeCost, Rollout, Rollouts, mean
from switchkd.sampling import noise_key

Metrics = dict[str, Any]
Rows = Sequence[Rollout | TokenizedExample]

# Words that part the uses of (seed, step): whether to generate, and dropout.
_CHOICE, _DROPOUT = 1, 2


class Trainer:
    """Distils ``pair.student`` on ``examples`` as ``config`` says; ``step`` is the number of updates done."""

    def __init__(
        self,
        pair: Pair,
        examples: Sequence[TokenizedExample],
        config: TrainConfig,
        accelerator: Accelerator | None = None,
    ):
        self.pair, self.examples, self.config = pair, examples, config
        self.accelerator = accelerator or Accelerator()
        self.objective = Objective(config.divergence, config.alpha, config.beta, config.loss_temperature)
        self.rows_per_rank = config.per_device_train_batch_size * config.gradient_accumulation_steps
        self.rows_per_step = self.rows_per_rank * self.accelerator.num_processes
        self.total_steps = _total_steps(config, len(examples), self.rows_per_step)
        self.step = self.num_tokens = 0
        self.run = Path(config.output_dir)
        if config.gradient_checkpointing:
            pair.student.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = _adamw(pair.student, config)
        self.student, self.optimizer = self.accelerator.prepare(pair.student, optimizer)
        pair.teacher.to(self.accelerator.device)
        self.heads = [Head.of(model, pair.vocab_size) for model in (pair.student, pair.teacher)]

    def train(
        self,
        on_step: Callable[[Metrics, DecodeCost], None] = lambda *_: None,
        on_round: Callable[[DecodeCost], None] | None = None,
    ) -> None:
        """Run to the last step: a line in ``metrics.jsonl`` for every step, rollouts, checkpoints.

        ``on_step`` is told of every step's metrics, ``on_round`` of every decoding round's cost so far in its step.

        Raises:
            NonFiniteError: a loss or gradient is not finite; the weights stay as they were before that step.
        """
        while self.step < self.total_steps:
            metrics, rollouts = self.train_step(on_round)
            if self.accelerator.is_main_process:
                _append(self.run / "metrics.jsonl", [metrics])
                _append(self.run / "rollouts.jsonl", [{"step": self.step, **r.to_json()} for r in rollouts])
                on_step(metrics, rollouts.cost)
            if self.step == self.total_steps or (self.config.save_steps and self.step % self.config.save_steps == 0):
                self.save()

    def train_step(self, on_round: Callable[[DecodeCost], None] | None = None) -> tuple[Metrics, Rollouts]:
        """One optimizer step; returns its metrics and the rollouts it made (none for a step on the data)."""
        start = time.perf_counter()
        examples = self._next_examples()
        generated = self._generates()
        rollouts = self._generate(examples, on_round) if generated else Rollouts()
        generated_at = time.perf_counter()
        loss, tokens, grad_norm = self._update(rollouts if generated else examples)
        self.num_tokens += tokens
        metrics = {
            "step": self.step,
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "generated": generated,
            "num_tokens": self.num_tokens,
            "seconds": time.perf_counter() - start,
            "seconds/generate": generated_at - start,
            "tokens_per_second": tokens / (time.perf_counter() - start),
        }
        if generated:
            metrics |= rollout_metrics(rollouts)
        return metrics, rollouts

    def save(self) -> None:
        """Write a checkpoint of this step, whole or not at all."""
        if self.accelerator.is_main_process:
            save_checkpoint(
                self.run,
                self.step,
                self.accelerator.unwrap_model(self.student),
                self.pair.tokenizer,
                _inner(self.optimizer),
                {"num_tokens": self.num_tokens},
                self.config.save_total_limit,
            )
        self.accelerator.wait_for_everyone()

    def resume(self) -> None:
        """Continue from the newest checkpoint; later lines of metrics and rollouts are taken back."""
        found = checkpoints(self.run)
        if not found:
            raise CheckpointError(f"{self.run} holds no checkpoint to resume from; start without --resume")
        state = load_checkpoint(found[-1], self.accelerator.unwrap_model(self.student), _inner(self.optimizer))
        self.step, self.num_tokens = state["step"], state["num_tokens"]
        if self.accelerator.is_main_process:
            for name in ("metrics.jsonl", "rollouts.jsonl"):
                _keep_until(self.run / name, self.step)

    def _next_examples(self) -> list[TokenizedExample]:
        """This rank's examples of the step; the data cursor is the step itself."""
        indices = batch_indices(len(self.examples), self.rows_per_step, self.step, self.config.seed)
        first = self.accelerator.process_index * self.rows_per_rank
        return [self.examples[i] for i in indices[first : first + self.rows_per_rank]]

    def _generates(self) -> bool:
        """GKD's coin: with probability lmbda this step trains on generated text; the same on every rank."""
        return noise_key(self.config.seed, self.step, _CHOICE) / 2**64 < self.config.lmbda

    def _generate(
        self, examples: Sequence[TokenizedExample], on_round: Callable[[DecodeCost], None] | None
    ) -> Rollouts:
        """Complete the prompts of the whole accumulation window at once."""
        first = self.step * self.rows_per_step + self.accelerator.process_index * self.rows_per_rank
        rollouts = decode(
            self.accelerator.unwrap_model(self.student),
            self.pair.teacher,
            [example.prompt_ids for example in examples],
            **self.config.decode_arguments(),
            seed=self.config.seed,
            sample_ids=range(first, first + len(examples)),
            eos_token_ids=self.pair.eos_token_ids,
            keep_hidden=True,
            vocab_size=self.pair.vocab_size,
            progress=on_round,
        )
        for rollout, example in zip(rollouts, examples, strict=True):
            if rollout.error:
                error = NonFiniteError if rollout.stop_reason == "non_finite" else DataError
                raise error(f"step {self.step + 1}, {example.source}: {rollout.error}")
        return rollouts

    def _update(self, rows: Rows) -> tuple[float, int, float]:
        """Gradient over the window, finite check, clip, AdamW: (loss per token, tokens trained on, gradient norm)."""
        accelerator, size = self.accelerator, self.config.per_device_train_batch_size
        local = torch.tensor(sum(len(row.completion_ids) for row in rows), device=accelerator.device)
        tokens = int(accelerator.reduce(local, "sum"))
        starts = range(0, len(rows), size)
        total = torch.zeros((), device=accelerator.device, dtype=torch.float64)
        for micro, start in enumerate(starts):
            syncs = nullcontext() if micro == len(starts) - 1 else accelerator.no_sync(self.student)
            with syncs, self._keyed_dropout(micro):
                loss = self._loss(rows[start : start + size]) / max(tokens, 1)
                # DDP averages gradients over ranks; the loss is a sum over all ranks' tokens divided once.
                accelerator.backward(loss * accelerator.num_processes)
            total += loss.detach()
        loss_value = accelerator.reduce(total, "sum").item()
        grad_norm = accelerator.clip_grad_norm_(self.student.parameters(), self.config.max_grad_norm or math.inf).item()
        self._check_finite(loss_value, grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step, self.total_steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return loss_value, tokens, grad_norm

    def _loss(self, rows: Rows) -> torch.Tensor:
        """Sum of the divergence over the response tokens of one micro-batch.

        What the teacher computed while it wrote or judged the text is used again; otherwise it reads the rows once.
        """
        batch = collate([(row.prompt_ids, row.completion_ids) for row in rows]).to(self.accelerator.device)
        known = [row.teacher_hidden for row in rows if isinstance(row, Rollout) and row.teacher_hidden is not None]
        if len(known) == len(rows):
            hidden_p = torch.cat([hidden.to(batch.input_ids.device) for hidden in known])
        else:
            with torch.no_grad():
                hidden_p = response_hidden(self.pair.teacher, batch)
        hidden_q = response_hidden(self.accelerator.unwrap_model(self.student), batch, self.student)
        return self.objective.total(self.heads[TEACHER], hidden_p, self.heads[STUDENT], hidden_q)

    def _check_finite(self, loss: float, grad_norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return
        self.optimizer.zero_grad()
        first = self.step * self.rows_per_step
        raise NonFiniteError(
            f"step {self.step + 1}: loss {loss}, gradient norm {grad_norm} (samples {first}..{first + self.rows_per_step - 1}); "
            "the weights are those of the step before. Lower learning_rate, or look for broken values in the models"
        )

    @contextmanager
    def _keyed_dropout(self, micro: int) -> Iterator[None]:
        """Training mode with dropout keyed by (seed, step, rank and micro-batch); the caller's random state is left alone."""
        part = self.accelerator.process_index * self.config.gradient_accumulation_steps + micro
        key = noise_key(noise_key(self.config.seed, self.step, _DROPOUT), part, _DROPOUT)
        with torch.random.fork_rng():
            torch.random.default_generator.manual_seed(key % 2**63)
            if torch.cuda.is_available():
                torch.cuda.manual_seed_all(key % 2**63)
            self.student.train()
            yield
            self.student.eval()


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """Rate of the update after ``step`` updates: linear warm-up, then constant or half a cosine down to 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.lr_scheduler_type == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def rollout_metrics(rollouts: Rollouts) -> Metrics:
    """What a generated step shows: lengths, who spoke, where the teacher first took over, and what decoding cost."""
    cost: DecodeCost = rollouts.cost
    firsts = [float(r.speakers.index(TEACHER)) for r in rollouts if TEACHER in r.speakers]
    summary = cost.summary()
    return {
        "completions/mean_length": mean(float(len(r.completion_ids)) for r in rollouts),
        "completions/eos_share": mean(float(r.stop_reason == "eos") for r in rollouts),
        "switch/teacher_share": summary.pop("teacher_share"),
        "switch/switched_share": len(firsts) / len(rollouts),
        "switch/first_switch": _or_none(mean(firsts)),
        "switch/divergence_mean": _or_none(mean(d for r in rollouts for d in r.divergences)),
        **{f"decode/{name}": value for name, value in summary.items()},
    }


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value  # JSON has no NaN


def _total_steps(config: TrainConfig, examples: int, rows_per_step: int) -> int:
    if config.max_steps >= 0:
        return config.max_steps
    return math.ceil(config.num_train_epochs * examples / rows_per_step)


def _adamw(model: torch.nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ConfigError("the student has no trainable parameters")
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon, fused=True)


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that accelerate wraps."""
    return optimizer.optimizer


def _append(path: Path, records: Sequence[Metrics]) -> None:
    if records:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)


def _keep_until(path: Path, step: int) -> None:
    """Drop the lines of steps after ``step``, and a last line that was cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            break
    write_file(path, "".join(kept))
