"""Row layouts of data files: which fields a row has, and what each example of it says.

One module knows the field names of the field's data sets; everything after it sees messages, references and a group.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from switchkd.errors import DataError
from switchkd.plain import shown

_DIALOGUE_INSTRUCTION = "Summarize the following dialogue."


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Record:
    """One example of a row: the prompt, the text it is about, the answers to score against (the first to train on), its group."""

    messages: tuple[Message, ...]
    references: tuple[str, ...]
    input: str = ""
    group: str = ""


@dataclass(frozen=True)
class Format:
    """A row layout: its name, the fields it must have (each with its alternatives), and how to read a row's examples."""

    name: str
    fields: tuple[tuple[str, ...], ...]
    read: Callable[[dict[str, Any]], list[Record]]

    def matches(self, row: dict[str, Any]) -> bool:
        return all(any(name in row for name in names) for names in self.fields)

    def __str__(self) -> str:
        return " + ".join("|".join(names) for names in self.fields)


def format_of(row: dict[str, Any]) -> Format:
    """The first of FORMATS that the row fits. Raises DataError, with what is needed, if there is none."""
    known = next((known for known in FORMATS if known.matches(row)), None)
    if known is None:
        needed = "; or ".join(map(str, FORMATS))
        hint = _VICUNA_HINT if {"question_id", "text", "category"} <= row.keys() else ""
        raise DataError(f"the row has the fields {_names(row)}; needed are: {needed}{hint}")
    return known


def examples_of(row: dict[str, Any], layout: Format) -> list[Record]:
    """The row's examples, one or more. Raises DataError for a row that lacks a field, a prompt or a reference."""
    if not layout.matches(row):
        raise DataError(f"the row has the fields {_names(row)}; needed are: {layout}")
    records = layout.read(row)
    for record in records:
        if not any(message.content.strip() for message in record.messages if message.role != "system"):
            raise DataError("empty prompt")
        if not record.references or not all(text.strip() for text in record.references):
            raise DataError("empty completion (an answer to train on or to score against)")
    return records


def _names(row: dict[str, Any]) -> str:
    return textwrap.shorten(", ".join(row), 300, placeholder=" …") or "(none)"


def text_field(row: dict[str, Any], *names: str) -> str:
    """The first of the fields ``names`` that the row has; "" when it has none. Raises DataError for anything but text."""
    name = next((name for name in names if name in row), "")
    return _checked_text(row.get(name, ""), name)


def _checked_text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"field {name!r} must be a string, not {type(value).__name__}")
    return value


def _group(row: dict[str, Any], *names: str) -> str:
    """The first of the fields that holds text: a row need not have a group, and other data may use the name for something else."""
    return next((row[name] for name in names if isinstance(row.get(name), str)), "")


def _user(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def _read_pair(row: dict[str, Any]) -> list[Record]:
    return [Record(_user(text_field(row, "prompt")), (text_field(row, "completion"),))]


def _read_conversation(row: dict[str, Any]) -> list[Record]:
    turns = row["messages"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError("field 'messages' must be a list of {role, content} objects")
    messages = tuple(Message(text_field(turn, "role"), text_field(turn, "content")) for turn in turns)
    answers = [position for position, message in enumerate(messages) if message.role == "assistant"]
    roles = [message.role for message in messages]
    if not all(roles):
        raise DataError(f"field 'messages' has a turn without a role (roles: {shown(roles)})")
    if not answers:
        raise DataError(f"field 'messages' has no assistant turn (roles: {shown(roles)})")
    return [Record(messages[: answers[-1]], (messages[answers[-1]].content,))]


def _read_instruction(row: dict[str, Any]) -> list[Record]:
    context = next((name for name in ("input", "context") if row.get(name) not in (None, "")), "")
    output = row["output"] if "output" in row else row["response"]
    answers = output if isinstance(output, list) else [output]
    references = tuple(_checked_text(answer, "output") for answer in answers)
    group = _group(row, "topic", "category")
    return [Record(_user(text_field(row, "instruction")), references, text_field(row, context), group)]


def _read_instances(row: dict[str, Any]) -> list[Record]:
    instances = row["instances"]
    if not isinstance(instances, list) or not instances or not all(isinstance(one, dict) for one in instances):
        raise DataError("field 'instances' must be a list of one or more {input, output} objects")
    prompt, group = _user(text_field(row, "instruction")), _group(row, "motivation_app")
    return [
        Record(prompt, (text_field(instance, "output"),), text_field(instance, "input"), group)
        for instance in instances
    ]


def _without_calculator(solution: str) -> str:
    # The marks are inputs to a calculator that no model here has.
    return re.sub(r"<<[^>]*>>", "", solution)


def _read_gsm8k(row: dict[str, Any]) -> list[Record]:
    return [Record(_user(text_field(row, "question")), (_without_calculator(text_field(row, "answer")),))]


def _read_gsm_plus(row: dict[str, Any]) -> list[Record]:
    solution = _without_calculator(text_field(row, "solution"))
    if "####" not in solution:
        solution += f"\n#### {text_field(row, 'answer')}"
    return [Record(_user(text_field(row, "question")), (solution,), group=text_field(row, "perturbation_type"))]


def _read_math(row: dict[str, Any]) -> list[Record]:
    prompt, solution = _user(text_field(row, "problem")), text_field(row, "solution")
    return [Record(prompt, (solution,), group=_group(row, "subject", "type"))]


def _read_dialogue(row: dict[str, Any]) -> list[Record]:
    names = [name for name in ("summary", "summary1", "summary2", "summary3") if name in row]
    dialogue = text_field(row, "dialogue")
    # The fixed instruction must not hide that there is nothing to summarise.
    prompt = _user(_DIALOGUE_INSTRUCTION if dialogue.strip() else "")
    return [Record(prompt, tuple(text_field(row, name) for name in names), dialogue)]


_VICUNA_HINT = (
    ". Vicuna's question.jsonl has no answers to score against; use rows of instruction + output, "
    "as MiniLLM's valid.jsonl has them (its outputs are gpt-3.5-turbo's answers)"
)

FORMATS = (
    Format("pair", (("prompt",), ("completion",)), _read_pair),
    Format("messages", (("messages",),), _read_conversation),
    Format("instruction", (("instruction",), ("output", "response")), _read_instruction),
    Format("instances", (("instruction",), ("instances",)), _read_instances),
    Format("gsm_plus", (("question",), ("solution",), ("answer",), ("perturbation_type",)), _read_gsm_plus),
    Format("gsm8k", (("question",), ("answer",)), _read_gsm8k),
    Format("math", (("problem",), ("solution",)), _read_math),
    Format("dialogue", (("dialogue",), ("summary", "summary1")), _read_dialogue),
)
