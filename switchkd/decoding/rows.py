"""What the reference loop and the block engine share: a checked job and its rows on their way to rollouts."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from switchkd.base.errors import ConfigError
from switchkd.decoding.pace import BLOCKS
from switchkd.decoding.rollouts import Rollout
from switchkd.decoding.settings import DecodeSettings
from switchkd.forward.ends import Ends
from switchkd.methods.policy import STUDENT, TEACHER
from switchkd.runner.architecture import beyond_context, cache_bytes_per_token
from switchkd.runner.cache import state_bytes


@dataclass
class Row:
    """One prompt on its way to a rollout; ``teacher_prompt`` where the teacher reads another one than the student."""

    id: int
    prompt: list[int]
    seed: int = 0
    teacher_prompt: list[int] | None = None
    completion: list[int] = field(default_factory=list)
    speakers: list[int] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)
    thresholds: list[float] = field(default_factory=list)
    stop_reason: str | None = None
    error: str | None = None
    said: Tensor | None = None
    start: int = 0  # the position of its first token, where it goes on with a text whose beginning is in the prompt

    def prompt_of(self, who: int) -> list[int]:
        """What STUDENT or TEACHER reads before the completion."""
        return self.prompt if who == STUDENT or self.teacher_prompt is None else self.teacher_prompt

    def tokens_of(self, who: int) -> list[int]:
        """The whole text as STUDENT or TEACHER reads it."""
        return self.prompt_of(who) + self.completion

    def append(self, token: int, speaker: int, divergence: float, threshold: float, ends: bool, job: "Job") -> None:
        """Write a token down; ``ends``: whether the policy's text ends behind it."""
        self.completion.append(token)
        self.speakers.append(speaker)
        self.divergences.append(divergence)
        self.thresholds.append(threshold)
        if token in job.ends.ids:
            self.stop_reason = "eos"
        elif ends:
            self.stop_reason = "policy"
        elif len(self.completion) == job.settings.max_new_tokens:
            self.stop_reason = "length"

    def fill(self, notes: np.ndarray) -> None:
        """Take what was noted of each token, ``[n, 4]``: the token, who wrote it, divergence and threshold."""
        tokens, speakers, divergences, thresholds = notes.T
        self.completion, self.speakers = tokens.astype(np.int64).tolist(), speakers.astype(np.int64).tolist()
        self.divergences, self.thresholds = divergences.tolist(), thresholds.tolist()

    def fail(self, reason: str, error: str) -> None:
        self.stop_reason, self.error = reason, error

    def check_finite(self, logq: Tensor, logp: Tensor, reads: Sequence[bool]) -> bool:
        """Stop the row if a model that is read has NaN log-probabilities (log-softmax spreads one NaN or +inf to all)."""
        for name, logs, read in zip(("student", "teacher"), (logq, logp), reads, strict=True):
            if self.stop_reason is None and read and logs.isnan().any():
                self.fail_non_finite(name, len(self.completion))
        return self.stop_reason is None

    def fail_non_finite(self, name: str, position: int) -> None:
        self.fail(*not_finite(name, self.id, position))

    def rollout(self) -> Rollout:
        """The row as it stands, with lists of its own; ``stop_reason`` is "" while it is not done."""
        return Rollout(
            self.id, self.prompt, self.completion[:], self.speakers[:], self.divergences[:], self.thresholds[:],
            self.stop_reason or "", self.error, teacher_prompt_ids=self.teacher_prompt,
            said=self.said,
        )  # fmt: skip


