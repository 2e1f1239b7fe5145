"""LoRA students, and their own base as the teacher: what is trained, saved and loaded, and that the base stays the base."""

import dataclasses
import json
import sys
from contextlib import nullcontext

import pytest
import torch
from families import small_model
from tiny import (
    POLICIES,
    VOCAB,
    assert_same,
    byte_level_tokenizer,
    retold,
    save,
    save_llama,
    tiny_model,
    tiny_tokenizer,
    toy_examples,
    toy_pair,
)
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from switchkd import AdaSwitch, Switch, TeacherOnly, decode, decode_reference
from switchkd.base.errors import CheckpointError, ConfigError, ModelError
from switchkd.base.settings import from_dict, to_dict
from switchkd.cli.main import main
from switchkd.data.texts import collate
from switchkd.decoding.settings import DecodeSettings
from switchkd.evaluation.evaluate import evaluate
from switchkd.evaluation.generate_backend import complete_by_generate
from switchkd.evaluation.settings import EvalSettings
from switchkd.evaluation.tasks import TASKS
from switchkd.forward.base_model import BaseModel
from switchkd.forward.head import Head, response_hidden
from switchkd.forward.proof import prove
from switchkd.methods.mixes import Generated
from switchkd.methods.objectives import ForwardKL
from switchkd.methods.policy import StudentOnly
from switchkd.models import adapters
from switchkd.models.adapters import add_adapter, has_adapter, merged
from switchkd.models.loading import load_model, load_tokenizer
from switchkd.models.pair import Pair, load_pair
from switchkd.models.settings import ModelConfig
from switchkd.runner.architecture import num_parameters
from switchkd.runner.modes import head_inputs
from switchkd.runs import finishing as rehearsal
from switchkd.runs.preflight import memory_estimate
from switchkd.teachers.said import TeacherStates
from switchkd.teachers.states import TeacherCache
from switchkd.teachers.store import weights_sha256
from switchkd.training.checkpoint import checkpoints, save_model
from switchkd.training.loss import response_tokens, total
from switchkd.training.optimizer import Masters
from switchkd.training.settings import TrainConfig
from switchkd.training.trainer import Trainer
from switchkd.writing.teacher_texts import teacher_texts

LORA = ModelConfig(use_peft=True, lora_r=4, lora_alpha=8)
SETTINGS = TrainConfig(
    policy=Switch(tau_0=0.6, decay=0.05), mix=Generated(0.5), objective=ForwardKL(), max_new_tokens=6, max_steps=6,
    per_device_train_batch_size=4, learning_rate=3e-3, save_steps=0, seed=3,
)  # fmt: skip
ROWS = [([3, 4, 5], [6, 7, 1]), ([8], [9, 9, 1, 9, 9])]
PROMPTS = [[3, 4, 5], [7], [2, 2, 9, 11, 4, 6, 8], [5, 5]]
IDS = torch.tensor([[3, 9, 4, 8, 2]])


def stir(model):
    """Give the adapter an effect: its second factor starts at zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return model


def trainer(folder, pair, examples=None, **changes):
    return Trainer(pair, examples or toy_examples(), dataclasses.replace(SETTINGS, output_dir=str(folder), **changes))


def lines(folder, name):
    """The records of a run's file, without what they say about time."""
    records = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{k: v for k, v in record.items() if "second" not in k and k != "memory_gib"} for record in records]


def lora_student(family="llama", settings=LORA, stirred=True, dtype=torch.float64):
    student = tiny_model(family, 1, dtype)
    add_adapter(student, settings, seed=0)
    return stir(student) if stirred else student


def self_pair(family="llama", settings=LORA, stirred=True, dtype=torch.float64):
    """A LoRA student and its own base as the teacher."""
    student = lora_student(family, settings, stirred, dtype)
    return Pair(BaseModel(student), student, byte_level_tokenizer(), VOCAB, (1,), ())


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def adapter_parameters(model):
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


@pytest.fixture
def base(tmp_path):
    return save(tmp_path / "base", seed=1)


