"""TODO."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from switchkd.data.texts import by_teacher
from switchkd.decoding.decode import decode
from switchkd.decoding.rollouts import DecodeCost, Rollout, Rollouts

if TYPE_CHECKING:
    from switchkd.data.texts import TokenizedExample
    from switchkd.models.pair import Pair


def decode_examples(
    pair: "Pair",
    examples: "Sequence[TokenizedExample]",
    settings: Mapping[str, Any],
    sample_ids: Sequence[int],
    progress: Callable[[DecodeCost], None] | None = None,
) -> Rollouts:
    """Complete examples as a pair's models read them, each with its own teacher, in their order.

    ``settings`` is what ``decode`` is told beside models, prompts, ids and vocabulary; errors are ``decode``'s. Each teacher's
    rows are decoded together; a row's text depends on its own sample id, prompts and teacher alone.
    """
    made: dict[int, Rollout] = {}
    cost, fitting = DecodeCost(), None
    for name, places in by_teacher(examples).items():
        mine, ids = [examples[place] for place in places], [sample_ids[place] for place in places]
        on_round = None if progress is None else partial(_further, progress, cost)
        rollouts = _decode_with(pair, name, mine, settings, ids, on_round)
        if rollouts.rows_that_fit:
            fitting = rollouts.rows_that_fit
            settings = {**settings, "batch_size": fitting}
        for place, example, rollout in zip(places, mine, rollouts, strict=True):
            own = example.teacher_prompt_ids
            made[place] = dataclasses.replace(rollout, teacher=name, teacher_prompt_ids=own)
        cost += rollouts.cost
    return Rollouts((made[place] for place in range(len(examples))), cost, fitting)


def _further(progress: Callable[[DecodeCost], None], before: DecodeCost, now: DecodeCost) -> None:
    progress(before + now)


def _decode_with(
    pair: "Pair",
    teacher: str,
    examples: "Sequence[TokenizedExample]",
    settings: Mapping[str, Any],
    sample_ids: Sequence[int],
    progress: Callable[[DecodeCost], None] | None,
) -> Rollouts:
    """Complete examples of one teacher."""
    own = any(example.teacher_prompt_ids is not None for example in examples)
    return decode(
        pair.student,
        pair.teacher_named(teacher),
        [example.prompt_ids for example in examples],
        **settings,
        sample_ids=sample_ids,
        eos_token_ids=pair.ends,
        vocab_size=pair.vocab_size,
        teacher_prompt_ids=[example.teacher_reads for example in examples] if own else None,
        progress=progress,
    )
