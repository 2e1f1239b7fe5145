"""The fields of a row, the turns of a conversation in them, and what becomes of those that nobody asks for."""

from __future__ import annotations

import textwrap
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from switchkd.base.errors import DataError, nearest
from switchkd.base.plain import json_value, shown

MOST_BYTES = 2**22  # of a row: a million tokens; a tokenizer takes three hundred times as much memory as its text
_HISTORY = "write its turns into the messages"
_TEXT_ONLY = "only text is read here; leave the field out if the text stands without it"
# Fields that change the text and that nothing here reads, each with the way out.
CHANGE_THE_TEXT = {
    "history": _HISTORY,
    "chat_template_kwargs": "give it for all rows, as the setting chat_template_kwargs",
    "documents": "write the documents into the messages",
    "functions": "write it as `tools`",
    "function_call": "write it as `tool_calls`",
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _TEXT_ONLY),
}


class Fields(dict[str, Any]):
    """The fields of a row, or of an object in it, that hold something, and the names of those that were read.

    A field that is null is none, whether it stands in a file or a data set writes it for every row that lacks it.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__({name: value for name, value in values.items() if value is not None})
        self._nulls = [name for name, value in values.items() if value is None]
        self._read: set[str] = set()
        self._inside: dict[str, list[Fields]] = {}
        self.left: dict[str, int] = {}

    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        return super().__getitem__(name)

    def names(self) -> str:
        """The names of all fields, for messages."""
        names = [*self, *(f"{name} (null)" for name in self._nulls)]
        return textwrap.shorten(", ".join(names), 300, placeholder=" …") or "(none)"

    def says(self, name: str) -> bool:
        """Whether a field is there and not empty."""
        return dict.get(self, name) not in (None, "", [], {})

    def text(self, *names: str) -> str:
        """The text of the first of these fields that is not empty; "" if there is none. Raises DataError for anything but text."""
        name = next((name for name in names if self.says(name)), next((name for name in names if name in self), ""))
        return checked_text(self[name], name) if name else ""

    def label(self, *names: str) -> str:
        """The first of these fields that holds text; other data may use the name for something else."""
        return next((self[name] for name in names if isinstance(dict.get(self, name), str)), "")

    def objects(self, name: str) -> list[Fields]:
        """The objects in a list. Raises DataError for anything else."""
        value = objects_in(self[name], name) if isinstance(dict.get(self, name), str) else self[name]
        if not isinstance(value, list) or not value or not all(isinstance(one, dict) for one in value):
            raise DataError(f"field {name!r} must be a list of one or more objects, not {shown(value)}")
        return self._inside.setdefault(name, [Fields(one) for one in value])

    def leave(self, what: str, turns: int) -> None:
        """Note how many of the row's turns are left, and what becomes of them."""
        if turns:
            self.left[what] = turns

    def unread(self) -> list[str]:
        """The fields that say something and were not read; those of objects in a list as ``messages[].name``."""
        own = [name for name in self if name not in self._read and self.says(name)]
        inside = {
            f"{name}[].{one}": None for name, parts in self._inside.items() for part in parts for one in part.unread()
        }
        return [*own, *inside]

    def check_unread(self) -> None:
        """Raise DataError for a field that was not read and would certainly change the text."""
        for name in self.unread():
            if way_out := CHANGE_THE_TEXT.get(name.rpartition(".")[2]):
                raise DataError(f"field {name!r} would change the text and is not read: {way_out}")


def checked_text(value: Any, name: str) -> str:
    """``value``, if it is text of a size that is read; raises DataError, naming the field, if it is not."""
    if not isinstance(value, str):
        raise DataError(f"field {name!r} must be a string, not {type(value).__name__}")
    if len(value) > MOST_BYTES:
        raise DataError(
            f"field {name!r} is longer than {MOST_BYTES / 2**20:.0f} MiB, which is more than is read; split it"
        )
    return value


def objects_in(value: Any, name: str) -> list[dict[str, Any]]:
    """A list of objects that may be written as JSON text, as columns of some data sets are. Raises DataError for anything else."""
    try:
        found = json_value(value) if isinstance(value, str) else value
    except DataError as error:
        raise DataError(f"field {name!r} is neither a list of objects nor one as JSON text: {error}") from error
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise DataError(f"field {name!r} must be a list of objects, not {shown(found)}")
    return found


class Unused:
    """What the rows of a file say and no example does, counted."""

    def __init__(self) -> None:
        self._fields: Counter[str] = Counter()
        self._turns: dict[str, list[int]] = {}

    def add(self, row: Fields) -> None:
        """Count one row's fields that were not read, and its turns that are left."""
        self._fields.update(row.unread())
        for what, turns in row.left.items():
            self._turns.setdefault(what, []).append(turns)

    def lines(self) -> list[str]:
        """The same in sentences, none where everything was used."""
        found = [
            f"{what} ({_count(sum(counts), 'turn')} in {_count(len(counts), 'row')})"
            for what, counts in self._turns.items()
        ]
        if self._fields:
            found.append(f"fields that are not read: {counted(self._fields)}")
        return found