# --- what is trained ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_the_adapter_gets_gradients(family, checkpointing, tmp_path):
    pair = self_pair(family)
    t = trainer(tmp_path, pair, mix=Generated(1.0), gradient_checkpointing=checkpointing)
    seen = {}
    t.learner.optimizer.register_step_pre_hook(
        lambda *_: seen.update({n: p.grad for n, p in pair.student.named_parameters()})
    )
    t.train_step()
    for name, gradient in seen.items():
        assert (gradient is not None and gradient.abs().max() > 0) == ("lora_" in name), name
    teacher = dict(pair.teacher.named_parameters())
    assert len(teacher) == len(seen) - len(adapter_parameters(pair.student)) > 0
    assert all(p.grad is None and not p.requires_grad for p in teacher.values())
    assert num_parameters(pair.teacher) == num_parameters(tiny_model(family))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_all_linear_layers_of_the_body_are_adapted_and_the_head_is_not(family):
    student = lora_student(family)
    linear = {"llama": 7, "gpt2": 4}[family]
    assert len(adapters.adapter_layers(student)) == 2 * linear
    assert type(student.get_output_embeddings()) is torch.nn.Linear
    assert not any(module.training for module in student.modules())
    assert {p.dtype for p in student.parameters()} == {torch.float64}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_loss_of_a_lora_student_is_the_dense_one(family):
    """Value and gradient against plain autograd through all logits, the base of another copy as the teacher."""
    pair, teacher = self_pair(family), tiny_model(family, 1)
    batch = collate(ROWS)
    tokens = response_tokens(batch, [[0] * len(completion) for _, completion in ROWS])
    predicts = batch.loss_mask.roll(-1, dims=1)
    predicts[:, -1] = False
    arguments = dict(attention_mask=batch.attention_mask, position_ids=batch.position_ids)
    with torch.no_grad():
        logits_p = teacher(batch.input_ids, **arguments).logits[predicts]
        hidden_p = response_hidden(pair.teacher, batch)
    logits_q = pair.student(batch.input_ids, **arguments).logits[predicts]
    dense = ForwardKL().loss(logits_p.log_softmax(-1), logits_q.log_softmax(-1), tokens).sum()
    states, head = TeacherStates(Head.of(pair.teacher, VOCAB), hidden_p), Head.of(pair.student, VOCAB)
    ours = total(ForwardKL(), states, head, response_hidden(pair.student, batch), tokens)
    torch.testing.assert_close(ours, dense, atol=1e-12, rtol=1e-12)
    parameters = list(adapter_parameters(pair.student).values())
    for a, b in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(dense, parameters), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


def test_a_new_adapter_is_keyed_by_the_seed_and_leaves_random_state_alone():
    before = torch.random.get_rng_state()
    made = [tiny_model("llama", 1) for _ in range(3)]
    for model, seed in zip(made, (0, 0, 1), strict=True):
        add_adapter(model, LORA, seed)
    assert torch.equal(torch.random.get_rng_state(), before)
    first, again, other = (torch.cat([p.flatten() for p in adapter_parameters(m).values()]) for m in made)
    assert torch.equal(first, again) and not torch.equal(first, other)


# --- the base as teacher ------------------------------------------------------------------------------------------


