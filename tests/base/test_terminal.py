"""What reaches a terminal commands nothing there, and a terminal that is gone ends nothing."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import yaml
from fabricated import metric, run
from rich.live import Live
from rich.table import Table
from rich.text import Text
from tiny import pair_on_disk

from switchkd.base import signals, terminal
from switchkd.base.settings import to_dict
from switchkd.base.terminal import Terminal, harmless
from switchkd.cli import main as cli
from switchkd.cli.main import main
from switchkd.reports import live
from switchkd.runs.distil import distil
from switchkd.training.settings import TrainConfig

ROOT = Path(__file__).parents[2]
HOSTILE = "a\x1b[2J\x9b31m[red]\x07\rb\u202ec\u2066d"


def commands(text):
    """The characters of ``text`` that a terminal obeys, but for newline and tab."""
    return {c for c in text if unicodedata.category(c) == "Cc" and c not in "\n\t"} | {
        c for c in text if c in "\u202e\u2066"
    }


# --- text of others -----------------------------------------------------------------------------------------------


def table(text):
    made = Table(text, title=text, caption=text)
    made.add_row(text)
    return made


@pytest.mark.parametrize("shown", [str, Text, table, lambda text: Live(Text(text)).get_renderable()])
def test_text_of_others_commands_no_terminal_in_whatever_it_stands(shown):
    out = io.StringIO()
    Terminal(file=out, width=200, color_system=None).print(shown(HOSTILE))
    assert (
        not commands(out.getvalue()) and "␛[2J\\x9b31m[red]" in out.getvalue() and "\\u202ec\\u2066d" in out.getvalue()
    )


def test_what_moves_on_a_terminal_still_commands_it():
    out = io.StringIO()
    with Live(Text(HOSTILE), console=Terminal(file=out, width=60, force_terminal=True), auto_refresh=False) as view:
        view.update(Text("next"), refresh=True)
    assert "\x1b[2K" in out.getvalue() and "\x1b[2J" not in out.getvalue() and "\u202e" not in out.getvalue()


def hostile_plan(folder):
    plan = {"title": HOSTILE, "methods": {"kd": "kd"}, "sizes": {"small": {}}}
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan))
    return ["study", str(folder / "plan.yaml"), "--dry-run"]


def hostile_method(folder):
    (folder / "plan.yaml").write_text(yaml.safe_dump({"methods": {HOSTILE: "kd"}, "sizes": {"small": {}}}))
    return ["study", str(folder / "plan.yaml")]


def hostile_row(folder):
    (folder / "data.jsonl").write_text(json.dumps({HOSTILE: "x"}) + "\n")
    (folder / "pair").mkdir()
    pair_on_disk(folder / "pair")
    names = {
        "teacher": folder / "pair" / "teacher",
        "student": folder / "pair" / "student",
        "train-file": folder / "data.jsonl",
    }
    return ["check", "kd", "--eval-samples", "0", *(part for n, v in names.items() for part in (f"--{n}", str(v)))]


def hostile_run(folder):
    return ["report", str(run(folder / HOSTILE, [metric(1)]))]


def hostile_setting(folder):
    made = run(folder / "run", [metric(1)])
    (made / "config.yaml").write_text(json.dumps({HOSTILE: 1}))
    return ["train", str(made)]


def hostile_scores(folder):
    made = run(folder / "run", [metric(1)], scores={HOSTILE: [1.0], "student": [1.0]})
    record = json.loads((made / "evaluation.json").read_text())
    record["task"] |= {"name": HOSTILE, "version": 1}
    record["data"] |= {"file": HOSTILE, "sha256": HOSTILE}
    record["settings"] = {HOSTILE: HOSTILE}
    for result in record["results"].values():
        result["model"] = {"sha256": HOSTILE}
    (made / "evaluation.json").write_text(json.dumps(record))
    return ["compare", str(made)]


def hostile_figures(folder):
    return ["plot", hostile_run(folder)[1], "--output-dir", str(folder / "figures")]


@pytest.mark.parametrize(
    "arguments",
    [
        hostile_plan, hostile_method, hostile_row, hostile_run, hostile_setting, hostile_scores, hostile_figures,
        lambda _: [HOSTILE], lambda _: ["train", HOSTILE], lambda _: ["compare", HOSTILE],
    ],
)  # fmt: skip
def test_no_name_or_message_reaches_the_terminal_raw(arguments, tmp_path, capsys):
    given = arguments(tmp_path)
    capsys.readouterr()  # the progress of what made the files
    main(given)
    said = "".join(capsys.readouterr())
    assert "␛[2J" in said or "\\x1b[2J" in said  # it was said, as text or as Python writes it
    assert not commands(said)


def test_a_warning_of_others_commands_no_terminal():
    assert not commands(cli._warning(HOSTILE, UserWarning, "file", 1))


# --- a terminal that is gone --------------------------------------------------------------------------------------


class Gone(io.StringIO):
    """A stdout that fails as ``error`` says."""

    encoding = "utf-8"

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


FAILURES = [
    BrokenPipeError(32, "Broken pipe"),
    OSError(28, "No space left on device"),
    OSError(5, "Input/output error"),
]


@pytest.mark.parametrize("error", [*FAILURES, ValueError("I/O operation on closed file")])
def test_a_stdout_that_cannot_be_written_is_told_of_once_and_raises_nothing(error, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Gone(error))
    console = Terminal()
    for _ in range(3):
        console.print("a step")
    assert capsys.readouterr().err == (
        f"warning: stdout cannot be written ({error}): what does not fit is not shown, and the work goes on\n"
    )
    assert console.lost is error


def test_no_stdout_and_no_stderr_at_all(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    Terminal().print("a step")
    terminal.complain("a word")
    terminal.leave()
    signals._say("a word")


def test_an_encoding_without_a_character_has_it_spelt_out(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    console = Terminal(width=20)
    console.print("loss 1 · 好")
    console.print(Table("a"))
    assert stream.buffer.getvalue().startswith(b"loss 1 \\xb7 \\u597d\n+")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A run of a second."""
    return TrainConfig(
        **pair_on_disk(tmp_path_factory.mktemp("pair")), template="none", max_new_tokens=4, max_steps=2, sample_steps=0,
        per_device_train_batch_size=2, eval_samples=1, eval_max_new_tokens=2, eval_on_start=False,
    )  # fmt: skip


