"""The same few prompts, completed again and again while a student learns, with what both models say at every token.

A report steps through them. Looking moves nothing: text is keyed by (seed, place of the prompt, position), as in evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from switchkd.data.texts import TokenizedExample
from switchkd.decoding.rollouts import Rollout
from switchkd.decoding.settings import DecodeSettings
from switchkd.evaluation.tasks import Task
from switchkd.methods.divergences import LN2, jsd
from switchkd.models.pair import Pair
from switchkd.teachers.asked import TextReader, text_reader
from switchkd.writing.examples import decode_examples

TOP = 5


@dataclass(frozen=True)
class Trace:
    """What two models say at the T tokens of a completion, having read all that stands before each.

    ``log_probs[who][t]``, in nats, is of the token that was written; ``top[who][t]`` are the `TOP` most probable tokens, each
    as (id, log-probability); ``who`` is STUDENT or TEACHER. ``jsd[t]`` is the divergence of the two in bits, whatever the
    policy looked at.
    """

    log_probs: list[list[float]]
    top: list[list[list[tuple[int, float]]]]
    jsd: list[float]


class Reader:
    """Reads texts again with a pair's models as they are."""

    def __init__(self, pair: Pair):
        self.pair = pair
        self._readers: dict[PreTrainedModel, TextReader] = {}

    @torch.no_grad()
    def __call__(self, rollout: Rollout) -> list[Tensor]:
        """The next-token log-distributions of STUDENT and TEACHER along a rollout, ``[T, V]`` each, on the host."""
        teacher = self.pair.teacher_named(rollout.teacher)
        read = (self.pair.student, rollout.prompt_ids), (teacher, rollout.teacher_reads)
        return [self._log_probs(model, prompt, rollout.completion_ids) for model, prompt in read]

    def _log_probs(self, model: PreTrainedModel, prompt: list[int], completion: list[int]) -> Tensor:
        if not completion:
            return torch.empty(0, self.pair.vocab_size)
        if model not in self._readers:
            self._readers[model] = text_reader(model, self.pair.vocab_size, self.pair.ends)
        reader = self._readers[model]
        return reader.log_probs(reader.hidden([(prompt, completion)])).cpu()


def trace(read: Reader, rollout: Rollout) -> Trace:
    """What the student, and the teacher that a rollout was written with, say of it at temperature 1."""
    logs = read(rollout)
    written = torch.tensor(rollout.completion_ids).unsqueeze(1)
    best = [each.topk(min(TOP, each.shape[1])) for each in logs]
    q, p = logs
    return Trace(
        [each.gather(1, written)[:, 0].tolist() for each in logs],
        [
            [list(zip(*row, strict=True)) for row in zip(b.indices.tolist(), b.values.tolist(), strict=True)]
            for b in best
        ],
        (jsd(p, q) / LN2).clamp(0.0, 1.0).tolist(),
    )


def samples(
    pair: Pair, examples: Sequence[TokenizedExample], settings: DecodeSettings, task: Task | None
) -> list[dict[str, Any]]:
    """Complete ``examples`` with the student as it is; a JSON-ready record for each: the rollout, its `Trace`, its scores.

    ``sample_id`` is the place of the prompt. ``scores`` are the task's, in percent, where the examples are held out and have
    references; ``reference`` is the first of these.
    """
    records, read = [], Reader(pair)
    for example, rollout in zip(examples, decode_examples(pair, examples, settings, range(len(examples))), strict=True):
        found = trace(read, rollout)
        own = {"log_probs": found.log_probs, "top": found.top, "jsd": found.jsd}
        records.append(rollout.to_json() | own | judged(pair, example, rollout, task))
    return records


def judged(pair: Pair, example: TokenizedExample, rollout: Rollout, task: Task | None) -> dict[str, Any]:
    """The ``scores`` of a sample and its ``reference``."""
    text = pair.tokenizer.decode(pair.ends.answer(rollout.completion_ids, pair.tokenizer), skip_special_tokens=True)
    scores = task.score(text, example.references, example.group) if task else {}
    return {"scores": scores, "reference": next(iter(example.references), None)}
