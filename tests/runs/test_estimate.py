"""The estimate before anything is loaded: counts are exact, memory is what `check` says of the loaded pair, and time moves the
right way. What a GPU would really take is not tested here, and nowhere: no run of that size was made."""

import dataclasses
import functools
import json
from pathlib import Path

import pytest
import torch
from tiny import FAMILIES, byte_level_tokenizer, pair_on_disk, tiny_model
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils import hub

from switchkd.base.errors import ConfigError, ModelError
from switchkd.cli.main import main
from switchkd.forward.head import DEVICE_SIZES
from switchkd.methods.mixes import GroundTruth
from switchkd.methods.policy import StudentOnly
from switchkd.models.loading import load_shapes
from switchkd.models.pair import load_pair
from switchkd.runner.architecture import num_parameters
from switchkd.runner.modes import head_inputs
from switchkd.runs import estimate
from switchkd.runs.estimate import GPUS, Spread, activation_bytes, on_one_gpu, seconds
from switchkd.runs.preflight import _holds, estimate_run, memory_estimate, shapes
from switchkd.training.optimizer import Masters
from switchkd.training.settings import TrainConfig

# As published: Qwen2.5-7B-Instruct and Qwen2.5-0.5B-Instruct.
QWEN = {
    "7b": dict(
        hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944,
        vocab_size=152064, tie_word_embeddings=False,
    ),
    "0.5b": dict(
        hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, intermediate_size=4864,
        vocab_size=151936, tie_word_embeddings=True,
    ),
}  # fmt: skip
SHARED = {"model_type": "qwen2", "max_position_embeddings": 32768, "rope_theta": 1e6, "torch_dtype": "bfloat16"}
H100, ONE = GPUS["H100"], Spread()


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """The settings of docs/gpu.md's case: two folders with a config.json and nothing else."""
    tmp_path = tmp_path_factory.mktemp("qwen")
    for name, sizes in QWEN.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(SHARED | sizes))
    return TrainConfig(
        teacher_model_name_or_path=str(tmp_path / "7b"), student_model_name_or_path=str(tmp_path / "0.5b"), dtype="bfloat16",
        teacher_dtype="bfloat16", per_device_train_batch_size=8, gradient_accumulation_steps=8, generation_batch_size=64,
        max_new_tokens=1024, max_completion_length=1024,
    )  # fmt: skip


@functools.cache
def _shapes(teacher, student, use_peft):
    models = {"teacher_model_name_or_path": teacher, "student_model_name_or_path": student}
    return shapes(TrainConfig(**models, dtype="bfloat16", teacher_dtype="bfloat16", use_peft=use_peft))


def of(config):
    """The shapes of a test's models, which other settings do not change: they are made once."""
    models, masters = _shapes(config.teacher_model_name_or_path, config.student_model_name_or_path, config.use_peft)
    return dataclasses.replace(models, teacher_prompt=config.max_prompt_length), masters


def needs(config, spread=ONE):
    return on_one_gpu(config, *of(config), spread)


def takes(config, spread=ONE, gpu=H100):
    return seconds(config, *of(config), spread, gpu)