def test_a_zero_adapter_is_its_base_everywhere(tmp_path):
    pair = self_pair(stirred=False)
    assert torch.equal(logits(pair.student), logits(pair.teacher))
    reference = decode_reference(pair.student, pair.teacher, PROMPTS, Switch(), 8, eos_token_ids=[])
    rollouts = decode(pair.student, pair.teacher, PROMPTS, Switch(), 8, eos_token_ids=[])
    for rollout in [*reference, *rollouts]:
        assert max(map(abs, rollout.divergences)) < 1e-14  # the mixture in it rounds
    assert trainer(tmp_path, pair, mix=Generated(0.0)).train_step()[0]["loss"] == 0.0


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_after_training_the_teacher_is_still_the_original_base_to_the_bit(tmp_path, dropout):
    pair, original = self_pair(settings=dataclasses.replace(LORA, lora_dropout=dropout)), tiny_model("llama", 1)
    trainer(tmp_path, pair, max_steps=3).train()
    assert torch.equal(logits(pair.teacher), logits(original))
    assert not torch.equal(logits(pair.student), logits(original))
    for (_, a), b in zip(pair.teacher.named_parameters(), original.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_base_holds_no_second_copy_of_the_weights():
    pair = self_pair()
    assert {p.data_ptr() for p in pair.teacher.parameters()} < {p.data_ptr() for p in pair.student.parameters()}
    config = TrainConfig(teacher_model_name_or_path="base", use_peft=True)
    need = memory_estimate(config, pair, Masters(pair.student))
    trained = 8 * sum(p.numel() for p in adapter_parameters(pair.student).values())
    assert need["gradients, in float64"] == trained and need["the optimizer's moments, in float64"] == 2 * trained
    assert need["teacher, in float64"] == 0


def test_the_adapter_is_on_again_after_a_teacher_forward_that_raises():
    pair = self_pair()
    expected = logits(pair.student)
    pair.student.train()

    def broken(*_):
        assert torch.equal(pair.student.model.layers[1].mlp.down_proj.weight, weight)
        raise KeyboardInterrupt

    weight = pair.student.model.layers[1].mlp.down_proj.weight
    handle = pair.student.lm_head.register_forward_pre_hook(broken)
    with pytest.raises(KeyboardInterrupt):
        logits(pair.teacher)
    handle.remove()
    assert pair.student.training
    pair.student.eval()
    assert torch.equal(logits(pair.student), expected) and not torch.equal(logits(pair.teacher), expected)


def test_the_base_has_no_dropout_while_its_student_trains():
    """A teacher with the student's dropout would be another teacher at every step."""
    pair = self_pair("gpt2", dataclasses.replace(LORA, lora_dropout=0.5))
    for module in pair.student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    expected = logits(pair.teacher)
    pair.student.train()
    assert torch.equal(logits(pair.teacher), expected)
    assert pair.student.training and all(module.training for module in pair.student.modules())
    pair.teacher.eval().train().requires_grad_(False)
    assert pair.student.training and not pair.teacher.training
    assert all(p.requires_grad for p in adapter_parameters(pair.student).values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("policy", [Switch(tau_0=0.6, decay=0.03), AdaSwitch(window=2, ratio=1.1), TeacherOnly()])
def test_decoding_with_ones_own_base_is_lossless(family, policy):
    """Equal to the reference loop on the same pair, and on two models that share nothing: the merged one and the base."""
    pair = self_pair(family)
    reference = decode_reference(pair.student, pair.teacher, PROMPTS, policy, 9)
    assert_same(decode_reference(merged(pair.student), tiny_model(family, 1), PROMPTS, policy, 9), reference)
    for block, batch, drafter in ((1, 3, "student"), (3, 2, "teacher"), (5, 4, "student"), ("auto", None, "auto")):
        out = decode(
            pair.student, pair.teacher, PROMPTS, policy, 9, block_size=block, batch_size=batch, drafter=drafter
        )
        assert_same(out, reference)


def test_these_settings_let_both_speak():
    pair = self_pair()
    for name in ("switch_exponential", "adaswitch"):
        rollouts = decode(pair.student, pair.teacher, PROMPTS, POLICIES[name], 9, eos_token_ids=[])
        assert {speaker for r in rollouts for speaker in r.speakers} == {0, 1}


@torch.no_grad()
def test_hidden_states_kept_while_decoding_are_the_bases():
    pair = self_pair()
    base = tiny_model("llama", 1)
    for rollout in decode(pair.student, pair.teacher, PROMPTS, POLICIES["switch_constant"], 8, keep_hidden=True):
        with head_inputs(base) as entered:
            base(torch.tensor([rollout.prompt_ids + rollout.completion_ids]))
        expected = entered[0][0, len(rollout.prompt_ids) - 1 : -1]
        torch.testing.assert_close(rollout.said, expected, atol=1e-10, rtol=1e-10)


def test_single_precision_pairs_decode_through_packed_layers(monkeypatch):
    """Both models, the adapter's layers among them; afterwards nothing is left on the layers."""
    pair = self_pair(dtype=torch.float32)
    calls = []
    original = torch.ops.mkl._mkl_linear
    monkeypatch.setattr(torch.ops.mkl, "_mkl_linear", lambda *args: calls.append(1) or original(*args))
    [row] = decode(pair.student, pair.teacher, [[3, 4, 5]], TeacherOnly(), 6, eos_token_ids=[])
    [again] = decode(pair.teacher, pair.teacher, [[3, 4, 5]], TeacherOnly(), 6, eos_token_ids=[])
    [plain] = decode_reference(
        pair.student, tiny_model("llama", 1, torch.float32), [[3, 4, 5]], TeacherOnly(), 6, eos_token_ids=[]
    )
    assert calls and row.completion_ids == again.completion_ids == plain.completion_ids
    assert not any("forward" in vars(module) for module in pair.student.modules())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3-hybrid"])
def test_the_cache_probe_passes_on_both(family):
    pair = self_pair(family)
    prove(pair.teacher)
    prove(pair.student)


def test_a_base_has_the_names_and_the_checksum_of_the_base_loaded_alone():
    """Whatever its student has learnt: else it would be another teacher after every step, to a store and to a comparison."""
    pair, plain = self_pair(), tiny_model("llama", 1)
    assert [name for name, _ in pair.teacher.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert pair.teacher.state_dict().keys() == plain.state_dict().keys()
    assert weights_sha256(pair.teacher) == weights_sha256(plain) != weights_sha256(pair.student)


@pytest.mark.parametrize("kind", ["text", "hidden", "top_k"])
def test_what_a_base_is_asked_once_is_what_the_base_loaded_alone_says(tmp_path, kind):
    """A store that the one has filled is the other's, and the other way round: byte for byte, so that neither is refused it."""
    pair, examples = self_pair(), toy_examples(5)
    other = Pair(tiny_model("llama", 1), tiny_model("llama", 2), pair.tokenizer, VOCAB, (1,), ())

    def ask(asked, folder):
        if kind == "text":
            return teacher_texts(asked, examples, folder, DecodeSettings(TeacherOnly(), max_new_tokens=4))
        TeacherCache.build(asked, examples, folder, kind, top_k=3)

    for folder, first, second in (("one", pair, other), ("other", other, pair)):
        assert ask(first, tmp_path / folder) == ask(second, tmp_path / folder)
    one, two = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("one", "other"))
    assert one == two


def test_a_base_generates_as_the_base_loaded_alone():
    pair, plain = self_pair(), tiny_model("llama", 1)
    arguments = DecodeSettings(StudentOnly(), 6, temperature=0.0), [], VOCAB
    pair.student.generation_config.repetition_penalty = 5.0  # a hub's own, which is put aside
    written = complete_by_generate(pair.teacher, PROMPTS, *arguments)
    assert written == complete_by_generate(plain, PROMPTS, *arguments)
    assert written != complete_by_generate(pair.student, PROMPTS, *arguments)
    assert pair.student.generation_config.repetition_penalty == 5.0


def test_a_base_gives_out_no_method_and_no_part_that_would_run_with_the_adapter():
    """What it hands out is a plain value, or runs without the adapter: asked for by every name that the student has."""
    pair = self_pair()
    for name in dir(pair.student):
        if hasattr(torch.nn.Module, name) or name in vars(BaseModel):
            continue
        try:
            given = getattr(pair.teacher, name)
        except (AttributeError, FutureWarning):
            continue
        bound_to = getattr(given, "__self__", pair.teacher)
        assert bound_to is not pair.student and not isinstance(given, torch.nn.Module), name
    for name in ("model", "save_pretrained", "prepare_inputs_for_generation", "set_adapter"):
        with pytest.raises(
            AttributeError, match=f"gives out no '{name}', which would be the student's, with its adapter"
        ):
            getattr(pair.teacher, name)
    assert pair.teacher.config is pair.student.config and pair.teacher.dtype is torch.float64


def test_evaluating_against_ones_own_base():
    pair = self_pair()
    other = Pair(tiny_model("llama", 1), merged(pair.student), pair.tokenizer, VOCAB, (1,), ())
    settings = EvalSettings(max_new_tokens=4)

    def kl(p, model):
        p.tokenizer.batch_decode = lambda rows, **_: [""] * len(rows)
        return evaluate(p, model, toy_examples(5), TASKS["references"], settings).means()["forward_kl"]

    assert kl(pair, pair.student) == pytest.approx(kl(other, other.student), rel=1e-9)
    assert kl(pair, pair.student) > 0.01 and kl(pair, pair.teacher) == 0.0


# --- saved, loaded, merged, resumed -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_saved_adapter_opens_with_equal_logits_and_is_an_adapter_only(tmp_path, family, monkeypatch):
    save(tmp_path / "base", family, seed=1)
    monkeypatch.chdir(tmp_path)
    pair = load_pair("./base", "./base", dtype="float64", device="cpu", lora=LORA)
    save_model(tmp_path / "student", stir(pair.student), pair.tokenizer)
    files = {path.name for path in (tmp_path / "student").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= files
    assert not {"model.safetensors", "config.json"} & files
    monkeypatch.chdir(tmp_path / "student")  # the base's relative name means nothing here
    config = tmp_path / "student" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"inference_mode": True}))  # as peft itself saves it
    opened = load_pair(str(tmp_path / "base"), str(tmp_path / "student"), dtype="float64", device="cpu").student
    assert torch.equal(logits(opened), logits(pair.student))
    assert {n for n, p in opened.named_parameters() if p.requires_grad} == set(adapter_parameters(opened))
    assert not any(module.training for module in opened.modules())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float64)  # by peft's own reading
    torch.testing.assert_close(logits(plain), logits(pair.student), atol=1e-12, rtol=1e-12)


