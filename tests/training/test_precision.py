"""Training in bfloat16 moves what training in float32 moves: weights and moments are in float32, products in bfloat16."""

import dataclasses
import json

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import AutocastKwargs, DistributedDataParallelKwargs
from safetensors.torch import load_file
from tiny import FAMILIES, VOCAB, byte_level_tokenizer, pair_on_disk, save_llama, tiny_model, toy_examples, toy_pair
from transformers import AutoModelForCausalLM

from switchkd.base.errors import ConfigError
from switchkd.base.settings import from_dict, to_dict
from switchkd.cli.main import main
from switchkd.data.texts import collate
from switchkd.decoding.decode import decode
from switchkd.evaluation.results import read_results
from switchkd.methods.divergences import log_probs
from switchkd.methods.mixes import Generated, GroundTruth
from switchkd.methods.objective import CrossEntropy
from switchkd.methods.objectives import ForwardKL
from switchkd.methods.policies import Switch
from switchkd.models import settings as precision
from switchkd.models.adapters import add_adapter, has_adapter
from switchkd.models.pair import load_pair
from switchkd.models.settings import ModelConfig, cast_weights
from switchkd.training import learner as learner_module
from switchkd.training import loss as loss_module
from switchkd.training.checkpoint import load_weights, save_model
from switchkd.training.optimizer import Masters, adamw
from switchkd.training.settings import TrainConfig
from switchkd.training.trainer import Trainer

SETTINGS = TrainConfig(
    objective=ForwardKL(), mix=GroundTruth(), max_new_tokens=6, per_device_train_batch_size=4, gradient_accumulation_steps=2,
    lr_scheduler_type="constant", max_steps=12, save_steps=6, sample_steps=0, seed=3,
)  # fmt: skip


def trainer(tmp_path, pair=None, accelerator=None, **changes):
    config = dataclasses.replace(SETTINGS, output_dir=str(tmp_path), **changes)
    return Trainer(pair or toy_pair(dtype=torch.float32), toy_examples(), config, accelerator)


def weights_of(model):
    return {name: parameter.detach().double().clone() for name, parameter in model.named_parameters()}


@torch.no_grad()
def kl_of(weights, pair):
    """The loss on all examples of a student with these weights, in float64: no rounding but that of the weights."""
    student = tiny_model("llama", 1, torch.float64)
    for name, parameter in student.named_parameters():
        parameter.copy_(weights[name])
    teacher = tiny_model("llama", 2, torch.float64)
    batch = collate([(e.prompt_ids, e.completion_ids) for e in toy_examples()])
    logits = [model(batch.input_ids, attention_mask=batch.attention_mask).logits for model in (teacher, student)]
    p, q = (log_probs(each[:, :-1][batch.loss_mask[:, 1:]]) for each in logits)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def moved(tmp_path, learning_rate, dtype):
    """The share of weights that training moves, by how much the loss falls, and the moments of every weight."""
    pair = toy_pair(dtype=torch.float32)
    before = weights_of(pair.student)
    t = trainer(tmp_path / dtype, pair, learning_rate=learning_rate, dtype=dtype)
    for _ in range(SETTINGS.max_steps):
        t.train_step()
    after = {name: weight.detach().double() for name, weight in t.learner.masters.named.items()}
    share = sum((after[name] != before[name]).sum().item() for name in before) / sum(w.numel() for w in before.values())
    moments = torch.cat(
        [t.learner.optimizer.state[w]["exp_avg_sq"].flatten() for w in t.learner.masters.named.values()]
    )
    return share, kl_of(before, pair) - kl_of(after, pair), moments


@pytest.mark.parametrize("learning_rate", [5e-6, 1e-5, 2e-5])
def test_bfloat16_moves_what_float32_moves(tmp_path, learning_rate):
    """As many weights to a percent, the loss to a tenth of its fall, and second moments that go on moving."""
    share, fall, moments = moved(tmp_path, learning_rate, "float32")
    ours, our_fall, our_moments = moved(tmp_path, learning_rate, "bfloat16")
    assert share > 0.9 and fall > 0
    assert ours == pytest.approx(share, abs=0.01)
    assert our_fall == pytest.approx(fall, rel=0.1)
    assert our_moments.sum().item() == pytest.approx(moments.sum().item(), rel=0.1)


