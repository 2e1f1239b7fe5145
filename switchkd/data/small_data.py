"""Three tasks for the small pair, generated: running totals, a row of digits put in another order, and notes retold.

All have long answers that are scored exactly, and more than one right answer: distillation is about distributions, and a language
in which each prompt has one continuation would make sampling pointless. In each a wrong token early spoils what follows:

- arithmetic (GSM8K's row): amounts are added to a two-digit total and taken from it, one after the other. Each step is written in
  one of several wordings, so every line has entropy. The number after ``####`` is right or wrong, whatever wording led there, and
  one wrong step makes all later ones wrong.
- order (GSM8K's row): the digits of a row change places, move by move, and the whole row is written after each. A digit that
  is written twice, or left out, stays so to the end: no row of the data is like that, so whoever goes on is on strange ground.
- text (Alpaca's row): notes are retold as sentences. An exact match must survive the choice, so there are only as many right
  answers as can be listed: `STYLES`, each kept from the first sentence to the last. A text that changes its style is wrong, as
  one with a wrong fact is; ROUGE-L tells how far it is off. A held-out row lists all of its right answers.

A row is a function of (seed, index, part). Train and held-out rows never share a problem: a hash of the problem alone (its numbers
or notes, in any order or wording) says to which part it belongs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar
from zlib import crc32

import numpy as np

from switchkd.base.errors import ConfigError, DataError, nearest
from switchkd.base.storage import cache_folder

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

TOTAL_STARTS = ("{p} has {n} {things}:", "{p} starts with {n} {things}:")
GAINS = (" gets {n};", " finds {n};", " buys {n};")
LOSSES = (" gives {n};", " loses {n};", " sells {n};")
ASKS = (" how many now?", " how many {things} are left?")
# One step of a total: before, change, after.
WRITTEN_GAINS = ("{a}+{b}={c}.", "{a} plus {b} is {c}.", "{a} and {b} make {c}.")
WRITTEN_LOSSES = ("{a}-{b}={c}.", "{a} minus {b} is {c}.", "{a} less {b} leaves {c}.")
STEPS = 12
# A row of digits, and what is done to it.
DIGITS = 6
MOVES = 9
ORDER_STARTS = ("The row is {row}:", "There is a row {row}:")
ORDER_ASKS = (" what is the row now?", " how does it end?")
_PLACES = ("first", "second", "third", "fourth", "fifth", "sixth")
# By each move, from which place the digits of the new row are taken.
ORDERS = {
    f"swap {_PLACES[a]} and {_PLACES[b]}": tuple({a: b, b: a}.get(place, place) for place in range(DIGITS))
    for a, b in itertools.combinations(range(DIGITS), 2)
} | {
    "first to the end": (*range(1, DIGITS), 0),
    "last to the front": (DIGITS - 1, *range(DIGITS - 1)),
    "turn around": tuple(reversed(range(DIGITS))),
}
WRITTEN_ROWS = ("{move} gives {row}.", "{move}: {row}.", "after {move} {row}.")
NOTES = 7
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
INSTRUCTIONS = (
    "Retell the notes.",
    "Tell what was done.",
    "Write a diary from the notes.",
    "Tell the story of these notes.",
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
    """``{"question", "answer"}``: `STEPS` changes of one digit to a total of two; the answer ends with ``#### N``."""
    draws = _Draws(seed, index, 0, part)
    totals = _totals(draws)
    while _part_of(" ".join(map(str, totals))) != part:
        totals = _totals(draws)
    words = {"p": draws.pick(NAMES), "things": draws.pick(THINGS)}
    said, written = [draws.pick(TOTAL_STARTS).format(**words, n=totals[0])], []
    for before, after in itertools.pairwise(totals):
        gain = after > before
        said.append(draws.pick(GAINS if gain else LOSSES).format(**words, n=abs(after - before)))
        line = draws.pick(WRITTEN_GAINS if gain else WRITTEN_LOSSES)
        written.append(line.format(a=before, b=abs(after - before), c=after))
    question = "".join([*said, draws.pick(ASKS).format(**words)])
    return {"question": question, "answer": "\n".join([*written, f"#### {totals[-1]}"])}


def _totals(draws: _Draws) -> list[int]:
    """The start and the total after each step, all from 10 to 99; each change is from 1 to 9."""
    totals = [20 + draws.below(61)]
    for _ in range(STEPS):
        change = (1 + draws.below(9)) * (1 if draws.below(2) else -1)
        totals.append(totals[-1] + (change if 10 <= totals[-1] + change <= 99 else -change))
    return totals


# --- order --------------------------------------------------------------------------------------------------------