def test_equal_adapters_have_equal_files(tmp_path):
    for name in ("a", "b"):
        save_model(tmp_path / name, lora_student(), byte_level_tokenizer())
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    targets = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_a_merged_student_is_a_plain_model_of_equal_logits(tmp_path, family):
    student = lora_student(family)
    expected, before = logits(student), logits(BaseModel(student))
    save_model(tmp_path, merged(student), byte_level_tokenizer())
    assert not (tmp_path / "adapter_config.json").exists()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert not has_adapter(plain) and num_parameters(plain) == num_parameters(tiny_model(family))
    torch.testing.assert_close(logits(plain), expected, atol=1e-10, rtol=1e-10)
    assert torch.equal(logits(student), expected) and torch.equal(logits(BaseModel(student)), before)


@pytest.mark.parametrize("targets", [(), ("experts", "q_proj"), ("experts.down_proj",)])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_adapters_on_experts_are_saved_opened_and_merged(tmp_path, family, targets):
    """The weights of experts are no layers, and those of one module have their adapters around each other."""
    student = small_model(family)
    layers = {(): 14, ("experts", "q_proj"): 6, ("experts.down_proj",): 2}[targets]
    if family == "gpt_oss" and not targets:
        layers = 8  # peft does not know its experts by itself
    settings = dataclasses.replace(LORA, lora_target_modules=targets)
    student.save_pretrained(tmp_path / "base")
    student.name_or_path = str(tmp_path / "base")
    add_adapter(student, settings, seed=0)
    stir(student)
    assert len(adapters.adapter_layers(student)) == layers
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    save_model(tmp_path / "student", student, tiny_tokenizer())
    opened = load_model(str(tmp_path / "base"), "float64", "cpu")
    adapters.open_adapter(opened, tmp_path / "student", asked=settings)
    torch.testing.assert_close(logits(opened), logits(student), atol=1e-10, rtol=1e-10)
    assert (logits(opened) - logits(BaseModel(opened))).abs().max() > 0.1
    save_model(tmp_path / "merged", merged(student), tiny_tokenizer())
    plain = load_model(str(tmp_path / "merged"), "float64", "cpu")
    assert not has_adapter(plain) and num_parameters(plain) == num_parameters(BaseModel(student))
    torch.testing.assert_close(logits(plain), logits(student), atol=1e-10, rtol=1e-10)