# --- counts and memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_weights_has_the_parameters_of_the_loaded_one(family, tmp_path):
    model = tiny_model(family, 0, torch.float32)
    model.config.save_pretrained(tmp_path)
    empty = load_shapes(str(tmp_path / "config.json"))
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert num_parameters(empty) == num_parameters(model)
    assert {name: p.shape for name, p in empty.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_qwens_parts_are_those_reckoned_by_hand(qwen):
    models, _ = of(qwen)
    assert num_parameters(models.teachers[""]) == 7_615_616_512
    assert num_parameters(models.student) == 494_032_768
    need = needs(qwen)
    tokens, student = 64 * 1280, 494_032_768
    caches = tokens * (28 * 2 * 4 * 128 * 2 + 24 * 2 * 2 * 64 * 2)
    assert need == {
        "teacher, in bfloat16": 2 * 7_615_616_512,
        "the student's trained weights, as they are updated, in float32": 4 * student,
        "the student as it multiplies, in bfloat16": 2 * student,
        "gradients, in float32": 4 * student,
        "the optimizer's moments, in float32": 8 * student,
        "loss": 2 * 2**28 + 16 * 2**28 + 4 * 151_936 * 896,
        "decoding": caches + 64 * 24 * 151_936 * 16,
        "activations of the student's forward and backward": 8 * 1280 * 24 * (10 * 896 + 4 * 4864) * 2,
        "the teacher's states of the step's texts": 64 * 1024 * 3584 * 2,
        "the teacher's forward over prompts or texts": 64 * 256 * (4 * 3584 + 3 * 18944) * 2,
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float32", "teacher_dtype": "bfloat16"},
        {"dtype": "bfloat16", "teacher_dtype": "float32", "mix": GroundTruth()},
        {"dtype": "bfloat16", "teacher_dtype": "bfloat16", "use_peft": True, "lora_r": 4},
        {"dtype": "float32", "teacher_dtype": "float32", "use_peft": True, "teacher_model_name_or_path": "base"},
    ],
)
def test_memory_is_what_check_says_of_the_loaded_pair(changes, tmp_path, monkeypatch):
    config = TrainConfig(**pair_on_disk(tmp_path) | {"max_new_tokens": 16, "generation_batch_size": 3} | changes)
    loaded = load_pair(
        config.teacher_model_name_or_path, config.student_model_name_or_path,
        dtype=config.dtype if config.use_peft else "float32", teacher_dtype=config.teacher_dtype,
        lora=config if config.use_peft else None, device="cpu",
    )  # fmt: skip
    masters = Masters(loaded.student, getattr(torch, config.dtype))
    monkeypatch.setattr(estimate, "sizes_on", lambda _: DEVICE_SIZES)  # a CPU's pieces of the loss are smaller
    said = memory_estimate(config, loaded, masters)
    need = on_one_gpu(config, *shapes(config), ONE)
    assert {name: need[name] for name in said} == said
    assert sum(said.values()) > 0


def test_activations_are_about_what_a_forward_keeps():
    """The rule for a layer and token, beside the tensors that autograd keeps of a small Qwen2 in bfloat16."""
    kept = {}
    for checkpointing in (False, True):
        sizes = [_kept(layers, checkpointing) for layers in (2, 4)]
        kept[checkpointing] = (sizes[1] - sizes[0]) / 2 / (4 * 64)  # bytes of a layer and token
    model = Qwen2ForCausalLM(_qwen2(2)).to(torch.bfloat16)
    rule = activation_bytes(model, TrainConfig()) / 2
    assert 0.9 < kept[False] / rule < 1.1
    assert kept[True] == 2 * model.config.hidden_size
    # One vector of every layer, and one layer in full.
    assert activation_bytes(model, TrainConfig(gradient_checkpointing=True)) == 2 * kept[True] + rule


def _qwen2(layers):
    return Qwen2Config(
        hidden_size=112, num_hidden_layers=layers, num_attention_heads=7, num_key_value_heads=1, intermediate_size=608,
        vocab_size=64,
    )  # fmt: skip


def _kept(layers, checkpointing):
    """Bytes of the tensors that a forward over 4 rows of 64 tokens keeps, weights left out, each storage once."""
    with torch.random.fork_rng():
        model = Qwen2ForCausalLM(_qwen2(layers)).to(torch.bfloat16).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), head_inputs(model, lambda h: h[:1, :1]):
        model(input_ids=torch.zeros(4, 64, dtype=torch.int64), use_cache=False)
    return sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in weights)