def test_a_run_whose_reader_has_left_comes_to_its_end(settings, tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(to_dict(settings)))
    monkeypatch.setattr(sys, "stdout", Gone(FAILURES[0]))
    assert main(["train", str(recipe), "--output-dir", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "student" / "README.md").is_file()
    assert capsys.readouterr().err.count("warning: stdout cannot be written") == 1


@pytest.mark.parametrize(("error", "code"), [(FAILURES[0], 141), (FAILURES[1], 1)])
def test_a_command_that_only_shows_ends_as_others_do(error, code, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Gone(error))
    assert main(["methods"]) == code and main([]) == 2
    said = capsys.readouterr().err
    assert said == ("" if code == 141 else f"error: stdout cannot be written: {error}\n")


def test_a_reader_that_leaves_hears_no_complaint_at_the_interpreters_end():
    """Python flushes once more when it ends, and would say that this failed."""
    read, write = os.pipe()
    os.close(read)
    command, buffered = [sys.executable, "-m", "switchkd.cli", "--help"], os.environ | {"PYTHONUNBUFFERED": ""}
    done = subprocess.run(command, cwd=ROOT, env=buffered, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_closed_stderr_is_not_the_next_file_that_is_opened(tmp_path):
    code = (
        "import os, sys; os.close(2); sys.stderr = None\n"
        "from switchkd.base.terminal import open_standard_streams; open_standard_streams()\n"
        f"sys.exit(open({str(tmp_path / 'weights')!r}, 'w').fileno())"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode > 2


def test_a_view_that_fails_is_told_of_once_and_the_run_goes_on(settings, tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise ZeroDivisionError("no seconds")

    monkeypatch.setattr(live.TrainLines, "on_step", broken)
    distil(dataclasses.replace(settings, output_dir=str(tmp_path / "run")))
    assert capsys.readouterr().err.count("warning: the lines of a run failed (ZeroDivisionError: no seconds)") == 1
    assert (tmp_path / "run" / "student" / "README.md").is_file()


def test_a_signal_passes_through_what_is_harmless():
    def stopped():
        raise signals.Stopped(signal.SIGTERM)

    with pytest.raises(signals.Stopped):
        harmless("the view", stopped)()