def test_dropout_on_experts_is_refused_before_anything_is_trained():
    with pytest.raises(
        ConfigError, match=r"on the student, mixtral: .*lora_dropout != 0.* Change lora_dropout, or name"
    ):
        add_adapter(small_model("mixtral"), dataclasses.replace(LORA, lora_dropout=0.1), seed=0)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_resumed_run_is_the_straight_run_bit_for_bit(tmp_path, dropout):
    settings = dataclasses.replace(LORA, lora_dropout=dropout)

    def pair(seed):
        made = self_pair(settings=settings, stirred=False)
        with torch.no_grad():  # as if the new process had drawn another adapter
            for parameter in adapter_parameters(made.student).values():
                parameter += seed
        return made

    straight = trainer(tmp_path / "straight", pair(0), max_steps=4, save_steps=1)
    straight.train()
    for crash in (2, None):
        part = trainer(tmp_path / "parts", pair(0 if crash else 7), max_steps=4, save_steps=1)
        if not crash:
            part.resume()
            assert part.step == 1

        def on_step(metrics, _, crash=crash):
            if metrics["step"] == crash:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt) if crash else nullcontext():
            part.train(on_step)
    for a, b in zip(straight.pair.student.parameters(), part.pair.student.parameters(), strict=True):
        assert torch.equal(a, b)
        assert straight.learner.optimizer.state[a].keys() == part.learner.optimizer.state[b].keys()
        assert all(
            torch.equal(v, part.learner.optimizer.state[b][k]) for k, v in straight.learner.optimizer.state[a].items()
        )
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert lines(tmp_path / "parts", name) == lines(tmp_path / "straight", name)
    assert not list(tmp_path.glob("*/checkpoint-*/model*.safetensors"))


@pytest.mark.parametrize("other", [dict(lora_r=2), dict(lora_target_modules=("q_proj",))])
def test_a_checkpoint_of_another_adapter_is_refused(tmp_path, other):
    t = trainer(tmp_path, self_pair(), max_steps=1)
    t.train()
    wrong = trainer(tmp_path, self_pair(settings=dataclasses.replace(LORA, **other)))
    before = [p.clone() for p in wrong.pair.student.parameters()]
    with pytest.raises(CheckpointError, match=r"checkpoint-1 belongs to another model: .* first base_model\.model\."):
        wrong.resume()
    assert all(torch.equal(a, b) for a, b in zip(before, wrong.pair.student.parameters(), strict=True))
    weights = checkpoints(tmp_path)[-1] / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is damaged"):
        trainer(tmp_path, self_pair(), resume_from="checkpoint-1").resume()


# --- by name ------------------------------------------------------------------------------------------------------


def test_base_as_a_teachers_name_gives_the_students_own_weights(base):
    pair = load_pair("base", str(base), device="cpu", lora=LORA)
    assert "so the student starts as its teacher" in pair.warnings[0]
    assert isinstance(pair.teacher, BaseModel) and pair.teacher.student is pair.student
    assert {n for n, p in pair.student.named_parameters() if p.requires_grad} == set(adapter_parameters(pair.student))
    assert torch.equal(logits(pair.teacher), logits(load_model(str(base), device="cpu")))


def test_a_saved_adapter_goes_on_with_its_base_as_teacher(base, tmp_path):
    first = load_pair("base", str(base), device="cpu", lora=LORA)
    save_model(tmp_path / "student", stir(first.student), first.tokenizer)
    for lora in (None, LORA):
        pair = load_pair("base", str(tmp_path / "student"), device="cpu", lora=lora)
        assert torch.equal(logits(pair.student), logits(first.student))
        assert torch.equal(logits(pair.teacher), logits(first.teacher)) and pair.warnings == ()
    with pytest.raises(ConfigError, match=r"is an adapter already \(lora_r 2, it has 4\)"):
        load_pair("base", str(tmp_path / "student"), device="cpu", lora=dataclasses.replace(LORA, lora_r=2))
    teacher = load_pair(str(tmp_path / "student"), str(base), device="cpu").teacher  # an adapter may also teach
    assert torch.equal(logits(teacher), logits(first.student)) and not any(
        p.requires_grad for p in teacher.parameters()
    )


def test_base_without_an_adapter_is_refused(base):
    with pytest.raises(
        ConfigError, match=r"'base' is the model under the student's adapter, and .* has none; set use_peft"
    ):
        load_pair("base", str(base), device="cpu")


