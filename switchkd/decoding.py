"""The decoding engine: the reference loop that defines the answer, and the block engine that gives it sooner.

Both draw every token as ``argmax(log m + T · g)``: m is the policy's target distribution at that position, g the noise of
(seed, sample id, position). The block engine lets one model draft K tokens with the same noise, has the other score them in
one forward, walks the positions in order and cuts the block at the first token that differs from its draft. Its tokens are
the reference loop's, one by one, for any block length, batch, neighbours and drafter.

Shapes: B rows, K positions of a block, V vocabulary. p is the teacher, q the student.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from switchkd.cache import CachedModel, evaluating
from switchkd.divergences import log_probs
from switchkd.errors import ConfigError
from switchkd.models import context_length, declared_eos
from switchkd.policies import STUDENT, TEACHER, Policy, State
from switchkd.rollouts import DecodeCost, Rollout, Rollouts
from switchkd.sampling import draw, gumbel_noise, noise_key

Drafter = Literal["auto", "student", "teacher"]

DEFAULT_BATCH = 32
DEFAULT_BLOCK = 4


@torch.no_grad()
def decode_reference(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    policy: Policy,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    seed: int = 0,
    sample_ids: Sequence[int] | None = None,
    eos_token_ids: Sequence[int] | None = None,
    vocab_size: int | None = None,
) -> Rollouts:
    """Decode one row and one token at a time, both models called on the whole text at every step.

    Slow on purpose: it defines what ``decode`` must return, token by token. Arguments and result are ``decode``'s.
    """
    job = _Job.of(
        student, teacher, prompt_ids, policy, max_new_tokens, temperature, seed, sample_ids, eos_token_ids, vocab_size
    )
    for row in job.rows:
        state = policy.init(1)
        while row.stop_reason is None:
            t = len(row.completion)
            with evaluating(student, teacher):
                logq, logp = (_next_log_probs(model, row.tokens, job.vocab_size) for model in (student, teacher))
            if not row.check_finite(logq, logp, [bool(read) for read in policy.reads(state)]):
                break
            decision = policy.step(state, logq, logp, torch.tensor([t]))
            state = decision.state
            noise = gumbel_noise([noise_key(seed, row.sample_id, t)], job.vocab_size)
            token = draw(decision.log_probs, noise, temperature)
            row.append(int(token), int(decision.speaker), float(decision.divergence), job)
    return Rollouts([row.rollout() for row in job.rows])


def _next_log_probs(model: PreTrainedModel, tokens: list[int], vocab_size: int) -> Tensor:
    """``[1, V]`` on the host, where the reference loop decides."""
    ids = torch.tensor([tokens], device=next(model.parameters()).device)
    return log_probs(model(ids).logits[:, -1, :vocab_size]).cpu()


@torch.no_grad()
def decode(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    policy: Policy,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    seed: int = 0,
    sample_ids: Sequence[int] | None = None,
    block_size: int | Literal["auto"] = "auto",
    eos_token_ids: Sequence[int] | None = None,
    batch_size: int | None = None,
    *,
    drafter: Drafter = "auto",
    vocab_size: int | None = None,
    progress: Callable[[DecodeCost], None] | None = None,
) -> Rollouts:
    """Complete every prompt under a policy: the same tokens as ``decode_reference``, in far fewer model calls.

    Args:
        student, teacher: causal language models that share a vocabulary; put in evaluation mode for the call.
        prompt_ids: token ids, one list a prompt; never padded.
        policy: who writes the next token.
        max_new_tokens: budget of each row.
        temperature: sampling temperature of the target distribution; 0 is greedy. The policy sees temperature 1.
        seed: key of the noise, together with each row's sample id and position.
        sample_ids: one id a prompt (default: its index); equal (seed, id, prompt) give equal text in any batch.
        block_size: positions decided in one round. It moves time, never tokens.
        eos_token_ids: ids that end a row (default: what the models' generation configs name).
        batch_size: rows decoded together; a finished row's place goes to the next prompt.
        drafter: which model proposes the block where both are read. It moves time, never tokens.
        vocab_size: ids that may be drawn (default: the rows that both models' logits have). Padding rows lie beyond.
        progress: called after every round with the cost so far.

    Returns:
        One ``Rollout`` for each prompt, in order, with ``.cost``. A row that cannot be decoded says why in ``stop_reason``
        and ``error`` and disturbs no other.

    Raises:
        ConfigError: for settings out of range. ModelError: for a model whose cache cannot be rolled back.
    """
    if block_size != "auto" and block_size < 1:
        raise ConfigError(f"block_size must be 'auto' or at least 1, got {block_size}")
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
    if drafter not in ("auto", "student", "teacher"):
        raise ConfigError(f"drafter must be 'auto', 'student' or 'teacher', got {drafter!r}")
    job = _Job.of(
        student, teacher, prompt_ids, policy, max_new_tokens, temperature, seed, sample_ids, eos_token_ids, vocab_size
    )
    start = time.perf_counter()
    cost = DecodeCost()
    if queue := deque(row for row in job.rows if row.stop_reason is None):
        engine = _BlockEngine(job, queue, batch_size or DEFAULT_BATCH, block_size, drafter)
        with evaluating(student, teacher):
            while engine.rows:
                engine.round()
                cost = engine.cost(time.perf_counter() - start)
                if progress is not None:
                    progress(cost)
    return Rollouts([row.rollout() for row in job.rows], cost)


@dataclass
class _Row:
    """One prompt on its way to a rollout."""

    sample_id: int
    prompt: list[int]
    completion: list[int] = field(default_factory=list)
    speakers: list[int] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)
    stop_reason: str | None = None
    error: str | None = None

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.completion

    def append(self, token: int, speaker: int, divergence: float, job: "_Job") -> None:
        self.completion.append(token)
        self.speakers.append(speaker)
        self.divergences.append(divergence)
        if token in job.eos_token_ids:
            self.stop_reason = "eos"
        elif len(self.completion) == job.max_new_tokens:
            self.stop_reason = "length"

    def fail(self, reason: str, error: str) -> None:
        self.stop_reason, self.error = reason, error

    def check_finite(self, logq: Tensor, logp: Tensor, reads: Sequence[bool]) -> bool:
        """Stop the row if a model that is read has NaN log-probabilities (log-softmax spreads one NaN or +inf to all)."""
        for name, logs, read in zip(("student", "teacher"), (logq, logp), reads, strict=True):
            if self.stop_reason is None and read and logs.isnan().any():
                where = f"sample {self.sample_id}, response position {len(self.completion)}"
                self.fail("non_finite", f"the {name}'s logits are not finite at {where}; check its weights and dtype")
        return self.stop_reason is None

    def rollout(self) -> Rollout:
        assert self.stop_reason is not None
        return Rollout(
            self.sample_id, self.prompt, self.completion, self.speakers, self.divergences, self.stop_reason, self.error
        )


@dataclass
class _Job:
    """Checked arguments, shared by the two loops."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    policy: Policy
    rows: list[_Row]
    max_new_tokens: int
    temperature: float
    seed: int
    eos_token_ids: frozenset[int]
    vocab_size: int

    @staticmethod
    def of(
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        prompt_ids: Sequence[Sequence[int]],
        policy: Policy,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        sample_ids: Sequence[int] | None,
        eos_token_ids: Sequence[int] | None,
        vocab_size: int | None,
    ) -> "_Job":
        if max_new_tokens < 0:
            raise ConfigError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
        if not 0 <= temperature < float("inf"):
            raise ConfigError(f"temperature must be finite and at least 0 (0 is greedy), got {temperature}")
        ids = list(range(len(prompt_ids))) if sample_ids is None else list(sample_ids)
        if len(ids) != len(prompt_ids):
            raise ConfigError(f"{len(ids)} sample_ids for {len(prompt_ids)} prompts; give one id for each prompt")
        shared = min(model.config.get_text_config().vocab_size for model in (student, teacher))
        if vocab_size is not None and not 0 < vocab_size <= shared:
            raise ConfigError(f"vocab_size must lie in 1..{shared} (rows both models have), got {vocab_size}")
        named = (
            declared_eos(student.generation_config, teacher.generation_config)
            if eos_token_ids is None
            else eos_token_ids
        )
        rows = [_Row(i, list(prompt)) for i, prompt in zip(ids, prompt_ids, strict=True)]
        job = _Job(
            student, teacher, policy, rows, max_new_tokens, temperature, seed, frozenset(named), vocab_size or shared
        )
        limit = min(context_length(student), context_length(teacher))
        for row in rows:
            _check_prompt(row, job, limit)
        return job


def _check_prompt(row: _Row, job: _Job, context: float) -> None:
    wanted = len(row.prompt) + job.max_new_tokens
    if not row.prompt:
        row.fail("empty_prompt", f"sample {row.sample_id} has an empty prompt; give it at least one token")
    elif bad := [i for i in row.prompt if not 0 <= i < job.vocab_size]:
        row.fail(
            "invalid_token", f"sample {row.sample_id} has token id {bad[0]}; ids must lie in 0..{job.vocab_size - 1}"
        )
    elif wanted > context:
        row.fail(
            "prompt_too_long",
            f"sample {row.sample_id}: {len(row.prompt)} prompt tokens + max_new_tokens {job.max_new_tokens} exceed the "
            f"models' context of {context:g}; shorten the prompt or lower max_new_tokens",
        )
    elif job.max_new_tokens == 0:
        row.stop_reason = "length"


class _BlockEngine:
    """Rounds over a batch of rows: catch up, draft K tokens, verify them in one forward, walk, roll back."""

    def __init__(
        self, job: _Job, queue: deque[_Row], batch_size: int, block_size: int | Literal["auto"], drafter: Drafter
    ):
        self.job, self.queue, self.block_size, self.drafter = job, queue, block_size, drafter
        self.rows = [queue.popleft() for _ in range(min(batch_size, len(queue)))]
        capacity = max(len(row.prompt) for row in job.rows if row.stop_reason is None) + job.max_new_tokens
        self.models = [  # indexed by STUDENT, TEACHER
            CachedModel(model, len(self.rows), capacity, job.vocab_size) for model in (job.student, job.teacher)
        ]
        self.device = self.models[STUDENT].device
        self.state: State = job.policy.init(len(self.rows), self.device)
        # Per speaker: how often its own draw is the final token, over a sliding window of about 30 positions.
        self.agreement = [0.5, 0.5]
        self.rounds = 0

    def round(self) -> None:
        """Decide up to K tokens of every row, then retire finished rows and admit new ones."""
        reads = self._reads(self.state)
        drafter = self._choose_drafter(reads)
        block = self._choose_block(reads)
        noise = [self._noise(i) for i in range(block)]
        drafts, logp_draft = self._draft(drafter, noise)
        verified = reads[1 - drafter]
        logp_other = self._verify(1 - drafter, verified, drafts, logp_draft)
        logs = {drafter: logp_draft, 1 - drafter: logp_other}
        has = [torch.ones_like(verified)] * 2
        has[1 - drafter] = verified
        self._walk(drafts, logs[STUDENT], logs[TEACHER], noise, has)
        self._retire()
        self.rounds += 1

    def cost(self, seconds: float) -> DecodeCost:
        student, teacher = self.models
        kept = sum(len(row.completion) for row in self.job.rows)
        by_teacher = sum(sum(row.speakers) for row in self.job.rows)
        return DecodeCost(
            seconds, kept, by_teacher, student.forwards, teacher.forwards,
            student.prefill_tokens, teacher.prefill_tokens, self.rounds,
        )  # fmt: skip

    def _reads(self, state: State) -> list[Tensor]:
        """Which model the policy looks at next, for each row: two ``[B]`` bool tensors on the host."""
        pair = self.job.policy.reads(state)
        return [torch.as_tensor(read, device="cpu").expand(len(self.rows)).clone() for read in pair]

    def _choose_drafter(self, reads: list[Tensor]) -> int:
        only = [bool(reads[s].any()) and not bool(reads[1 - s].any()) for s in (STUDENT, TEACHER)]
        if self.drafter != "auto":
            return STUDENT if self.drafter == "student" else TEACHER
        if any(only):
            return only.index(True)
        return TEACHER if self.agreement[TEACHER] > self.agreement[STUDENT] else STUDENT

    def _choose_block(self, reads: list[Tensor]) -> int:
        left = max(self.job.max_new_tokens - len(row.completion) for row in self.rows)
        if self.block_size != "auto":
            return min(self.block_size, left)
        # A lone model has nothing to verify: a block would only run past the end of rows that stop in it.
        alone = not (reads[STUDENT].any() and reads[TEACHER].any()) and self.drafter == "auto"
        return 1 if alone else min(DEFAULT_BLOCK, left)

    def _noise(self, offset: int) -> Tensor:
        keys = [noise_key(self.job.seed, row.sample_id, len(row.completion) + offset) for row in self.rows]
        return gumbel_noise(keys, self.job.vocab_size, self.device)

    def _draft(self, who: int, noise: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """K draws of one model, each read by it before the next: drafts ``[B, K]`` and K log-distributions ``[B, V]``."""
        model, rows = self.models[who], range(len(self.rows))
        model.catch_up(rows, [row.tokens for row in self.rows])
        token = self._last_tokens()
        drafts, logs = [], []
        for g in noise:
            logp = log_probs(model.extend(rows, token.to(model.device), self._limits())[:, 0]).to(self.device)
            draft = draw(logp, g, self.job.temperature)
            drafts.append(draft)
            logs.append(logp)
            token = draft.unsqueeze(1)
        return torch.stack(drafts, 1), logs

    def _verify(self, who: int, wanted: Tensor, drafts_BK: Tensor, fallback: list[Tensor]) -> list[Tensor]:
        """Log-distributions of the other model at the K positions, in one forward over the rows that are ``wanted``.

        The k-th draft is not read: its successor lies outside the block. Rows not wanted get ``fallback``, unread.
        """
        if not wanted.any():
            return fallback
        model, rows = self.models[who], wanted.nonzero().flatten().tolist()
        model.catch_up(rows, [self.rows[row].tokens for row in rows])
        tokens = torch.cat([self._last_tokens(), drafts_BK[:, :-1]], 1).to(model.device)
        limits = self._limits()
        logits = model.extend(rows, tokens[rows], [limits[row] for row in rows]).to(self.device)
        logs = [log_probs(logits[:, k]) for k in range(drafts_BK.shape[1])]
        if len(rows) == len(self.rows):
            return logs
        index = torch.tensor(rows, device=self.device)
        return [whole.index_copy(0, index, part) for whole, part in zip(fallback, logs, strict=True)]

    def _walk(
        self, drafts_BK: Tensor, logq: list[Tensor], logp: list[Tensor], noise: list[Tensor], has: list[Tensor]
    ) -> None:
        """Decide the positions in order; a row stops at the first token that its draft did not foresee."""
        start = [len(row.completion) for row in self.rows]
        alive = [True] * len(self.rows)
        reads = self._reads(self.state)
        for k, g in enumerate(noise):
            for b, row in enumerate(self.rows):
                read = [bool(r[b]) for r in reads]
                alive[b] = alive[b] and row.check_finite(logq[k][b, :1], logp[k][b, :1], read)
            position = torch.tensor([t + k for t in start], device=self.device)
            decision = self.job.policy.step(self.state, logq[k], logp[k], position)
            token = draw(decision.log_probs, g, self.job.temperature)
            self._keep_state(alive, decision.state)
            reads = self._reads(self.state)
            own = [draw(logs[k], g, self.job.temperature).tolist() for logs in (logq, logp)]
            lacking = [(reads[s] & ~has[s]).tolist() for s in (STUDENT, TEACHER)]
            draft = drafts_BK[:, k].tolist()
            columns = zip(token.tolist(), decision.speaker.tolist(), decision.divergence.tolist(), strict=True)
            for b, (row, (y, speaker, d)) in enumerate(zip(self.rows, columns, strict=True)):
                if not alive[b]:
                    continue
                row.append(y, speaker, d, self.job)
                self._observe(y, [own[s][b] for s in (STUDENT, TEACHER)], [bool(h[b]) for h in has])
                # A policy may want a model again that this block did not run for the row: the block ends there.
                alive[b] = row.stop_reason is None and y == draft[b] and not (lacking[0][b] or lacking[1][b])
            if not any(alive):
                break
        # Both models have read the last token but one at most; the last one may differ from what was drafted.
        for model in self.models:
            model.lengths = [
                min(length, len(row.tokens) - 1) for length, row in zip(model.lengths, self.rows, strict=True)
            ]

    def _keep_state(self, alive: list[bool], new: State) -> None:
        """Rows whose block was cut keep the state of their last kept token."""
        keep = torch.tensor(alive, device=self.device)
        self.state = tuple(
            torch.where(keep.view(-1, *[1] * (n.dim() - 1)), n, old) for n, old in zip(new, self.state, strict=True)
        )

    def _observe(self, token: int, own: list[int], has: list[bool]) -> None:
        for who in (STUDENT, TEACHER):
            if has[who]:
                self.agreement[who] += ((token == own[who]) - self.agreement[who]) / 30

    def _retire(self) -> None:
        """Give the places of finished rows to waiting prompts; when none waits, shrink the batch."""
        for place, row in enumerate(self.rows):
            if row.stop_reason is not None and self.queue:
                self.rows[place] = self.queue.popleft()
                for model in self.models:
                    model.reset(place)
                fresh = self.job.policy.init(1, self.device)
                for whole, first in zip(self.state, fresh, strict=True):
                    whole[place] = first[0]
        left = [place for place, row in enumerate(self.rows) if row.stop_reason is None]
        if left and len(left) < len(self.rows):
            for model in self.models:
                model.select(left)
            index = torch.tensor(left, device=self.device)
            self.state = tuple(part[index] for part in self.state)
        self.rows = [self.rows[place] for place in left]

    def _last_tokens(self) -> Tensor:
        return torch.tensor([[row.tokens[-1]] for row in self.rows], device=self.device)

    def _limits(self) -> list[int]:
        """First position beyond each row's budget."""
        return [len(row.prompt) + self.job.max_new_tokens for row in self.rows]
