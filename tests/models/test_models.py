"""Loading: what is refused, and that a pair shares its vocabulary, its EOS and its device settings."""

import json
import socket
from pathlib import Path

import pytest
import torch
from tiny import FAMILIES, TOKENS, VOCAB, byte_level_tokenizer, save, save_llama, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, models
from transformers import (
    BartConfig,
    DeepseekV32Config,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma2PreTrainedModel,
    GPT2Config,
    Llama4TextConfig,
    PreTrainedTokenizerFast,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    RwkvConfig,
    T5Config,
)

from switchkd import TeacherOnly, decode
from switchkd.base.errors import ConfigError, DataError, ModelError, VocabularyError
from switchkd.models.loading import load_model, load_tokenizer
from switchkd.models.pair import load_pair
from switchkd.models.vocabulary import check_vocabulary, left_out_note
from switchkd.runner.architecture import check_layers, num_parameters, parameter_bytes
from switchkd.runs.opening import load_train, open_pair
from switchkd.training.settings import TrainConfig


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "teacher")


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_local_pair_loads_whole_without_any_connection(folder, tmp_path, monkeypatch):
    def no_network(*_):
        raise AssertionError("a local folder asked the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    student = save(tmp_path / "student", seed=1)
    pair = load_pair(str(folder), str(student), device="cpu")
    assert pair.vocab_size == len(TOKENS) < VOCAB
    assert pair.eos_token_ids == (1,)
    assert pair.warnings == ()
    assert torch.equal(pair.teacher.lm_head.weight, tiny_model(dtype=torch.float32).lm_head.weight)
    assert torch.equal(pair.student.lm_head.weight, tiny_model(seed=1, dtype=torch.float32).lm_head.weight)


def test_teacher_is_frozen_and_student_trainable_both_in_eval_mode(folder):
    pair = load_pair(str(folder), str(folder), device="cpu")
    assert not any(parameter.requires_grad for parameter in pair.teacher.parameters())
    assert all(parameter.requires_grad for parameter in pair.student.parameters())
    assert not pair.teacher.training and not pair.student.training


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_dtype_and_sdpa(folder, dtype):
    model = load_model(str(folder), dtype, "cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("soft_cap", "class_takes_sdpa", "expected"),
    [(50.0, False, "eager"), (50.0, True, "eager"), (None, False, "eager"), (None, True, "sdpa")],
)
def test_attention_that_sdpa_cannot_compute_is_eager(tmp_path, monkeypatch, soft_cap, class_takes_sdpa, expected):
    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", class_takes_sdpa)
    config = Gemma2Config(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, eos_token_id=1, pad_token_id=0, bos_token_id=None,
        attn_logit_softcapping=soft_cap,
    )  # fmt: skip
    config._attn_implementation = "eager"
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    assert load_model(str(tmp_path), device="cpu").config._attn_implementation == expected


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"dtype": "flaot32"}, "did you mean 'float32'"),
        ({"dtype": "int8"}, "known: auto, bfloat16, float16, float32, float64"),
        ({"device": "gpu0"}, "use 'cpu'"),
    ],
)
def test_unknown_settings_are_config_errors(folder, setting, message):
    with pytest.raises(ConfigError, match=message):
        load_model(str(folder), **setting)


def test_a_teacher_alone_is_refused(folder):
    with pytest.raises(ConfigError, match="has no student"):
        load_pair(str(folder))


def test_what_is_not_a_model_folder_is_refused_with_what_is_missing(tmp_path):
    with pytest.raises(ModelError, match=r"does not exist; a model is a folder with config\.json"):
        load_model(str(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="is a file"):
        load_model(str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        load_model(str(tmp_path))


def test_a_bin_only_folder_is_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no \*\.safetensors but pytorch_model\.bin"):
        load_model(str(folder))


def test_code_in_a_model_folder_is_refused_and_never_run(folder):
    (folder / "modeling_own.py").write_text("raise SystemExit('code from a model folder ran')")
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    with pytest.raises(ModelError, match="needs its own code"):
        load_model(str(folder))


def test_a_cut_weight_file_is_a_model_error(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot load"):
        load_model(str(folder))


def test_weights_that_are_missing_are_not_made_up(folder):
    edit_json(folder / "config.json", num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"9 weights of LlamaForCausalLM are missing.*model\.layers\.2"):
        load_model(str(folder))


def test_a_broken_config_is_a_model_error(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot load"):
        load_model(str(folder))


def test_a_name_that_the_hub_does_not_give_says_so(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"there is no local folder nobody/nothing-here, so the hub was asked"):
        load_model("nobody/nothing-here")


def test_a_folder_without_tokenizer_is_refused(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ModelError, match="holds no tokenizer"):
        load_tokenizer(str(folder))


# --- vocabulary ---------------------------------------------------------------------------------------------------


def test_equal_tokenizers_share_highest_id_plus_one():
    assert check_vocabulary(tiny_tokenizer(), tiny_tokenizer()) == len(TOKENS)


def test_unused_ids_below_the_highest_count_as_vocabulary():
    holes = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "a": 3, "b": 9}, unk_token="<unk>"))
    )
    assert check_vocabulary(holes, holes) == 10