def test_shards_and_split_teachers_take_their_share(qwen):
    whole, sharded = needs(qwen), needs(dataclasses.replace(qwen, fsdp=True), Spread(4))
    student = 494_032_768
    assert sharded["the student's trained weights, as they are updated, in float32"] == student
    assert sharded["the optimizer's moments, in float32"] == 2 * student
    assert sharded["the student as it multiplies, in bfloat16"] == 2 * student  # gathered for the step
    # Eight micro-batches are added up whole; one is not.
    assert sharded["gradients, in float32"] == (4 + 1) * student
    at_once = dataclasses.replace(qwen, fsdp=True, gradient_accumulation_steps=1)
    assert needs(at_once, Spread(4))["gradients, in float32"] == student
    split = needs(qwen, Spread(2, 2))
    norms = (28 * 2 + 1) * 3584
    assert split["teacher, in bfloat16"] == 2 * ((7_615_616_512 - norms) / 2 + norms)
    # The teacher's cache is halved; the rows stay 64, which is all that are decoded at once.
    assert whole["decoding"] - split["decoding"] == 64 * 1280 * 28 * 2 * 4 * 128 * 2 / 2
    assert needs(qwen, Spread(4))["teacher, in bfloat16"] == whole["teacher, in bfloat16"]


def test_four_bits_and_experts(qwen, tmp_path):
    whole, small = (needs(dataclasses.replace(qwen, use_peft=True, load_in_4bit=bits)) for bits in (False, True))
    name = "the student as it multiplies, in bfloat16"
    body = 24 * 896 * (2 * 896 + 2 * 128 + 3 * 4864)
    assert whole[name] - small[name] == body * (2 - 0.5625)
    model = tiny_model("llama", 0, torch.float32)
    experts = {
        "model_type": "qwen3_moe", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": model.config.vocab_size, "num_experts": 8, "num_experts_per_tok": 2,
        "moe_intermediate_size": 12, "head_dim": 4,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(experts))
    shape = load_shapes(str(tmp_path))
    work = estimate.Work.of(shape, frozenset())
    attention = 16 * 4 * (4 + 2 * 2) + 4 * 4 * 16
    other = 2 * (attention + 2 * 16 + 2 * 4 + 8 * 16) + 16  # with norms and routers
    assert work.body == other + 2 * 2 * 3 * 16 * 12
    assert work.read == 4 * (other + 2 * 8 * 3 * 16 * 12 + work.output)


# --- time ---------------------------------------------------------------------------------------------------------

WRITES, READS, LEARNS, UPDATE = "the student writes", "the teacher reads", "forward and backward", "update"


@pytest.mark.parametrize(
    ("changes", "longer"),
    [
        ({"max_new_tokens": 2048}, {WRITES, READS, LEARNS}),
        ({"max_prompt_length": 2048}, {WRITES, READS, LEARNS}),
        ({"gradient_accumulation_steps": 32}, {WRITES, READS, LEARNS}),
        ({"generation_batch_size": 8}, {WRITES, READS}),
        ({"gradient_checkpointing": True}, {LEARNS}),
    ],
)
def test_time_grows_with_what_it_must_grow_with(qwen, changes, longer):
    before, after = takes(qwen), takes(dataclasses.replace(qwen, **changes))
    assert {part for part in before if after[part] > before[part]} == longer
    assert all(after[part] == before[part] for part in before.keys() - longer)


def test_time_falls_with_what_it_must_fall_with(qwen):
    before = takes(qwen)
    alone = takes(dataclasses.replace(qwen, policy=StudentOnly()))
    assert alone[WRITES] < before[WRITES], "no draft is thrown away"
    assert alone[READS] < before[READS], "a text is read at once"
    data = takes(dataclasses.replace(qwen, mix=GroundTruth()))
    assert data[WRITES] == 0 and data[READS] == alone[READS]
    assert takes(dataclasses.replace(qwen, graphs=True))[WRITES] < before[WRITES]
    assert takes(dataclasses.replace(qwen, use_peft=True))[LEARNS] < before[LEARNS]
    sharded = takes(dataclasses.replace(qwen, fsdp=True), Spread(4))
    assert sharded[UPDATE] == before[UPDATE] / 4
    for part, value in takes(qwen, gpu=GPUS["L4"]).items():
        assert value > before[part], "an L4 is slower in everything"