class Narrow(Masters):
    """The mistake: the weights that the model multiplies by are those that the optimizer updates."""

    def __init__(self, model, compute=None):
        cast_weights(model, torch.bfloat16)
        self.model, self._copies, self.named = model, {}, dict(model.named_parameters())


def test_a_mutant_without_masters_does_not_move(tmp_path, monkeypatch):
    monkeypatch.setattr(learner_module, "Masters", Narrow)
    with pytest.raises(ConfigError, match=r"AdamW would update weights in torch\.bfloat16"):
        moved(tmp_path, 5e-6, "bfloat16")
    monkeypatch.setattr(
        learner_module, "adamw", lambda weights, config: torch.optim.AdamW(weights, config.learning_rate)
    )
    t = trainer(tmp_path, dtype="bfloat16", learning_rate=5e-6)
    before = weights_of(t.student)
    for _ in range(SETTINGS.max_steps):
        t.train_step()
    share = sum((weight != before[name]).sum().item() for name, weight in weights_of(t.student).items())
    assert share < 0.1 * sum(weight.numel() for weight in before.values())  # the test above asks for more than 0.9


def test_gradients_of_many_passes_are_added_in_float32():
    """In bfloat16 a sum stands still once it is 256 times what is added."""
    layer = torch.nn.Linear(1, 1, bias=False)
    ours = Masters(layer, torch.bfloat16)
    for _ in range(1000):
        layer(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
    assert layer.weight.dtype == torch.bfloat16 and layer.weight.grad is None
    assert ours.named["weight"].grad.dtype == torch.float32 and ours.named["weight"].grad.item() == 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_that_multiplies_in_float32_is_its_own_master(dtype):
    model = tiny_model(dtype=dtype)
    found = Masters(model).named
    assert all(found[name] is parameter for name, parameter in model.named_parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_in_bfloat16_is_what_from_pretrained_gives(tmp_path, family):
    """Also where weights are tied, and angles of positions stay in float32."""
    model = tiny_model(family, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    Masters(model, torch.bfloat16)
    assert dict(model.named_parameters()).keys() == dict(expected.named_parameters()).keys()
    for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name
    assert {angles.dtype for name, angles in model.named_buffers() if "inv_freq" in name} <= {torch.float32}
    ids = torch.tensor([[3, 4, 5, 6]])
    assert torch.equal(model(ids).logits, expected(ids).logits)


@pytest.mark.parametrize("lora", [False, True])
def test_a_run_in_bfloat16_goes_on_bit_for_bit(tmp_path, lora):
    """Masters and moments come back unrounded; an adapter's too."""

    def pair():
        made = toy_pair(dtype=torch.float32)
        if lora:
            add_adapter(made.student, ModelConfig(use_peft=True, lora_r=4), seed=0)
        return made

    settings = {
        "dtype": "bfloat16",
        "mix": Generated(0.5),
        "policy": Switch(tau_0=0.6, decay=0.05),
        "learning_rate": 1e-3,
    }
    straight = trainer(tmp_path / "straight", pair(), **settings)
    straight.train()
    trainer(tmp_path / "parts", pair(), **settings | {"max_steps": 6}).train()
    resumed = trainer(tmp_path / "parts", pair(), **settings)
    resumed.resume()
    assert resumed.step == 6
    resumed.train()
    for name, weight in straight.learner.masters.named.items():
        assert weight.dtype == torch.float32 and torch.equal(weight, resumed.learner.masters.named[name])
        for key, moment in straight.learner.optimizer.state[weight].items():
            assert moment.dtype == torch.float32
            assert torch.equal(moment, resumed.learner.optimizer.state[resumed.learner.masters.named[name]][key])
    for one, two in zip(straight.student.parameters(), resumed.student.parameters(), strict=True):
        assert one.dtype == torch.bfloat16 and torch.equal(one, two)
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    saved = load_file(tmp_path / "straight" / "checkpoint-12" / name)
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert has_adapter(straight.student) == lora


def test_a_checkpoint_opens_as_what_it_holds(tmp_path):
    """config.json says float32, tied weights are saved once, and a rounded model can be made of it."""
    pair = toy_pair("gemma", torch.float32)
    t = trainer(tmp_path, pair, dtype="bfloat16")
    t.train()
    folder = tmp_path / "checkpoint-12"
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    opened = AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(t.learner.masters.named[name], p) for name, p in opened.named_parameters())
    other = tiny_model("gemma", 9, torch.bfloat16)
    load_weights(folder, other)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), t.student.parameters(), strict=True))


