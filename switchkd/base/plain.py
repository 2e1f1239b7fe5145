"""JSON and YAML that others wrote: plain values of the expected types, or an error that says where they are not.

Nothing that a file says is run, and nothing in it is passed over: a name that is given twice is an error.
"""

from __future__ import annotations

import json
import types
import typing
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from reprlib import Repr
from typing import Annotated, Any, NamedTuple, NotRequired

import yaml

from switchkd.base.errors import ConfigError, DataError

Lines = list[dict[str, Any]]
TokenId = Annotated[int, range(2**31)]
_NUMBER = range(-(2**63), 2**63)  # what numpy and torch take
_PLAIN = (bool, int, float, str, list, dict, tuple, types.NoneType)
_UNIONS = (types.UnionType, typing.Union)
_MOST_VALUES = 100_000  # of a YAML file
_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist = 2, 8, 8


def shown(value: Any) -> str:
    """``repr`` for messages, of bounded length whatever a file holds."""
    return _SHORT.repr(value)


def check_text(text: str, name: str) -> None:
    """Raise DataError for text that no file and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{name} holds half of a surrogate pair, {text[error.start]!r}; it is not text") from error


# --- JSON -----------------------------------------------------------------------------------------------------------


def json_object(text: bytes | str) -> dict[str, Any]:
    """The one JSON object in ``text``. Raises DataError for anything else."""
    return checked_object(json_value(text))


def checked_object(value: Any) -> dict[str, Any]:
    """``value``, if it is a JSON object. Raises DataError for anything else."""
    if not isinstance(value, dict):
        raise DataError(f"it must be a JSON object, not {type(value).__name__}")
    return value


def json_value(text: bytes | str) -> Any:
    """The JSON value in ``text``, in UTF-8 with or without a byte-order mark. Raises DataError for what is none."""
    try:
        decoded = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value = json.loads(decoded.rstrip("\r\n"), object_pairs_hook=_each_once)
        if "\\ud" in decoded.lower():  # an escape may stand for what no file can hold
            check_text(json.dumps(value, ensure_ascii=False), "it")
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: byte {error.object[error.start]:#04x} at {error.start}") from error
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise DataError(f"broken JSON at {line}column {error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise DataError("broken JSON: nested too deeply") from error
    except DataError:
        raise
    except ValueError as error:  # a name given twice, or a number of thousands of digits, which Python refuses
        raise DataError(f"broken JSON: {error}") from error
    return value


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{shown(Counter(name for name, _ in pairs).most_common(1)[0][0])} is given twice")
    return found


def check_type(value: Any, hint: Any, name: str = "") -> None:
    """Raise DataError, naming the first part that differs, unless a value is of the type ``hint``.

    A hint is a plain type, a Literal, several of them (``int | None``), list, dict[str, …], a tuple (in JSON a list of that
    length; ``tuple[…, ...]`` is one of any length, and no list), Annotated[int, range(…)], or a TypedDict (an object with at least
    these fields). Any number fits into 64 bits.
    """
    shape = _shape(hint)
    if shape.kind is types.UnionType:
        return _check_options(value, hint, name)
    if not _fits(value, shape):
        raise DataError(f"{name[:200] or 'it'} must be {_words(hint)}, got {shown(value)}")
    if missing := [key for key in shape.fields if key not in value and key in shape.required]:
        raise DataError(f"{name[:200] or 'it'} has no {missing[0]!r}")
    kind = shape.kind
    if kind is dict and (other := next((key for key in value if type(key) is not str), None)) is not None:
        raise DataError(f"{name[:200] or 'it'}, the name must be str, got {shown(other)}")
    inside = value.items() if kind is dict else enumerate(value) if kind in (list, tuple) else ()
    for key, item in inside:
        own = shape.fields.get(str(key), Any) if shape.fields else shape.parts[key if shape.each else -1]
        check_type(item, own, f"{name}.{key}" if kind is dict and name else f"{name}[{key}]" if name else str(key))
    for relation in shape.relations:
        if words := relation(value):
            raise DataError(f"{name[:200] or 'it'} does not fit together: {words}")
    return None


def _check_options(value: Any, hint: Any, name: str) -> None:
    """``check_type`` where several types will do. Of one that may be absent, the other type's own words say what is wrong."""
    options = [option for option in typing.get_args(hint) if option is not types.NoneType]
    if value is None and len(options) < len(typing.get_args(hint)):
        return None
    if len(options) == 1:
        return check_type(value, options[0], name)
    for option in options:
        with suppress(DataError):
            return check_type(value, option, name)
    raise DataError(f"{name[:200] or 'it'} must be {_words(hint)}, got {shown(value)}")


def _fits(value: Any, shape: _Shape) -> bool:
    """Whether a value is of that type, without what is in it."""
    kind = shape.kind
    if kind is typing.Literal:
        return any(value == own and type(value) is type(own) for own in shape.parts)
    if type(value) is int:
        return value in shape.number and (kind in (Any, int, float))
    if shape.each:  # in JSON a tuple is a list
        return type(value) is list and len(value) == len(shape.parts)
    return kind is Any or type(value) is kind or (kind not in _PLAIN and isinstance(value, kind))


