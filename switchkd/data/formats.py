"""Row layouts of data files: which fields a row has, and what each example of it says.

One module knows the field names of the field's data sets; everything after it sees messages, references and a group.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from switchkd.base.errors import DataError
from switchkd.base.plain import json_value, shown
from switchkd.data.fields import Fields, checked_text, objects_in

_DIALOGUE_INSTRUCTION = "Summarize the following dialogue."
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # names for what a model thinks before it answers
_OF_A_TURN = (*THOUGHTS, "tool_calls", "tool_call_id", "name")  # what a template may write beside the content
_TRAINED = ("weight", "train", "training", "loss")  # names for whether a turn is trained on
_EARLIER = "only the last answer of a row is used, earlier ones are read as its prompt"
_LATER = "what follows the answer is not used"


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


@dataclass(frozen=True)
class Record:
    """One example of a row: the prompt, the text it is about, the answers to score against (the first to train on), its group.

    ``answer`` is the turn to train on where it says more than its text; ``tools`` are those that the prompt offers.
    """

    messages: tuple[Message, ...]
    references: tuple[str, ...]
    input: str = ""
    group: str = ""
    answer: Message | None = None
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Format:
    """A row layout: its name, the fields it must have (each with its alternatives), and how to read a row's examples."""

    name: str
    fields: tuple[tuple[str, ...], ...]
    read: Callable[[Fields], list[Record]]

    def matches(self, row: Fields) -> bool:
        return all(any(name in row for name in names) for names in self.fields)

    def __str__(self) -> str:
        return " + ".join("|".join(names) for names in self.fields)


def format_of(row: Fields) -> Format:
    """The first of FORMATS that the row fits. Raises DataError, with what is needed, if there is none."""
    known = next((known for known in FORMATS if known.matches(row)), None)
    if known is None:
        needed = "; or ".join(map(str, FORMATS))
        hint = next((hint for names, hint in _HINTS if names <= row.keys()), "")
        raise DataError(f"the row has the fields {row.names()}; needed are: {needed}{hint}")
    return known


def examples_of(row: Fields, layout: Format) -> list[Record]:
    """The row's examples, one or more.

    Raises DataError for a row that lacks a field, a prompt or a reference, or that has one which changes the text and is not read.
    """
    if not layout.matches(row):
        raise DataError(f"the row has the fields {row.names()}; needed are: {layout}")
    records = [_with_row(row, record) for record in layout.read(row)]
    for record in records:
        if not any(message.content.strip() for message in record.messages if message.role != "system"):
            raise DataError("empty prompt")
        if not record.references or not all(text.strip() for text in record.references):
            raise DataError("empty completion (an answer to train on or to score against)")
    row.check_unread()
    return records


def _with_row(row: Fields, record: Record) -> Record:
    """The record with what the row says beside any layout: a system prompt, and tools."""
    tools = tuple(objects_in(row["tools"], "tools")) if row.says("tools") else ()
    for tool in tools:
        _function(tool)
    messages = record.messages
    if system := row.text("system", "system_prompt"):
        if any(message.role == "system" for message in messages):
            raise DataError("a system turn stands in the messages and another beside them; keep one of them")
        messages = (Message("system", system), *messages)
    return replace(record, messages=messages, tools=tools)


