"""What people see: numbers, speakers, and text from models that cannot command the terminal."""

import io
import math
import re

import numpy as np
import pytest
from fabricated import metric, run
from rich.console import Console
from tiny import byte_level_tokenizer

from switchkd import Rollout
from switchkd.base import terminal as terminal_module
from switchkd.cli.main import main
from switchkd.decoding.rollouts import DecodeCost
from switchkd.evaluation.results import Evaluation
from switchkd.evaluation.statistics import Estimate, Values, verdict
from switchkd.evaluation.tasks import TASKS
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


def test_long_work_without_a_terminal_says_how_far_it_is_every_half_minute(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(terminal_module, "monotonic", lambda: now[0])

    def work(quiet=False):
        with terminal_module.bar("evaluate", 40, quiet) as bar:
            for seconds in (10, 19, 1, 29, 1):
                now[0] += seconds
                bar.advance(8, f"{seconds} tok/s")

    assert shown(monkeypatch, work) == "evaluate …\nevaluate: 24 of 40 · 1 tok/s\nevaluate: 40 of 40 · 1 tok/s\n"
    assert shown(monkeypatch, lambda: work(quiet=True)) == ""
    assert " of 40 ·" not in shown(monkeypatch, work, terminal=True)


def test_a_bar_of_a_share_moves_by_parts_in_percent(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(terminal_module, "monotonic", lambda: now[0])

    def work():
        with terminal_module.bar("study", 1, share=True) as bar:
            for share in (0.25, 0.2, 0.456):
                now[0] += 31
                bar.reach(share, "about 3 min left")

    lines = [f"study: {share}% · about 3 min left\n" for share in (25, 20, 46)]
    assert shown(monkeypatch, work) == "study …\n" + "".join(lines)
    moving = shown(monkeypatch, work, terminal=True)
    assert "46%" in moving and "about 3 min left" in moving and "/1" not in moving


def test_step_lines():
    data = {"loss": 1.23456, "tokens_per_second": 50.4, "source": "examples"}
    assert report.step_line(data) == "loss 1.235 · 50 tokens/s · examples"
    generated = data | {"source": "policy", "switch/teacher_share": 0.25, "switch/divergence_mean": 0.5}
    assert report.step_line(generated) == "loss 1.235 · 50 tokens/s · teacher 25% · divergence 0.50"
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
        == "10 tokens (60% student, 40% teacher), 5.0 tokens/s; passes through the models per token: student 2.00, teacher 0.500"
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
    assert report.estimate_text(estimate) == "0.000120 [0.000030, 0.000210]"


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((75.0, 55.0, 90.0), "+75.0 [+55.0, +90.0]"),
        ((12345.6, 12345.1, 12346.2), "+12,345.6 [+12,345.1, +12,346.2]"),  # three digits would show no interval
        ((0.00012, 0.00003, 0.00021), "+0.000120 [+0.000030, +0.000210]"),
        ((2.5, 1e-6, 5.0), "+2.50 [+0.000001, +5.00]"),  # an end that is not 0 is not written so
        ((-0.0004, -0.0009, -1e-9), "−0.000400 [−0.000900, −1e-09]"),
        ((0.0, -0.5, 0.5), "0 [−0.500, +0.500]"),
        ((0.0, 0.0, 0.0), "0 [0, 0]"),
    ],
)  # fmt: skip
def test_a_difference_has_as_many_digits_as_its_interval_needs(values, text):
    assert report.difference_text(Estimate(values[0], None, values[1], values[2], 100)) == text


def test_no_verdict_stands_beside_zeros():
    """Whatever the size: an interval that excludes 0 is written so that it does."""
    rng = np.random.default_rng(0)
    for scale in 10.0 ** np.arange(-12, 12):
        low, mean, high = sorted(scale * rng.random(3) + scale * 1e-3)
        for sign in (1, -1):
            ends = sorted((sign * low, sign * high))
            estimate = Estimate(sign * mean, None, *ends, 100)
            assert verdict(estimate, False) != "not distinguishable"
            numbers = re.findall(r"[\d.,]+(?:e[-+]\d+)?", report.difference_text(estimate).replace(", ", " "))
            assert len(numbers) == 3 and all(float(one.replace(",", "")) > 0 for one in numbers)
            assert numbers[1] != numbers[2]


def test_times_are_as_people_say_them():
    assert [terminal_module.duration(s) for s in (0.0123, 2, 59.4, 61, 3600, 8100)] == [
        "0.0123 s", "2.00 s", "59.4 s", "1 min 1 s", "1 h 0 min", "2 h 15 min",
    ]  # fmt: skip


def test_every_score_is_explained_in_words():
    for task in TASKS.values():
        assert report.score_words(task.primary) != task.primary
    for name in ("forward_kl", "perplexity", "length", "eos", "own_forward_kl"):
        assert len(report.score_words(name)) > 10
    assert report.score_words("forward_kl@11-50").endswith(", at tokens 11-50 of the answer")


# A typo in a name


@pytest.mark.parametrize(
    "command",
    [
        ["report", "runs/swich"], ["report", "runs/swich", "--output-file", "out/page.html"],
        ["report", "runs/switch", "runs/swich"],
        ["plot", "runs/swich"], ["plot", "runs/switch", "runs/swich", "--output-dir", "figures"],
        ["compare", "runs/swich"], ["compare", "runs/swich", "--output-dir", "compared"],
        ["evaluate", "runs/swich"], ["check", "runs/swich"], ["generate", "runs/swich"], ["play", "runs/swich"],
        ["train", "runs/swich", "--resume"], ["train", "switch", "--output-dir", "runs/swich", "--resume"],
        ["push", "runs/swich", "my-name/my-student"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_typo_in_a_runs_name_is_an_error_and_makes_nothing(tmp_path, monkeypatch, capsys, command):
    run(tmp_path / "runs" / "switch", [metric(1)])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "none")
    before = sorted(path for path in tmp_path.rglob("*"))
    assert main(command) == 1
    assert sorted(path for path in tmp_path.rglob("*")) == before
    said = capsys.readouterr().err
    assert "runs/swich" in said
    if command[0] in ("report", "plot", "compare"):
        assert "did you mean 'runs/switch'?" in said
