"""Data files to examples: a prompt, its references, and what else a row says of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from switchkd.base.errors import ConfigError, DataError
from switchkd.data.fields import Fields, Unused
from switchkd.data.formats import Format, Message, Record, examples_of, format_of
from switchkd.data.lines import BadRows, rows_of

logger = logging.getLogger(__name__)

AnyExample = TypeVar("AnyExample")


@dataclass(frozen=True)
class Example:
    """One prompt with its reference completion(s).

    ``id`` is the row's index among all rows of its file, so it depends neither on ``limit`` nor on rows that were
    skipped. ``messages`` is the prompt; ``input`` is the text an instruction is about (Alpaca's second field, a
    dialogue to summarise), kept apart because the Alpaca template needs it apart. ``references`` are all the answers
    to score against, ``completion`` is the one to train on, ``source`` is ``file:line``, ``teacher`` the name of its teacher,
    "" for the default one. ``group`` is the part of its data set that it belongs to (category, topic, kind of perturbation), ""
    for none; ``format`` names its row's layout (``switchkd.data.formats``). ``answer`` is the completion's turn where it says more
    than its text, such as thoughts or calls of tools, and ``tools`` are those that the prompt offers.
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
    path: str,
    limit: int | None = None,
    skip_bad: int | BadRows = 0,
    *,
    teacher_field: str = "",
    teachers: Collection[str] = (),
) -> list[Example]:
    """The examples of a JSONL file, plain or gzip; ``gsm8k-sample[:train|:heldout]`` names the packaged sample,
    ``small:train``, ``small:arithmetic-heldout``, … a file of the small pair.

    ``hub:OWNER/NAME[/CONFIG]:SPLIT[@REVISION]`` names a data set on the Hugging Face Hub (``switchkd.data.lines``).
    The fields of the first row decide the file's format; the first of these that fits is taken:
    ``prompt``, ``completion`` · ``messages`` (the last assistant turn is the completion, the turns before it the
    prompt, turns after it are not used) · ``instruction``, ``input`` or ``context`` if any, ``output`` or ``response``
    (a list of strings: several references) · ``instruction``, ``instances`` (Self-Instruct, Unnatural Instructions; each
    instance is an example, further ones of a row have the ids index + k·2**32) · ``question``, ``solution``, ``answer``,
    ``perturbation_type`` (GSM-Plus) · ``question``, ``answer`` (GSM8K; calculator marks removed in both) · ``problem``,
    ``solution`` (MATH) · ``dialogue``, ``summary`` and/or ``summary1..3``. Blank lines are not rows, and fields that are null
    are none. What the rows say and no example does is logged, with counts: fields that are not read, turns that are not trained on.

    ``limit`` stops after that many examples. Up to ``skip_bad`` bad rows are left out, with a logged warning that
    counts and names them; given as ``BadRows``, they are counted there, and whoever made it tells. In ``teacher_field``, if one
    is given, a row may name its teacher, one of ``teachers``. Raises DataError for a file or row that cannot be used, ConfigError
    for a bad setting.
    """
    layout: Format | None = None

    def read(row: Fields, index: int, source: str) -> list[Example]:
        nonlocal layout
        layout = layout or format_of(row)
        teacher = _teacher_name(row, teacher_field, teachers)
        return _examples(examples_of(row, layout), layout, index, source, teacher)

    return read_rows(path, limit, skip_bad, read)


def read_rows(
    path: str, limit: int | None, skip_bad: int | BadRows, read: Callable[[Fields, int, str], list[AnyExample]]
) -> list[AnyExample]:
    """What ``read`` makes of each row, its index and ``file:line``, up to ``limit``; bad rows are counted, and told or refused.

    What no example says of the rows is told too.
    """
    bad = skip_bad if isinstance(skip_bad, BadRows) else BadRows(path, skip_bad)
    if (limit is not None and limit < 1) or bad.tolerated < 0:
        raise ConfigError(f"limit must be at least 1 and skip_bad at least 0, not {limit} and {bad.tolerated}")
    found: list[AnyExample] = []
    unused = Unused()
    for index, source, line in rows_of(path):
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
            record.references[0],
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
