"""What becomes of a block of drafts: which token stands at each position, who wrote it, and how many of them a row keeps.

A row keeps tokens up to the first that its draft did not foresee, which is kept too, being right whatever the draft was. A rule
without state is asked once for all positions; one with state is walked through them, since each step hears the last token.

Shapes: B rows, K positions of a block, V vocabulary. p is the teacher, q the student.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from switchkd.forward.ends import Ends
from switchkd.methods.policy import STUDENT, TEACHER, Policy, State
from switchkd.methods.sampling import Sampling, draw, speakers


@dataclass(frozen=True)
class Block:
    """What two models say about the K positions of a round.

    ``logs`` are ``[B, K, V]`` by STUDENT, TEACHER. Where a model was not run for a row and position, ``ran`` ``[B, K]`` is False
    and the other's words, or any, stand in its place; None where it ran for all. ``drafts`` ``[B, K]`` or fewer: none for the last
    position if nobody asked the drafter about it, and none at all where it was not run. ``start`` ``[B]`` is the position of the
    first, ``left`` ``[B]`` how many tokens a row may still write. ``keys`` ``[B, K]`` are those of the ``noise`` ``[B, K, V]``.
    """

    logs: tuple[Tensor, Tensor]
    ran: tuple[Tensor | None, Tensor | None]
    drafts: Tensor
    keys: Tensor
    noise: Tensor
    start: Tensor
    left: Tensor

    @property
    def size(self) -> int:
        """K."""
        return self.noise.shape[1]


class Said:
    """What the models say in a round, by STUDENT, TEACHER: log-distributions ``[b, K, V]``, and where they are a model's own."""

    noise: Tensor

    def __init__(self, keys: Tensor, drafter: int):
        self.keys, self.drafter = keys, drafter
        self.logs: list[Tensor | None] = [None, None]
        self.ran: list[Tensor | None] = [None, None]  # [b, K] bool; None: everywhere
        self.drafts = keys[:, :0]  # [b, K] or fewer

    @property
    def both(self) -> bool:
        """Whether both were run."""
        return None not in self.logs

    def drafted(self, logs: Tensor, drafts: Tensor, noise: Tensor) -> None:
        self.logs[self.drafter], self.drafts, self.noise = logs, drafts, noise

    def verified(self, logs: Tensor, index: Tensor | None = None) -> None:
        """What the other said, of all rows or of those at ``index``, in whose place the drafter's words stand elsewhere."""
        who, drafted = 1 - self.drafter, self.logs[self.drafter]
        if index is not None:
            others = torch.zeros(*self.keys.shape, logs.shape[-1], dtype=logs.dtype, device=logs.device)
            if drafted is not None:
                others[:, : drafted.shape[1]] = drafted
            logs = others.index_copy(0, index, logs)
            self.ran[who] = self._nowhere().index_fill(0, index, True)
        if drafted is not None and (size := drafted.shape[1]) < logs.shape[1]:
            self.logs[self.drafter] = torch.cat([drafted, logs[:, size:].to(drafted.dtype)], 1)
            self.ran[self.drafter] = self._nowhere().index_fill(1, torch.arange(size, device=logs.device), True)
        self.logs[who] = logs

    def block(self, start: Tensor, left: Tensor) -> Block:
        """All of it, for the decision; where a model was not run the other's words, or any, stand in."""
        student, teacher = self.logs
        said = student if student is not None else teacher
        if said is None:  # the policy knows the next tokens by itself
            said = torch.zeros_like(self.noise).log_softmax(-1)
        logs = said if student is None else student, said if teacher is None else teacher
        ran = [self._nowhere() if each is None else ran for each, ran in zip(self.logs, self.ran, strict=True)]
        return Block(logs, (ran[0], ran[1]), self.drafts, self.keys, self.noise, start, left)

    def _nowhere(self) -> Tensor:
        return torch.zeros(self.keys.shape, dtype=torch.bool, device=self.keys.device)


class Verdict(NamedTuple):
    """What was decided, ``[B, K]`` each; what stands behind a row's ``kept`` ``[B]`` tokens means nothing.

    ``broken`` says by STUDENT, TEACHER ``[B]`` where a model that is read is not a number at the position behind the kept ones.
    ``eos`` and ``told`` ``[B]``: the last kept token is an end, or the policy ends the text behind it; ``state`` is that behind it.
    ``asked`` ``[B, K]``: the policy looked at both models.
    """

    tokens: Tensor
    speakers: Tensor
    divergences: Tensor
    thresholds: Tensor
    kept: Tensor
    broken: tuple[Tensor, Tensor]
    eos: Tensor
    told: Tensor
    asked: Tensor
    state: State