def test_the_first_row_of_numbers_is_reckoned_by_hand(qwen):
    """An L4 reads 0.21 TB/s: a round reads the teacher's 14.1 GB without its embeddings, and caches of 768 tokens in 64 rows."""
    found = takes(qwen, gpu=GPUS["L4"])
    body, head = 28 * (3584 * 3584 * 2 + 2 * 3584 * 512 + 3 * 3584 * 18944), 152_064 * 3584
    small = 28 * (2 * 3584 + 3584 + 2 * 512) + 3584  # norms and biases
    read = (2 * (body + small + head) + 64 * 768 * 57_344) / (0.7 * 300e9)
    arithmetic = (2 * (body + small + head) * 256 + 4 * 28 * 3584 * 768 * 256) / (0.4 * 121e12)
    rounds = 1024 / (1 + 0.7 + 0.49 + 0.343)
    tokens = 64 * 256
    prompts = (2 * (body + small) * tokens + 4 * 28 * 3584 * 128 * tokens) / (0.4 * 121e12)
    assert found[READS] == pytest.approx(rounds * max(read, arithmetic) + prompts)
    assert found[UPDATE] == pytest.approx(28 * 494_032_768 / (0.7 * 300e9))


# --- what is printed ----------------------------------------------------------------------------------------------


def test_the_command_loads_nothing_and_says_what_it_is(qwen, capsys, monkeypatch):
    monkeypatch.setattr(hub, "hf_hub_download", lambda *_, **__: pytest.fail("a hub was asked"))
    pair = ["--teacher", f"{qwen.teacher_model_name_or_path}/config.json", "--student", qwen.student_model_name_or_path]
    assert main(["check", "switch", "--estimate", *pair]) == 0
    out = capsys.readouterr().out
    assert "none of this was measured on a GPU" in out and "the data are not looked at" in out
    assert "7,615,616,512 parameters" in out and "494,032,768 of them trained" in out
    assert all(f"\n  {card} " in out for card in GPUS)
    assert "A100-80GB" in out.split("at most 90% of the memory: ")[1].splitlines()[0]
    assert main(["check", "switch", "--estimate", *pair, "--gpu", "L4", "--processes", "2", "--fsdp"]) == 0
    out = capsys.readouterr().out
    assert "GB on each of 2 GPUs" in out and "\n  H100 " not in out
    assert "none of these" in out and "--teacher-tensor-parallel 2 on 2 GPUs" in out and "--use-peft" in out
    assert "--fsdp on" not in out, "it is on already"


def test_ways_out_take_less_and_are_named_with_what_they_fit(qwen):
    lines = estimate_run(qwen, ONE, "L40S")
    total = sum(needs(qwen).values())
    ways = [line for line in lines[lines.index("With one of these changes each GPU would hold, in GB:") + 1 :]]
    assert len(ways) >= 5 and all(float(line.split()[0]) * 1e9 < total for line in ways)
    checkpointed = needs(dataclasses.replace(qwen, gradient_checkpointing=True))
    line = next(line for line in ways if "--gradient-checkpointing:" in line)
    assert float(line.split()[0]) == round(sum(checkpointed.values()) / 1e9, 2) and "L40S" in line
    assert _holds("H100", 0.9 * 80e9) and not _holds("H100", 0.91 * 80e9)
    assert "With one of these changes" not in "\n".join(estimate_run(qwen, ONE, "H200"))


def test_a_name_on_the_hub_is_asked_for_its_config_alone(qwen, monkeypatch):
    asked = []

    def answer(path_or_repo_id, filenames, **_):
        asked.append((path_or_repo_id, *filenames))
        return [f"{qwen.student_model_name_or_path}/config.json"]

    monkeypatch.setattr(hub, "cached_files", answer)
    assert num_parameters(load_shapes("Qwen/Qwen2.5-0.5B-Instruct")) == 494_032_768
    assert set(asked) == {("Qwen/Qwen2.5-0.5B-Instruct", "config.json")}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "nosuch"}, "does not recognize this architecture.*check the name"),
        ({"model_type": "vit"}, "vit is not a causal language model; choose one that generates text"),
        ({"model_type": "t5"}, "choose one"),
        ({}, "model_type"),
        (None, "holds no config.json; name a folder that has one"),
    ],
)
def test_a_config_that_is_no_students_is_refused(config, words, tmp_path):
    (tmp_path / "model").mkdir()
    if config is not None:
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"(?s){words}"):
        load_shapes(str(tmp_path / "model"))


