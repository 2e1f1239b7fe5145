"""Two tasks for the small pair, generated: sums with their written-out steps, and notes retold in the order of the day.

Both have long answers (60 to 150 tokens) that are scored exactly, and more than one right answer, since distillation is about
distributions, and a language in which each prompt has one continuation would make sampling pointless:

- arithmetic (GSM8K's row): three numbers are added column by column. Each column may be summed at once (``7+4+8=19``) or in two
  steps (``7+4=11, 11+8=19``), with the carry first or last, in one of several wordings, so every line has entropy and a student
  may prefer the easier way. The number after ``####`` is right or wrong, whatever way led there.
- text (Alpaca's row): notes are sorted by time and retold in the past tense. An exact match must survive the choice, so there are
  only as many right answers as can be listed: `STYLES`, each kept from the first sentence to the last. A text that changes its
  style is wrong, as one with a wrong fact is; ROUGE-L tells how far it is off. A held-out row lists all of its right answers.

A row is a function of (seed, index, part). Train and held-out rows never share a problem: a hash of the problem alone (its numbers
or notes, in any order or wording) says to which part it belongs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar
from zlib import crc32

import numpy as np

from switchkd.demo_pair import cache_folder
from switchkd.errors import ConfigError, DataError, nearest

Item = TypeVar("Item")
Row = dict[str, Any]

PARTS = ("train", "heldout")
_HELDOUT_SHARE = 8  # one problem in so many is held out

NAMES = (
    "Ada",
    "Ben",
    "Cleo",
    "Dan",
    "Eva",
    "Finn",
    "Gita",
    "Hugo",
    "Ines",
    "Jon",
    "Kira",
    "Leo",
    "Mona",
    "Nils",
    "Omar",
    "Pia",
)
THINGS = ("apples", "books", "boxes", "coins", "cups", "eggs", "keys", "lamps", "pens", "plates", "shells", "stamps")
PLACES = (
    "attic",
    "barn",
    "cellar",
    "garage",
    "garden",
    "hall",
    "kitchen",
    "library",
    "office",
    "school",
    "shop",
    "yard",
)
PAST = {
    "break": "broke", "bring": "brought", "buy": "bought", "carry": "carried", "clean": "cleaned", "count": "counted",
    "draw": "drew", "find": "found", "hide": "hid", "mend": "mended", "paint": "painted", "sell": "sold",
    "sort": "sorted", "take": "took", "wash": "washed", "wrap": "wrapped",
}  # fmt: skip

QUESTIONS = (
    "What is {a} + {b} + {c}?",
    "Add {a}, {b} and {c}.",
    "Find the sum of {a}, {b} and {c}.",
    "How much is {a} plus {b} plus {c}?",
    "{p} has {a} {things}, {q} has {b} and {r} has {c}. How many {things} do they have?",
    "A shop sold {a} {things} in May, {b} in June and {c} in July. How many {things} did it sell?",
    "{p} counted {a} {things}, then {b} and then {c} more. How many {things} are there?",
    "There are {a} {things} in the {x}, {b} in the {y} and {c} in the {z}. How many {things} are there?",
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
COLUMNS = ("Ones", "Tens", "Hundreds")
INSTRUCTIONS = (
    "Retell the notes in the order of the days.",
    "Sort the notes by day and tell what was done.",
    "Write a diary from the notes, earliest first.",
    "Tell the story of the week from these notes.",
)
# What joins the first, the middle and the last sentence.
STYLES = (
    ("First", "Then", "Finally"),
    ("To begin with", "Next", "At last"),
    ("At the start", "After that", "In the end"),
)


class _Draws:
    """Choices from the stream keyed by (seed, index, task, part), which NumPy keeps the same in every release."""

    def __init__(self, seed: int, index: int, task: int, part: str):
        if part not in PARTS or min(seed, index) < 0:
            raise ConfigError(f"no row for {seed=}, {index=}, {part=}: counts from 0, and a part of {', '.join(PARTS)}")
        key = np.array([seed, index], dtype=np.uint64)
        self._bits = np.random.Philox(key=key, counter=np.array([0, 0, task, PARTS.index(part)], dtype=np.uint64))

    def below(self, count: int) -> int:
        return int(self._bits.random_raw()) % count

    def pick(self, items: Sequence[Item]) -> Item:
        return items[self.below(len(items))]

    def sample(self, items: Sequence[Item], count: int) -> list[Item]:
        """Different items, in random order."""
        rest = list(items)
        return [rest.pop(self.below(len(rest))) for _ in range(count)]


def _part_of(problem: str) -> str:
    return "heldout" if crc32(problem.encode()) % _HELDOUT_SHARE == 0 else "train"


# --- arithmetic ---------------------------------------------------------------------------------------------------


def arithmetic_row(seed: int, index: int, part: str) -> Row:
    """``{"question", "answer"}``: a sum of three numbers of three or four digits; the answer ends with ``#### N``."""
    draws = _Draws(seed, index, 0, part)
    numbers = _addends(draws)
    while _part_of(" ".join(map(str, sorted(numbers)))) != part:
        numbers = _addends(draws)
    names, places = draws.sample(NAMES, 3), draws.sample(PLACES, 3)
    words = dict(zip("abcpqrxyz", [*numbers, *names, *places], strict=True))
    question = draws.pick(QUESTIONS).format(**words, things=draws.pick(THINGS))
    return {"question": question, "answer": _written_sum(numbers, draws)}


