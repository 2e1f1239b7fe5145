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

from switchkd.crossing.bridge import Bridge, Side
from switchkd.crossing.laws import SharedLaw
from switchkd.data.texts import TokenizedExample
from switchkd.decoding.rollouts import Rollout
from switchkd.decoding.settings import DecodeSettings
from switchkd.evaluation.tasks import Task
from switchkd.methods.divergences import LN2, jsd
from switchkd.models.pair import Pair
from switchkd.teachers.across import compared
from switchkd.teachers.asked import TextReader, side_reader
from switchkd.writing.examples import decode_examples

TOP = 5


@dataclass(frozen=True)
class Trace:
    """What two models say at the T tokens of a completion, having read all that stands before each.

    ``log_probs[who][t]``, in nats, is of the token that was written; ``top[who][t]`` are the `TOP` most probable tokens, each
    as (id, log-probability); ``who`` is STUDENT or TEACHER. ``jsd[t]`` is the divergence of the two in bits, whatever the
    policy looked at. Where the teacher has a tokenizer of its own, both are known on what both vocabularies have, at the tokens
    that match; at others the teacher's are None, and no token is its likeliest.
    """

    log_probs: list[list[float | None]]
    top: list[list[list[tuple[int, float]]]]
    jsd: list[float | None]


class Reader:
    """Reads texts again with a pair's models as they are."""

    def __init__(self, pair: Pair):
        self.pair = pair
        self._readers: dict[PreTrainedModel, TextReader] = {}

    @torch.no_grad()
    def __call__(self, rollout: Rollout) -> list[Tensor]:
        """The next-token log-distributions of STUDENT and TEACHER along a rollout, ``[T, V]`` each, on the host.

        A teacher with a tokenizer of its own says them in its own tokens.
        """
        teacher, name = self.pair.teacher_named(rollout.teacher), rollout.teacher
        return [
            self._log_probs(self.pair.student, self.pair.side, rollout.prompt_ids, rollout.completion_ids),
            self._log_probs(teacher, self.pair.side_of(name), rollout.teacher_reads, rollout.teacher_completion),
        ]

    def _log_probs(self, model: PreTrainedModel, side: Side, prompt: list[int], completion: list[int]) -> Tensor:
        if not completion:
            return torch.empty(0, side.vocab_size)
        if model not in self._readers:
            self._readers[model] = side_reader(model, side)
        reader = self._readers[model]
        return reader.log_probs(reader.hidden([(prompt, completion)])).cpu()


def trace(read: Reader, rollout: Rollout) -> Trace:
    """What the student, and the teacher that a rollout was written with, say of it at temperature 1."""
    logs = read(rollout)
    if bridge := read.pair.bridges.get(rollout.teacher):
        return _trace_across(bridge, rollout, *logs)
    written = torch.tensor(rollout.completion_ids).unsqueeze(1)
    q, p = logs
    return Trace(
        [each.gather(1, written)[:, 0].tolist() for each in logs],
        [_likeliest(each) for each in logs],
        (jsd(p, q) / LN2).clamp(0.0, 1.0).tolist(),
    )


def _likeliest(logs: Tensor) -> list[list[tuple[int, float]]]:
    best = logs.topk(min(TOP, logs.shape[1]))
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [list(zip(*row, strict=True)) for row in rows]


def _trace_across(bridge: Bridge, rollout: Rollout, logq: Tensor, logp: Tensor) -> Trace:
    """A trace whose teacher has a tokenizer of its own; its likeliest tokens are given as the student's ids."""
    count = len(rollout.completion_ids)
    written = bridge.student.ends.events(torch.tensor(rollout.completion_ids, dtype=torch.int64)).unsqueeze(1)
    law = SharedLaw.of(bridge, logq.device)
    places = compared(law, rollout)
    mine, theirs = torch.from_numpy(places.student), torch.from_numpy(places.teacher)
    p, q = law(logp[theirs], logq[mine])
    of_text = p.gather(1, law.index[written[mine]])[:, 0].tolist()
    apart = (jsd(p, q) / LN2).clamp(0.0, 1.0).tolist()
    best = [[(int(law.student[at]), value) for at, value in row] for row in _likeliest(p)]
    known = dict(zip(mine.tolist(), zip(of_text, apart, best, strict=True), strict=True))
    found = [known.get(t, (None, None, [])) for t in range(count)]
    return Trace(
        [logq.gather(1, written)[:, 0].tolist(), [own for own, _, _ in found]],
        [_likeliest(logq), [likely for _, _, likely in found]],
        [distance for _, distance, _ in found],
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
