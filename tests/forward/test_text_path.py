"""Weights that text does not reach are no student's: frozen, not adapted, and said."""

import pytest
import torch
from families import config_of, small_model
from test_trainer import trainer
from tiny import byte_level_tokenizer, save_llama, tiny_model
from transformers import Gemma3ForConditionalGeneration

from switchkd import load_pair
from switchkd.base.errors import SwitchKDWarning
from switchkd.forward.text_path import beside_text, freeze_beside_text, frozen_note
from switchkd.forward.twin import small_config
from switchkd.methods.mixes import Generated
from switchkd.models.pair import Pair
from switchkd.models.settings import ModelConfig


@pytest.fixture
def folders(tmp_path):
    """A text teacher, and a student that sees pictures too."""
    tokenizer = byte_level_tokenizer()
    config = small_config(config_of("gemma3"))
    config.text_config.vocab_size = len(tokenizer)
    config.text_config.pad_token_id = config.text_config.eos_token_id = tokenizer.eos_token_id
    config.image_token_id = len(tokenizer) - 1
    model = Gemma3ForConditionalGeneration._from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    return save_llama(tmp_path / "teacher", tokenizer, 1), str(tmp_path / "student")


def test_a_vision_tower_is_frozen_and_said(folders):
    pair = load_pair(*folders, device="cpu")
    [note] = [warning for warning in pair.warnings if "frozen" in warning]
    assert "model.vision_tower, model.multi_modal_projector" in note
    trainable = {name for name, p in pair.student.named_parameters() if p.requires_grad}
    assert trainable and not any("vision" in name or "projector" in name for name in trainable)
    logits = pair.student(input_ids=torch.tensor([[3, 4, 5]])).logits
    logits.sum().backward()
    assert all(p.grad is not None for p in pair.student.parameters() if p.requires_grad)  # or two processes would wait


def test_no_adapter_is_put_on_it(folders):
    pytest.importorskip("peft")
    for targets in ((), ("q_proj",)):
        lora = ModelConfig(use_peft=True, lora_r=2, lora_target_modules=targets)
        pair = load_pair(*folders, device="cpu", lora=lora)
        adapted = [name for name, p in pair.student.named_parameters() if p.requires_grad]
        assert adapted and all("language_model" in name and "lora_" in name for name in adapted)


def test_training_does_not_move_it(tmp_path):
    """Weight decay would, without any gradient; a pair made by hand is looked at too."""
    student, teacher = small_model("gemma3"), small_model("llama", 2)
    pair = Pair(teacher, student, byte_level_tokenizer(), 23, (1,), ())
    before = {name: p.clone() for name, p in student.named_parameters()}
    with pytest.warns(SwitchKDWarning, match="model.vision_tower, model.multi_modal_projector: frozen"):
        t = trainer(tmp_path, pair, mix=Generated(0.0), weight_decay=0.5)
    t.train_step()
    moved = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert moved and not any("vision" in name or "projector" in name for name in moved)


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "opt", "mixtral", "qwen3_moe", "deepseek_v3", "gemma3n_text", "gpt_oss"]
)
def test_text_models_keep_every_weight(name):
    """Also experts that a short text is not sent to."""
    model = small_model(name) if name not in ("llama", "gpt2", "opt") else tiny_model(name)
    assert freeze_beside_text(model) == ()
    assert all(p.requires_grad for p in model.parameters())


def test_a_module_that_is_never_called_is_named_whole():
    model = tiny_model("llama")
    model.model.extra = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model.model.layers[1].unused = torch.nn.Parameter(torch.zeros(2))
    assert set(beside_text(model)) == {
        "model.extra.0.weight", "model.extra.0.bias", "model.extra.1.weight", "model.extra.1.bias", "model.layers.1.unused",
    }  # fmt: skip
    assert set(freeze_beside_text(model)) == {"model.extra", "model.layers.1.unused"}
    assert freeze_beside_text(model) == () and "frozen" in frozen_note(("model.extra",))