def test_tokenizers_of_equal_size_and_other_content_are_refused_with_the_ids():
    swapped = [*TOKENS[:7], "b", "a", *TOKENS[9:]]
    with pytest.raises(VocabularyError, match=r"2 ids: id 7: teacher 'a', student 'b'; id 8: teacher 'b', student 'a'"):
        check_vocabulary(tiny_tokenizer(), tiny_tokenizer(swapped))


@pytest.mark.parametrize("longer", ["teacher", "student", "both"])
@pytest.mark.parametrize("special", [True, False])
def test_added_tokens_at_the_end_that_one_lacks_are_beyond_the_shared_vocabulary(longer, special):
    teacher, student = tiny_tokenizer(), tiny_tokenizer()
    if longer != "student":
        teacher.add_tokens(["<tool>", "<same>"], special_tokens=special)
    if longer != "teacher":
        student.add_tokens(["<image>", "<same>"], special_tokens=special)
    assert check_vocabulary(teacher, student) == len(TOKENS)
    (note,) = left_out_note([teacher, student], len(TOKENS))
    assert ("16 '<tool>'" in note) == (longer != "student") and ("16 '<image>'" in note) == (longer != "teacher")
    assert "17 '<same>'; they are never drawn" in note and left_out_note([teacher, student], len(TOKENS) + 2) == ()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.add_special_tokens({"bos_token": "<s>"}), "1 ids: id 16: teacher '<s>', student nothing"),
        (lambda t: t.add_special_tokens({"eos_token": "<end>"}), "1 ids: id 16: teacher '<end>', student nothing"),
        (lambda t: t.add_tokens(["4159"]), "1 ids: id 16: teacher '4159', student nothing"),  # in the probe
    ],
)
def test_a_tail_that_text_needs_is_refused(change, words):
    teacher = tiny_tokenizer()
    change(teacher)
    with pytest.raises(VocabularyError, match=words):
        check_vocabulary(teacher, tiny_tokenizer())


def test_a_tail_of_the_vocabulary_proper_is_refused():
    with pytest.raises(VocabularyError, match="1 ids: id 16: teacher nothing, student 'zz'"):
        check_vocabulary(tiny_tokenizer(), tiny_tokenizer([*TOKENS, "zz"]))


def test_one_id_more_than_logits_rows_is_never_drawn_and_rows_that_hold_it_are_left_out(tmp_path, capsys):
    """The shape of Gemma 3 1B, whose tokenizer has a token for pictures that its models have no row for."""
    tokenizer = byte_level_tokenizer()
    rows = len(tokenizer)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    for name, seed in (("teacher", 1), ("student", 2)):
        save_llama(tmp_path / name, tokenizer, seed, vocab_size=rows + (name == "teacher"))
    file = tmp_path / "data.jsonl"
    texts = ["two and two", "the <image> here", "three"]
    file.write_text("".join(json.dumps({"prompt": text, "completion": "four"}) + "\n" for text in texts))
    config = TrainConfig(
        teacher_model_name_or_path=str(tmp_path / "teacher"), student_model_name_or_path=str(tmp_path / "student"),
        train_file=str(file), template="none", eval_split=0,
    )  # fmt: skip
    pair = open_pair(config)
    assert pair.vocab_size == rows == len(pair.tokenizer) - 1
    assert f"the added tokens {rows} '<image>'; they are never drawn" in capsys.readouterr().out.replace("\n", " ")
    assert [example.source[-1] for example in load_train(config, pair)] == ["1", "3"]
    assert "2 examples; 1 that hold a token not all of the models know left out" in capsys.readouterr().out
    [rollout] = decode(
        pair.student, pair.teacher, [[5, 6, 7]], TeacherOnly(), 8, vocab_size=pair.vocab_size, eos_token_ids=pair.ends
    )
    assert max(rollout.completion_ids) < rows
    file.write_text(json.dumps({"prompt": "<image>", "completion": "four"}) + "\n")
    with pytest.raises(DataError, match="each of 1 examples holds a token that not all of the models know"):
        load_train(config, pair)


def test_a_missing_digit_split_is_refused_although_the_vocabulary_is_equal():
    with pytest.raises(VocabularyError, match=r"teacher writes \['2', '0'.*the student \['20'"):
        check_vocabulary(tiny_tokenizer(digits=True), tiny_tokenizer(digits=False))


def test_a_probe_that_is_a_prefix_of_the_other_is_refused():
    class Shorter:
        def __init__(self, inner, cut):
            self.inner, self.cut = inner, cut
            self.get_vocab, self.convert_ids_to_tokens = inner.get_vocab, inner.convert_ids_to_tokens

        def encode(self, text, add_special_tokens):
            return self.inner.encode(text, add_special_tokens=add_special_tokens)[: self.cut]

    with pytest.raises(VocabularyError, match="at token 4 of a probe"):
        check_vocabulary(Shorter(tiny_tokenizer(), None), Shorter(tiny_tokenizer(), 4))