def run(tmp_path, name, *more, **pair):
    options = ["--template", "none", "--max-new-tokens", "5", "--max-steps", "3", "--eval-samples", "3", "--quiet"]
    options += ["--learning-rate", "1e-3", "--eval-max-new-tokens", "4", "--output-dir", str(tmp_path / name), *more]
    for setting, value in pair.items():
        options += [f"--{setting.replace('_', '-')}", value]
    assert main(["train", "switch", *options]) == 0
    return tmp_path / name


def in_folder(student):
    return {str(tensor.dtype).removeprefix("torch.") for tensor in load_file(student / "model.safetensors").values()}


@pytest.mark.parametrize("folder_dtype", ["bfloat16", "float32"])
def test_a_student_is_saved_as_its_folder_was_and_scored_as_it_is_saved(tmp_path, folder_dtype):
    pair = pair_on_disk(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(pair["student_model_name_or_path"], dtype=folder_dtype)
    model.save_pretrained(pair["student_model_name_or_path"])
    ours = run(tmp_path, "run", **pair)
    assert in_folder(ours / "student") == {folder_dtype}
    assert json.loads((ours / "student" / "config.json").read_text())["dtype"] == folder_dtype
    options = ["--only", "student", "--eval-samples", "3", "--output-file", str(tmp_path / "again.json")]
    assert main(["evaluate", str(ours), *options]) == 0
    again = read_results(tmp_path / "again.json")["student"]
    after = read_results(ours / "evaluation.json")["student after"]
    assert again.means() == pytest.approx(after.means(), rel=0, abs=0, nan_ok=True) and again.model == after.model
    assert in_folder(ours / "checkpoint-3") == {"float32"}


def test_the_dtype_of_the_saved_student_can_be_named(tmp_path):
    pair = pair_on_disk(tmp_path)
    ours = run(tmp_path, "run", "--save-dtype", "bfloat16", "--bf16", **pair)
    assert in_folder(ours / "student") == {"bfloat16"} and in_folder(ours / "checkpoint-3") == {"float32"}
    settings = (ours / "config.yaml").read_text()
    assert "\ndtype: bfloat16\n" in settings and "\nteacher_dtype: float32\n" in settings and "bf16:" not in settings
    assert main(["check", str(ours), "--eval-samples", "2"]) == 0  # what it wrote down is what its models say


def test_a_merged_adapter_is_rounded_once(tmp_path):
    """The sum is made in float32, also where products are in bfloat16, and then rounded to the folder's dtype."""
    pair = pair_on_disk(tmp_path)
    options = ["--bf16", "--use-peft", "--lora-r", "4"]
    apart, whole = run(tmp_path, "apart", *options, **pair), run(tmp_path, "whole", *options, "--merge", **pair)
    adapter = load_file(apart / "student" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    merged, base = (load_file(folder / "model.safetensors") for folder in (whole / "student", tmp_path / "student"))
    name = "model.layers.0.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
    expected = (
        base[f"{name}.weight"].bfloat16().double() + 2 * b @ a
    )  # lora_alpha / lora_r, of what the base multiplies in
    scale = TrainConfig().lora_alpha / 4 / 2
    expected = base[f"{name}.weight"].bfloat16().double() + 2 * scale * b @ a
    torch.testing.assert_close(merged[f"{name}.weight"].double(), expected, atol=1e-7, rtol=1e-6)


def test_an_opened_adapter_goes_on_unrounded(tmp_path):
    base = save_llama(tmp_path / "base", byte_level_tokenizer(), 1)
    lora = ModelConfig(use_peft=True, lora_r=4)
    first = load_pair("base", base, lora=lora, device="cpu")
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, first.student.parameters()):
            parameter.normal_()
    save_model(tmp_path / "adapter", first.student, first.tokenizer)
    opened = load_pair("base", str(tmp_path / "adapter"), lora=lora, device="cpu", dtype="bfloat16").student
    trained = {name: p for name, p in first.student.named_parameters() if p.requires_grad}
    assert all(torch.equal(p, trained[name]) for name, p in opened.named_parameters() if p.requires_grad)
    assert {p.dtype for p in opened.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_auto_is_what_the_device_is_good_at(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert precision.chosen_dtype("auto", cpu) == "float32"
    for good, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, good=good: good)
        config = precision.with_dtypes(TrainConfig(), cuda)
        assert (config.dtype, config.teacher_dtype) == (dtype, dtype)
    assert precision.with_dtypes(TrainConfig(dtype="float64"), cpu).teacher_dtype == "float64"
    mixed = precision.with_dtypes(TrainConfig(dtype="bfloat16", teacher_dtype="float16"), cpu)
    assert (mixed.dtype, mixed.teacher_dtype) == ("bfloat16", "float16")
    own = precision.with_dtypes(TrainConfig(teacher_model_name_or_path="base", use_peft=True, bf16=True), cpu)
    assert own.teacher_dtype == "bfloat16"


def test_bf16_is_another_name_for_a_dtype():
    config = TrainConfig(bf16=True)
    assert config.dtype == "bfloat16" and "bf16" not in to_dict(config)
    assert (
        from_dict(TrainConfig, {"bf16": True}, "recipe") == config == from_dict(TrainConfig, to_dict(config), "record")
    )
    assert dataclasses.replace(config, dtype="float32").dtype == "float32"
    with pytest.raises(
        ConfigError, match="bf16 means dtype bfloat16, and dtype is float32; give --dtype bfloat16 alone"
    ):
        TrainConfig(bf16=True, dtype="float32")
    with pytest.raises(ConfigError, match="cannot be in teacher_dtype bfloat16 beside dtype float32"):
        TrainConfig(teacher_model_name_or_path="base", use_peft=True, dtype="float32", teacher_dtype="bfloat16")


def test_pairs_are_loaded_in_the_dtypes_that_are_named(tmp_path):
    pair = pair_on_disk(tmp_path)
    names = pair["teacher_model_name_or_path"], pair["student_model_name_or_path"]
    for given, found in (
        ({}, (torch.float32, torch.float32)),
        ({"dtype": "float64"}, (torch.float64, torch.float64)),
        ({"dtype": "bfloat16"}, (torch.float32, torch.bfloat16)),
        ({"teacher_dtype": "bfloat16"}, (torch.bfloat16, torch.float32)),
        ({"dtype": "auto", "teacher_dtype": "float16"}, (torch.float16, torch.float32)),
    ):
        loaded = load_pair(*names, device="cpu", **given)
        assert (loaded.teacher.dtype, loaded.student.dtype) == found
    with pytest.raises(ConfigError, match="unknown dtype 'bf16'"):
        load_pair(*names, device="cpu", teacher_dtype="bf16")


def test_a_student_in_float16_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="a student in float16 cannot be trained"):
        trainer(tmp_path, toy_pair(dtype=torch.float16))


def test_a_student_that_was_loaded_in_bfloat16_gets_masters_too(tmp_path):
    t = trainer(tmp_path, toy_pair(dtype=torch.bfloat16), learning_rate=1e-6)
    t.train_step()
    assert {w.dtype for w in t.learner.masters.named.values()} == {torch.float32}
    assert any(not torch.equal(w, w.bfloat16().float()) for w in t.learner.masters.named.values())
    assert t.student.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match=r"AdamW would update weights in torch\.bfloat16"):
        adamw(list(t.student.parameters()), SETTINGS)


