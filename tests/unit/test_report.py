"""What people see: numbers, speakers, and text from models that cannot command the terminal."""

import io
import math

import pytest
from rich.console import Console
from tiny import byte_level_tokenizer

from switchkd import Rollout, report
from switchkd.evaluation import Scores
from switchkd.rollouts import DecodeCost


def shown(monkeypatch, show, terminal=False):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120, emoji=False, markup=False, highlight=False)
    monkeypatch.setattr(report, "console", console)
    show()
    return out.getvalue()


def rollout(text, teacher_from):
    ids = byte_level_tokenizer().encode(text, add_special_tokens=False)
    speakers = [int(t >= teacher_from) for t in range(len(ids))]
    return Rollout(3, [1], ids, speakers, [math.nan] * len(ids), "length")


def test_the_teachers_words_are_bracketed_without_a_terminal_and_coloured_with_one(monkeypatch):
    row, tokenizer = rollout("zzyyy", 2), byte_level_tokenizer()
    plain = shown(monkeypatch, lambda: report.print_rollout(row, tokenizer))
    assert plain == "#3 (length) zz⟦yyy⟧\n"
    coloured = shown(monkeypatch, lambda: report.print_rollout(row, tokenizer), terminal=True)
    assert "⟦" not in coloured and "\x1b[1;35myyy" in coloured


def test_escape_sequences_and_markup_from_a_model_are_shown_as_text(monkeypatch):
    row, tokenizer = rollout("\x1b[2J[red]:train:", 99), byte_level_tokenizer()
    plain = shown(monkeypatch, lambda: report.print_rollout(row, tokenizer))
    assert "\x1b" not in plain and "␛[2J[red]:train:" in plain


def test_a_failed_row_says_why(monkeypatch):
    row = Rollout(0, [], [], [], [], "empty_prompt", "sample 0 has an empty prompt")
    assert "empty prompt" in shown(monkeypatch, lambda: report.print_rollout(row, byte_level_tokenizer()))


def test_bars_move_on_a_terminal_and_speak_in_lines_elsewhere(monkeypatch):
    def work():
        with report.bar("train", 2) as bar:
            for step in (1, 2):
                bar.advance(1, f"loss {step}")
                bar.line(f"step {step}")

    assert shown(monkeypatch, work) == "train …\nstep 1\nstep 2\n"
    terminal = shown(monkeypatch, work, terminal=True)
    assert "2/2" in terminal and "loss 2" in terminal and "step 1" not in terminal


def test_step_lines():
    data = {"loss": 1.23456, "tokens_per_second": 50.4, "source": "examples"}
    assert report.step_line(data) == "loss 1.235 · 50 tok/s · examples"
    generated = data | {"source": "policy", "switch/teacher_share": 0.25, "switch/divergence_mean": 0.5}
    assert report.step_line(generated) == "loss 1.235 · 50 tok/s · teacher 25% · divergence 0.50"
    assert report.step_line(generated | {"switch/divergence_mean": None}).endswith("teacher 25%")


def test_tables_and_costs(monkeypatch):
    scores = {"teacher": Scores(0.0, 4.0, 26.0, 32, 900), "student": Scores(3.1, 81234.0, math.nan, 32, 900)}
    table = shown(monkeypatch, lambda: report.console.print(report.score_table(scores)))
    assert "32 held-out examples, 900 reference tokens" in table and "81,234" in table and " - " in table
    cost = DecodeCost(seconds=2.0, kept_tokens=10, teacher_tokens=4, student_forwards=20, teacher_forwards=5)
    line = report.cost_line(cost)
    assert (
        line
        == "10 tokens (60% student, 40% teacher), 5.0 tokens/s; forwards per kept token: student 2.00, teacher 0.50"
    )
    assert (cost + cost).kept_tokens == 20


@pytest.mark.parametrize("value,text", [(0.0123, "0.012"), (12.34, "12.3"), (1234.5, "1,234"), (math.inf, "inf")])
def test_numbers(value, text):
    assert report.number(value) == text
