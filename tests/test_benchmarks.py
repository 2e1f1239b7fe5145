"""Every benchmark runs on tiny random models and leaves a JSON file and a plot; nothing is timed here."""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from switchkd.data.small_data import arithmetic_row
from switchkd.methods.policy import StudentOnly

ROOT = Path(__file__).parents[1]
CONTENDERS = {
    "decode": {"plain loop", "block engine", "generate", "assisted generate", "block engine, student drafts"},
    "step": {"switchkd on-policy", "switchkd SWITCH", "switchkd AdaSwitch", "TRL GKDTrainer"},
    "memory": {"dense", "switchkd", "TRL GKD", "TRL chunked", "Liger chunked"},
    "decode_memory": {"block engine"},
    "methods": {"plain loop", "block engine"},
    "evaluate": {"generate", "engine"},
    "scaling": {"1", "2", "4", "auto", "0.0", "0.1", "60"},
    "small": {"on-policy", "SWITCH", "AdaSwitch", "evaluate"},
    "states": {"plain loop", "block engine"},
    "two_sizes": {"SWITCH", "AdaSwitch", "SWITCH, LoRA"},
    "two_tokenizers": {"one tokenizer", "two tokenizers", "before", "strict", "sorted (ULD)", "prefix"},
    "premise": {"teacher", "little-warm"},
    "handover": {"AdaSwitch", "SWITCH"},
    "counts": {"StudentOnly", "SWITCH", "AdaSwitch", "SKD", "pieces for a GPU", "pieces for a CPU"},
    "engines": {"switchkd decode", "transformers generate", "transformers continuous batching", "vLLM"},
}
UNTIMED = ("counts", "premise", "handover")


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
    runs = 0 if name in UNTIMED else 1
    assert all(len(row["seconds"]) == runs or row["note"] == "not installed" for row in record["rows"])
    assert record["machine"]["torch"]
    assert (tmp_path / f"{name}.png").stat().st_size > 1000


def test_without_the_small_pair_its_benchmark_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    monkeypatch.setenv("SWITCHKD_CACHE", str(tmp_path / "cache"))
    assert import_module("benchmarks.small").main(["--output", str(tmp_path)]) == 0
    assert "switchkd make-pair" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_where_the_writer_went_wrong_and_whether_the_teachers_next_line_follows():
    premise = import_module("benchmarks.premise")
    row = arithmetic_row(0, 3, "heldout")  # Dan starts with 24 books: finds 1; gets 3; loses 2; …
    right = row["answer"]
    for end in (0, 1, 9, 17, 40, len(right)):
        assert not premise.spoilt(right[:end], [right]), right[:end]
    assert premise.spoilt("24 and 1 make 26.\n2", [right]) and not premise.spoilt("24 and 1 make 26", [right])
    assert premise.spoilt("First, on Monday Ben x", ["First, on Monday Ada"]) and not premise.spoilt("Fir", ["First"])

    def follows(task, before, text, question=row["question"]):
        return premise.next_follows(task, question, before, text)

    assert follows("arithmetic", "", right) is True
    assert follows("arithmetic", "24 and", right) is True
    # From a wrong total the next line is right if it goes on from there.
    wrong = "24 and 1 make 26.\n"
    assert follows("arithmetic", wrong, wrong + "26 plus 3 is 29.\n") is True
    assert follows("arithmetic", wrong, wrong + "25 plus 3 is 28.\n") is False
    assert follows("arithmetic", wrong, wrong + "26 plus 2 is 28.\n") is False
    assert follows("arithmetic", "what\n", "what\n26 plus 2 is 28.\n") is None
    assert follows("text", "", "First, on Monday") is None
    question = "The row is 896517: swap first and fifth; turn around; how does it end?"
    assert follows("order", "", "swap first and fifth: 196587.\n", question) is True
    assert follows(
        "order", "swap first and fifth: 116587.\n", "swap first and fifth: 116587.\nturn around gives 785611.", question
    )
    spoilt = "swap first and fifth: 116587.\n"
    assert follows("order", spoilt, spoilt + "turn around gives 785691.", question) is False


def test_an_engine_that_does_not_come_up_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    program = import_module("benchmarks.engines")
    threads = torch.get_num_threads()
    arguments = ["--quick", "--repeats", "1", "--output", str(tmp_path), "--busy", "--vllm-python", sys.executable]
    assert program.main(arguments) == 0
    rows = json.loads((tmp_path / "engines_busy.json").read_text())["rows"]
    notes = {row["contender"]: row["note"] for row in rows}
    assert "No module named 'vllm'" in notes.pop("vLLM")
    assert set(notes.values()) == {""}
    assert torch.get_num_threads() == threads, "the number of threads is not put back"


def test_the_page_on_a_gpu_has_the_tables_of_its_program():
    program = import_module("benchmarks.roofline")
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    for table in (program.limits, program.memory, program.training):
        assert table() in page, f"run benchmarks.roofline and take its table of {table.__name__} into docs/gpu.md"
    assert "nothing is measured" in page
    counts = program.counted_round(StudentOnly(), 1)
    assert counts["teacher"] == (0, 0)
    assert counts["student"][0] > counts["student"][1] > 24 * 20, "a layer has more than twenty kernels"
