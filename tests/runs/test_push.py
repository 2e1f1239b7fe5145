"""The student in other hands: it writes as its generation config says, its card opens it, and what goes to the hub is it alone.

Tests end at the network: in the hub's place stands a double that writes down what it is asked.
"""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from tiny import byte_level_tokenizer, pair_on_disk
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

from switchkd.base.errors import CheckpointError, ConfigError, HubError, ModelError
from switchkd.cli.main import main
from switchkd.models.pair import load_pair
from switchkd.models.vocabulary import save_tokenizer
from switchkd.reports.record import read_config
from switchkd.runs import distil as runs
from switchkd.runs import finishing
from switchkd.runs.finishing import push
from switchkd.training.settings import TrainConfig

# As Qwen2.5-0.5B-Instruct has it, with ids of the tiny tokenizer.
SAMPLES = {
    "do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05, "eos_token_id": [258, 257],
    "pad_token_id": 259,
}  # fmt: skip
NAME = "somebody/a-student"


def settings_of(folder, generation, **changes):
    settings = pair_on_disk(folder)
    file = Path(settings["student_model_name_or_path"]) / "generation_config.json"
    file.write_text(json.dumps(generation))
    short = {"max_steps": 1, "max_new_tokens": 4, "eval_samples": 0, "sample_steps": 0, "quiet": True}
    return TrainConfig(**settings | short | {"output_dir": str(folder / "run")} | changes)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run that has come to its end, and its settings."""
    config = settings_of(tmp_path_factory.mktemp("pair"), SAMPLES, save_dtype="bfloat16")
    runs.distil(config)
    return Path(config.output_dir), config


class Hub:
    """What stands in the hub's place."""

    def __init__(self, error=None):
        self.made, self.uploads, self.error = [], [], error

    def create_repo(self, name, **how):
        if self.error:
            raise self.error
        self.made.append((name, how))
        return SimpleNamespace(repo_id=name, __str__=lambda: name)

    def upload_folder(self, **what):
        self.uploads.append(what)


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(finishing, "get_token", lambda: "a token")
    monkeypatch.setattr(finishing, "HfApi", lambda: hub)
    hub = Hub()
    return hub


# --- as its users open it -----------------------------------------------------------------------------------------


def test_the_student_samples_as_its_model_did(made):
    student = made[0] / "student"
    saved = GenerationConfig.from_pretrained(student)
    ends = saved.eos_token_id
    assert {**SAMPLES, "eos_token_id": ends} == {name: getattr(saved, name) for name in SAMPLES}
    assert set(SAMPLES["eos_token_id"]) <= set(ends), "and what the tokenizer ends with"
    model = AutoModelForCausalLM.from_pretrained(student)
    assert model.dtype == torch.bfloat16
    assert json.loads((student / "config.json").read_text())["dtype"] == "bfloat16"
    writer = pipeline("text-generation", model=str(student))
    [answer] = writer([{"role": "user", "content": "What is 2 and 2?"}], max_new_tokens=3)
    assert answer["generated_text"][-1]["role"] == "assistant"
    assert writer.model.generation_config.temperature == 0.7


