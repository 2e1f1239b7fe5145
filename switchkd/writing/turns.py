"""Two models with different tokenizers write one text in turns of words: the loop that defines the answer.

A word begins where both tokenizers have a token end whatever follows. There the rule compares both models and names a writer, who
draws the word's first token from what begins a word, and goes on from its own law. Once it draws a token that would begin the next
word, the other reads the word in its own tokens, and the rule is asked again: if it keeps the writer, that token stands; if not, it
is dropped, and the other draws with noise of its own. So a writer that is never relieved writes by its own law, exactly.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from switchkd.base.errors import ConfigError
from switchkd.crossing.bridge import Bridge
from switchkd.decoding.rollouts import Rollouts
from switchkd.decoding.rows import prompt_problem
from switchkd.decoding.settings import DecodeSettings
from switchkd.methods.policy import STUDENT, TEACHER, Policy
from switchkd.methods.rules import name_of
from switchkd.methods.sampling import draw, gumbel_noise, keys_tensor
from switchkd.runner.modes import evaluating
from switchkd.writing.turn_laws import TurnLaws
from switchkd.writing.turn_texts import TurnText


@dataclass
class TurnJob:
    """Rows that a student and a teacher with another tokenizer write together."""

    bridge: Bridge
    student: PreTrainedModel
    teacher: PreTrainedModel
    texts: list[TurnText]
    settings: DecodeSettings

    @staticmethod
    def of(
        bridge: Bridge,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        prompt_ids: Sequence[Sequence[int]],
        teacher_prompt_ids: Sequence[Sequence[int]],
        settings: DecodeSettings,
        sample_ids: Sequence[int] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> "TurnJob":
        """``prompt_ids`` are the student's ids of each prompt, ``teacher_prompt_ids`` the teacher's. ``seeds`` has one for each,
        in place of the settings' own.

        Raises what `check_policy` does.
        """
        check_policy(settings.policy)
        ids = range(len(prompt_ids)) if sample_ids is None else sample_ids
        keys = [settings.seed] * len(ids) if seeds is None else seeds
        texts = [
            TurnText(bridge, i, (list(own), list(theirs)), settings.max_new_tokens, seed)
            for i, own, theirs, seed in zip(ids, prompt_ids, teacher_prompt_ids, keys, strict=True)
        ]
        for text in texts:
            _check_text(text, (student, teacher))
        return TurnJob(bridge, student, teacher, texts, settings)


def _check_text(text: TurnText, models: Sequence[PreTrainedModel]) -> None:
    """Stop a row that cannot be decoded, and one that has no budget."""
    for prompt, side, model in zip(text.prompts, text.bridge.sides, models, strict=True):
        name = "prompt" if side is text.bridge.student else "teacher prompt"
        problem = prompt_problem(text.id, prompt, name, f"{side.role}'s", [model], text.budget, side.vocab_size)
        if problem and not text.error:
            text.stop(*problem)
    if text.budget == 0 and not text.error:
        text.stop_reason = "length"


def only_reader(policy: Policy) -> int | None:
    """STUDENT or TEACHER if it is the only model that a rule ever reads, which then writes alone; else None."""
    reads = policy.reads(()) if type(policy).init is Policy.init else (True, True)
    return {(True, False): STUDENT, (False, True): TEACHER}.get((reads[0] is True, reads[1] is True))


def check_policy(policy: Policy) -> None:
    """Raise ConfigError for a rule that cannot decide word by word.

    It can if it names a writer from the two laws alone: one that blends them needs the probability that each model gives to the
    other's tokens, and one that looks at the tokens drawn, or ends texts, would see those of two vocabularies.
    """
    logs = torch.full((1, 8), 0.125).log()
    blends = policy.step(policy.init(1), logs, logs, torch.zeros(1, dtype=torch.int64)).teacher_part is not None
    looks = [name for name in ("observe", "ends") if getattr(type(policy), name) is not getattr(Policy, name)]
    if blends or looks:
        why = (
            "blends the two models' probabilities token by token"
            if blends
            else f"looks at single tokens ({', '.join(looks)})"
        )
        raise ConfigError(
            f"the policy {name_of(policy)} {why}, which needs one tokenizer for both; with two, texts are written in turns of "
            "words: take switch, adaswitch, ssd, hysteresis, student_only or teacher_only, or a teacher of the student's family"
        )


@torch.no_grad()
def decode_turns_reference(job: TurnJob) -> Rollouts:
    """Write one row and one token at a time, each model called on its whole text whenever it is asked.

    Slow on purpose: it defines what `decode_turns` must return, token by token.
    """
    laws = TurnLaws(job.bridge, torch.device("cpu"))
    for text in job.texts:
        _Row(job, text, laws).write()
    return Rollouts([text.rollout() for text in job.texts])


class _Row:
    """One row of the reference loop."""

    def __init__(self, job: TurnJob, text: TurnText, laws: TurnLaws):
        self.job, self.text, self.laws, self.policy = job, text, laws, job.settings.policy
        self.state = self.policy.init(1)

    def write(self) -> None:
        text = self.text
        while not text.stop_reason:
            token = None
            if text.writer is not None:
                if (law := self.law(text.writer)) is None:
                    return
                token = self.draw(text.writer, law)
                if not text.begins(token):
                    text.go_on(token)
                    continue
                text.close()
            self.turn(token)

    def turn(self, token: int | None) -> None:
        """A place where the text may change hands; ``token`` is what its writer would go on with."""
        text = self.text
        read = [bool(each) for each in self.policy.reads(self.state)]
        found = [self.law(who) if read[who] or text.writer == who else None for who in (STUDENT, TEACHER)]
        if text.stop_reason:
            return
        writer = torch.tensor([STUDENT if text.writer is None else text.writer])
        student, teacher = (law if asked else None for law, asked in zip(found, read, strict=True))
        turn = self.laws.decide(
            self.policy, self.state, (student, teacher), [text.tail], writer, torch.tensor([text.turns])
        )
        self.state, speaker = turn.state, int(turn.speaker)
        text.turns += int(turn.asked)
        if token is None or speaker != text.writer:
            law = found[speaker]
            assert law is not None, "a rule names a model that it has read"
            token = self.draw(speaker, self.laws.beginning(speaker, law, [text.tail])[0])
        text.begin(token, speaker, float(turn.divergence), float(turn.threshold))

    def law(self, who: int) -> Tensor | None:
        """A model's own law of the next token, ``[1, V]``; None, and the row fails, if it is not finite."""
        model, side = (self.job.student, self.job.teacher)[who], self.job.bridge.sides[who]
        ids = torch.tensor([self.text.ids(who)], device=next(model.parameters()).device)
        with evaluating(model):
            logs = side.ends.log_probs(model(ids).logits[:, -1, : side.vocab_size]).cpu()
        if logs.isnan().any():
            self.text.fail(who)
            return None
        return self.laws.own(who, logs)

    def draw(self, who: int, law: Tensor) -> int:
        """The token that a model draws from a law, with its own noise."""
        settings = self.job.settings
        noise = gumbel_noise(keys_tensor([self.text.key(who)]), law.shape[-1])
        return int(draw(settings.sampling.shape(law), noise, settings.temperature))
