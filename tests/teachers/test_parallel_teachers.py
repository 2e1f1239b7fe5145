"""A teacher in shards over two and four processes says what it says in one. Where it cannot be in shards, that is said first."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from parallel_teacher import CASES, Runs, put_models
from safetensors.torch import load_file
from test_trainer import lines
from tiny import _ROPE, byte_level_tokenizer, save_llama
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, Qwen3MoeConfig

from switchkd import load_pair
from switchkd.base.errors import ConfigError, ModelError
from switchkd.evaluation.results import read_results
from switchkd.forward import parallel
from switchkd.models.settings import ModelConfig, Place
from switchkd.training.processes import new_accelerator
from switchkd.training.settings import TrainConfig

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    put_models(folder)
    return folder


@pytest.fixture(scope="module")
def one(models):
    """What a teacher says that one process runs alone."""
    Runs(models, models / "one", new_accelerator(), 1).everything()
    return models / "one"


@pytest.fixture(scope="module")
def several(models):
    """The same by two processes, and by four, which are two groups of two; made when it is first asked for."""

    @cache
    def made(processes):
        launch = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
        command = [sys.executable, *launch, str(TESTS / "parallel_teacher.py"), str(models), str(processes)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=TESTS.parent)
        assert done.returncode == 0, done.stderr[-4000:]
        return models / str(processes)

    return made


def texts(folder):
    rollouts = lines(folder, "rollouts.jsonl") if (folder / "rollouts.jsonl").exists() else []
    return [[r["step"], r["sample_id"], r["completion_ids"], r["speakers"], r["stop_reason"]] for r in rollouts]


def assert_alike(two, one):
    """Equal, and numbers to the rounding of float32."""
    assert type(two) is type(one), (two, one)
    if isinstance(one, dict):
        assert two.keys() == one.keys()
        for key in one:
            assert_alike(two[key], one[key])
    elif isinstance(one, list):
        assert len(two) == len(one)
        for pair in zip(two, one, strict=True):
            assert_alike(*pair)
    else:
        assert two == (pytest.approx(one, rel=1e-4, abs=1e-5, nan_ok=True) if isinstance(one, float) else one)


def assert_trained_alike(two, one):
    """The same text, each row once; the same losses, counts and weights."""
    assert texts(two) == texts(one)
    if texts(one):
        divergences = [[r["divergences"] for r in lines(run, "rollouts.jsonl")] for run in (two, one)]
        assert_alike(*divergences)
    for line, other in zip(lines(two, "metrics.jsonl"), lines(one, "metrics.jsonl"), strict=True):
        counted = {"loss", "grad_norm", "num_tokens", "source", "step"}
        assert_alike({key: line[key] for key in counted}, {key: other[key] for key in counted})
    weights, others = (load_file(run / "weights.safetensors") for run in (two, one))
    for name, weight in others.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_with_one_teacher_are_one(one, several, processes):
    """Also scores, samples, stored work, checksums, and a run from the command line that goes on."""
    two = several(processes)
    for case in CASES:
        assert_trained_alike(two / case, one / case)
    wrote = {speaker for case in CASES for *_, speakers, _ in texts(one / case) for speaker in speakers}
    assert wrote == {0, 1}  # both models
    said = [json.loads((run / "said.json").read_text()) for run in (two, one)]
    halves = [torch.tensor(each.pop("bfloat16")) for each in said]
    torch.testing.assert_close(*halves, rtol=0.02, atol=0.02)
    assert_alike(*said)
    runs = two / "run", one / "run"
    assert texts(runs[0]) == texts(runs[1])
    origins = [json.loads((run / "origin.json").read_text()) for run in runs]
    for origin in origins:
        origin.pop("conditions")
    assert origins[0] == origins[1]
    scores = [{name: found.means() for name, found in read_results(run / "evaluation.json").items()} for run in runs]
    assert_alike(*scores)
    files = [{path.relative_to(run) for path in run.rglob("*")} for run in runs]
    assert files[0] == files[1]
    student = [load_file(run / "student" / "model.safetensors") for run in runs]
    for name, weight in student[1].items():
        torch.testing.assert_close(student[0][name], weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mistake", ["states go to another row", "each row is trained on by all of a group"])
def test_mutants_in_which_rows_are_not_where_they_belong(one, several, mistake):
    with pytest.raises(AssertionError):
        assert_trained_alike(several(2) / mistake, one / "switch")


def test_processes_that_do_not_agree_end_the_run(several):
    said = (several(2) / "a process writes another token" / "error").read_text()
    assert (
        "step 2: process 0 and process 1 of those that run the teacher together have decoded different text: sample"
        in said
    )


# --- what is refused, before weights are read ---------------------------------------------------------------------


@pytest.fixture
def no_weights(monkeypatch):
    def read(*_, **__):
        raise AssertionError("weights are read")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", read)


def gpt2(folder):
    tokenizer = byte_level_tokenizer()
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=4)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def refused(teacher, student, monkeypatch, processes=2, **place):
    monkeypatch.setattr(parallel, "processes", lambda: processes)
    with pytest.raises((ConfigError, ModelError)) as error:
        load_pair(teacher, student, teacher_place=Place(**place))
    return str(error.value)


def test_what_cannot_be_in_shards_is_refused_before_weights_are_read(tmp_path, monkeypatch, no_weights):
    student = save_llama(tmp_path / "student", byte_level_tokenizer(), 2)
    words = refused(gpt2(tmp_path / "gpt2"), student, monkeypatch, tensor_parallel=2)
    assert "(gpt2) has no plan for tensor parallelism" in words and "teacher_device auto" in words
    words = refused(student, student, monkeypatch, 4, tensor_parallel=4)
    assert "(llama) cannot be divided among 4 processes: num_key_value_heads 2;" in words and "or to 1" in words
    words = refused(student, student, monkeypatch, 3, tensor_parallel=2)
    assert "there are 3, which 2 does not divide" in words and "torchrun --nproc-per-node 2 -m switchkd.cli" in words
    words = refused(student, student, monkeypatch, 1, tensor_parallel=2)
    assert "this process runs alone; start a multiple of 2: torchrun" in words
    words = refused(student, student, monkeypatch, tensor_parallel=2, expert_parallel=True)
    assert "has no plan for experts in shards" in words and "leave teacher_expert_parallel out" in words


@pytest.mark.parametrize(
    "config,experts,words",
    [
        (LlamaConfig(**_ROPE | {"intermediate_size": 25}), False, "intermediate_size 25;"),
        (LlamaConfig(**_ROPE | {"num_attention_heads": 1, "num_key_value_heads": 2}), False, "num_attention_heads 1;"),
        (Qwen3MoeConfig(**_ROPE, num_experts=3), True, "num_experts 3"),
        (Qwen3MoeConfig(**_ROPE, moe_intermediate_size=3, num_experts=3), False, "moe_intermediate_size 3;"),
    ],
)
def test_what_does_not_divide_is_named(config, experts, words):
    with pytest.raises(ModelError, match=f"cannot be divided among 2 processes: {words}"):
        parallel.check_parallel(config, "a teacher", 2, experts)


@pytest.mark.parametrize(
    "settings,words",
    [
        ({"teacher_tensor_parallel": 0}, "teacher_tensor_parallel must be at least 1"),
        ({"teacher_expert_parallel": True}, "without teacher_tensor_parallel"),
        ({"teacher_tensor_parallel": 2, "teacher_device": "cuda:1"}, "drop one"),
        ({"teacher_tensor_parallel": 2, "teacher_load_in_8bit": True}, "drop one"),
        ({"teacher_load_in_4bit": True, "teacher_load_in_8bit": True}, "give one of them"),
        ({"teacher_load_in_4bit": True, "teacher_dtype": "float64"}, "no products in teacher_dtype float64"),
        ({"teacher_device": "gpu"}, "teacher_device 'gpu'; use 'cuda:1', 'cpu' or 'auto'"),
        ({"teacher_model_name_or_path": "base", "use_peft": True, "teacher_device": "cuda:1"}, "on the student's own weights"),
    ],
)  # fmt: skip
def test_places_that_contradict(settings, words):
    with pytest.raises(ConfigError, match=words):
        ModelConfig(**settings)


def test_graphs_are_recorded_on_one_device():
    with pytest.raises(ConfigError, match="graphs are recorded on one device"):
        TrainConfig(graphs=True, teacher_tensor_parallel=2)
    with pytest.raises(ConfigError, match="graphs are recorded on one device"):
        TrainConfig(graphs=True, teacher_device="auto")


def test_all_gpus_of_one_process_alone(tmp_path, monkeypatch, no_weights):
    student = save_llama(tmp_path / "student", byte_level_tokenizer(), 2)
    assert "each of 2 processes would; start one process" in refused(student, student, monkeypatch, device="auto")
    if not torch.cuda.is_available():
        assert "PyTorch sees no CUDA device" in refused(student, student, monkeypatch, device="cuda:1")