def order_row(seed: int, index: int, part: str) -> Row:
    """``{"question", "answer"}``: `MOVES` different moves of `DIGITS` different digits; the answer ends with ``#### ROW``."""
    draws = _Draws(seed, index, 2, part)
    start, moves = _order(draws)
    while _part_of(" ".join([start, *moves])) != part:
        start, moves = _order(draws)
    rows = list(itertools.accumulate(moves, moved, initial=start))
    written = [draws.pick(WRITTEN_ROWS).format(move=move, row=row) for move, row in zip(moves, rows[1:], strict=True)]
    question = f"{draws.pick(ORDER_STARTS).format(row=start)} {'; '.join(moves)};{draws.pick(ORDER_ASKS)}"
    return {"question": question, "answer": "\n".join([*written, f"#### {rows[-1]}"])}


def _order(draws: _Draws) -> tuple[str, list[str]]:
    return "".join(draws.sample("123456789", DIGITS)), draws.sample(tuple(ORDERS), MOVES)


def moved(row: str, move: str) -> str:
    """A row of `DIGITS` digits after a move, one of `ORDERS`."""
    return "".join(row[place] for place in ORDERS[move])


# --- text ---------------------------------------------------------------------------------------------------------


def text_row(seed: int, index: int, part: str) -> Row:
    """``{"instruction", "input", "output"}``: `NOTES` notes; held out, ``output`` lists all right answers."""
    draws = _Draws(seed, index, 1, part)
    notes = _notes(draws)
    while _part_of(" ".join(sorted(map(_note, notes)))) != part:
        notes = _notes(draws)
    answers = [_diary(notes, style) for style in draws.sample(STYLES, len(STYLES))]
    output = answers if part == "heldout" else answers[0]
    return {"instruction": draws.pick(INSTRUCTIONS), "input": "\n".join(map(_note, notes)), "output": output}


def _notes(draws: _Draws) -> list[tuple[str, ...]]:
    """(day, name, verb, object, place, companion) of each note; no word occurs twice in the notes."""
    names = draws.sample(NAMES, 2 * NOTES)
    rest = [draws.sample(kind, NOTES) for kind in (DAYS, tuple(PAST), THINGS, PLACES)]
    return [
        (day, name, *what, with_) for name, with_, day, *what in zip(names[:NOTES], names[NOTES:], *rest, strict=True)
    ]


def _note(note: tuple[str, ...]) -> str:
    day, name, verb, thing, place, companion = note
    return f"{day}, {name}: {verb} {thing}, {place}, {companion}"


def _diary(notes: list[tuple[str, ...]], style: tuple[str, str, str]) -> str:
    joins = [style[0], *[style[1]] * (len(notes) - 2), style[2]]
    return " ".join(
        f"{join}, on {day} {name} {PAST[verb]} the {thing} in the {place} with {companion}."
        for join, (day, name, verb, thing, place, companion) in zip(joins, notes, strict=True)
    )


TASKS: dict[str, Callable[[int, int, str], Row]] = {"arithmetic": arithmetic_row, "text": text_row, "order": order_row}


def as_instruction(task: str, row: Row) -> Row:
    """A row of any task in one layout, with its task as ``category``: rows of several can stand in one file."""
    question = row.get("question") or f"{row['instruction']}\n\n{row['input']}"
    return {"instruction": question, "output": row.get("answer") or row["output"], "category": task}


# --- the pair that was made ---------------------------------------------------------------------------------------
SMALL = "small"
# The number is raised when the files made there change, so that an old cache is not taken for a new one.
FOLDER = "small-pair-2"
NOT_MADE = "the small pair is not in {} yet; make it once with `switchkd make-pair` (less than an hour on 2 cores)"
FILES = (*PARTS, *(f"{task}-{part}" for task in TASKS for part in PARTS))
SIZES, STARTS = ("little", "big"), ("cold", "warm", "near")
STUDENTS = tuple(f"{size}-{start}" for size in SIZES for start in STARTS)
"""The students by size, and by how far each was trained before: hardly, until it knows the tasks, until it is near its teacher."""
DEFAULT_STUDENT = "little-warm"
SMALL_MODELS = (SMALL, *(f"{SMALL}:{student}" for student in STUDENTS))


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


def small_model_folder(name: str, role: str) -> Path:
    """The folder of one of `SMALL_MODELS`; ``small`` alone is the teacher, or the student `DEFAULT_STUDENT`, by its ``role``."""
    if name == SMALL and role == "teacher":
        return small_pair_folder() / "teacher"
    return small_pair_folder() / student_folder(name.partition(":")[2] or DEFAULT_STUDENT)


def student_folder(student: str) -> str:
    """The name of the folder of one of `STUDENTS`."""
    return f"student-{student}"
