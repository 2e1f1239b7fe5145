"""Row layouts of data files: which fields a row has, and what each example of it says.

One module knows the field names of the field's data sets; everything after it sees messages, references and a group.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from switchkd.base.errors import DataError
from switchkd.base.plain import json_value, shown
from switchkd.data.fields import Fields, Message, checked_text, function_of, objects_in, sharegpt_turn, turn_of

_DIALOGUE_INSTRUCTION = "Summarize the following dialogue."
_EARLIER = (
    "only the last answer of a row is used, earlier ones are read as its prompt; with assistant_turns all each is used"
)
_LATER = "what follows the answer is not used"


@dataclass(frozen=True)
class Record:
    """One example of a row: the prompt, the text it is about, the answers to score against (the first to train on), its group.

    It has no ``references`` if the row is a prompt alone. ``answer`` is the turn to train on where it says more than its text;
    ``tools`` are those that the prompt offers.
    """

    messages: tuple[Message, ...]
    references: tuple[str, ...]
    input: str = ""
    group: str = ""
    answer: Message | None = None
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Wanted:
    """What is to be made of rows: examples with ``answers``, or prompts too; of a conversation the last one, or ``every`` one."""

    answers: bool = True
    every: bool = False


@dataclass(frozen=True)
class Format:
    """A row layout: its name, the fields of the prompt and of the answer (each with its alternatives), and how a row is read."""

    name: str
    fields: tuple[tuple[str, ...], ...]
    answers: tuple[tuple[str, ...], ...]
    read: Callable[[Fields, Wanted], list[Record]]

    def matches(self, row: Fields, answers: bool = True) -> bool:
        wanted = self.fields + (self.answers if answers else ())
        return all(any(name in row for name in names) for names in wanted)

    def __str__(self) -> str:
        return " + ".join("|".join(names) for names in self.fields + self.answers)


def format_of(row: Fields, wanted: Wanted) -> Format:
    """The first of FORMATS that the row fits, with its answer or, where none is needed, without.

    Raises DataError, with what is needed, if there is none.
    """
    full = (known for known in FORMATS if known.matches(row))
    prompts = (known for known in FORMATS if known.matches(row, answers=False))
    known = next(full, None if wanted.answers else next(prompts, None))
    if known is None:
        hint = next((hint for names, hint in _HINTS if names <= row.keys()), "")
        small = Fields({name.strip().lower(): value for name, value in row.items()})
        if not hint and (meant := next((f for f in FORMATS if f.matches(small, wanted.answers)), None)):
            hint = f". Field names are written small and without spaces here: {meant}"
        if not hint and (lists := [name for name, value in row.items() if _is_rows(value)]):
            hint = f". Its field {lists[0]!r} is a list of objects; if these are the rows, write that list alone into the file"
        raise DataError(f"the row has the fields {row.names()}; {_needed(row)}{hint}")
    return known


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def _needed(row: Fields) -> str:
    """What the row lacks: an answer, if it has a prompt of some layout, else one of the layouts."""
    if asked := next((known for known in FORMATS if known.answers and known.matches(row, answers=False)), None):
        fields = " and ".join(" or ".join(names) for names in asked.answers)
        return f"it is a prompt without the answer ({fields}) that this use of the data needs"
    return f"needed are: {'; or '.join(map(str, FORMATS))}"


def examples_of(row: Fields, layout: Format, wanted: Wanted) -> list[Record]:
    """The row's examples, one or more.

    Raises DataError for a row that lacks a field, a prompt or a reference, or that has one which changes the text and is not read.
    """
    if not layout.matches(row, wanted.answers):
        raise DataError(f"the row has the fields {row.names()}; needed are, as in the file's first row: {layout}")
    records = [_with_row(row, record) for record in layout.read(row, wanted)]
    for record in records:
        if not any(message.content.strip() for message in record.messages if message.role != "system"):
            raise DataError("empty prompt")
        if (record.references or wanted.answers) and not all(text.strip() for text in record.references or [""]):
            raise DataError("empty completion (an answer to train on or to score against)")
    row.check_unread()
    return records


def _with_row(row: Fields, record: Record) -> Record:
    """The record with what the row says beside any layout: a system prompt, and tools."""
    tools = tuple(objects_in(row["tools"], "tools")) if row.says("tools") else ()
    for tool in tools:
        function_of(tool)
    messages = record.messages
    if system := row.text("system", "system_prompt"):
        if any(message.role == "system" for message in messages):
            raise DataError("a system turn stands in the messages and another beside them; keep one of them")
        messages = (Message("system", system), *messages)
    return replace(record, messages=messages, tools=tools)


def _answers(row: Fields, *names: str) -> tuple[str, ...]:
    """What the first of these fields that says something answers: a text, or a list of them, several references."""
    name = next((name for name in names if row.says(name)), next((name for name in names if name in row), ""))
    value = row[name] if name else ()
    if value == "":
        return ()  # as a table writes it for a row that has no answer
    return tuple(checked_text(answer, name) for answer in (value if isinstance(value, (list, tuple)) else [value]))


# --- conversations ------------------------------------------------------------------------------------------------


def _read_conversation(row: Fields, wanted: Wanted) -> list[Record]:
    return _conversation(row, [turn_of(turn, "messages") for turn in row.objects("messages")], "messages", wanted)


def _read_sharegpt(row: Fields, wanted: Wanted) -> list[Record]:
    turns = [sharegpt_turn(turn) for turn in row.objects("conversations")]
    return _conversation(row, turns, "conversations", wanted)


def _read_pair(row: Fields, wanted: Wanted) -> list[Record]:
    prompt = "prompt" if "prompt" in row else "query"
    if not isinstance(dict.get(row, prompt), list):
        if isinstance(dict.get(row, "completion"), list):
            before = [(turn, False) for turn in _user(row, prompt)]
            return _conversation(row, [*before, *_completion(row)], "completion", wanted)
        return _with_history(row, Record(_user(row, prompt), _answers(row, "completion", "response")), wanted)
    before = [(turn_of(turn, prompt)[0], False) for turn in row.objects(prompt)]
    if before[-1][0].role == "assistant":
        raise DataError(
            f"field {prompt!r} ends with an assistant turn, which would be begun anew and not gone on with; end it before"
        )
    return _conversation(row, [*before, *_completion(row)], prompt, wanted)


def _completion(row: Fields) -> list[tuple[Message, bool]]:
    """The turns of a pair's completion, each with whether it is trained on."""
    if isinstance(dict.get(row, "completion"), list) and row.says("completion"):
        return [turn_of(turn, "completion") for turn in row.objects("completion")]
    return [(Message("assistant", text), True) for text in _answers(row, "completion", "response")]