def test_what_cannot_be_estimated_says_the_way_out(qwen, tmp_path, capsys):
    with pytest.raises(ConfigError, match="gpu 'H10' is not in the table; did you mean 'H100'"):
        estimate_run(qwen, ONE, "H10")
    with pytest.raises(ConfigError, match=r"3 of 4 processes: give .* a number that divides it"):
        Spread(4, 3)
    with pytest.raises(ConfigError, match="4 key/value heads, which cannot be split so; take a divisor"):
        needs(qwen, Spread(8, 8))
    with pytest.raises(ModelError, match="no/such/folder does not exist; name a folder"):
        load_shapes("no/such/folder")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen2.5-0.5B"}')
    with pytest.raises(ModelError, match=r"is an adapter, .* name its base, Qwen/Qwen2.5-0.5B"):
        load_shapes(str(tmp_path / "adapter"))
    gpt2 = tiny_model("gpt2", 0, torch.float32)
    gpt2.config.save_pretrained(tmp_path / "gpt2")
    split = dataclasses.replace(qwen, teacher_model_name_or_path=str(tmp_path / "gpt2"))
    with pytest.raises(ConfigError, match="gpt2 has no plan by which it could be split; leave"):
        needs(split, Spread(2, 2))
    with pytest.raises(SystemExit):
        main(["check", "switch", "--gpu", "H100"])
    assert "give --estimate too" in capsys.readouterr().err


def test_a_tokenizer_is_not_needed(tmp_path):
    """The words of a teacher's prompt count as many tokens as they have bytes: no tokenizer has more."""
    settings = pair_on_disk(tmp_path)
    for folder in ("teacher", "student"):
        (tmp_path / folder / "tokenizer.json").unlink()
    words = "Réponse: {completion}"
    config = TrainConfig(**settings, dtype="float32", teacher_dtype="float32", teacher_prompt=words)
    models, _ = shapes(config)
    assert models.teacher_prompt == 256 + 256 + len(words.encode())
    assert models.vocab_size == len(byte_level_tokenizer())


def test_the_page_has_what_the_command_prints(qwen):
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text(encoding="utf-8")
    names = {
        qwen.teacher_model_name_or_path: "Qwen/Qwen2.5-7B-Instruct",
        qwen.student_model_name_or_path: "Qwen/Qwen2.5-0.5B-Instruct",
    }
    text = "\n".join(estimate_run(qwen, ONE, "A100-80GB"))
    for folder, name in names.items():
        text = text.replace(folder, name)
    assert text in page, f"put this into docs/scale.md:\n{text}"
    assert len(page.splitlines()) <= 110


def test_the_page_on_costs_has_what_the_command_prints(qwen, tmp_path):
    teacher = tmp_path / "config.json"
    sizes = dict(
        hidden_size=2048, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2, intermediate_size=11008
    )
    teacher.write_text(json.dumps(SHARED | QWEN["0.5b"] | sizes))
    page = (Path(__file__).parents[2] / "docs" / "costs.md").read_text(encoding="utf-8")
    config = TrainConfig(
        teacher_model_name_or_path=str(tmp_path), student_model_name_or_path=qwen.student_model_name_or_path, dtype="bfloat16",
        teacher_dtype="bfloat16",
    )  # fmt: skip
    text = "\n".join(estimate_run(config, ONE, ""))
    for folder, name in {str(tmp_path): "3B", qwen.student_model_name_or_path: "0.5B"}.items():
        text = text.replace(folder, f"Qwen/Qwen2.5-{name}-Instruct")
    table, _, changes = text.partition("\nIt is said to fit")
    assert table.strip() in page, f"put this into docs/costs.md:\n{table}"
    needed = [line.split()[0] for line in changes.splitlines() if line.startswith("     ")]
    assert len(needed) == 5 and all(f"| {number} |" in page for number in needed)
