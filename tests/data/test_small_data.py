"""Generated rows are right by an account of their own, differ, and never stand in both parts."""

import re
from itertools import pairwise

import pytest

from switchkd.base.errors import ConfigError, DataError
from switchkd.data.small_data import (
    DIGITS,
    MOVES,
    NOTES,
    PARTS,
    PAST,
    STEPS,
    STYLES,
    TASKS,
    arithmetic_row,
    as_instruction,
    order_row,
    small_data_file,
    text_row,
)

ROWS = 400


def notes_of(row):
    return [
        re.fullmatch(r"(\w+), (\w+): (\w+) (\w+), (\w+), (\w+)", line).groups() for line in row["input"].splitlines()
    ]


def problem(row):
    if "question" not in row:
        return tuple(sorted(notes_of(row)))
    return tuple(running(row["question"]) if re.search("has|starts", row["question"]) else said(row))


def said(row):
    """The row of digits that a question begins with, and the moves that it asks for."""
    start, moves = re.fullmatch(r".* (\d+): (.*); [^;]+\?", row["question"]).groups()
    return [start, *moves.split("; ")]


def running(question):
    """The totals that a question's sentences lead to."""
    start, *changes = re.split("[:;]", question)[:-1]
    totals = [int(re.search(r"\d+", start)[0])]
    for change in changes:
        gain = any(word in change for word in ("buys", "finds", "gets"))
        assert gain or any(word in change for word in ("sells", "loses", "gives")), change
        totals.append(totals[-1] + (1 if gain else -1) * int(re.search(r"\d+", change)[0]))
    return totals


STEP = re.compile(r"(\d+)(\+|-| plus | minus | and | less )(\d+)(?:=| is | make | leaves )(\d+)\.")


@pytest.mark.parametrize("part", PARTS)
def test_every_written_step_of_a_total_is_right(part):
    wordings = set()
    for index in range(ROWS):
        row = arithmetic_row(7, index, part)
        totals, (*lines, last) = running(row["question"]), row["answer"].splitlines()
        assert len(lines) == STEPS == len(totals) - 1 and all(10 <= total <= 99 for total in totals)
        for before, after, line in zip(totals, totals[1:], lines, strict=False):
            a, sign, b, c = STEP.fullmatch(line).groups()
            a, b, c, gain = int(a), int(b), int(c), sign.strip() in ("+", "plus", "and")
            assert (a, c) == (before, after) and a + (b if gain else -b) == c, line
            wordings.add(re.sub(r"\d+", "N", line))
        assert last == f"#### {totals[-1]}"
    assert len(wordings) == 6


PLACES = {"first": 0, "second": 1, "third": 2, "fourth": 3, "fifth": 4, "sixth": 5}


def after(row, move):
    """The row of digits after a move, by what its words say."""
    match move.split():
        case ["swap", a, "and", b]:
            order = list(range(DIGITS))
            order[PLACES[a]], order[PLACES[b]] = PLACES[b], PLACES[a]
            return "".join(row[place] for place in order)
        case ["turn", "around"]:
            return "".join(reversed(row))
        case ["first", *_]:
            return row[1:] + row[0]
        case ["last", *_]:
            return row[-1] + row[:-1]


@pytest.mark.parametrize("part", PARTS)
def test_every_written_row_of_digits_follows_from_the_one_before(part):
    wordings, kinds = set(), set()
    for index in range(ROWS):
        row = order_row(7, index, part)
        (standing, *moves), (*lines, last) = said(row), row["answer"].splitlines()
        assert len(set(moves)) == len(lines) == MOVES and len(set(standing)) == DIGITS and "0" not in standing
        for move, line in zip(moves, lines, strict=True):
            standing = after(standing, move)
            assert re.sub(r"^after | gives|:", "", line) == f"{move} {standing}."
            wordings.add(line.replace(move, "M").replace(standing, "R"))
        kinds |= set(moves)
        assert last == f"#### {standing}"
    assert len(wordings) == 3 and len(kinds) == 18


def test_rows_of_all_tasks_have_one_layout():
    for task, make in TASKS.items():
        row = make(7, 0, "heldout")
        together = as_instruction(task, row)
        assert together["category"] == task and together["output"] == row.get("answer", row.get("output"))
        assert together["instruction"].splitlines()[-1] == (row.get("question") or row["input"].splitlines()[-1])


def test_a_diary_has_every_note_in_order_in_one_style_in_the_past_tense():
    for index in range(ROWS):
        row = text_row(7, index, "heldout")
        notes = notes_of(row)
        assert len(notes) == len({note[0] for note in notes}) == NOTES
        for answer in row["output"]:
            told = re.findall(r"([\w ]+), on (\w+) (\w+) (\w+) the (\w+) in the (\w+) with (\w+)\.(?: |$)", answer)
            assert [tuple(words) for _, *words in told] == [
                (day, name, PAST[verb], *rest) for day, name, verb, *rest in notes
            ]
            first, *middle, last = [join for join, *_ in told]
            assert len(set(middle)) == 1 and (first, middle[0], last) in STYLES
        assert len(set(row["output"])) == len(STYLES)


def test_the_training_answer_is_one_of_the_right_ones_and_each_style_occurs():
    firsts = {text_row(7, index, "train")["output"].split(",")[0] for index in range(100)}
    assert firsts == {first for first, _, _ in STYLES}


@pytest.mark.parametrize("task", TASKS)
def test_no_problem_is_in_both_parts_in_any_seed(task):
    parts = [{problem(TASKS[task](seed, index, part)) for seed in (0, 1) for index in range(ROWS)} for part in PARTS]
    assert not parts[0] & parts[1]
    assert all(len(part) > 1.98 * ROWS for part in parts)  # and hardly one occurs twice


@pytest.mark.parametrize("task", TASKS)
def test_a_row_is_a_function_of_seed_index_and_part(task):
    make = TASKS[task]
    assert make(3, 5, "train") == make(3, 5, "train")
    rows = [make(3, 5, "train"), make(3, 6, "train"), make(4, 5, "train"), make(3, 5, "heldout")]
    assert all(problem(one) != problem(other) for one, other in pairwise(rows))


def test_unusable_keys_and_names_are_errors():
    with pytest.raises(ConfigError, match="part='test'"):
        arithmetic_row(0, 0, "test")
    with pytest.raises(ConfigError, match="index=-1"):
        text_row(0, -1, "train")
    with pytest.raises(DataError, match="did you mean 'text-heldout'"):
        small_data_file("text-heldou")