def _conversation(row: Fields, turns: list[tuple[Message, bool]], name: str, wanted: Wanted) -> list[Record]:
    """The examples of a conversation: each turn to train on as an answer, with all before it as its prompt."""
    messages = tuple(message for message, _ in turns)
    roles = [message.role for message in messages]
    if not all(roles):
        raise DataError(f"field {name!r} has a turn without a role (roles: {shown(roles)})")
    answers = [place for place, role in enumerate(roles) if role == "assistant"]
    trained = [place for place in answers if turns[place][1]]
    if not wanted.answers and roles[-1] != "assistant":  # the next answer is to be written
        trained = [*(trained if wanted.every else []), len(messages)]
    elif not answers:
        raise DataError(f"field {name!r} has no assistant turn (roles: {shown(roles)})")
    elif not trained:
        raise DataError(f"field {name!r} says of every assistant turn that it is not trained on; leave the row out")
    places = trained if wanted.every else trained[-1:]
    row.leave(_EARLIER, len([place for place in answers if place < places[0] and turns[place][1]]))
    row.leave(_LATER, max(0, len(messages) - 1 - places[-1]))
    return [_answered(messages, place) for place in places]


def _answered(messages: tuple[Message, ...], place: int) -> Record:
    """The example whose answer is the turn at ``place``, which may be still to come."""
    if place == len(messages):
        return Record(messages, ())
    answer = messages[place]
    calls = json.dumps(answer.calls, ensure_ascii=False) if answer.calls else ""
    said = answer.content if answer.content.strip() else calls
    return Record(messages[:place], (said,), answer=answer if answer.more else None)


# --- rows of one question -----------------------------------------------------------------------------------------