def test_both_places_have_the_chat_template_and_no_path_of_this_machine(made, tmp_path):
    student = made[0] / "student"
    settings = json.loads((student / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == (student / "chat_template.jinja").read_text()
    assert (
        str(made[0].parent)
        not in (student / "tokenizer_config.json").read_text() + (student / "config.json").read_text()
    )
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = {"default": "a{{ messages }}", "tools": "b"}
    save_tokenizer(tokenizer, tmp_path)
    for file in tmp_path.rglob("*.jinja"):
        file.unlink()
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template


@pytest.mark.parametrize(("template", "lora"), [("chat", False), ("chat", True), ("alpaca", False), ("none", False)])
def test_the_card_says_how_to_open_it(tmp_path, monkeypatch, capsys, template, lora):
    runs.distil(settings_of(tmp_path, SAMPLES, template=template, use_peft=lora))
    card = (tmp_path / "run" / "student" / "README.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path / "run")
    capsys.readouterr()
    names = {}
    exec(compile(code, "card", "exec"), names)
    assert 0 < names["written"].shape[1] - names["prompt"]["input_ids"].shape[1] <= 4
    prompt = names["tokenizer"].decode(names["prompt"]["input_ids"][0])
    assert ("<|im_start|>assistant" in prompt) == (template == "chat") and ("### Response:" in prompt) == (
        template == "alpaca"
    )
    assert "samples (temperature 0.7, top_p 0.8, top_k 20, repetition_penalty 1.05)" in card
    assert ("transformers 5 or later and peft" in card) == lora


@pytest.mark.parametrize("lora", [False, True])
def test_a_temperature_without_sampling_ends_no_run(tmp_path, lora):
    """transformers reads such a generation config and refuses to write it: so ended the first checkpoint."""
    config = settings_of(
        tmp_path, {"temperature": 0.6, "top_p": 0.9, "eos_token_id": 257, "pad_token_id": -1}, use_peft=lora
    )
    before = AutoModelForCausalLM.from_pretrained(config.student_model_name_or_path)
    runs.distil(config)
    saved = GenerationConfig.from_pretrained(tmp_path / "run" / "student")
    assert not saved.do_sample and saved.temperature is None and saved.top_p is None
    assert saved.pad_token_id == byte_level_tokenizer().pad_token_id
    after = load_pair(config.teacher_model_name_or_path, config.student_model_name_or_path)
    assert any("temperature 0.6, top_p 0.9" in warning for warning in after.warnings)
    ids = torch.arange(3, 9).unsqueeze(0)
    texts = [
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8) for model in (before, after.student)
    ]
    assert torch.equal(*texts), "what generate writes has changed"


def test_a_generation_config_that_nothing_saves_is_said_before_the_run(tmp_path):
    wrong = {"eos_token_id": 257, "output_scores": True}
    with pytest.raises(ModelError, match=r"(?s)generation_config.json could not be saved: .*output_scores.*correct it"):
        runs.distil(settings_of(tmp_path, wrong))
    assert not (tmp_path / "run" / "student").exists()


# --- to the hub ---------------------------------------------------------------------------------------------------


def test_what_goes_up_is_the_student_alone(made, hub, capsys):
    (made[0] / "student" / "notes.txt").write_text("mine")
    try:
        assert main(["push", str(made[0]), NAME]) == 0
    finally:
        (made[0] / "student" / "notes.txt").unlink()
    assert hub.made == [(NAME, {"private": True, "exist_ok": True})]
    [upload] = hub.uploads
    assert upload["folder_path"] == made[0] / "student" and upload["repo_id"] == NAME
    files = {file.name for file in (made[0] / "student").iterdir()}
    assert set(upload["allow_patterns"]) == files and "README.md" in files
    assert "*.safetensors" in upload["delete_patterns"] and "student of step 1" in upload["commit_message"]
    assert "put on the hub" in capsys.readouterr().out
    assert main(["push", str(made[0] / "student"), NAME, "--no-private"]) == 0
    assert hub.made[1][1]["private"] is False


def test_a_run_pushes_when_it_is_done_and_only_if_told(made, hub, tmp_path, capsys):
    config = dataclasses.replace(made[1], push_to_hub=NAME, output_dir=str(tmp_path / "run"))
    runs.distil(config)
    assert len(hub.uploads) == 1 and hub.uploads[0]["folder_path"] == tmp_path / "run" / "student"
    assert f"name = '{NAME}'" in (tmp_path / "run" / "student" / "README.md").read_text()
    assert read_config(tmp_path / "run").push_to_hub == "", "who makes it again would push over it"
    assert main(["train", str(tmp_path / "run"), "--resume"]) == 0
    assert len(hub.uploads) == 1
    assert main(["train", str(tmp_path / "run"), "--resume", "--push-to-hub", NAME]) == 0
    assert len(hub.uploads) == 2


def test_a_hub_that_refuses_leaves_the_student_and_says_what_to_do(made, hub):
    hub.error = OSError("403 Forbidden")
    words = rf"403 Forbidden.*It lies in {made[0]}/student.*switchkd push {made[0]} {NAME}"
    with pytest.raises(HubError, match=words):
        push(made[0], NAME)
    assert (made[0] / "student" / "model.safetensors").is_file()


def test_what_can_be_known_is_said_before_the_first_step(made, hub, tmp_path, monkeypatch):
    def refused(words, name=NAME, **changes):
        config = dataclasses.replace(made[1], push_to_hub=name, output_dir=str(tmp_path / "run"), **changes)
        monkeypatch.setattr(runs, "open_pair", lambda *_, **__: pytest.fail("models were loaded first"))
        with pytest.raises(ConfigError, match=words):
            runs.distil(config)

    refused("no name on the hub.*give my-name/my-student", name="a/b/c")
    refused("an adapter on .*student, which nobody else has.*--merge", use_peft=True)
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True)
    refused("HF_HUB_OFFLINE is set: unset it")
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
    monkeypatch.setattr(finishing, "get_token", lambda: None)
    refused("there is none: log in with `hf auth login`, or set HF_TOKEN")
    assert not hub.made


def test_a_folder_that_is_no_saved_student_is_not_pushed(made, hub, tmp_path):
    with pytest.raises(CheckpointError, match="holds no student that a run saved; name the directory of a run"):
        push(tmp_path, NAME)
    with pytest.raises(CheckpointError, match="holds no student that a run saved"):
        push(made[0] / "checkpoint-1", NAME)
    config = settings_of(tmp_path, SAMPLES, use_peft=True)
    runs.distil(config)
    with pytest.raises(ConfigError, match=r"adapter_config.json would tell its folder"):
        push(tmp_path / "run", NAME)
    runs.distil(dataclasses.replace(config, merge=True, output_dir=str(tmp_path / "merged")))
    push(tmp_path / "merged", NAME)
    assert len(hub.uploads) == 1
    weights = tmp_path / "merged" / "student" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged"):
        push(tmp_path / "merged", NAME)
    assert len(hub.uploads) == 1
