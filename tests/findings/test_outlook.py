"""What further seeds would be worth: widths counted by hand, and against what further seeds did bring."""

import math

import numpy as np
import pytest
from half_study import begin, finish, grid_of, step

from switchkd.base.errors import DataError
from switchkd.evaluation.statistics import Values, difference
from switchkd.findings.outlook import main_score, outlook, outlook_markdown, outlook_sheet, outlook_words, outlooks_of
from switchkd.studies.progress import Folder


def runs(*by_seed):
    """A method's runs: the value of every row by seed."""
    return {seed: Values(np.array([values], dtype=float)) for seed, values in enumerate(by_seed)}


ZERO = runs(*[[0] * 40] * 3)


def test_where_rows_do_not_differ_the_width_is_students_t_times_the_spread():
    """Differences of 1, 2 and 3 points spread by 1: t(3) / 2, t(4) / sqrt(5), … of the tables."""
    found = outlook("a", "b", "strict", runs([1] * 40, [2] * 40, [3] * 40), ZERO, 60.0)
    assert found.difference.mean == pytest.approx(2) and found.difference.std == pytest.approx(1) and found.rows == 0
    t = {1: 3.182, 2: 2.776, 3: 2.571, 4: 2.447, 5: 2.365}
    assert found.expected == {k: pytest.approx(t[k] / math.sqrt(3 + k), rel=1e-3) for k in t}
    assert found.now == pytest.approx(2.69, abs=0.01)  # the interval that the tables show


def test_the_rows_part_stays_whatever_the_number_of_seeds():
    """Half of 100 rows differ by 10 in every run: 1.96 · 5 / sqrt(100)."""
    found = outlook("a", "b", "strict", runs(*[[0, 10] * 50] * 2), runs(*[[0] * 100] * 2))
    assert found.rows == pytest.approx(0.98, rel=0.05) and found.now == pytest.approx(found.rows)
    assert set(found.expected.values()) == {found.rows}
    assert outlook_words(found).endswith("More seeds would hardly narrow that: ±1.0 is of the held-out rows alone.")


def test_both_parts_are_added_as_squares():
    ours = runs(*[np.tile([shift, 10 + shift], 50) for shift in (-1, 0, 1)])
    found = outlook("a", "b", "strict", ours, runs(*[[0] * 100] * 3))
    assert found.rows == pytest.approx(0.98, rel=0.05)
    assert found.expected[1] == pytest.approx(math.hypot(found.rows, 3.182 / 2), rel=1e-3)


def test_rows_are_paired():
    """What both find hard moves no difference."""
    rows = np.arange(100.0)
    found = outlook("a", "b", "strict", runs(rows + 1, rows + 1), runs(rows, rows))
    assert found.rows == pytest.approx(0, abs=1e-9)


def test_now_is_the_interval_of_the_comparison_over_the_seeds_that_both_have():
    rng = np.random.default_rng(0)
    ours, theirs = (runs(*rng.normal(50, 10, (count, 60))) for count in (4, 3))
    found = outlook("a", "b", "strict", ours, theirs)
    estimate = difference("strict", {s: ours[s] for s in range(3)}, theirs)
    assert found.seeds == (0, 1, 2) and found.difference == estimate
    assert found.now == (estimate.high - estimate.low) / 2
    with pytest.raises(DataError, match="cannot be paired"):
        outlook("a", "b", "strict", ours, runs([1.0] * 9, [1.0] * 9))


