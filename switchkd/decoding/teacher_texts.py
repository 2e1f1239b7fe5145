"""The teacher's own text for every prompt, made once and kept."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import TypedDict

from switchkd.base.errors import CheckpointError, DataError
from switchkd.base.lock import Check
from switchkd.base.manifest import file_sha256
from switchkd.base.plain import TokenId, check_type, json_object
from switchkd.base.storage import append_lines, write_file, written
from switchkd.data.texts import TokenizedExample
from switchkd.decoding.decode import DEFAULT_BATCH
from switchkd.decoding.examples import decode_examples
from switchkd.decoding.rollouts import Rollout
from switchkd.decoding.settings import DecodeSettings
from switchkd.methods.policy import TEACHER, TeacherOnly
from switchkd.models.pair import Pair
from switchkd.teachers.store import (
    _CHUNK_BATCHES,
    _FORMAT,
    Header,
    Progress,
    _anew,
    alone,
    fingerprint,
    read_json,
    refuse_foreign,
    refuse_other,
)

HEADER, TEXTS, COMPLETE = "header.json", "texts.jsonl", "complete.json"


# --- the teacher's own text ---------------------------------------------------------------------------------------


def teacher_texts(
    pair: Pair,
    examples: Sequence[TokenizedExample],
    folder: Path,
    settings: DecodeSettings,
    progress: Progress = lambda _: None,
) -> list[TokenizedExample]:
    """The examples with the teacher's own completion of each prompt in place of the reference (SeqKD, arXiv 1606.07947).

    A token's noise is keyed by (seed, example id, position), so the text depends on no batch. It is stored in
    ``folder`` as it is made; a call after a kill goes on behind the last whole line, and where all is there, the teacher is
    not called. One process at a time writes a folder: a second waits for it, and then finds the text.

    Args:
        pair: the teacher writes; the student drafts for it, which moves time and never tokens.
        examples: prompts, ids and references; their completions are not read.
        settings: how it is decoded, whatever policy they name. What the text depends on is stored, and compared when a folder is
            opened again.

    Returns:
        One example each, in order; ``truncated`` where the budget ran out before the end token.

    Raises:
        CheckpointError: the folder holds text made under other conditions (all that differs is named), or is damaged.
        DataError, NonFiniteError: a prompt cannot be completed; the text before it is kept.
        ConfigError: for settings out of range.
        Stopped: a signal came while it waited, or decoded.
    """
    if not examples:
        raise DataError("no examples for the teacher to complete; give a train_file with at least one usable row")
    folder = Path(folder)
    settings = dataclasses.replace(settings, policy=TeacherOnly())
    header = _texts_header(pair, examples, settings)
    with alone(folder, whole=(folder / COMPLETE).exists()) as check:
        rows = _fill_texts(pair, examples, folder, header, settings, progress, check)
    return [
        dataclasses.replace(
            e,
            completion_ids=row["completion_ids"],
            speakers=[TEACHER] * len(row["completion_ids"]),
            truncated=row["truncated"],
        )
        for e, row in zip(examples, rows, strict=True)
    ]


def _fill_texts(
    pair: Pair,
    examples: Sequence[TokenizedExample],
    folder: Path,
    header: Header,
    settings: DecodeSettings,
    progress: Progress,
    check: Check,
) -> list[Header]:
    """All rows; those that are missing are made, and stored chunk by chunk."""
    rows = _open_texts(folder, header, examples)
    progress(len(rows))
    chunk = _CHUNK_BATCHES * (settings.batch_size or DEFAULT_BATCH)
    while len(rows) < len(examples):
        # Chunks end where they would without a kill, so that the batches behind it are the same ones.
        part = examples[len(rows) : (len(rows) // chunk + 1) * chunk]
        rollouts = decode_examples(pair, part, settings, [example.id for example in part])
        settings = dataclasses.replace(settings, batch_size=rollouts.rows_that_fit or settings.batch_size)
        made = _sound_rows(rollouts)
        check()
        _append(folder, header, made)
        if len(made) < len(part):
            raise rollouts[len(made)].failure(f"{part[len(made)].source}: the teacher cannot complete it")
        rows += made
        progress(len(made))
    check()
    _seal(folder, len(rows))
    return rows


def _texts_header(pair: Pair, examples: Sequence[TokenizedExample], settings: DecodeSettings) -> Header:
    merged = pair.ends.merged_into
    return {
        "format": _FORMAT,
        **fingerprint(pair, examples, completions=False),
        "vocab_size": pair.vocab_size,
        "eos_token_ids": list(pair.eos_token_ids),
        **({} if merged is None else {"merged_eos_token_id": merged}),
        "max_new_tokens": settings.max_new_tokens,
        "temperature": float(settings.temperature),
        **settings.sampling.cuts,
        "seed": settings.seed,
    }


def _sound_rows(rollouts: Sequence[Rollout]) -> list[Header]:
    """What is stored of the rollouts before the first that failed."""
    return [
        {"id": r.id, "completion_ids": r.completion_ids, "truncated": r.stop_reason == "length"}
        for r in takewhile(lambda rollout: rollout.error is None, rollouts)
    ]


def _open_texts(folder: Path, header: Header, examples: Sequence[TokenizedExample]) -> list[Header]:
    """The rows that are there, after every check; a last line that was cut short is taken off the file."""
    if not (folder / HEADER).exists():
        refuse_foreign(folder)
        return []
    refuse_other(folder, read_json(folder / HEADER), header)
    file = folder / TEXTS
    content = file.read_bytes() if file.exists() else b""
    if (folder / COMPLETE).exists():
        seal = {"lines": len(examples), "sha256": hashlib.sha256(content).hexdigest()}
        if read_json(folder / COMPLETE) != seal:
            raise CheckpointError(f"{file} is damaged (not as written); {_anew(folder)}")
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with written(file):
            os.truncate(file, whole)
    lines = content[:whole].splitlines()
    if len(lines) > len(examples):
        raise CheckpointError(f"{file} has {len(lines)} lines for {len(examples)} examples; {_anew(folder)}")
    numbered = enumerate(zip(lines, examples[: len(lines)], strict=True), start=1)
    return [_row(line, example, header, f"{file}:{n}") for n, (line, example) in numbered]


class _Row(TypedDict):
    id: int
    completion_ids: list[TokenId]
    truncated: bool


def _row(line: bytes, example: TokenizedExample, header: Header, where: str) -> Header:
    try:
        row = json_object(line)
        check_type(row, _Row)
        ids, ended = (
            row["completion_ids"],
            row["completion_ids"][-1:] and row["completion_ids"][-1] in header["eos_token_ids"],
        )
        whole = len(ids) == header["max_new_tokens"] if row["truncated"] else ended
        if (
            row["id"] == example.id
            and whole
            and max(ids, default=0) < header["vocab_size"]
            and len(ids) <= header["max_new_tokens"]
        ):
            return row
    except DataError:
        pass
    raise CheckpointError(
        f"{where} is damaged: not a completion of example {example.id}; delete the folder to have the work done again"
    )


def _append(folder: Path, header: Header, rows: Sequence[Header]) -> None:
    """Add whole lines, on the disk before this returns; the header goes before the first."""
    if not rows:
        return  # a setting with which nothing could be made binds nobody
    if not (folder / HEADER).exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / HEADER, json.dumps(header, indent=1))
    append_lines(folder / TEXTS, rows, durable=True)


def _seal(folder: Path, lines: int) -> None:
    if not (folder / COMPLETE).exists():
        write_file(folder / COMPLETE, json.dumps({"lines": lines, "sha256": file_sha256(folder / TEXTS)}))