def _words(hint: Any) -> str:
    """A type as messages call it."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        number: range = hint.__metadata__[0]
        return f"int from {number[0]} to {number[-1]}"
    if origin is typing.Literal:
        return ", ".join(map(repr, parts))
    if origin is tuple and parts[-1] is ...:
        return "several values"
    if origin in _UNIONS:
        return " or ".join(map(_words, parts))
    return str(getattr(hint, "__name__", hint))


Relation = Callable[[dict[str, Any]], str]
_RELATIONS: list[tuple[type, Relation]] = []


def related(kind: type) -> Callable[[Relation], Relation]:
    """Register what must hold between the fields of a TypedDict, and of those that have all of its fields.

    The function says in words what does not, "" if all does; ``check_type`` asks it once the types are right.
    """

    def register(relation: Relation) -> Relation:
        _RELATIONS.append((kind, relation))
        return relation

    return register


def first(problems: Mapping[str, bool]) -> str:
    """The first problem that there is; "" for none."""
    return next((words for words, there in problems.items() if there), "")


class _Shape(NamedTuple):
    """A type hint taken apart: ``fields`` are those of a TypedDict, ``number`` the range of an int.

    ``each``: whether ``parts`` are the types of a tuple's items, one by one.
    """

    kind: Any
    parts: tuple[Any, ...]
    number: range
    fields: dict[str, Any]
    required: Collection[str]
    relations: Sequence[Relation] = ()
    each: bool = False


@cache
def _shape(hint: Any) -> _Shape:
    # Asked for every value of a file, of which there are millions.
    if typing.is_typeddict(hint):
        hints = typing.get_type_hints(hint, include_extras=True)
        fields = {
            name: typing.get_args(h)[0] if typing.get_origin(h) is NotRequired else h for name, h in hints.items()
        }
        relations = [each for kind, each in _RELATIONS if kind.__annotations__.keys() <= fields.keys()]
        return _Shape(dict, (), _NUMBER, fields, hint.__required_keys__, relations)
    kind, parts = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is Annotated:
        return _Shape(parts[0], (), parts[1], {}, ())
    if kind in _UNIONS:
        return _Shape(types.UnionType, parts, _NUMBER, {}, ())
    if kind is tuple and parts[-1] is ...:
        return _Shape(tuple, parts[:1], _NUMBER, {}, ())
    return _Shape(kind, parts, _NUMBER, {}, (), each=kind is tuple)


# --- JSON lines ---------------------------------------------------------------------------------------------------


def read_lines(file: Path, kind: type, most: int | None = None) -> Lines:
    """The records of a JSONL file that a run appends to, or ``most`` of them, evenly spread; none where there is no file."""
    if most is None or not file.is_file():
        return list(iter_lines(file, kind))
    with file.open("rb") as lines:
        count = sum(1 for _ in lines)
    return list(iter_lines(file, kind, set(spread(count, most))))


def iter_lines(file: Path, kind: type, wanted: Collection[int] | None = None) -> Iterator[dict[str, Any]]:
    """The records of a JSONL file that a run appends to, or those of the ``wanted`` lines from 0; none where there is no file.

    ``kind`` says what each has. A last line that was cut short is left out. Raises DataError, naming the line, for any other that
    is no such record, or whose step is before that of the line above it.
    """
    if not file.is_file():
        return
    step = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines):
            if (wanted is not None and number not in wanted) or not line.endswith(b"\n"):
                continue
            with damaged_at(file, number + 1):
                record = json_object(line)
                check_type(record, kind)
                if record.get("step", step) < step:
                    raise DataError(f"its step is {record['step']}, and that of a line above it is {step}")
            step = record.get("step", step)
            yield record


@contextmanager
def damaged_at(file: Path, number: int) -> Iterator[None]:
    """What is wrong with a line is said with its file and number, from 1."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{file}, line {number} is damaged: {error}; take the line out") from error


def spread(count: int, most: int) -> list[int]:
    """At most ``most`` of the places 0 … count − 1, evenly spread, the first and last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / max(most - 1, 1)) for i in range(most)})


# --- YAML -----------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML without anything that makes one value of another: each name is text and given once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if not isinstance(name, str):
                problem = f"a name must be text, not {shown(name)}"
            elif name in names:
                problem = f"the name {shown(name)} is given twice"
            else:
                names.add(name)
                continue
            raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(file: Path) -> dict[str, Any]:
    """The settings in a YAML file; raises ConfigError if it holds none."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    values = yaml_value(text, str(file))
    if not isinstance(values, dict):
        raise ConfigError(f"{file} must hold settings as `name: value` lines, not {type(values).__name__}")
    return values


def yaml_value(text: str, source: str) -> Any:
    """The value that a YAML text stands for; ``source`` names it in messages. Raises ConfigError for what is no plain YAML."""
    try:
        value = yaml.load(text, _Loader)
        _check_values(value)
    except RecursionError as error:
        raise ConfigError(f"{source} is not valid YAML: nested too deeply") from error
    # A date that there is not, a number of thousands of digits, a tag on another kind of value: Python says so, in many ways.
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise ConfigError(f"{source} is not valid YAML: {error}") from error
    return value


def _check_values(value: Any) -> None:
    """Raise DataError for what is no text, or for more values than settings have: a few aliases can stand for billions."""
    waiting = [value]
    for _ in range(_MOST_VALUES):
        if not waiting:
            return
        one = waiting.pop()
        if isinstance(one, str):
            check_text(one, "a value")
        waiting += [*one, *one.values()] if isinstance(one, dict) else one if isinstance(one, (list, set)) else []
    raise DataError(f"more than {_MOST_VALUES:,} values; write out what its aliases stand for")
