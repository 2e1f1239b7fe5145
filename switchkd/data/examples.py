"""Data files to examples: a prompt, its references, and what else a row says of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from switchkd.base.errors import ConfigError, DataError
from switchkd.base.manifest import json_sha256
from switchkd.data.fields import Fields, Message, Unused
from switchkd.data.files import BadRows, rows_of
from switchkd.data.formats import Format, Record, Wanted, examples_of, format_of

logger = logging.getLogger(__name__)

AnyExample = TypeVar("AnyExample")


@dataclass(frozen=True)
class Example:
    """One prompt with its reference completion(s).

    ``id`` is the row's index among all rows of its files, so it depends neither on ``limit`` nor on rows that were
    skipped. ``messages`` is the prompt; ``input`` is the text an instruction is about (Alpaca's second field, a
    dialogue to summarise), kept apart because the Alpaca template needs it apart. ``references`` are all the answers
    to score against, ``completion`` is the one to train on; both are empty for a prompt alone. ``source`` is ``file:line``,
    ``teacher`` the name of its teacher, "" for the default one. ``group`` is the part of its data set that it belongs to
    (category, topic, kind of perturbation), "" for none; ``format`` names its row's layout (``switchkd.data.formats``).
    ``answer`` is the completion's turn where it says more than its text, such as thoughts or calls of tools, and ``tools`` are
    those that the prompt offers.
    """

    id: int
    messages: tuple[Message, ...]
    completion: str
    references: tuple[str, ...]
    source: str
    input: str = ""
    teacher: str = ""
    group: str = ""
    format: str = ""
    answer: Message | None = None
    tools: tuple[dict[str, Any], ...] = ()


# --- reading files ------------------------------------------------------------------------------------------------


def load_examples(
    sources: str | Sequence[str],
    limit: int | None = None,
    skip_bad: int | BadRows = 0,
    *,
    wanted: Wanted = Wanted(),  # noqa: B008 - it is frozen
    streaming: bool = False,
    teacher_field: str = "",
    teachers: Collection[str] = (),
) -> list[Example]:
    """The examples of data files, one source or several, as ``switchkd.data.files.rows_of`` reads them.

    The fields of the first row decide the layout of all; the first of ``switchkd.data.formats.FORMATS`` that fits is taken, and
    docs/data.md lists them. ``wanted`` says whether every row must have an answer, and whether each answer of a conversation
    is an example. Fields that are null are none. What the rows say and no example does is logged, with counts: fields that are not
    read, turns that are not trained on. Further examples of a row have the ids index + k·2**32.

    ``limit`` stops after that many examples. Up to ``skip_bad`` bad rows are left out, with a logged warning that
    counts and names them; given as ``BadRows``, they are counted there, and whoever made it tells. In ``teacher_field``, if one
    is given, a row may name its teacher, one of ``teachers``. Raises DataError for a file or row that cannot be used, ConfigError
    for a bad setting.
    """
    layout: Format | None = None

    def read(row: Fields, index: int, source: str) -> list[Example]:
        nonlocal layout
        layout = layout or format_of(row, wanted)
        teacher = _teacher_name(row, teacher_field, teachers)
        return _examples(examples_of(row, layout, wanted), layout, index, source, teacher)

    return read_rows(sources, limit, skip_bad, read, streaming)


def read_rows(
    sources: str | Sequence[str],
    limit: int | None,
    skip_bad: int | BadRows,
    read: Callable[[Fields, int, str], list[AnyExample]],
    streaming: bool = False,
) -> list[AnyExample]:
    """What ``read`` makes of each row, its index and ``file:line``, up to ``limit``; bad rows are counted, and told or refused.

    What no example says of the rows is told too.
    """
    sources = [sources] if isinstance(sources, str) else sources
    path = ", ".join(sources)
    bad = skip_bad if isinstance(skip_bad, BadRows) else BadRows(path, skip_bad)
    if (limit is not None and limit < 1) or bad.tolerated < 0:
        raise ConfigError(f"limit must be at least 1 and skip_bad at least 0, not {limit} and {bad.tolerated}")
    found: list[AnyExample] = []
    unused = Unused()
    for index, source, line in rows_of(sources, streaming):
        try:
            if isinstance(line, DataError):
                raise line
            row = Fields(line)
            found += read(row, index, source)
            unused.add(row)
        except DataError as error:
            bad.add(source, error)
        except RecursionError:
            bad.add(source, DataError("nested too deeply"))
        if limit is not None and len(found) >= limit:
            break
    if not found:
        raise DataError(f"{path}: no usable row" + "".join(f"\n  {line}" for line in bad.first()))
    for said in unused.lines():
        logger.warning("%s: %s", path, said)
    if bad is not skip_bad:
        bad.tell()
    return found[:limit]


def _examples(records: Sequence[Record], layout: Format, index: int, source: str, teacher: str) -> list[Example]:
    return [
        Example(
            index + place * _NEXT_INSTANCE,
            record.messages,
            next(iter(record.references), ""),
            record.references,
            source,
            record.input,
            teacher,
            record.group,
            layout.name,
            record.answer,
            record.tools,
        )
        for place, record in enumerate(records)
    ]


def _teacher_name(row: Fields, field: str, known: Collection[str]) -> str:
    """The teacher that the row names; "", the default one, if it has no such field or leaves it empty."""
    name = row.text(field) if field else ""
    if name and name not in known:
        raise DataError(f"field {field!r} names the teacher {name!r}; known are {', '.join(known)}")
    return name


_NEXT_INSTANCE = 2**32  # ids of a row's further examples lie above every row index


# --- held-out examples --------------------------------------------------------------------------------------------


def split(examples: Sequence[Example], share: float) -> tuple[list[Example], list[Example]]:
    """The examples in two, to train on and held out: about a ``share`` of their prompts, and at least one.

    A prompt is held out for what it says alone, whatever the other rows, the seed and the settings are: its checksum, taken as a
    number from 0 to 1, is below ``share``. Examples whose conversations begin with the same question stand on the same side.

    Raises:
        DataError: all examples ask the same, so that none can be held out.
    """
    beginnings = [_beginning(example) for example in examples]
    different = sorted(set(beginnings))
    if len(different) < 2:
        raise DataError(
            f"none of {len(examples)} examples can be held out, as they all begin with the same question; give eval_file, or set "
            "eval_split to 0"
        )
    held_out = {one for one in different[:-1] if one < share} or {different[0]}
    sides: tuple[list[Example], list[Example]] = [], []
    for example, beginning in zip(examples, beginnings, strict=True):
        sides[beginning in held_out].append(example)
    return sides


def _beginning(example: Example) -> float:
    """A checksum, as a number from 0 to 1, of a conversation up to its first question."""
    first = next((place for place, turn in enumerate(example.messages) if turn.role == "user"), 0)
    said = [*[turn.content for turn in example.messages[: first + 1]], example.input]
    return int(json_sha256(said)[:13], 16) / 16**13  # as many digits as a float holds