def test_an_adapter_without_tokenizer_takes_its_bases(base, tmp_path):
    pair = load_pair("base", str(base), device="cpu", lora=LORA)
    (tmp_path / "bare").mkdir()
    adapters.save_adapter(pair.student, tmp_path / "bare")
    assert load_tokenizer(str(tmp_path / "bare")).get_vocab() == tiny_tokenizer().get_vocab()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base_model_name_or_path": None}, "names no base_model_name_or_path"),
        ({"base_model_name_or_path": "itself"}, "names the adapter .* as its base; merge that one first"),
        (
            {"modules_to_save": ["lm_head"]},
            r"has modules_to_save set to \['lm_head'\], which is not known to work here",
        ),
        ({"bias": "all"}, "has bias set to 'all'"),
        ({"peft_type": "IA3"}, "has peft_type set to 'IA3'"),
        ({"peft_type": "NEWER"}, "has peft_type set to 'NEWER'"),
        ({"alora_invocation_tokens": [3, 4]}, r"has alora_invocation_tokens set to \[3, 4\]"),
        ({"alora_invocation_tokens": []}, "has alora_invocation_tokens set"),
        ({"kasa_config": {}, "use_qalora": True}, r"has kasa_config set to \{\}, use_qalora set to True"),
        ({"of_a_newer_peft": "yes"}, "has of_a_newer_peft set to 'yes'"),
        ({"revision": "v2"}, "has revision set to 'v2'"),
        ({"task_type": "SEQ_CLS"}, "has task_type set to 'SEQ_CLS'"),
        ({"init_lora_weights": "pissa"}, "has init_lora_weights set to 'pissa'"),
        ({"lora_dropout": "none"}, "lora_dropout must be float, got 'none'"),
        ({"target_modules": "q_proj", "layers_to_transform": [0]}, "cannot be used when `target_modules` is a str"),
        ({"target_modules": ["nowhere"]}, "does not fit llama"),
        ({"target_modules": ["lm_head", "q_proj"]}, "adapts the output layer"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "adapts the embedding"),
        ({"r": 5}, "holds another adapter: 28 weights do not fit, first .*: .4, 24. there, .5, 24. here"),
    ],
)
def test_adapters_that_cannot_be_used_are_refused(base, tmp_path, changes, words):
    pair = load_pair("base", str(base), device="cpu", lora=LORA)
    folder = tmp_path / "adapter"
    save_model(folder, pair.student, pair.tokenizer)
    if changes.get("base_model_name_or_path"):
        changes = {"base_model_name_or_path": str(folder)}
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ModelError, match=words):
        load_model(str(folder), device="cpu")


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({"target_modules": r".*\.(q|v)_proj"}, 4),
        ({"target_modules": r".*proj", "exclude_modules": r".*\.mlp\..*"}, 8),
        ({"target_modules": "all-linear", "exclude_modules": ["mlp.up_proj"]}, 12),
        ({"target_modules": ["q_proj"], "layers_to_transform": 0}, 1),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}, 1),
        ({"target_modules": ["q_proj", "up_proj"], "rank_pattern": {r"up_.*": 3}, "alpha_pattern": {"q_proj": 16}}, 4),
        ({"target_modules": ["q_proj", "v_proj"], "use_rslora": True}, 4),
        ({"target_modules": ["down_proj", "q_proj"], "use_dora": True}, 4),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft on the newest transformers
def test_options_that_are_known_open_as_in_peft_and_are_saved_as_they_were(base, tmp_path, changes, layers):
    """One text, one number or a list of them, each stays what it is; and the base below, decoding and merging agree."""
    peft = pytest.importorskip("peft")
    made = peft.get_peft_model(
        load_model(str(base), "float64", "cpu"), peft.LoraConfig(r=2, task_type="CAUSAL_LM", **changes)
    )
    stir(made)
    made.eval().save_pretrained(tmp_path / "peft")
    config = tmp_path / "peft" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(base)}))
    student = load_model(str(tmp_path / "peft"), "float64", "cpu")
    assert len(adapters.adapter_layers(student)) == layers
    torch.testing.assert_close(logits(student), logits(made), atol=1e-12, rtol=1e-12)
    save_model(tmp_path / "again", student, tiny_tokenizer())
    saved = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert all(saved[name] == value for name, value in changes.items() if value != "all-linear")
    assert torch.equal(logits(load_model(str(tmp_path / "again"), "float64", "cpu")), logits(student))
    teacher, plain = BaseModel(student), load_model(str(base), "float64", "cpu")
    assert torch.equal(logits(teacher), logits(plain)) and not torch.equal(logits(student), logits(plain))
    torch.testing.assert_close(logits(merged(student)), logits(student), atol=1e-10, rtol=1e-10)
    rollouts = decode(student, teacher, PROMPTS, Switch(tau_0=0.6), 6)
    assert_same(rollouts, decode_reference(merged(student), plain, PROMPTS, Switch(tau_0=0.6), 6))


def test_an_adapter_without_weights_is_refused(base, tmp_path):
    pair = load_pair("base", str(base), device="cpu", lora=LORA)
    save_model(tmp_path / "adapter", pair.student, pair.tokenizer)
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors cannot be read"):
        load_model(str(tmp_path / "adapter"), device="cpu")


# --- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(merge=True), "there is no adapter: set use_peft"),
        (dict(merge=True, use_peft=True, load_in_4bit=True), "4 bits would round it away"),
        (dict(load_in_4bit=True), "load_in_4bit without use_peft"),
        (dict(load_in_4bit=True, use_peft=True, dtype="float64"), "no products in float64"),
        (dict(use_peft=True, lora_r=0), "lora_r and lora_alpha must be at least 1, got 0 and 32"),
        (dict(use_peft=True, lora_dropout=1.0), "lora_dropout must be from 0 to below 1, got 1.0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        TrainConfig(**settings)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("lm_head", "names the output layer 'lm_head', whose weight the loss takes"),
        ("q_porj", "the student has no linear layer 'q_porj'; did you mean 'q_proj'"),
        ("embed_tokens", "no linear layer 'embed_tokens'"),
        ("proj", "no linear layer 'proj'"),
    ],
)
def test_targets_that_are_no_linear_layers_of_the_body_are_refused(target, words):
    """Each of them, although peft is content when one target matches."""
    with pytest.raises(ConfigError, match=words):
        lora_student(settings=dataclasses.replace(LORA, lora_target_modules=("v_proj", target)))
    student = lora_student(settings=dataclasses.replace(LORA, lora_target_modules=("self_attn.v_proj",)))
    assert len(adapters.adapter_layers(student)) == 2


