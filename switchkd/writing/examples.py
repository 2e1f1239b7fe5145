"""The texts of examples, each written with its own teacher: token by token, or word by word where that has another tokenizer."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from switchkd.base.errors import ConfigError
from switchkd.crossing.bridge import Bridge
from switchkd.data.texts import TokenizedExample, by_teacher
from switchkd.decoding.decode import Runners, decode_job, measured_costs
from switchkd.decoding.rollouts import DecodeCost, Rollout, Rollouts
from switchkd.decoding.rows import Job
from switchkd.decoding.settings import DecodeSettings
from switchkd.forward.served import ServedModel
from switchkd.methods.policy import STUDENT, TEACHER, StudentOnly
from switchkd.models.pair import Pair
from switchkd.writing.turn_engine import decode_turns
from switchkd.writing.turns import TurnJob, only_reader


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
        further = progress and partial(_further, progress, cost)
        if name in pair.bridges:
            rollouts = _write_across(pair, name, mine, settings, ids, further, watch, runners)
        else:
            rollouts = decode_job(job_of(pair, name, mine, settings, ids), further, watch, runners)
        if rollouts.rows_that_fit:
            fitting = rollouts.rows_that_fit
            settings = replace(settings, batch_size=fitting)
        for place, example, rollout in zip(places, mine, rollouts, strict=True):
            made[place] = replace(rollout, teacher=name, teacher_prompt_ids=example.teacher_prompt_ids)
        cost += rollouts.cost
    return Rollouts((made[place] for place in range(len(examples))), cost, fitting)


def _further(progress: Callable[[DecodeCost], None], before: DecodeCost, now: DecodeCost) -> None:
    progress(before + now)


def _write_across(
    pair: Pair,
    teacher: str,
    examples: Sequence[TokenizedExample],
    settings: DecodeSettings,
    sample_ids: Sequence[int],
    progress: Callable[[DecodeCost], None] | None,
    watch: Callable[[Rollouts], None] | None,
    runners: Runners,
) -> Rollouts:
    """Texts of a teacher with a tokenizer of its own: in turns of words, or, where one model is all that is asked, by it alone."""
    bridge, who = pair.bridges[teacher], only_reader(settings.policy)
    if who != STUDENT and isinstance(pair.teacher_named(teacher), ServedModel):
        raise ConfigError(
            "a teacher behind a server that has another tokenizer than the student scores text and writes none: take a method "
            "whose text the student writes, or the data (on_policy, gkd, kd …), or the teacher into this process"
        )
    if who is None:
        prompts = [e.prompt_ids for e in examples], [e.teacher_reads for e in examples]
        job = TurnJob.of(bridge, pair.student, pair.teacher_named(teacher), *prompts, settings, sample_ids)
        return decode_turns(job, progress, watch, runners)

    def both(alone: Rollouts) -> Rollouts:
        read = read_by_teacher if who == STUDENT else partial(read_by_student, most=settings.max_new_tokens)
        texts = (replace(read(r, bridge), prompt_ids=e.prompt_ids) for r, e in zip(alone, examples, strict=True))
        return Rollouts(texts, alone.cost, alone.rows_that_fit)

    alone = alone_job(pair, teacher, examples, settings, sample_ids, who)
    return both(decode_job(alone, progress, watch and (lambda now: watch(both(now))), runners))


def alone_job(
    pair: Pair,
    teacher: str,
    examples: Sequence[TokenizedExample],
    settings: DecodeSettings,
    sample_ids: Sequence[int],
    who: int,
) -> Job:
    """The examples of one teacher, written by one of the two models in its own tokens."""
    side = pair.bridges[teacher].sides[who]
    model = pair.student if who == STUDENT else pair.teacher_named(teacher)
    prompts = [e.prompt_ids if who == STUDENT else e.teacher_reads for e in examples]
    alone = replace(settings, policy=StudentOnly(), keep_hidden=False)
    return Job.of(model, model, prompts, alone, sample_ids, side.ends, side.vocab_size)


def read_by_teacher(rollout: Rollout, bridge: Bridge) -> Rollout:
    """What the student wrote, with what the teacher reads of it."""
    return replace(rollout, teacher_completion_ids=bridge.teacher_reading(rollout.completion_ids))


def read_by_student(rollout: Rollout, bridge: Bridge, most: int) -> Rollout:
    """What the teacher wrote, as a text of the student's tokens, of which there are at ``most`` so many: else it is cut."""
    ids = bridge.student_reading(rollout.completion_ids)
    cut, theirs, reason = ids[:most], rollout.completion_ids, rollout.stop_reason
    if len(cut) < len(ids):
        theirs, reason = bridge.teacher_reading(cut), "length"
    notes = [math.nan] * len(cut)
    return replace(
        rollout, completion_ids=cut, speakers=[TEACHER] * len(cut), divergences=notes, thresholds=notes, stop_reason=reason,
        teacher_completion_ids=theirs,
    )  # fmt: skip


def costs_of(pair: Pair, examples: Sequence[TokenizedExample], settings: DecodeSettings) -> tuple[float, ...]:
    """What rounds of such texts are planned by, for the setting ``costs``; texts in turns are planned by other things."""
    teacher, ids = examples[0].teacher, range(len(examples))
    if teacher not in pair.bridges:
        return measured_costs(job_of(pair, teacher, examples, settings, ids))
    who = only_reader(settings.policy)
    return () if who is None else measured_costs(alone_job(pair, teacher, examples, settings, ids, who))


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
