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
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from switchkd.base import signals
from switchkd.base.errors import ConfigError
from switchkd.base.memory import fits, tell_fewer
from switchkd.decoding.engine import BlockEngine
from switchkd.decoding.pace import NO_COSTS
from switchkd.decoding.rollouts import DecodeCost, Rollouts
from switchkd.decoding.rows import Job, Row
from switchkd.decoding.served import by_student, decode_served, reads_none
from switchkd.decoding.settings import DecodeSettings, Drafter
from switchkd.forward.ends import Ends
from switchkd.forward.parallel import Together
from switchkd.forward.proof import prove
from switchkd.forward.served import ServedModel
from switchkd.methods.policy import STUDENT, TEACHER, Policy
from switchkd.methods.sampling import draw, gumbel_noise, keys_tensor, noise_key, speakers
from switchkd.runner.fast_layers import kept_layers
from switchkd.runner.modes import evaluating
from switchkd.runner.runner import Runner
from switchkd.runner.threads import FittingThreads

DEFAULT_BATCH = 32
# One for all decodings of the process: it goes by what it has seen of the machine so far.
threads = FittingThreads()


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
            key = keys_tensor([noise_key(seed, row.id, t)])
            token = draw(settings.sampling.shape(decision.log_probs), gumbel_noise(key, job.vocab_size), temperature)
            speaker = speakers(decision, token, key)
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
    costs: tuple[float, ...] = (),
    memory_gib: float | None = None,
    keep_hidden: bool = False,
    graphs: bool = False,
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
        batch_size: rows decoded together; a finished row's place goes to the next prompt. Where memory runs out, half of the rows
            go on and the others begin again later.
        top_p, top_k, min_p: what is left of the target distribution to draw from, as in transformers' ``generate`` (see
            ``sampling.Sampling``). The policy sees all of it; greedy text is not touched.
        drafter: which model proposes the block. It moves time, never tokens.
        costs: six numbers of seconds by which rounds are planned (`pace.Costs`), as a run's config.yaml holds them; by default a
            model is timed when it is first used. With equal costs rounding too is the same each time.
        memory_gib: GiB that key/value caches and block buffers may take; fewer rows are then decoded together.
        keep_hidden: whether rollouts carry what the teacher ``said``: its hidden states.
        graphs: record drafts and verifying forwards as CUDA graphs, for batches of 1, 2, 4 … 64 rows; not yet run on a GPU.
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
        policy, max_new_tokens, temperature, seed, top_p, top_k, min_p, block_size, batch_size, drafter, costs, memory_gib,
        keep_hidden, graphs,
    )  # fmt: skip
    job = Job.of(student, teacher, prompt_ids, settings, sample_ids, eos_token_ids, vocab_size, teacher_prompt_ids)
    return decode_job(job, progress, watch, Runners(lasting=True))


class Runners:
    """The models of decodings that follow on each other, with what each has prepared; whoever decodes again keeps them.

    ``lasting``: what was prepared of weights is kept as long as the models live. Not for models that are trained in between.
    """

    def __init__(self, lasting: bool = False) -> None:
        self.lasting = lasting
        self._of: dict[int, Runner] = {}

    def of_pair(self, student: PreTrainedModel, teacher: PreTrainedModel) -> tuple[Runner, Runner]:
        """The runners of two models, which are proved; two of them also where both are one model."""
        one, other = self._runner(student), self._runner(teacher)
        return one, Runner(teacher) if other is one else other

    def _runner(self, model: PreTrainedModel) -> Runner:
        prove(model)
        runner = self._of.get(id(model))
        if runner is None or runner.model is not model:
            runner = self._of[id(model)] = Runner(model)
            if self.lasting:
                runner.fast = kept_layers(model)
        return runner


@torch.no_grad()
def measured_costs(job: Job) -> tuple[float, ...]:
    """What rounds of such a job are planned by, for the setting ``costs``; measured now, on its first rows.

    Processes that run the teacher together ask in step, and are told the same.
    """
    job = by_student(job) if isinstance(job.teacher, ServedModel) else job
    decodable = [row for row in job.rows if row.stop_reason is None]
    if not decodable:
        return NO_COSTS.plain()
    student, teacher = pair = Runners().of_pair(job.student, job.teacher)
    with evaluating(job.student, job.teacher), student.fast(), teacher.fast():
        mine = _begun(job, decodable, _most(job, decodable), pair)[0].pace.costs.plain()
    return Together.of(job.teacher).first(lambda: mine)


@torch.no_grad()
def decode_job(
    job: Job,
    progress: Callable[[DecodeCost], None] | None = None,
    watch: Callable[[Rollouts], None] | None = None,
    runners: Runners | None = None,
) -> Rollouts:
    """``decode`` of arguments that are checked."""
    if isinstance(job.teacher, ServedModel):
        final = watch if reads_none(job.settings.policy) else None  # drafts may be taken back
        return decode_served(job, partial(decode_job, progress=progress, watch=final, runners=runners))
    decodable = [row for row in job.rows if row.stop_reason is None]
    if not decodable:
        return Rollouts(row.rollout() for row in job.rows)
    start = time.perf_counter()
    alone = Together.of(job.teacher).alone
    if not alone and not job.settings.costs:  # plans must be the same on all processes that run the teacher
        job = replace(job, settings=replace(job.settings, costs=measured_costs(job)))
    pair = (runners or Runners()).of_pair(job.student, job.teacher)
    most, (student, teacher) = _most(job, decodable), pair
    # Given costs ask for the same text each time, which another number of threads may round otherwise, or cannot.
    any_number = not job.settings.costs or (student.fast.steady and teacher.fast.steady)
    fit = threads() if any_number else nullcontext(lambda: 0)
    with evaluating(job.student, job.teacher), student.fast(), teacher.fast(), fit as fitted:
        engine, rows = _begun(job, decodable, most, pair)
        while engine.rows:
            signals.check()
            fitted()
            if not fits(engine.round, engine.board.count, "decoding", alone)[0]:
                rows = engine.shrink()
                continue
            cost = engine.cost(time.perf_counter() - start)
            if progress is not None:
                progress(cost)
            if watch is not None:
                engine.board.fetch(np.arange(engine.board.count))
                watch(Rollouts([row.rollout() for row in job.rows], cost))
    for runner in pair:
        runner.close()
    tell_fewer("decoding", "generation_batch_size", most, rows)
    return Rollouts([row.rollout() for row in job.rows], cost, rows if rows < most else None)


def _begun(job: Job, decodable: Sequence[Row], rows: int, pair: Sequence[Runner]) -> tuple[BlockEngine, int]:
    """An engine for ``rows`` rows at a time, or for as many as memory holds, and their number."""
    alone = Together.of(job.teacher).alone
    while (engine := fits(partial(BlockEngine, job, deque(decodable), rows, pair), rows, "decoding", alone)[1]) is None:
        rows //= 2
    return engine, rows


def _most(job: Job, decodable: Sequence[Row]) -> int:
    """Rows that may be decoded together."""
    return min(job.settings.batch_size or DEFAULT_BATCH, _rows_within(job), len(decodable))


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
