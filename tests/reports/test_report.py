"""What people see: numbers, speakers, and text from models that cannot command the terminal."""

import io
import math

import numpy as np
import pytest
from rich.console import Console
from tiny import byte_level_tokenizer

from switchkd import Rollout
from switchkd.base import terminal as terminal_module
from switchkd.decoding.rollouts import DecodeCost
from switchkd.evaluation.results import Evaluation
from switchkd.evaluation.statistics import Estimate, Values
from switchkd.reports import live
from switchkd.reports import tables as report


def shown(monkeypatch, show, terminal=False, width=120):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=width, emoji=False, markup=False, highlight=False)
    for module in (report, live, terminal_module):
        monkeypatch.setattr(module, "console", console)
    show()
    return out.getvalue()


def rollout(text, teacher_from):
    ids = byte_level_tokenizer().encode(text, add_special_tokens=False)
    speakers = [int(t >= teacher_from) for t in range(len(ids))]
    return Rollout(3, [1], ids, speakers, [math.nan] * len(ids), [math.nan] * len(ids), "length")


def test_the_teachers_words_are_bracketed_without_a_terminal_and_coloured_with_one(monkeypatch):
    row, tokenizer = rollout("zzyyy", 2), byte_level_tokenizer()
    plain = shown(monkeypatch, lambda: live.print_rollout(row, tokenizer))
    assert plain == "#3 (length) zz⟦yyy⟧\n"
    coloured = shown(monkeypatch, lambda: live.print_rollout(row, tokenizer), terminal=True)
    assert "⟦" not in coloured and "\x1b[1;35myyy" in coloured


def test_escape_sequences_and_markup_from_a_model_are_shown_as_text(monkeypatch):
    row, tokenizer = rollout("\x1b[2J[red]:train:", 99), byte_level_tokenizer()
    plain = shown(monkeypatch, lambda: live.print_rollout(row, tokenizer))
    assert "\x1b" not in plain and "␛[2J[red]:train:" in plain


def test_a_failed_row_says_why(monkeypatch):
    row = Rollout(0, [], [], [], [], [], "empty_prompt", "sample 0 has an empty prompt")
    assert "empty prompt" in shown(monkeypatch, lambda: live.print_rollout(row, byte_level_tokenizer()))


def test_bars_move_on_a_terminal_and_speak_in_lines_elsewhere_unless_told_to_be_quiet(monkeypatch):
    def work(quiet=False):
        with terminal_module.bar("train", 2, quiet) as bar:
            for step in (1, 2):
                bar.advance(1, f"loss {step}")
                bar.line(f"step {step}")

    assert shown(monkeypatch, work) == "train …\nstep 1\nstep 2\n"
    moving = shown(monkeypatch, work, terminal=True)
    assert "2/2" in moving and "loss 2" in moving and "step 1" not in moving
    assert shown(monkeypatch, lambda: work(quiet=True), terminal=True) == ""


def test_step_lines():
    data = {"loss": 1.23456, "tokens_per_second": 50.4, "source": "examples"}
    assert report.step_line(data) == "loss 1.235 · 50 tok/s · examples"
    generated = data | {"source": "policy", "switch/teacher_share": 0.25, "switch/divergence_mean": 0.5}
    assert report.step_line(generated) == "loss 1.235 · 50 tok/s · teacher 25% · divergence 0.50"
    assert report.step_line(generated | {"switch/divergence_mean": None}).endswith("teacher 25%")


def evaluation(examples=40, seeds=2, groups=(), own=False):
    rng = np.random.default_rng(0)
    values = {name: Values(rng.random((seeds, examples)) * 100) for name in ("strict", "rouge_l")}
    values["perplexity"] = Values(np.full((1, examples), math.log(81234.0)))
    values["forward_kl@51+"] = Values(np.zeros((1, examples)), np.zeros(examples))
    if own:
        values |= {
            "own_forward_kl": Values(values["rouge_l"].values * -1),
            "length": Values(np.full((seeds, examples), 7.0)),
        }
    return Evaluation(values, "strict", groups or [""] * examples)


def test_scores_are_shown_with_deviation_interval_and_settings(monkeypatch):
    results = {"teacher": evaluation(), "student": evaluation(own=True)}
    results["teacher"].scores.update(results["student"].scores)
    out = shown(monkeypatch, lambda: report.print_results(results, {"template": "chat", "seeds": [1, 2]}), width=200)
    assert "40 held-out examples" in out and "†" not in out and "settings: template chat; seeds [1, 2]" in out
    [strict] = [line for line in out.splitlines() if " strict " in line]
    found = results["student"].summary["strict"]
    assert f"{report.number(found.mean)} ± {report.number(found.std)} [{report.number(found.low)}, " in strict
    assert out.index(" strict ") < out.index(" rouge_l ") and "81,234 [81,234, 81,234]" in out
    [empty] = [line for line in out.splitlines() if "forward_kl@51+" in line]
    assert " - " in empty
    assert "correlation of ROUGE-L with the divergence on its own text, 1-10 tokens: -1.00 (over 80 completions)" in out


def test_scores_over_few_examples_carry_a_mark_and_groups_are_shown(monkeypatch):
    results = {"student": evaluation(groups=["adding"] * 35 + ["taking away"] * 5)}
    out = shown(monkeypatch, lambda: report.print_results(results, {}))
    assert "strict by group" in out and "† over fewer than 30 examples" in out
    marked = {line.split("  ")[0].strip("│ ") for line in out.splitlines() if "†" in line and "over" not in line}
    assert "taking away" in str(marked) and "adding" not in str(marked)


def test_scores_of_a_step():
    metrics = {"eval/strict": 12.5, "eval/forward_kl": 1.5, "eval/perplexity": None, "eval/eos": 3.0}
    assert report.scores_line(metrics, "strict") == f"strict 12.5 · forward_kl {report.number(1.5)}"
    assert report.scores_line({"loss": 1.0}, "strict") == ""


def test_costs():
    cost = DecodeCost(seconds=2.0, kept_tokens=10, teacher_tokens=4, student_forwards=20, teacher_forwards=5)
    line = live.cost_line(cost)
    assert (
        line
        == "10 tokens (60% student, 40% teacher), 5.0 tokens/s; forwards per kept token: student 2.00, teacher 0.500"
    )
    assert (cost + cost).kept_tokens == 20


NUMBERS = {
    0.0: "0", 3.1e-9: "3.10e-09", 0.0000312: "0.0000312", 0.00012: "0.000120", 0.0123: "0.0123", 0.9996: "1.00",
    9.996: "10.0", 12.34: "12.3", 123.4: "123", 1234.5: "1,234", 1e16: "1.00e+16", math.inf: "inf",
}  # fmt: skip


@pytest.mark.parametrize("value", NUMBERS)
def test_numbers_have_three_significant_digits_however_small(value):
    assert report.number(value) == NUMBERS[value]
    if value:
        assert report.number(-value) == f"-{NUMBERS[value]}" and report.number(math.nan) == "-"


@pytest.mark.parametrize(
    ("share", "text"), [(0, "0%"), (0.25, "25%"), (1, "100%"), (0.003, "0.30%"), (0.9996, "99.96%")]
)
def test_a_share_that_is_not_none_or_all_does_not_look_so(share, text):
    assert report.percent(share) == text


def test_an_interval_near_zero_shows_on_which_side_it_is():
    estimate = Estimate(0.00012, None, 0.00003, 0.00021, 100)
    assert report.estimate_text(estimate) == "0.000120 [0.0000300, 0.000210]"
