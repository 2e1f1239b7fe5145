"""Generated rows are right by an account of their own, differ, and never stand in both parts."""

import re
from itertools import pairwise

import pytest

from switchkd.errors import ConfigError, DataError
from switchkd.small_data import DAYS, PARTS, PAST, STYLES, TASKS, arithmetic_row, small_data_file, text_row

ROWS = 400


def numbers_of(row):
    return [int(number) for number in re.findall(r"\d+", row["question"])]


def notes_of(row):
    return [re.fullmatch(r"(\w+) (\w+), (\w+): (\w+) (\w+)", line).groups() for line in row["input"].splitlines()]


def problem(row):
    return tuple(sorted(numbers_of(row) if "question" in row else notes_of(row)))


@pytest.mark.parametrize("part", PARTS)
def test_every_written_step_of_a_sum_is_right(part):
    for index in range(ROWS):
        row = arithmetic_row(7, index, part)
        numbers, lines = numbers_of(row), row["answer"].splitlines()
        assert len(numbers) == 3
        carry, written = 0, ""
        for place, line in enumerate(lines[:-1]):
            sums = [(eval(left), int(right)) for left, right in re.findall(r"([\d+]+)=(\d+)", line)]
            assert sums and all(left == right for left, right in sums), line
            read = [int(n) for n in re.findall(r"\d+", line.split(": ")[1].split("=")[0])]  # addends of the first sum
            read += [int(n) for n in re.findall(r"\d\+(\d)=", line)][1:] if len(sums) > 1 else []
            digits = [int(str(number)[-1 - place]) for number in numbers]
            assert sorted(read) == sorted([*digits, carry] if carry else digits), line
            if place < 2:
                kept = re.fullmatch(r".*=\d+, (?:write|put|keep) (\d)(?:(?:, | and )carry (\d))?\.", line)
                assert int(kept[1]) + 10 * int(kept[2] or 0) == sums[-1][1], line
                carry, written = int(kept[2] or 0), kept[1] + written
        assert [line.split(":")[0] for line in lines[:-1]] == ["Ones", "Tens", "Hundreds"]
        assert lines[-1] == f"#### {sums[-1][1]}{written}" == f"#### {sum(numbers)}"


def test_a_diary_has_every_note_in_order_in_one_style_in_the_past_tense():
    for index in range(ROWS):
        row = text_row(7, index, "heldout")
        notes = sorted(notes_of(row), key=lambda note: DAYS.index(note[0]))
        assert len(notes) == len({note[0] for note in notes}) in (5, 6)
        for answer in row["output"]:
            told = re.findall(r"([\w ]+), on (\w+) (\w+) (\w+) the (\w+) in the (\w+)\.(?: |$)", answer)
            assert [(d, n, pl, v, th) for _, d, n, v, th, pl in told] == [
                (day, name, place, PAST[verb], thing) for day, name, place, verb, thing in notes
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
