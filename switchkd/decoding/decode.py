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
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from switchkd.base import signals
from switchkd.base.errors import ConfigError
from switchkd.base.memory import halving
from switchkd.decoding.engine import BlockEngine
from switchkd.decoding.linear import packed
from switchkd.decoding.pace import Pace
from switchkd.decoding.rollouts import DecodeCost, Rollouts
from switchkd.decoding.rows import Job
from switchkd.decoding.settings import DecodeSettings, Drafter
from switchkd.forward.architecture import num_parameters
from switchkd.forward.ends import Ends
from switchkd.forward.modes import evaluating
from switchkd.forward.proof import prove
from switchkd.methods.policy import STUDENT, TEACHER, Policy
from switchkd.methods.sampling import draw, gumbel_noise, noise_key, speakers

DEFAULT_BATCH = 32


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
    eos_token_ids: Sequence[int] | Ends | None = None,
    vocab_size: int | None = None,
    *,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    teacher_prompt_ids: Sequence[Sequence[int]] | None = None,
) -> Rollouts:
    """Decode one row and one token at a time, both models called on the whole text at every step.

    Slow on purpose: it defines what ``decode`` must return, token by token. Arguments and result are ``decode``'s.
    """
    settings = DecodeSettings(policy, max_new_tokens, temperature, seed, top_p, top_k, min_p)
    job = Job.of(student, teacher, prompt_ids, settings, sample_ids, eos_token_ids, vocab_size, teacher_prompt_ids)
    for row in job.rows:
        state = policy.init(1)
        while row.stop_reason is None:
            t = len(row.completion)
            with evaluating(student, teacher):
                logq = _next_log_probs(student, row.tokens_of(STUDENT), job)
                logp = _next_log_probs(teacher, row.tokens_of(TEACHER), job)
            if not row.check_finite(logq, logp, [bool(read) for read in policy.reads(state)]):
                break
            decision = policy.step(state, logq, logp, torch.tensor([t]))
            key = noise_key(seed, row.id, t)
            token = draw(settings.sampling.shape(decision.log_probs), gumbel_noise([key], job.vocab_size), temperature)
            speaker = speakers(decision, token, [key])
            state = policy.spoke(policy.observe(decision.state, token), speaker)
            seen = float(decision.divergence), float(decision.thresholds)
            row.append(int(token), int(speaker), *seen, bool(policy.ends(state)), job)
    return Rollouts([row.rollout() for row in job.rows])