def test_padded_logits_rows_are_accepted_and_too_few_are_refused(folder, tmp_path):
    padded = tiny_model(dtype=torch.float32)
    padded.resize_token_embeddings(VOCAB + 9, mean_resizing=False)
    padded.save_pretrained(tmp_path / "padded")
    tiny_tokenizer().save_pretrained(tmp_path / "padded")
    pair = load_pair(str(folder), str(tmp_path / "padded"), device="cpu")
    assert (pair.vocab_size, pair.student.lm_head.weight.shape[0]) == (len(TOKENS), VOCAB + 9)
    padded.resize_token_embeddings(len(TOKENS) - 1, mean_resizing=False)
    padded.save_pretrained(tmp_path / "padded")
    with pytest.raises(VocabularyError, match="student has 15 logits rows for 16 token ids"):
        load_pair(str(folder), str(tmp_path / "padded"), device="cpu")


# --- EOS and chat template ----------------------------------------------------------------------------------------


def test_eos_outside_the_vocabulary_is_refused(folder):
    edit_json(folder / "generation_config.json", eos_token_id=[1, 20])
    with pytest.raises(ModelError, match="EOS id 20 lies outside the shared vocabulary of 16"):
        load_pair(str(folder), str(folder), device="cpu")


@pytest.mark.parametrize(
    ("teacher", "student", "words"),
    [
        ("A", "A", []),
        (None, None, []),
        ("A", "B", ["teacher and student have different chat templates; the teacher's is used for both"]),
        (None, "B", ["note: the teacher has no chat template; the student's is used for both"]),
        ("A", None, ["note: the student has no chat template"]),
    ],
)
def test_chat_templates_that_differ_are_told(tmp_path, teacher, student, words):
    for name, template in (("t", teacher), ("s", student)):
        save(tmp_path / name, tokenizer=tiny_tokenizer(chat_template=template))
    pair = load_pair(str(tmp_path / "t"), str(tmp_path / "s"), device="cpu")
    assert len(pair.warnings) == len(words)
    assert all(word in warning for word, warning in zip(words, pair.warnings, strict=True))
    assert pair.tokenizer.chat_template == (teacher or student)


def test_special_tokens_around_a_text_that_differ_are_told(folder, tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<pad> $A", "<pad> $A $B", [("<pad>", 0)])
    student = save(tmp_path / "student", tokenizer=tokenizer)
    (warning,) = load_pair(str(folder), str(student), device="cpu").warnings
    assert "[7] and [0, 7]" in warning


# --- architectures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_models_are_accepted(family):
    model = tiny_model(family)
    check_layers(model)
    check_layers(model.config)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (RwkvConfig(num_hidden_layers=1), "rwkv has a recurrent state in a form of its own"),
        (DeepseekV32Config(num_hidden_layers=1), "deepseek_v32 has layers of kind indexed_attention"),
        (Llama4TextConfig(num_hidden_layers=4), "llama4_text attends in chunks"),
        (BartConfig(), "bart is an encoder-decoder"),
        (T5Config(), "t5 is an encoder-decoder"),
    ],
    ids=lambda value: value.model_type if not isinstance(value, str) else "",
)
def test_models_that_cannot_roll_back_are_refused_by_name(config, words):
    with pytest.raises(ModelError, match=words):
        check_layers(config)


def test_a_stateful_class_is_refused_without_layer_types():
    class Stateful:
        _is_stateful = True
        config = GPT2Config()

    with pytest.raises(ModelError, match="gpt2 has a recurrent state in a form of its own"):
        check_layers(Stateful())


def test_a_recurrent_folder_is_refused_before_its_weights_are_read(folder):
    RwkvConfig(num_hidden_layers=1).save_pretrained(folder)
    with pytest.raises(ModelError, match="does not know how to take back"):
        load_model(str(folder))


def test_sizes_count_tied_parameters_once():
    model = tiny_model("gemma", dtype=torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    names = {name: parameter for name, parameter in model.state_dict().items() if name != "lm_head.weight"}
    assert num_parameters(model) == sum(parameter.numel() for parameter in names.values())
    assert parameter_bytes(model) == 2 * num_parameters(model)


def test_the_language_model_of_a_larger_one_is_opened(tmp_path):
    """A folder of Qwen3.5 holds a vision tower, which nobody asks: its language model is what distils."""
    sizes = {"hidden_size": 32, "intermediate_size": 48}
    text = {
        "vocab_size": 61, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "max_position_embeddings": 256, "full_attention_interval": 2, "eos_token_id": 1,
    }  # fmt: skip
    vision = {"depth": 1, "num_heads": 2, "out_hidden_size": 32}
    config = Qwen3_5Config(text_config=text | sizes, vision_config=vision | sizes)
    Qwen3_5ForConditionalGeneration(config).save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert model.config.model_type == "qwen3_5_text"
    assert decode(model, model, [[3, 4], [5, 6, 7]], TeacherOnly(), 4)[0].error is None
