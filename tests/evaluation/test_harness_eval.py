"""lm-eval on a student: its numbers against log-likelihoods worked out here, and what is said where it cannot run."""

import functools
import json
import sys

import pytest
import torch
from tiny import byte_level_tokenizer, save_llama
from transformers import AutoTokenizer

from switchkd.base.settings import to_dict
from switchkd.cli.main import main
from switchkd.models.adapters import add_adapter
from switchkd.models.loading import load_model
from switchkd.models.settings import ModelConfig
from switchkd.training.checkpoint import save_model
from switchkd.training.records import CONFIG
from switchkd.training.settings import TrainConfig

TASK = """task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
ROWS = [  # choices of one length, or the shortest would always win
    {
        "question": f"What is {i} and {2 * i}?",
        "choices": [f"{3 * i:03}", f"{5 * i + 7:03}", f"{900 - i}"],
        "answer": i % 3,
    }
    for i in range(40)
]


@pytest.fixture(scope="module")
def harness():
    return pytest.importorskip("lm_eval")


@pytest.fixture
def tasks(harness, tmp_path, monkeypatch):
    """A folder with one task on a local file; lm-eval's own 14,000 are left out, as reading them takes long."""
    import datasets
    from lm_eval import tasks as lm_eval_tasks

    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "sums.yaml").write_text(TASK.format(data=folder / "sums.jsonl"))
    own = functools.partial(lm_eval_tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval_tasks, "TaskManager", own)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return folder


@pytest.fixture
def model(tmp_path):
    return save_llama(tmp_path / "model", byte_level_tokenizer(), seed=3)


@pytest.fixture
def adapter_run(tmp_path, model):
    """A run directory whose student is an adapter with an effect."""
    student = load_model(model)
    add_adapter(student, ModelConfig(use_peft=True, lora_r=4), seed=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    run = tmp_path / "run"
    save_model(run / "student", student, byte_level_tokenizer())
    settings = TrainConfig(student_model_name_or_path=model, use_peft=True, lora_r=4, dtype="float64")
    (run / CONFIG).write_text(json.dumps(to_dict(settings)))
    return run


@torch.no_grad()
def right_answers(folder, dtype="float32"):
    """For each row, whether the right choice has the highest log-likelihood: one choice a forward, no padding."""
    model, tokenizer = load_model(str(folder), dtype), AutoTokenizer.from_pretrained(folder)
    found = []
    for row in ROWS:
        scores = []
        for choice in row["choices"]:
            before, ids = (tokenizer.encode(text) for text in (row["question"], f"{row['question']} {choice}"))
            logs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            scores.append(logs[range(len(before) - 1, len(ids) - 1), ids[len(before) :]].sum().item())
        found.append(scores.index(max(scores)) == row["answer"])
    return found


def evaluated(model, tasks, output, *more):
    words = ["lm-eval", str(model), "--tasks", "sums", "--include-path", str(tasks), "--output-file", str(output)]
    assert main([*words, *more]) == 0
    return json.loads(output.read_text())


def test_accuracy_of_a_folder_is_that_of_its_log_likelihoods(tasks, model, tmp_path, capsys):
    answer = evaluated(model, tasks, tmp_path / "out.json", "--batch-size", "7")
    right = right_answers(model)
    share = sum(right) / len(right)
    assert 0 < share < 1
    assert answer["results"]["sums"]["acc,none"] == pytest.approx(share)
    # The standard error of a mean, with n - 1.
    assert answer["results"]["sums"]["acc_stderr,none"] == pytest.approx(
        (share * (1 - share) / (len(right) - 1)) ** 0.5
    )
    assert answer["n-samples"]["sums"]["effective"] == len(ROWS)
    assert answer["settings"]["tasks"] == ["sums"] and answer["seeds"]["fewshot_random_seed"] == 1234
    assert {"switchkd", "lm_eval", "transformers", "torch"} <= answer["packages"].keys()
    assert answer["model"]["dtype"] == "torch.float32"
    printed = capsys.readouterr().out
    assert f"{share:.4f}" in printed and "fewshot_random_seed 1234" in printed


def test_a_run_directory_is_its_adapter_on_its_base_in_the_runs_dtype(tasks, model, adapter_run, tmp_path):
    answer = evaluated(adapter_run, tasks, tmp_path / "out.json", "--limit", "30")
    right = right_answers(adapter_run / "student", "float64")[:30]
    assert right != right_answers(model)[:30]
    assert answer["results"]["sums"]["acc,none"] == pytest.approx(sum(right) / 30)
    assert answer["n-samples"]["sums"]["effective"] == 30
    assert answer["model"]["dtype"] == "torch.float64"


def test_an_unknown_task_and_data_out_of_reach_are_explained(tasks, model, tmp_path, capsys):
    flags = ["--include-path", str(tasks)]
    assert main(["lm-eval", model, "--tasks", "sumz", *flags]) == 1
    assert "no task 'sumz'; did you mean sums?" in capsys.readouterr().err
    hub = (
        (tasks / "sums.yaml")
        .read_text()
        .replace("path: json", "path: nobody/nothing")
        .replace("task: sums", "task: far")
    )
    (tasks / "far.yaml").write_text("\n".join(line for line in hub.splitlines() if "kwargs" not in line))
    assert main(["lm-eval", model, "--tasks", "far", *flags]) == 1
    assert "the data of far cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "no task given"),
        (["--tasks", "sums", "--include-path", "nowhere"], "include_path nowhere is no folder"),
        (["--tasks", "sums", "--limit", "0"], "at least 1, num_fewshot at least 0; got 8, 0 and None"),
    ],
)
def test_wrong_settings_are_explained(tasks, model, capsys, flags, words):
    if "--include-path" not in flags:
        flags = [*flags, "--include-path", str(tasks)]
    assert main(["lm-eval", model, *flags]) == 1
    assert words in capsys.readouterr().err


def test_a_run_without_a_student_is_explained(tasks, tmp_path, capsys):
    run = tmp_path / "unfinished"
    run.mkdir()
    (run / CONFIG).write_text(json.dumps(to_dict(TrainConfig())))
    assert main(["lm-eval", str(run), "--tasks", "sums", "--include-path", str(tasks)]) == 1
    assert "has no student yet" in capsys.readouterr().err


def test_without_lm_eval_the_extra_is_named(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["lm-eval", "demo", "--tasks", "arc_easy"]) == 1
    assert "pip install 'switchkd[lm-eval]'" in capsys.readouterr().err