def test_what_was_expected_of_more_seeds_came_about():
    """From three seeds to eight, in the mean over forty studies with both parts."""
    expected, came = [], []
    for study in range(40):
        rng = np.random.default_rng(study)
        hard, shifts = rng.normal(0, 8, 64), rng.normal(0, 2, 8)
        ours = runs(*(hard + shift + rng.normal(0, 4, 64) for shift in shifts))
        theirs = runs(*[np.zeros(64)] * 8)
        expected.append(outlook("a", "b", "strict", {s: ours[s] for s in range(3)}, theirs).expected[5])
        whole = difference("strict", ours, theirs)
        came.append((whole.high - whole.low) / 2)
    assert np.mean(expected) == pytest.approx(np.mean(came), rel=0.1)


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_is_said_with_fewer_than_two_seeds(count):
    found = outlook("a", "b", "strict", {s: v for s, v in ZERO.items() if s < count}, ZERO, 60.0)
    assert found.difference is None and math.isnan(found.now)
    assert f"with {count} seed" in outlook_words(found) and "nothing can be said" in outlook_words(found)
    assert outlook_sheet([found]).rows == [["a", str(count), *["–"] * 8, "about 1 min"]]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            (1, 2, 3),
            "a against b: +2.0 ±2.7 points after 3 seeds, not told apart. 1 more seed (about 10 min) would narrow ±2.7 to about "
            "±1.6 points, enough to tell the difference if it stays as it is.",
        ),
        (
            (-1, 0.1, 1),
            "a against b: +0.03 ±2.7 points after 3 seeds, not told apart. 5 more seeds (about 50 min) would narrow ±2.7 to "
            "about ±0.8 points, not enough to tell so small a difference.",
        ),
        (
            (9, 10, 11),
            "a against b: +10.0 ±2.7 points after 3 seeds, told apart from no difference already. 2 more seeds (about 20 min) "
            "would narrow ±2.7 to about ±1.2 points.",
        ),
    ],
)
def test_it_is_said_in_words(values, words):
    found = outlook("a", "b", "strict", runs(*[[v] * 40 for v in values]), ZERO, 600.0)
    assert outlook_words(found) == words


def test_a_difference_that_the_rows_hide_is_said_to_be_hidden_by_them():
    ours = runs(*[np.tile([shift - 5, 5 + shift], 50) for shift in (-1, 0.1, 1)])
    assert outlook_words(outlook("a", "b", "forward_kl", ours, runs(*[[0] * 100] * 3))).endswith(
        "nats per token, not enough to tell so small a difference; ±1.0 is of the held-out rows alone."
    )


def test_a_studys_outlook_is_read_from_its_folder(tmp_path):
    plan, size, grid = grid_of(tmp_path, ("kd", "switch", "gkd"), (0, 1, 2))
    assert outlooks_of(plan, Folder(grid, size, tmp_path).look().cells) == [] and outlook_markdown([]) == ""
    for cell in grid:
        if cell.name == "gkd-seed0" or (cell.method != "gkd" and cell.config.seed < 2):
            begin(tmp_path / cell.name, step(1, 1.0, 300.0, 1000))
            finish(tmp_path / cell.name, [50.0 + cell.config.seed * (cell.method == "switch")] * 40)
    cells = Folder(grid, size, tmp_path).look().cells
    switch, gkd = found = outlooks_of(plan, cells)
    assert (switch.method, switch.baseline, switch.score, switch.seeds) == ("switch", "kd", "strict", (0, 1))
    assert switch.difference.mean == 0.5 and switch.seconds == pytest.approx(600, abs=5) and gkd.difference is None
    text = outlook_markdown(found)
    assert text.startswith("## What the next seeds would be worth\n\n- switch against kd: +0.5")
    assert "\n\nstrict, each method less kd (in points):\n\n| method | seeds |" in text
    assert "\n| switch | 2 | +0.5 |" in text and "\n| gkd | 1 | – |" in text and "- gkd against kd: with 1 seed" in text


def test_the_main_score_is_the_plans_or_the_tasks(tmp_path):
    plan, size, grid = grid_of(tmp_path)
    begin(tmp_path / "kd-seed0")
    assert main_score(plan, Folder(grid, size, tmp_path).look().cells) == ""
    finish(tmp_path / "kd-seed0")
    cells = Folder(grid, size, tmp_path).look().cells
    assert main_score(plan, cells) == "strict"
    assert main_score(type(plan)(scores=("flexible",)), cells) == "flexible"
