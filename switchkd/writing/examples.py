"""The texts of examples, each written with its own teacher: token by token, or word by word where that has another tokenizer."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from switchkd.data.texts import TokenizedExample, by_teacher
from switchkd.decoding.decode import Runners, decode_job
from switchkd.decoding.rollouts import DecodeCost, Rollout, Rollouts
from switchkd.decoding.rows import Job
from switchkd.decoding.settings import DecodeSettings
from switchkd.models.pair import Pair


def decode_examples(
    pair: Pair,
    examples: Sequence[TokenizedExample],
    settings: DecodeSettings,
    sample_ids: Sequence[int],
    progress: Callable[[DecodeCost], None] | None = None,
    watch: Callable[[Rollouts], None] | None = None,
    runners: Runners | None = None,
) -> Rollouts:
    """Complete examples as a pair's models read them, each with its own teacher, in their order; errors are ``decode``'s.

    Each teacher's rows are decoded together; a row's text depends on its own sample id, prompts and teacher alone.
    """
    made: dict[int, Rollout] = {}
    runners = runners or Runners()
    cost, fitting = DecodeCost(), None
    for name, places in by_teacher(examples).items():
        mine, ids = [examples[place] for place in places], [sample_ids[place] for place in places]
        job = job_of(pair, name, mine, settings, ids)
        rollouts = decode_job(job, progress and partial(_further, progress, cost), watch, runners)
        if rollouts.rows_that_fit:
            fitting = rollouts.rows_that_fit
            settings = replace(settings, batch_size=fitting)
        for place, example, rollout in zip(places, mine, rollouts, strict=True):
            made[place] = replace(rollout, teacher=name, teacher_prompt_ids=example.teacher_prompt_ids)
        cost += rollouts.cost
    return Rollouts((made[place] for place in range(len(examples))), cost, fitting)


def _further(progress: Callable[[DecodeCost], None], before: DecodeCost, now: DecodeCost) -> None:
    progress(before + now)


def job_of(
    pair: Pair, teacher: str, examples: Sequence[TokenizedExample], settings: DecodeSettings, sample_ids: Sequence[int]
) -> Job:
    """The examples of one teacher."""
    own = any(example.teacher_prompt_ids is not None for example in examples)
    return Job.of(
        pair.student,
        pair.teacher_named(teacher),
        [example.prompt_ids for example in examples],
        settings,
        sample_ids,
        pair.ends,
        pair.vocab_size,
        [example.teacher_reads for example in examples] if own else None,
    )