def counted(names: Counter[str]) -> str:
    """The most frequent names with their numbers of rows."""
    most = ", ".join(f"{shown(name)} ({_count(count, 'row')})" for name, count in names.most_common(20))
    return most + (f", and {len(names) - 20} more" if len(names) > 20 else "")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


# --- turns --------------------------------------------------------------------------------------------------------

THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # names for what a model thinks before it answers
_OF_A_TURN = (*THOUGHTS, "tool_calls", "tool_call_id", "name")  # what a template may write beside the content
_TRAINED = ("weight", "train", "training", "loss")  # names for whether a turn is trained on
_SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "bot": "assistant",
    "model": "assistant", "chatgpt": "assistant", "bing": "assistant", "tool": "tool", "observation": "tool",
    "function_response": "tool", "function_call": "assistant", "tool_call": "assistant",
}  # fmt: skip
_CALLS = ("function_call", "tool_call")  # roles of ShareGPT whose text is the call of a tool


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; ``more`` is what a chat template may write beside the content, by the names of fields."""

    role: str
    content: str
    more: dict[str, Any] = field(default_factory=dict, hash=False)

    def to_dict(self, in_parts: bool = False) -> dict[str, Any]:
        """The turn as a chat template wants it; ``in_parts`` with its text as a list. Thoughts stand under each of their names."""
        content = [{"type": "text", "text": self.content}] if in_parts else self.content
        thoughts = dict.fromkeys(THOUGHTS, self.thoughts) if self.thoughts else {}
        return {"role": self.role, "content": content, **thoughts, **self.more}

    @property
    def thoughts(self) -> str:
        """What was thought before the content."""
        return next((self.more[name] for name in THOUGHTS if name in self.more), "")

    @property
    def calls(self) -> list[dict[str, Any]]:
        """The tools that are called, each with a name and arguments."""
        return [call.get("function", call) for call in self.more.get("tool_calls", ())]


def turn_of(turn: Fields, name: str) -> tuple[Message, bool]:
    """A turn of the field ``name``, and whether it may be trained on."""
    more = {part: turn[part] for part in _OF_A_TURN if turn.says(part)}
    for part, value in more.items():
        if part != "tool_calls":
            checked_text(value, f"{name}[].{part}")
    if "tool_calls" in more:
        more["tool_calls"] = [_call(call) for call in objects_in(more["tool_calls"], f"{name}[].tool_calls")]
    elif "content" not in turn:
        raise DataError(f"field {name!r} has a turn without content (its fields: {turn.names()})")
    return Message(turn.text("role"), _content(turn, name), more), _is_trained(turn, name)


def _content(turn: Fields, name: str) -> str:
    """The text of a turn, which may be written as a list of parts."""
    if not isinstance(dict.get(turn, "content"), list):
        return turn.text("content")
    parts = []
    for part in turn["content"]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise DataError(
                f"field '{name}[].content' holds {shown(part)}; of content in parts only {{'type': 'text', 'text': …}} is read here"
            )
        parts.append(part["text"])
    return "".join(parts)


def sharegpt_turn(turn: Fields) -> tuple[Message, bool]:
    """A turn as ShareGPT writes it, with `from` and `value`; or one with role and content."""
    if "from" not in turn:
        return turn_of(turn, "conversations")
    speaker, said = turn.text("from"), turn.text("value")
    if speaker not in _SHAREGPT_ROLES:
        raise DataError(f"field 'conversations' has a turn from {shown(speaker)}{nearest(speaker, _SHAREGPT_ROLES)}")
    more = {}
    if speaker in _CALLS:
        found = json_value(said)
        calls = objects_in(found if isinstance(found, list) else [found], "conversations[].value")
        said, more = "", {"tool_calls": [_call(call) for call in calls]}
    return Message(_SHAREGPT_ROLES[speaker], said, more), _is_trained(turn, "conversations")


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """A call of a tool with its arguments as an object: templates write these as JSON, and text would be quoted once more."""
    function = function_of(call)
    arguments = function.get("arguments")
    arguments = json_value(arguments) if isinstance(arguments, str) else arguments
    function = function | {"arguments": arguments}
    return call | {"function": function} if "function" in call else function


def function_of(tool: dict[str, Any]) -> dict[str, Any]:
    """The function of a tool or of a call, which may stand in it or be it. Raises DataError for one without a name."""
    function = tool.get("function", tool)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"a tool, or a call of one, needs a function with a name, not {shown(tool)}")
    return function


def _is_trained(turn: Fields, where: str) -> bool:
    """Whether an answer may be trained on, as weights and marks of other trainers say it."""
    marks = {name: turn[name] for name in _TRAINED if name in turn}
    for name, value in marks.items():
        if value not in (0, 1):  # True and False are among them
            raise DataError(
                f"field '{where}[].{name}' must be 0 or 1 (an answer is trained on or not), not {shown(value)}"
            )
    return all(marks.values())