def _addends(draws: _Draws) -> list[int]:
    return [100 + draws.below(900) for _ in range(3)]


def _written_sum(numbers: list[int], draws: _Draws) -> str:
    """A line for each column from the right; the last column's total is written whole."""
    lines, carry = [], 0
    for place, column in enumerate(COLUMNS):
        digits = [number // 10**place % 10 for number in numbers]
        if carry:
            digits.insert(draws.pick((0, len(digits))), carry)
        total = sum(digits)
        line = f"{column}: {_written_column(digits, draws)}"
        if column != COLUMNS[-1]:
            carry = total // 10
            line += draws.pick((", write", ", put", ", keep")) + f" {total % 10}"
            line += draws.pick((", carry", " and carry")) + f" {carry}" if carry else ""
        lines.append(line + ".")
    return "\n".join([*lines, f"#### {sum(numbers)}"])


def _written_column(digits: list[int], draws: _Draws) -> str:
    if draws.below(2):
        return "+".join(map(str, digits)) + f"={sum(digits)}"
    sums = np.cumsum(digits).tolist()
    return ", ".join(
        f"{before}+{digit}={after}" for before, digit, after in zip(sums, digits[1:], sums[1:], strict=False)
    )


# --- text ---------------------------------------------------------------------------------------------------------


def text_row(seed: int, index: int, part: str) -> Row:
    """``{"instruction", "input", "output"}``: four or five notes in random order; held out, ``output`` lists all right answers."""
    draws = _Draws(seed, index, 1, part)
    notes = _notes(draws)
    while _part_of(" ".join(sorted(map(_note, notes)))) != part:
        notes = _notes(draws)
    answers = [_diary(notes, style) for style in draws.sample(STYLES, len(STYLES))]
    output = answers if part == "heldout" else answers[0]
    return {"instruction": draws.pick(INSTRUCTIONS), "input": "\n".join(map(_note, notes)), "output": output}


def _notes(draws: _Draws) -> list[tuple[str, ...]]:
    """(day, name, verb, object, place) of each note; no word occurs twice."""
    count = 5 + draws.below(2)
    return list(zip(*(draws.sample(kind, count) for kind in (DAYS, NAMES, tuple(PAST), THINGS, PLACES)), strict=True))


def _note(note: tuple[str, ...]) -> str:
    day, name, verb, thing, place = note
    return f"{day} {name}, {place}: {verb} {thing}"


def _diary(notes: list[tuple[str, ...]], style: tuple[str, str, str]) -> str:
    joins = [style[0], *[style[1]] * (len(notes) - 2), style[2]]
    notes = sorted(notes, key=lambda note: DAYS.index(note[0]))
    return " ".join(
        f"{join}, on {day} {name} {PAST[verb]} the {thing} in the {place}."
        for join, (day, name, verb, thing, place) in zip(joins, notes, strict=True)
    )


TASKS: dict[str, Callable[[int, int, str], Row]] = {"arithmetic": arithmetic_row, "text": text_row}


# --- files of the pair that was made ------------------------------------------------------------------------------

SMALL = "small"
# The number is raised when the files made there change, so that an old cache is not taken for a new one.
FOLDER = "small-pair-1"
NOT_MADE = "the small pair is not in {} yet; make it once with `switchkd make-pair` (about 20 minutes on 2 cores)"
FILES = ("train", *(f"{task}-{part}" for task in TASKS for part in PARTS))


def small_pair_folder() -> Path:
    """Where ``switchkd make-pair`` puts the pair, and where the name ``small`` means."""
    return cache_folder() / FOLDER


def small_data_file(name: str) -> Path:
    """A data file of the small pair by the name after ``small:``; raises DataError if there is none or the pair was not made."""
    if name not in FILES:
        raise DataError(f"{SMALL} has no part {name!r}{nearest(name, FILES)}")
    if not small_pair_folder().is_dir():
        raise DataError(NOT_MADE.format(small_pair_folder()))
    return small_pair_folder() / f"{name}.jsonl"
