"""Relay: where the teacher would write a word of reflection (Wait, But, Hmm), it writes the next few paragraphs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from switchkd.base.errors import ConfigError
from switchkd.methods.policy import TEACHER, Decision, Policy, State, blended, one_of, unseen

if TYPE_CHECKING:  # tensor methods suffice at run time, and `switchkd --help` answers without loading torch
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Relay(Policy):
    """Relay-OPD (arXiv 2607.26057, and its released code): where the teacher would write a word of reflection and the student
    would not, the teacher writes that word and the next few paragraphs, called a leg.

    A trigger is a position at which the teacher's best token is one of ``triggers`` and not among the student's ``student_top``
    best. That token is then written. Where the student would have drawn it too, it is the student's and nothing follows; else it
    is the teacher's and begins a leg: the teacher writes ``paragraphs`` paragraphs, or ``leg_tokens`` tokens, and hands back. After
    the last of ``legs`` legs the text ends. What the student would have drawn is itself drawn, with the probability that it gives
    to the token at temperature 1.

    ``bind`` finds the tokens that spell a trigger, each also in lower case and behind a space, and those that make a blank line,
    which ends a paragraph; ids may also be given.

    State, ``[B]`` each: paragraphs and tokens left in the leg, legs taken, whether the last token ended a line, and whether it was
    written at a trigger.
    """

    triggers: tuple[str, ...] = (
        "Wait", "But", "Hmm", "Actually", "Hold", "However", "Yet", "Oh", "Alternatively", "No", "Ah", "Oops", "Well",
    )  # single tokens of the tokenizer  # fmt: skip
    student_top: int = 5  # K, ranks among which the student must not have the trigger
    paragraphs: int = 3  # of a leg
    leg_tokens: int = 256  # of a leg, at most
    legs: int = 2  # M, of a text
    trigger_ids: tuple[int, ...] = ()  # tokens that spell a trigger
    blank_ids: tuple[int, ...] = ()  # tokens that hold a blank line
    line_end_ids: tuple[int, ...] = ()  # tokens that end with a newline
    line_start_ids: tuple[int, ...] = ()  # tokens that start with a newline

    def __post_init__(self) -> None:
        for name in ("student_top", "paragraphs", "leg_tokens", "legs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} of Relay must be at least 1, got {getattr(self, name)}")

    def bind(self, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> Relay:
        if self.trigger_ids:
            return self
        texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        where = lambda holds: tuple(i for i, text in enumerate(texts) if holds(text))  # noqa: E731
        spelt = {space + form for word in self.triggers for form in (word, word.lower()) for space in ("", " ")}
        triggers = where(spelt.__contains__)
        if not triggers:
            raise ConfigError(
                f"none of Relay's triggers {self.triggers} is a single token of this tokenizer; give others"
            )
        return replace(
            self,
            trigger_ids=triggers,
            blank_ids=where(lambda text: "\n\n" in text),
            line_end_ids=where(lambda text: text.endswith("\n")),
            line_start_ids=where(lambda text: text.startswith("\n")),
        )

    def init(self, batch: int, device: torch.device | str = "cpu") -> State:
        import torch

        if not self.trigger_ids:
            raise ConfigError("Relay does not know its trigger tokens: bind it to a tokenizer, or give trigger_ids")
        count, flag = (torch.zeros(batch, dtype=dtype, device=device) for dtype in (torch.int64, torch.bool))
        return count, count.clone(), count.clone(), flag, flag.clone()

    def reads(self, state: State) -> tuple[Tensor, bool]:
        return state[0] == 0, True

    def step(self, state: State, logp_student: Tensor, logp_teacher: Tensor, position: Tensor) -> Decision:
        left, tokens, taken, ended, _ = state
        best = logp_teacher.argmax(1, keepdim=True)
        favoured = (logp_student.topk(min(self.student_top, logp_student.shape[1])).indices == best).any(1)
        trigger = (left == 0) & (taken < self.legs) & one_of(best[:, 0], self.trigger_ids) & ~favoured
        target = logp_teacher.where((left > 0).unsqueeze(1), logp_student)
        nothing = target.new_full(target.shape, -math.inf)  # in the wider dtype of the two
        target = nothing.scatter(1, best, 0.0).where(trigger.unsqueeze(1), target)
        # Of a trigger's token all but the student's probability of it is the teacher's part.
        others = (-logp_student.gather(1, best).exp()).log1p()
        part = target.where((left > 0).unsqueeze(1), nothing)
        part = nothing.scatter(1, best, others.to(nothing)).where(trigger.unsqueeze(1), part)
        return blended(target, part, unseen(target), (left, tokens, taken, ended, trigger))

    def observe(self, state: State, token: Tensor) -> State:
        left, tokens, taken, ended, trigger = state
        over = one_of(token, self.blank_ids) | (ended & one_of(token, self.line_start_ids))
        tokens = (tokens - 1).clamp(min=0)
        left = (left - over.long()).clamp(min=0).masked_fill(tokens == 0, 0)
        return left, tokens, taken, one_of(token, self.line_end_ids) & ~over, trigger

    def spoke(self, state: State, speaker: Tensor) -> State:
        left, tokens, taken, ended, trigger = state
        begins = trigger & (speaker == TEACHER)
        # The trigger is the first token of the leg.
        left = left.masked_fill(begins, self.paragraphs if self.leg_tokens > 1 else 0)
        return left, tokens.masked_fill(begins, self.leg_tokens - 1), taken + begins, ended, trigger

    def ends(self, state: State) -> Tensor:
        left, _, taken, _, _ = state
        return (left == 0) & (taken == self.legs)
