"""A run that somebody else sent is looked at: nothing of it runs, nobody is asked, and nothing is made."""

import json
import socket

import pytest
import yaml
from fabricated import metric, rollout, run, sample
from huggingface_hub import constants

from switchkd.base import plain
from switchkd.cli.main import main
from switchkd.reports.page import page
from switchkd.reports.record import RunRecord
from switchkd.reports.viewer import MOST_TOKENS, payload


def changed(folder, **settings):
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | settings))
    return folder


@pytest.mark.parametrize("noun", ["policy", "objective", "mix"])
@pytest.mark.parametrize("command", ["report", "plot"])
def test_a_rule_from_elsewhere_is_named_and_not_imported(tmp_path, monkeypatch, noun, command, capsys):
    folder = run(tmp_path / "run", [metric(1, **{"switch/teacher_share": 0.5})], [sample(1, "yes")])
    changed(folder, **{noun: {"name": "evil:Rule", "strength": 3}})
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    monkeypatch.chdir(folder)
    assert main([command, "."]) == 0
    assert not (tmp_path / "canary").exists()
    if command == "report":
        assert "evil:Rule (strength=3)" in (folder / "report.html").read_text()


@pytest.mark.parametrize("teacher", ["org/model", "demo", "small", "qwen-coder"])
def test_no_hub_is_asked_for_a_tokenizer_and_no_pair_is_made(tmp_path, monkeypatch, teacher):
    folder = changed(run(tmp_path / "run", [metric(1)], [sample(1, "yes")]), teacher_model_name_or_path=teacher)

    calls = []

    def asked(*arguments, **__):
        calls.append(arguments)
        raise OSError("no network")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", asked)
    monkeypatch.setattr(socket, "getaddrinfo", asked)
    monkeypatch.setattr("switchkd.models.pypi_pairs.pair_paths", asked)
    shown = payload(RunRecord.read(folder), "a", 10**6)
    assert "Token ids stand in place of words" in shown["notes"][0] and not calls


def test_no_more_looks_are_held_than_can_be_shown(tmp_path, monkeypatch):
    """Of many steps those that are shown, and of one step with too much text the prompts that there is room for."""
    read, words = [], "word " * 8
    folder = run(tmp_path / "run", [metric(1)], [sample(step, words) for step in range(90)], [rollout(1, "a")])
    record = RunRecord.read(folder)
    monkeypatch.setattr(plain, "json_object", lambda line, parse=plain.json_object: read.append(1) or parse(line))
    monkeypatch.setattr("switchkd.reports.viewer.MOST_TOKENS", 10 * record.looks[0][1])
    shown = payload(record, "a", 10**7)
    assert len(shown["prompts"][0]["looks"]) == 10 and len(read) == 11
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample(1, words, sample_id=i)) + "\n" for i in range(15)))
    shown = payload(RunRecord.read(folder), "a", 10**7)
    assert len(shown["prompts"]) == 10 and "5 prompts are left out" in shown["notes"][0]
    assert MOST_TOKENS == 100_000


# --- names that there are not -------------------------------------------------------------------------------------

READING = {
    "report": (), "plot": (), "compare": (), "check": (), "evaluate": (), "generate": (), "play": (),
    "train": ("--resume",), "study": ("--dry-run",),
}  # fmt: skip


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("command", READING)
def test_no_command_that_reads_makes_what_it_does_not_find(tmp_path, monkeypatch, capsys, command, there):
    monkeypatch.chdir(tmp_path)
    if there:
        (tmp_path / "runs" / "TYPO").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    assert main([command, "runs/TYPO", *READING[command]]) == 1
    said = capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
    assert "runs/TYPO" in said and "config.yaml'" not in said


def test_a_page_is_made_after_its_runs_are_read(tmp_path):
    assert main(["report", str(tmp_path / "none"), "--output-file", str(tmp_path / "new" / "page.html")]) == 1
    assert not any(tmp_path.iterdir())
    assert page([run(tmp_path / "run")])