def test_target_modules_are_a_list_in_yaml():
    config = from_dict(TrainConfig, {"use_peft": True, "lora_target_modules": ["q_proj", "v_proj"]}, "here")
    assert config.lora_target_modules == ("q_proj", "v_proj")
    assert from_dict(TrainConfig, to_dict(config), "again") == config
    with pytest.raises(ConfigError, match=r"here: lora_target_modules.* must be"):
        from_dict(TrainConfig, {"lora_target_modules": [1]}, "here")


def test_a_text_is_not_taken_for_the_list_of_its_letters():
    """Of settings that take several texts it is the only one."""
    for config in (
        TrainConfig(lora_target_modules="q_proj"),
        from_dict(TrainConfig, {"lora_target_modules": "q_proj"}, "here"),
    ):
        assert config.lora_target_modules == ("q_proj",)
    assert TrainConfig(report_to="wandb").report_to == ("wandb",)
    with pytest.raises(ConfigError, match="eval_seeds must be several values, got '12'"):
        TrainConfig(eval_seeds="12")


def test_an_end_that_is_a_text_is_refused():
    model = tiny_model()
    model.generation_config.eos_token_id = "12"
    with pytest.raises(ModelError, match="eos_token_id is the text '12'"):
        decode(model, model, PROMPTS, Switch(), 2)