@dataclass
class Job:
    """Checked arguments, shared by the two loops."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    rows: list[Row]
    settings: DecodeSettings
    ends: Ends
    vocab_size: int

    def capacity(self, who: int) -> int:
        """Tokens of the longest row that STUDENT or TEACHER has still to read, its budget included."""
        return (
            max(len(row.prompt_of(who)) for row in self.rows if row.stop_reason is None) + self.settings.max_new_tokens
        )

    def row_bytes(self) -> int:
        """Bytes that decoding one row takes at most."""
        tokens = self.capacity(STUDENT), self.capacity(TEACHER)
        return row_bytes((self.student, self.teacher), tokens, self.vocab_size)

    @staticmethod
    def of(
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        prompt_ids: Sequence[Sequence[int]],
        settings: DecodeSettings,
        sample_ids: Sequence[int] | None = None,
        eos_token_ids: Sequence[int] | Ends | None = None,
        vocab_size: int | None = None,
        teacher_prompt_ids: Sequence[Sequence[int]] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> "Job":
        """``seeds`` has one for each prompt, in place of the settings' own.

        Raises ConfigError for arguments that do not go together; a row that cannot be decoded says so itself.
        """
        ids = list(range(len(prompt_ids))) if sample_ids is None else list(sample_ids)
        if len(ids) != len(prompt_ids):
            raise ConfigError(f"{len(ids)} sample_ids for {len(prompt_ids)} prompts; give one id for each prompt")
        if teacher_prompt_ids is not None and len(teacher_prompt_ids) != len(prompt_ids):
            raise ConfigError(
                f"{len(teacher_prompt_ids)} teacher_prompt_ids for {len(prompt_ids)} prompts; give one list for each prompt"
            )
        shared = min(model.config.get_text_config().vocab_size for model in (student, teacher))
        if vocab_size is not None and not 0 < vocab_size <= shared:
            raise ConfigError(f"vocab_size must lie in 1..{shared} (rows both models have), got {vocab_size}")
        ends = Ends.asked(eos_token_ids, vocab_size or shared, student, teacher)
        own = [None] * len(ids) if teacher_prompt_ids is None else map(list, teacher_prompt_ids)
        noise = [settings.seed] * len(ids) if seeds is None else seeds
        rows = [
            Row(i, list(prompt), seed, other)
            for i, prompt, seed, other in zip(ids, prompt_ids, noise, own, strict=True)
        ]
        job = Job(student, teacher, rows, settings, ends, vocab_size or shared)
        for row in rows:
            _check_row(row, job)
        return job


def row_bytes(models: Sequence[PreTrainedModel], tokens: Sequence[int], vocab_size: int) -> int:
    """Bytes that decoding one row takes: keys and values of so many ``tokens`` in each model, states, and what a block is decided
    from."""
    each = zip(tokens, models, strict=True)
    caches = sum(count * cache_bytes_per_token(model) + state_bytes(model) for count, model in each)
    # Noise and two log-distributions of a block, and the logits they are made of.
    return caches + max(BLOCKS) * vocab_size * 4 * 4


def _check_row(row: Row, job: Job) -> None:
    """Stop a row that cannot be decoded, and one that has no budget."""
    if row.teacher_prompt is None:
        _check_prompt(row, STUDENT, "prompt", "models'", (job.student, job.teacher), job)
    else:
        _check_prompt(row, STUDENT, "prompt", "student's", (job.student,), job)
        if row.stop_reason is None:
            _check_prompt(row, TEACHER, "teacher prompt", "teacher's", (job.teacher,), job)
    if row.stop_reason is None and job.settings.max_new_tokens == 0:
        row.stop_reason = "length"


def _check_prompt(row: Row, who: int, name: str, whose: str, models: Sequence[PreTrainedModel], job: Job) -> None:
    prompt, budget = row.prompt_of(who), job.settings.max_new_tokens
    if problem := prompt_problem(row.id, prompt, name, whose, models, budget, job.vocab_size):
        row.fail(*problem)


def prompt_problem(
    sample: int,
    prompt: Sequence[int],
    name: str,
    whose: str,
    models: Sequence[PreTrainedModel],
    budget: int,
    vocab_size: int,
) -> tuple[str, str] | None:
    """Why a prompt cannot be completed: the reason for a rollout's ``stop_reason``, and its words; None if it can."""
    if not prompt:
        return "empty_prompt", f"sample {sample} has an empty {name}; give it at least one token"
    if bad := [i for i in prompt if not 0 <= i < vocab_size]:
        return (
            "invalid_token",
            f"sample {sample} has token id {bad[0]} in its {name}; ids must lie in 0..{vocab_size - 1}",
        )
    if words := beyond_context(len(prompt) + budget, whose, *models):
        return (
            "prompt_too_long",
            f"sample {sample}: {len(prompt)} {name} tokens + max_new_tokens {budget} {words}; shorten the prompt or lower "
            "max_new_tokens",
        )
    return None


def not_finite(name: str, sample: int, position: int) -> tuple[str, str]:
    """The same of a model, student or teacher, whose logits are not finite at a response position."""
    where = f"sample {sample}, response position {position}"
    return "non_finite", f"the {name}'s logits are not finite at {where}; check its weights and dtype"