def decide(policy: Policy, state: State, sampling: Sampling, ends: Ends, block: Block) -> Verdict:
    """Decide a block for rows in this ``state``; nothing is changed in place, and nothing waits for the device."""
    steps = _in_order(policy, state, sampling, block) if state else _at_once(policy, state, sampling, block)
    eos = ends.among(steps.tokens)
    broken = [read & logs[..., 0].isnan() for read, logs in zip(steps.reads, block.logs, strict=True)]
    sound = ~(broken[STUDENT] | broken[TEACHER])
    said = steps.tokens, steps.speakers, steps.divergences, steps.thresholds
    asked = steps.reads[STUDENT] & steps.reads[TEACHER]
    if block.size == 1:
        by_student, by_teacher, eos, told = (each[:, 0] for each in (*broken, eos, steps.told))
        kept = sound[:, 0].long()
        return Verdict(*said, kept, (by_student, by_teacher), eos, told, asked, steps.states[0])
    goes_on = (sound & ~eos & ~steps.told)[:, :-1] & (steps.tokens[:, :-1] == block.drafts[:, : block.size - 1])
    for read, ran in zip(steps.reads, block.ran, strict=True):
        if ran is not None:  # a model that the policy wants again and that was not run: the block ends there
            goes_on = goes_on & (ran | ~read)[:, 1:]
    reached = torch.cat([torch.ones_like(sound[:, :1]), goes_on.cumprod(1).bool()], 1)
    kept = torch.minimum((reached & sound).sum(1), block.left)
    last, behind = (kept - 1).clamp(min=0).unsqueeze(1), kept.clamp(max=block.size - 1).unsqueeze(1)
    open_ = reached.gather(1, behind) & (kept < block.left).unsqueeze(1)
    by_student, by_teacher = ((each.gather(1, behind) & open_)[:, 0] for each in broken)
    eos, told = (each.gather(1, last)[:, 0] for each in (eos, steps.told))
    return Verdict(*said, kept, (by_student, by_teacher), eos, told, asked, steps.behind(last[:, 0], kept > 0, state))


class _Steps(NamedTuple):
    """What the rule says if every position is reached, ``[B, K]`` each; what it says of others is passed over."""

    tokens: Tensor
    speakers: Tensor
    divergences: Tensor
    thresholds: Tensor
    told: Tensor  # whether the text ends behind the token
    reads: tuple[Tensor, Tensor]  # of student and teacher
    states: list[State]  # behind each position

    def behind(self, last: Tensor, kept: Tensor, before: State) -> State:
        """The state ``[B]`` behind the ``last`` kept position; ``before`` the block where none was ``kept``."""
        rows = torch.arange(len(last), device=last.device)
        parts = (torch.stack(parts, 1)[rows, last] for parts in zip(*self.states, strict=True))
        return tuple(where_rows(kept, new, old) for new, old in zip(parts, before, strict=True))


def _at_once(policy: Policy, state: State, sampling: Sampling, block: Block) -> _Steps:
    """All positions in one step of a rule without state."""
    rows, size, start = *block.noise.shape[:2], block.start
    logq, logp = _pair(block, lambda logs: logs.flatten(0, 1))
    positions = start if size == 1 else (start.unsqueeze(1) + torch.arange(size, device=start.device)).flatten()
    decision = policy.step(state, logq, logp, positions)
    token = draw(sampling.shape(decision.log_probs), block.noise.flatten(0, 1), sampling.temperature)
    speaker = speakers(decision, token, block.keys.flatten())
    token, speaker, seen, limits = (
        each.view(rows, size) for each in (token, speaker, decision.divergence, decision.thresholds)
    )
    told, student, teacher = (spread(each, block.keys) for each in (policy.ends(state), *policy.reads(state)))
    return _Steps(token, speaker, seen, limits, told, (student, teacher), [state])


def _in_order(policy: Policy, state: State, sampling: Sampling, block: Block) -> _Steps:
    """Position by position: each step of the rule hears the token before it."""
    columns, states = [], []
    for k in range(block.size):
        reads = policy.reads(state)
        decision = policy.step(state, *_pair(block, partial(Tensor.select, dim=1, index=k)), block.start + k)
        token = draw(sampling.shape(decision.log_probs), block.noise[:, k], sampling.temperature)
        speaker = speakers(decision, token, block.keys[:, k])
        state = policy.spoke(policy.observe(decision.state, token), speaker)
        columns.append((token, speaker, decision.divergence, decision.thresholds, policy.ends(state), *reads))
        states.append(state)
    tokens, who, seen, limits, told, *by_model = (_column(each, block.keys) for each in zip(*columns, strict=True))
    return _Steps(tokens, who, seen, limits, told, (by_model[STUDENT], by_model[TEACHER]), states)


def _column(answers: Sequence[Tensor | bool], like: Tensor) -> Tensor:
    """Answers to each position, for all rows or ``[B]``, as ``[B, K]``."""
    if all(isinstance(answer, Tensor) and answer.dim() for answer in answers):
        return torch.stack(answers, 1)  # type: ignore[arg-type]
    if all(answer is answers[0] for answer in answers):
        return spread(answers[0], like)
    return torch.stack([spread(answer, like[:, 0]) for answer in answers], 1)


def _pair(block: Block, view: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """What the two models say, in another shape; one tensor where one stands in for the other, and then nothing is compared."""
    logq = view(block.logs[STUDENT])
    return logq, logq if block.logs[TEACHER] is block.logs[STUDENT] else view(block.logs[TEACHER])


def spread(answer: Tensor | bool, like: Tensor) -> Tensor:
    """A policy's answer for all rows, or for each, as bools of the shape of ``like``, ``[B]`` or ``[B, K]``."""
    if isinstance(answer, Tensor):
        return (answer if answer.dim() < 1 or like.dim() == 1 else answer.unsqueeze(1)).expand(like.shape)
    return torch.full(like.shape, answer, dtype=torch.bool, device=like.device)


def where_rows(rows: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """``new`` ``[B, …]`` in the rows ``[B]`` that say so, else ``old``."""
    return torch.where(rows.view(-1, *[1] * (new.dim() - 1)), new, old)


def stacked(parts: list[Tensor]) -> Tensor:
    """Parts ``[b, …]`` of one position each, as ``[b, K, …]``."""
    return parts[0].unsqueeze(1) if len(parts) == 1 else torch.stack(parts, 1)