def _user(row: Fields, *names: str) -> tuple[Message, ...]:
    """One user turn, after those of Alpaca's ``history``, a list of [question, answer]."""
    turns = row["history"] if row.says("history") else []
    if not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        raise DataError(f"field 'history' must be a list of [question, answer], not {shown(turns)}")
    before = [
        Message(role, checked_text(text, "history"))
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    row.leave(_EARLIER, len(turns))
    return (*before, Message("user", row.text(*names)))


def _read_pair(row: Fields) -> list[Record]:
    return [Record(_user(row, "prompt"), (row.text("completion"),))]


def _read_conversation(row: Fields) -> list[Record]:
    turns = row.objects("messages")
    messages = tuple(_turn(turn) for turn in turns)
    roles = [message.role for message in messages]
    if not all(roles):
        raise DataError(f"field 'messages' has a turn without a role (roles: {shown(roles)})")
    answers = [place for place, role in enumerate(roles) if role == "assistant"]
    if not answers:
        raise DataError(f"field 'messages' has no assistant turn (roles: {shown(roles)})")
    trained = [place for place in answers if _is_trained(turns[place])]
    if not trained:
        raise DataError("field 'messages' says of every assistant turn that it is not trained on; leave the row out")
    *earlier, last = trained
    answer = messages[last]
    calls = json.dumps(answer.calls, ensure_ascii=False) if answer.calls else ""
    row.leave(_EARLIER, len(earlier))
    row.leave(_LATER, len(messages) - 1 - last)
    said = answer.content if answer.content.strip() else calls
    return [Record(messages[:last], (said,), answer=answer if answer.more else None)]


def _turn(turn: Fields) -> Message:
    more = {name: turn[name] for name in _OF_A_TURN if turn.says(name)}
    for name, value in more.items():
        if name != "tool_calls":
            checked_text(value, f"messages[].{name}")
    if "tool_calls" in more:
        more["tool_calls"] = [_call(call) for call in objects_in(more["tool_calls"], "messages[].tool_calls")]
    elif "content" not in turn:
        raise DataError(f"field 'messages' has a turn without content (its fields: {turn.names()})")
    return Message(turn.text("role"), turn.text("content"), more)


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """A call of a tool with its arguments as an object: templates write these as JSON, and text would be quoted once more."""
    function = _function(call)
    arguments = function.get("arguments")
    arguments = json_value(arguments) if isinstance(arguments, str) else arguments
    function = function | {"arguments": arguments}
    return call | {"function": function} if "function" in call else function


def _function(tool: dict[str, Any]) -> dict[str, Any]:
    """The function of a tool or of a call, which may stand in it or be it. Raises DataError for one without a name."""
    function = tool.get("function", tool)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"a tool, or a call of one, needs a function with a name, not {shown(tool)}")
    return function


def _is_trained(turn: Fields) -> bool:
    """Whether an answer may be trained on, as weights and marks of other trainers say it."""
    marks = {name: turn[name] for name in _TRAINED if name in turn}
    for name, value in marks.items():
        if value not in (0, 1):  # True and False are among them
            raise DataError(
                f"field 'messages[].{name}' must be 0 or 1 (an answer is trained on or not), not {shown(value)}"
            )
    return all(marks.values())


def _read_instruction(row: Fields) -> list[Record]:
    output = row["output"] if "output" in row else row["response"]
    answers = output if isinstance(output, list) else [output]
    references = tuple(checked_text(answer, "output") for answer in answers)
    group = row.label("topic", "category")
    return [Record(_user(row, "instruction"), references, row.text("input", "context"), group)]


def _read_instances(row: Fields) -> list[Record]:
    prompt, group = _user(row, "instruction"), row.label("motivation_app")
    return [
        Record(prompt, (instance.text("output"),), instance.text("input"), group)
        for instance in row.objects("instances")
    ]


def _without_calculator(solution: str) -> str:
    # The marks are inputs to a calculator that no model here has.
    return re.sub(r"<<[^>]*>>", "", solution)


def _read_gsm8k(row: Fields) -> list[Record]:
    return [Record(_user(row, "question"), (_without_calculator(row.text("answer")),))]


def _read_gsm_plus(row: Fields) -> list[Record]:
    solution, answer = _without_calculator(row.text("solution")), row.text("answer")
    if "####" not in solution:
        solution += f"\n#### {answer}"
    return [Record(_user(row, "question"), (solution,), group=row.text("perturbation_type"))]


def _read_math(row: Fields) -> list[Record]:
    return [Record(_user(row, "problem"), (row.text("solution"),), group=row.label("subject", "type"))]


def _read_dialogue(row: Fields) -> list[Record]:
    names = [name for name in ("summary", "summary1", "summary2", "summary3") if name in row]
    dialogue = row.text("dialogue")
    # The fixed instruction must not hide that there is nothing to summarise.
    prompt = (Message("user", _DIALOGUE_INSTRUCTION if dialogue.strip() else ""),)
    return [Record(prompt, tuple(row.text(name) for name in names), dialogue)]


_HINTS: tuple[tuple[set[str], str], ...] = (
    (
        {"question_id", "text", "category"},
        ". Vicuna's question.jsonl has no answers to score against; use rows of instruction + output, "
        "as MiniLLM's valid.jsonl has them (its outputs are gpt-3.5-turbo's answers)",
    ),
    (
        {"conversations"},
        ". ShareGPT's `conversations` are not read: write them as `messages`, a list of {role, content}",
    ),
    (
        {"query", "answers", "tools"},
        ". xLAM's rows are not read: write query and answers as `messages` with `tool_calls`",
    ),
    ({"chosen", "rejected"}, ". Preferences are not read: write the chosen answer as `completion` or into `messages`"),
    ({"text"}, ". Rows of plain `text` are for lm_file"),
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
