"""Every benchmark runs on tiny random models and leaves a JSON file and a plot; nothing is timed here."""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONTENDERS = {
    "decode": {"plain loop", "block engine", "generate", "assisted generate", "block engine, student drafts"},
    "step": {"switchkd on-policy", "switchkd SWITCH", "switchkd AdaSwitch", "TRL GKDTrainer"},
    "memory": {"dense", "switchkd", "TRL GKD", "TRL chunked", "Liger chunked"},
    "decode_memory": {"block engine"},
    "methods": {"plain loop", "block engine"},
    "evaluate": {"generate", "engine"},
    "scaling": {"1", "2", "4", "auto", "0.0", "0.1", "60"},
}


@pytest.mark.parametrize("name", CONTENDERS)
def test_quick_run_writes_every_contender(name, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    program = import_module(f"benchmarks.{name}")
    if name in ("step", "memory"):  # peers count as absent, so that the test is the same on every machine
        monkeypatch.setattr(program, "installed", lambda package: package == "torch")
    if name in ("memory", "decode_memory"):  # a process of its own would import everything once more
        monkeypatch.setattr(program, "in_own_process", lambda *cell: program.peak(*cell, threads=1))
    arguments = ["--quick", "--repeats", "1", "--device", "cpu", "--output", str(tmp_path)]
    assert program.main(arguments) == 0
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert {row["contender"] for row in record["rows"]} >= CONTENDERS[name]
    assert all(len(row["seconds"]) == 1 or row["note"] == "not installed" for row in record["rows"])
    assert record["machine"]["torch"]
    assert (tmp_path / f"{name}.png").stat().st_size > 1000