@pytest.mark.parametrize("loaded", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_a_student_multiplies_in_what_the_settings_say_whatever_it_was_loaded_in(tmp_path, dtype, loaded):
    t = trainer(tmp_path, toy_pair(dtype=loaded), dtype=dtype)
    assert {p.dtype for p in t.student.parameters()} == {getattr(torch, dtype)}
    assert t.learner.masters.dtype == torch.promote_types(
        torch.promote_types(loaded, getattr(torch, dtype)), torch.float32
    )
    t.train_step()


def test_decoding_and_scores_use_the_same_rounded_weights(tmp_path):
    t = trainer(tmp_path, dtype="bfloat16", mix=Generated(1.0), learning_rate=1e-2)
    t.train_step()
    rounded = tiny_model("llama", 5, torch.bfloat16)
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            parameter.copy_(t.learner.masters.named[name])
    prompts = [e.prompt_ids for e in toy_examples()]
    settings = {"policy": Switch(tau_0=0.6), "max_new_tokens": 6, "vocab_size": VOCAB}
    texts = [decode(student, t.pair.teacher, prompts, **settings) for student in (t.student, rounded)]
    assert [r.completion_ids for r in texts[0]] == [r.completion_ids for r in texts[1]]


def test_memory_is_told_by_part_and_dtype(tmp_path, capsys):
    pair = pair_on_disk(tmp_path)
    options = [option for name, value in pair.items() for option in (f"--{name.replace('_', '-')}", value)]
    assert main(["check", "switch", *options, "--bf16", "--template", "none"]) == 0
    shown = capsys.readouterr().out
    for part in (
        "the student's trained weights, as they are updated, in float32: ",
        "the student as it multiplies, in bfloat16: ",
        "gradients, in float32: ",
        "the optimizer's moments, in float32: ",
        "teacher, in float32: ",
    ):
        assert part in shown


# --- what the loss works on ---------------------------------------------------------------------------------------


def test_chunks_of_the_loss_are_by_device():
    assert loss_module.sizes_on(torch.device("cpu")).piece <= 2**22
    assert 2**28 <= loss_module.sizes_on(torch.device("cuda")).piece <= 2**29
    assert 2**28 <= loss_module.sizes_on(torch.device("cuda")).chunk <= 2**29


def test_no_gradient_is_computed_where_nobody_wants_one(tmp_path, monkeypatch):
    """Of validation and of finding what is not finite; a training step does compute it."""
    calls, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or grad(*a, **k))
    t = trainer(tmp_path)
    with torch.no_grad():
        before = t.learner.loss(toy_examples(4), CrossEntropy())
    assert not calls
    after = t.learner.loss(toy_examples(4), CrossEntropy())
    assert calls and torch.equal(before, after)


