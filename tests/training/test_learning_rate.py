"""The learning rate that nobody gave: by the size of the student, said once, recorded, and kept when a run goes on."""

import dataclasses

import pytest
import torch
import yaml
from tiny import FAMILIES, pair_on_disk, toy_examples, toy_pair
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from switchkd.base.errors import ConfigError
from switchkd.cli.main import main
from switchkd.models.adapters import add_adapter
from switchkd.training.optimizer import RATES, logical_parameters, with_learning_rate
from switchkd.training.settings import TrainConfig
from switchkd.training.trainer import Trainer


def model(layers=2, vocab=23):
    """A Llama without weights, which may be as large as a real one."""
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(vocab_size=vocab, num_hidden_layers=layers))


class Sized(nn.Module):
    """Stands for a student of so many parameters."""

    def __init__(self, size):
        super().__init__()
        self.config = LlamaConfig()
        with torch.device("meta"):
            self.weight = nn.Parameter(torch.empty(size))


@pytest.mark.parametrize(
    ("size", "rate", "words"),
    [
        (4_664, 1e-4, "a student of 4,664 parameters"),
        (81_000_000, 1e-4, "a student of 81.0M parameters"), (135_000_000, 1e-4, "135M"), (360_000_000, 3e-5, "360M"),
        (494_032_768, 1e-5, "494M"), (1_540_000_000, 1e-5, "1.5B"), (3_090_000_000, 5e-6, "3.1B"), (7_600_000_000, 2e-6, "7.6B"),
    ],
)  # fmt: skip
def test_the_rate_goes_by_the_size_and_is_said_with_the_way_to_another(size, rate, words):
    said = []
    config = with_learning_rate(TrainConfig(), Sized(size), said.append)
    assert config.learning_rate == rate and dataclasses.replace(config, learning_rate=None) == TrainConfig()
    [line] = said
    assert line.startswith(f"learning_rate {rate:g}: chosen for ") and words in line and "--learning-rate" in line


def test_larger_students_have_no_larger_rates():
    assert list(RATES) == sorted(RATES) and list(RATES.values()) == sorted(RATES.values(), reverse=True)


def test_a_rate_that_is_given_stands_and_nothing_is_said():
    config = TrainConfig(learning_rate=0.0)
    assert with_learning_rate(config, Sized(10), lambda line: pytest.fail(line)) is config


def test_an_adapter_has_ten_times_as_much_for_the_model_that_it_is_on():
    student = FAMILIES["llama"]()
    plain = logical_parameters(student)
    add_adapter(student, TrainConfig(use_peft=True, lora_r=64), seed=0)
    said = []
    assert with_learning_rate(TrainConfig(), student, said.append).learning_rate == 1e-3
    assert logical_parameters(student) == plain < sum(p.numel() for p in student.parameters())
    assert "the adapter of a student" in said[0]


def test_packed_weights_count_as_the_numbers_that_they_stand_for():
    student = model()
    plain = logical_parameters(student)
    layer = student.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(torch.empty(layer.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
    assert logical_parameters(student) < plain
    student.config.quantization_config = {"quant_method": "bitsandbytes"}
    assert logical_parameters(student) == plain


def test_a_rate_that_is_not_chosen_yet_trains_nothing():
    with pytest.raises(ConfigError, match="learning_rate is not given"):
        _ = TrainConfig().peak_rate


def test_a_trainer_made_in_python_chooses_it_too(tmp_path, capsys):
    config = TrainConfig(output_dir=str(tmp_path), costs=(1.0,) * 6)
    assert Trainer(toy_pair(), toy_examples(), config).config.learning_rate == 1e-4
    assert capsys.readouterr().out.startswith("learning_rate 0.0001: chosen for a student of ")
    Trainer(toy_pair(), toy_examples(), dataclasses.replace(config, quiet=True))
    assert capsys.readouterr().out == ""


@pytest.mark.filterwarnings("ignore:.*set-aside")
def test_a_run_says_it_once_records_it_and_goes_on_with_it(tmp_path, capsys, monkeypatch):
    pair = [f"--{name.replace('_', '-')}={value}" for name, value in pair_on_disk(tmp_path).items()]
    small = [
        "--template",
        "chat",
        "--eval-samples",
        "0",
        "--sample-steps",
        "0",
        "--max-new-tokens",
        "4",
        "--save-steps",
        "1",
    ]
    run = tmp_path / "run"
    assert main(["check", "adaswitch", *pair, *small]) == 0
    out = capsys.readouterr().out
    assert out.count("chosen for a student of") == 1 and "\nlearning_rate: 0.0001\n" in out
    command = ["train", "adaswitch", *pair, *small, "--output-dir", str(run)]
    assert main([*command, "--max-steps", "1"]) == 0
    assert capsys.readouterr().out.count("learning_rate 0.0001: chosen for a student of") == 1
    assert yaml.safe_load((run / "config.yaml").read_text())["learning_rate"] == 1e-4
    # Another version chooses otherwise; the run keeps what it has.
    monkeypatch.setattr("switchkd.training.optimizer.RATES", {10**12: 0.5})
    assert main([*command, "--max-steps", "2", "--resume", "--allow-change", "max_steps"]) == 0
    assert main(["train", str(run), "--output-dir", str(tmp_path / "again")]) == 0
    assert "chosen for" not in capsys.readouterr().out
    for folder in (run, tmp_path / "again"):
        assert yaml.safe_load((folder / "config.yaml").read_text())["learning_rate"] == 1e-4