@pytest.mark.parametrize("package", ["peft", "bitsandbytes"])
def test_a_missing_package_is_named_with_its_command(base, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    lora = dataclasses.replace(LORA, load_in_4bit=package == "bitsandbytes")
    with pytest.raises(ConfigError, match=rf"{package} is needed.*pip install '{package}>=0\.\d+'"):
        load_pair("base", str(base), device="cpu", lora=lora)


# --- QLoRA --------------------------------------------------------------------------------------------------------


def test_four_bits_are_asked_for_as_qlora_does(base, monkeypatch):
    """Without the package that does it: what reaches from_pretrained, and that it reaches the student's base only."""
    given = []
    original = AutoModelForCausalLM.from_pretrained

    def watched(*args, quantization_config=None, device_map=None, **kwargs):
        given.append((quantization_config, device_map))
        return original(*args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", watched)
    monkeypatch.setitem(sys.modules, "bitsandbytes", sys)
    lora = dataclasses.replace(LORA, load_in_4bit=True)
    load_pair(str(base), str(base), dtype="bfloat16", device="cpu", lora=lora)
    (student, device_map), teacher = given
    assert teacher == (None, None) and device_map == {"": torch.device("cpu")}
    assert (student.load_in_4bit, student.bnb_4bit_quant_type) == (True, "nf4")
    assert student.bnb_4bit_compute_dtype == torch.bfloat16


@pytest.mark.parametrize("config", [BitsAndBytesConfig(load_in_4bit=True), {"quant_method": "gptq", "bits": 4}])
def test_a_student_that_is_quantised_already_is_known_by_itself(tmp_path, config):
    """Whoever did it, and whatever load_in_4bit says; without a package that does it, only a config can say so here."""
    method = "gptq" if isinstance(config, dict) else "bitsandbytes"
    whole, adapted = toy_pair(), self_pair()
    for pair, settings, words in (
        (whole, {}, "they cannot be trained: set use_peft, or take the student in full precision"),
        (adapted, dict(merge=True, use_peft=True), "an adapter cannot be merged into them: leave merge out, or take"),
    ):
        pair.student.config.quantization_config = config
        with pytest.raises(ConfigError, match=rf"the student's weights are quantised \({method}\), and {words}"):
            trainer(tmp_path, pair, **settings)
    trainer(tmp_path, adapted, use_peft=True)


def test_a_model_that_is_quantised_already_is_not_quantised_again(base):
    edit = json.loads((base / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (base / "config.json").write_text(json.dumps(edit))
    lora = dataclasses.replace(LORA, load_in_4bit=True)
    with pytest.raises(ConfigError, match=r"load_in_4bit, and the weights of .*base are quantised already \(fp8\)"):
        load_pair("base", str(base), device="cpu", lora=lora)


def test_a_four_bit_student_trains_and_its_teacher_is_the_four_bit_base(base, tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    lora = dataclasses.replace(LORA, load_in_4bit=True)
    pair = load_pair("base", str(base), device="cpu", lora=lora)
    assert isinstance(pair.student.model.layers[0].mlp.up_proj.get_base_layer(), bnb.nn.Linear4bit)
    assert {p.dtype for p in adapter_parameters(pair.student).values()} == {torch.float32}
    before = logits(pair.teacher)
    assert torch.equal(logits(pair.student), before)
    prove(pair.student)
    stir(pair.student)
    examples = [retold(e, prompt_ids=[2, 3], completion_ids=[4, 5, 1]) for e in toy_examples(4)]
    t = trainer(tmp_path / "run", pair, examples, mix=Generated(1.0), max_steps=2, save_steps=1)
    t.train()
    assert torch.equal(logits(pair.teacher), before) and not torch.equal(logits(pair.student), before)
    assert lines(tmp_path / "run", "metrics.jsonl")[0]["loss"] > 0
    again = trainer(tmp_path / "run", load_pair("base", str(base), device="cpu", lora=lora), examples)
    again.resume()
    assert torch.equal(logits(again.pair.student), logits(pair.student))
    save_model(tmp_path / "student", pair.student, pair.tokenizer)
    opened = load_pair("base", str(tmp_path / "student"), device="cpu", lora=lora)
    assert torch.equal(logits(opened.student), logits(pair.student))


# --- whole runs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path):
    """A student and a data file, as flags of a run that distils the student from its own base."""
    rows = [{"prompt": f"What is {i} and {i}?", "completion": f"It is {2 * i}."} for i in range(8)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    student = save_llama(tmp_path / "student", byte_level_tokenizer(), 1, layers=3)
    own = f"--teacher-model-name-or-path base --student-model-name-or-path {student} --train-file {data} --eval-file {data}"
    sizes = (
        "--template none --max-new-tokens 8 --eval-samples 2 --eval-max-new-tokens 6 --per-device-train-batch-size 2"
    )
    return [*own.split(), *sizes.split(), "--dtype", "float64"]


def run(place, folder, *more, recipe="switch"):
    """Train an adapter; it starts at its teacher, where a divergence has no gradient: the data's cross-entropy moves it."""
    place = [*place, "--objective.ce-weight", "0.5"]
    own = ["--use-peft", "--lora-r", "4", "--lora-dropout", "0.5", "--max-steps", "3", "--save-steps", "1"]
    return main(["train", recipe, *place, *own, "--learning-rate", "0.05", "--output-dir", str(folder), *more])


def scores(file):
    results = json.loads(file.read_text())["results"]
    return {name: result["summary"]["forward_kl"]["mean"] for name, result in results.items()}


def test_a_run_leaves_an_adapter_that_commands_open(place, tmp_path):
    folder = tmp_path / "run"
    assert main(["check", "switch", *place, "--use-peft"]) == 0
    assert run(place, folder) == 0
    assert (folder / "student" / "adapter_model.safetensors").is_file()
    assert not list(folder.rglob("model*.safetensors"))
    kl = scores(folder / "evaluation.json")
    assert kl["teacher"] == kl["student before"] == 0 < kl["student after"]
    assert main(["evaluate", str(folder), "--eval-samples", "2", "--output-file", str(tmp_path / "again.json")]) == 0
    assert scores(tmp_path / "again.json") == {"teacher": 0, "student": kl["student after"]}
    assert main(["generate", str(folder), "--prompt", "What is 2 and 2?"]) == 0
    assert run(place, folder, "--resume") == 0
    assert scores(folder / "evaluation.json") == kl
    source = str(folder / "student")
    assert main(["prune", "--model-name-or-path", source, "--layers", "2", "--output-dir", str(tmp_path / "p")]) == 0
    assert not has_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "p"))


def test_a_merged_run_leaves_a_plain_student_whose_teacher_is_the_base_that_it_left(place, tmp_path):
    """Not the merged student's own weights, which would be a divergence of zero."""
    merge = "--merge", "--save-dtype", "float64"
    assert run(place, tmp_path / "adapter") == 0 and run(place, tmp_path / "merged", *merge) == 0
    assert not (tmp_path / "merged" / "student" / "adapter_config.json").exists()
    expected = scores(tmp_path / "adapter" / "evaluation.json")
    for name, found in scores(tmp_path / "merged" / "evaluation.json").items():
        assert found == pytest.approx(expected[name], rel=1e-9)
    again = ["--eval-samples", "2", "--output-file", str(tmp_path / "again.json")]
    assert main(["evaluate", str(tmp_path / "merged"), *again]) == 0
    assert scores(tmp_path / "again.json")["student"] == pytest.approx(expected["student after"], rel=1e-9)
    assert run(place, tmp_path / "adapter", "--resume", "--merge") == 0  # a change of mind costs no training
    for name in ("adapter", "merged"):
        assert {p.name for p in (tmp_path / name / "student").glob("*model*")} == {"model.safetensors"}


@pytest.mark.parametrize("part", ["merged", "load_model", "model_card"])
def test_what_the_end_of_a_run_does_is_tried_before_its_first_step(place, tmp_path, monkeypatch, capsys, part):
    def fails(*_, **__):
        raise ModelError("no card") if part == "model_card" else RecursionError("too deep")

    monkeypatch.setattr(rehearsal, part, fails)
    assert run(place, tmp_path / "run", "--merge", "--eval-samples", "0") == 1
    words = (
        "no card"
        if part == "model_card"
        else "tried before the first step: the adapter cannot be merged into the student "
    )
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_resuming_with_another_adapter_is_refused(place, tmp_path, capsys):
    assert run(place, tmp_path / "run") == 0
    assert run(place, tmp_path / "run", "--resume", "--lora-alpha", "64") == 1
    assert "lora_alpha: 32 -> 64" in capsys.readouterr().err