# --- launchers ----------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh():
    """accelerate keeps what the first accelerator of a process was told."""

    def reset():
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()

    reset()
    yield
    reset()


def test_what_an_accelerator_was_told_and_means_the_same_here_is_taken_over(tmp_path, fresh):
    """The gradient of 2 x 4 rows is that of 8, and products are in bfloat16."""
    ours = trainer(tmp_path, gradient_accumulation_steps=4, dtype="bfloat16").train_step()[0]
    AcceleratorState._reset_state()
    told = Accelerator(cpu=True, gradient_accumulation_steps=4, mixed_precision="bf16")
    theirs = trainer(tmp_path, accelerator=told, gradient_accumulation_steps=1)
    assert theirs.config.gradient_accumulation_steps == 4 and theirs.config.dtype == "bfloat16"
    found = theirs.train_step()[0]
    assert (found["loss"], found["grad_norm"]) == (ours["loss"], ours["grad_norm"])


@pytest.mark.parametrize(
    ("told", "own", "message"),
    [
        ({"mixed_precision": "fp16"}, {}, "mixed_precision fp16, which has no meaning here"),
        ({"dynamo_backend": "eager"}, {}, "the dynamo backend EAGER, which has no meaning here"),
        ({"kwargs_handlers": [DistributedDataParallelKwargs()]}, {}, "DistributedDataParallelKwargs"),
        ({"kwargs_handlers": [AutocastKwargs(enabled=False)]}, {}, "AutocastKwargs"),
        ({"device_placement": False}, {}, "device_placement False, which has no meaning here"),
        ({"mixed_precision": "bf16"}, {"dtype": "float32"}, "dtype is float32 in the settings and bfloat16 in the accelerator"),
        ({"gradient_accumulation_steps": 4}, {}, "gradient_accumulation_steps is 2 in the settings and 4 in the accelerator"),
    ],
)  # fmt: skip
def test_what_an_accelerator_was_told_otherwise_is_refused_by_name(tmp_path, fresh, told, own, message):
    try:
        accelerator = Accelerator(cpu=True, **told)
    except ValueError:
        accelerator = Accelerator(cpu=True)  # fp16 asks for a GPU
        accelerator.state._mixed_precision = told["mixed_precision"]
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, accelerator=accelerator, **own)


def test_kept_in_float32_stays_there():
    """Some architectures name weights that must not be rounded."""
    model = tiny_model(dtype=torch.float32)
    model._keep_in_fp32_modules_strict = {"norm"}
    ours = Masters(model, torch.bfloat16)
    assert model.model.norm.weight.dtype == torch.float32 and ours.named["model.norm.weight"] is model.model.norm.weight
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert cast_weights(model, torch.float32) is None and model.dtype == torch.float32
