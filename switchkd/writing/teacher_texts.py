"""The teacher's own text, written once and kept: a kind of work in a ``teachers.store``, a line of JSON an example."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from switchkd.data.texts import TokenizedExample
from switchkd.decoding.decode import DEFAULT_BATCH
from switchkd.decoding.rollouts import Rollout
from switchkd.decoding.settings import DecodeSettings
from switchkd.forward.parallel import Together
from switchkd.methods.policy import TEACHER, TeacherOnly
from switchkd.models.pair import Pair
from switchkd.teachers.store import Header, Progress, Store, fingerprint
from switchkd.writing.examples import decode_examples

# Batches decoded for a part: enough to keep a batch full while rows finish, few enough to lose little in a kill.
_PART_BATCHES = 4


def teacher_texts(
    pair: Pair,
    examples: Sequence[TokenizedExample],
    folder: Path,
    settings: DecodeSettings,
    progress: Progress = lambda _: None,
) -> list[TokenizedExample]:
    """The examples with the teacher's own completion of each prompt in place of the reference (SeqKD, arXiv 1606.07947).

    A token's noise is keyed by (seed, example id, position), so the text depends on no batch. It is kept in ``folder``, as
    ``Store.fill`` says; where all of it is there, the teacher is not called.

    Args:
        pair: the teacher writes; the student drafts for it, which moves time and never tokens.
        examples: prompts, ids and references; their completions are not read.
        settings: how it is decoded, whatever policy they name. What the text depends on is kept, and compared when a folder is
            opened again.
        progress: told how many examples are done, part by part.

    Returns:
        One example each, in order; ``truncated`` where the budget ran out before the end token.

    Raises:
        CheckpointError, DiskError, Stopped: ``Store.fill``'s; also Stopped for a signal that comes while it decodes.
        DataError, NonFiniteError: a prompt cannot be completed; the parts before it are kept.
    """
    settings = replace(settings, policy=TeacherOnly())

    def made(places: range) -> bytes:
        nonlocal settings
        part = examples[places.start : places.stop]
        rollouts = decode_examples(pair, part, settings, [example.id for example in part])
        settings = replace(settings, batch_size=rollouts.rows_that_fit or settings.batch_size)
        for rollout, example in zip(rollouts, part, strict=True):
            if rollout.error is not None:
                raise rollout.failure(f"{example.source}: the teacher cannot complete it")
        return b"".join(map(_line, rollouts))

    # Parts end where they would without a kill, so that the batches in them are the same ones.
    firsts = range(0, len(examples), _PART_BATCHES * (settings.batch_size or DEFAULT_BATCH))
    store = Store(Path(folder), _header(pair, examples, settings), firsts, len(examples), "jsonl")
    parts = store.fill(made, progress, Together.of(pair.teacher))
    lines = [line for part in parts for line in part.file.read_bytes().splitlines()]
    return [_completed(example, json.loads(line)) for example, line in zip(examples, lines, strict=True)]


def _line(rollout: Rollout) -> bytes:
    kept = {"id": rollout.id, "completion_ids": rollout.completion_ids, "truncated": rollout.stop_reason == "length"}
    if rollout.teacher_completion_ids is not None:
        kept["teacher_completion_ids"] = rollout.teacher_completion_ids
    return json.dumps(kept).encode() + b"\n"


def _completed(example: TokenizedExample, kept: Header) -> TokenizedExample:
    ids = kept["completion_ids"]
    return replace(
        example,
        completion_ids=ids,
        speakers=[TEACHER] * len(ids),
        truncated=kept["truncated"],
        teacher_completion_ids=kept.get("teacher_completion_ids"),
    )


def _header(pair: Pair, examples: Sequence[TokenizedExample], settings: DecodeSettings) -> Header:
    """All that the text depends on."""
    merged = pair.ends.merged_into
    return {
        "kind": "text",
        **fingerprint(pair, examples, completions=False),
        "vocab_size": pair.vocab_size,
        "eos_token_ids": list(pair.eos_token_ids),
        **({} if merged is None else {"merged_eos_token_id": merged}),
        "max_new_tokens": settings.max_new_tokens,
        "temperature": float(settings.temperature),
        **settings.sampling.cuts,
        "seed": settings.seed,
    }