def _user(row: Fields, *names: str) -> tuple[Message, ...]:
    """One user turn, after those of Alpaca's ``history``, a list of [question, answer]."""
    turns = row["history"] if row.says("history") else []
    if isinstance(turns, str):  # as a cell of a table has it
        with suppress(DataError):
            turns = json_value(turns)
    if not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        raise DataError(f"field 'history' must be a list of [question, answer], not {shown(turns)}")
    before = [
        Message(role, checked_text(text, "history"))
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    return (*before, Message("user", row.text(*names)))


def _with_history(row: Fields, record: Record, wanted: Wanted) -> list[Record]:
    """The record, after one for each answer of its history where every answer is wanted."""
    answers = [place for place, message in enumerate(record.messages) if message.role == "assistant"]
    if wanted.every:
        return [*(_answered(record.messages, place) for place in answers), record]
    row.leave(_EARLIER, len(answers))
    return [record]


def _read_instruction(row: Fields, wanted: Wanted) -> list[Record]:
    references, group = _answers(row, "output", "response"), row.label("topic", "category")
    record = Record(_user(row, "instruction"), references, row.text("input", "context"), group)
    return _with_history(row, record, wanted)


def _read_instances(row: Fields, wanted: Wanted) -> list[Record]:
    prompt, group = _user(row, "instruction"), row.label("motivation_app")
    return [
        Record(prompt, _answers(instance, "output"), instance.text("input"), group)
        for instance in row.objects("instances")
    ]


def _without_calculator(solution: str) -> str:
    # The marks are inputs to a calculator that no model here has.
    return re.sub(r"<<[^>]*>>", "", solution)


def _read_gsm8k(row: Fields, wanted: Wanted) -> list[Record]:
    return [Record(_user(row, "question"), tuple(map(_without_calculator, _answers(row, "answer"))))]


def _read_gsm_plus(row: Fields, wanted: Wanted) -> list[Record]:
    solution, answer = _without_calculator(row.text("solution")), row.text("answer")
    if answer and "####" not in solution:
        solution += f"\n#### {answer}"
    references = (solution,) if solution else ()
    return [Record(_user(row, "question"), references, group=row.text("perturbation_type"))]


def _read_math(row: Fields, wanted: Wanted) -> list[Record]:
    return [Record(_user(row, "problem"), _answers(row, "solution"), group=row.label("subject", "type"))]


def _read_dialogue(row: Fields, wanted: Wanted) -> list[Record]:
    names = [name for name in ("summary", "summary1", "summary2", "summary3") if name in row]
    dialogue = row.text("dialogue")
    # The fixed instruction must not hide that there is nothing to summarise.
    prompt = (Message("user", _DIALOGUE_INSTRUCTION if dialogue.strip() else ""),)
    return [Record(prompt, tuple(row.text(name) for name in names), dialogue)]


# --- the layouts --------------------------------------------------------------------------------------------------

_HINTS: tuple[tuple[set[str], str], ...] = (
    (
        {"question_id", "text", "category"},
        ". Vicuna's question.jsonl has no answers to score against; use rows of instruction + output, "
        "as MiniLLM's valid.jsonl has them (its outputs are gpt-3.5-turbo's answers)",
    ),
    (
        {"query", "answers", "tools"},
        ". xLAM's answers are not read: write query and answers as `messages` with `tool_calls`",
    ),
    ({"chosen", "rejected"}, ". Preferences are not read: write the chosen answer as `completion` or into `messages`"),
    ({"text"}, ". Rows of plain `text` are for lm_file"),
)

FORMATS = (
    Format("pair", (("prompt", "query"),), (("completion", "response"),), _read_pair),
    Format("messages", (("messages",),), (), _read_conversation),
    Format("messages", (("conversations",),), (), _read_sharegpt),
    Format("instruction", (("instruction",),), (("output", "response"),), _read_instruction),
    Format("instances", (("instruction",), ("instances",)), (), _read_instances),
    Format("gsm_plus", (("question",), ("perturbation_type",)), (("solution",), ("answer",)), _read_gsm_plus),
    Format("gsm8k", (("question",),), (("answer",),), _read_gsm8k),
    Format("math", (("problem",),), (("solution",),), _read_math),
    Format("dialogue", (("dialogue",),), (("summary", "summary1"),), _read_dialogue),
)
FIELD_NAMES = {name for known in FORMATS for names in known.fields + known.answers for name in names} | {"text"}
"""The fields by which a row's layout is known."""