def _next_log_probs(model: PreTrainedModel, tokens: list[int], job: Job) -> Tensor:
    """``[1, V]`` on the host, where the reference loop decides."""
    ids = torch.tensor([tokens], device=next(model.parameters()).device)
    return job.ends.log_probs(model(ids).logits[:, -1, : job.vocab_size]).cpu()


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
    eos_token_ids: Sequence[int] | Ends | None = None,
    batch_size: int | None = None,
    *,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    drafter: Drafter = "auto",
    repeatable: bool = False,
    memory_gib: float | None = None,
    keep_hidden: bool = False,
    static_step: bool = False,
    vocab_size: int | None = None,
    teacher_prompt_ids: Sequence[Sequence[int]] | None = None,
    progress: Callable[[DecodeCost], None] | None = None,
    watch: Callable[[Rollouts], None] | None = None,
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
        block_size: positions decided in one round; "auto" chooses by running agreement and measured cost. It moves time,
            never tokens.
        eos_token_ids: ids that end a row, or a pair's ``ends``, which also say whether they are one event (default: what the
            models' generation configs name, as ``load_pair`` leaves them).
        batch_size: rows decoded together; a finished row's place goes to the next prompt. Where memory runs out, all rows are
            decoded again with half as many together.
        top_p, top_k, min_p: what is left of the target distribution to draw from, as in transformers' ``generate`` (see
            ``sampling.Sampling``). The policy sees all of it; greedy text is not touched.
        drafter: which model proposes the block. It moves time, never tokens.
        repeatable: take the models' sizes for their costs and do not look at the clock: rounding too is then the same each time.
        memory_gib: GiB that key/value caches and block buffers may take; fewer rows are then decoded together.
        keep_hidden: whether rollouts carry what the teacher ``said``: its hidden states.
        static_step: run the student's one-token steps on buffers that never move, on CUDA as one graph. Worth a try where
            the student is small; each change in the number of rows records the graph anew.
        vocab_size: ids that may be drawn (default: the rows that both models' logits have). Padding rows lie beyond.
        teacher_prompt_ids: one list a prompt, which the teacher reads in its place: another instruction, or what the student may
            not see. Both read the completion; positions are counted in it, so noise and policy see no difference.
        progress: called after every round with the cost so far.
        watch: called after every round with the rows as they stand, and their cost; ``stop_reason`` is "" where a row goes on.

    Returns:
        One ``Rollout`` for each prompt, in order, with ``.cost``. A row that cannot be decoded says why in ``stop_reason``
        and ``error`` and disturbs no other.

    Raises:
        ConfigError: for settings out of range. ModelError: for a model that is not decoded exactly (`switchkd.forward.proof`).
        NoMemoryError: one row is too much for the memory. Stopped: a signal came between two rounds.
    """
    settings = DecodeSettings(
        policy, max_new_tokens, temperature, seed, top_p, top_k, min_p, block_size, batch_size, drafter, repeatable, memory_gib,
        keep_hidden, static_step,
    )  # fmt: skip
    job = Job.of(student, teacher, prompt_ids, settings, sample_ids, eos_token_ids, vocab_size, teacher_prompt_ids)
    return decode_job(job, progress, watch)


@torch.no_grad()
def decode_job(
    job: Job,
    progress: Callable[[DecodeCost], None] | None = None,
    watch: Callable[[Rollouts], None] | None = None,
) -> Rollouts:
    """``decode`` of arguments that are checked."""
    student, teacher, settings = job.student, job.teacher, job.settings
    decodable = [row for row in job.rows if row.stop_reason is None]
    if not decodable:
        return Rollouts(row.rollout() for row in job.rows)
    sizes = (num_parameters(student), num_parameters(teacher))
    start = time.perf_counter()

    def work(rows: int) -> DecodeCost:
        """Decode from the prompts on; tokens do not depend on how many rows are decoded together."""
        for model in (student, teacher):
            prove(model)
        for row in decodable:
            row.restart()
        pace = Pace(
            sizes,
            job.vocab_size,
            next(student.parameters()).device,
            settings.block_size,
            settings.drafter,
            not settings.repeatable,
        )
        engine = BlockEngine(job, deque(decodable), rows, pace)
        with evaluating(student, teacher), packed(student, teacher):
            while engine.rows:
                signals.check()
                engine.round()
                cost = engine.cost(time.perf_counter() - start)
                if progress is not None:
                    progress(cost)
                if watch is not None:
                    watch(Rollouts([row.rollout() for row in job.rows], cost))
        return cost

    most = min(settings.batch_size or DEFAULT_BATCH, _rows_within(job), len(decodable))
    cost, rows = halving(work, most, "decoding", "generation_batch_size")
    return Rollouts([row.rollout() for row in job.rows], cost, rows if rows < most else None)


def _rows_within(job: Job) -> int:
    """Rows that fit into ``memory_gib`` together; raises ConfigError if not even one does."""
    memory_gib = job.settings.memory_gib
    if memory_gib is None:
        return len(job.rows)
    if memory_gib * 2**30 < (row := job.row_bytes()):
        longest = max(job.capacity(STUDENT), job.capacity(TEACHER))
        raise ConfigError(
            f"one row of {longest} tokens needs {row / 2**30:.3g} GiB to be decoded, memory_gib is {memory_gib:g}; "
            "raise it, shorten the prompts or lower max_new_tokens"
        )
    return int(memory_gib * 2**30 / row)
