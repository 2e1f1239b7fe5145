"""Pairs whose models have different tokenizers: what loads, with which sentences, what is refused, and what each model reads."""

import dataclasses
import json
from pathlib import Path

import pytest
from tiny import CHATML
from tokenizers import Tokenizer, normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from two_tokenizers import across_on_disk, model_of, tokenizer_of

from switchkd import distil
from switchkd.base.errors import ConfigError, VocabularyError
from switchkd.cli.main import main
from switchkd.data.files import BadRows
from switchkd.data.settings import DataConfig
from switchkd.data.templates import alpaca_prompt
from switchkd.models.pair import load_pair, pair_of
from switchkd.runs.opening import prepared, read_examples


@pytest.fixture
def place(tmp_path):
    return across_on_disk(tmp_path)


def names(place):
    return place["teacher_model_name_or_path"], place["student_model_name_or_path"]


def load(place, **more):
    return load_pair(*names(place), device="cpu", **more)


def changed(folder, change):
    """The tokenizer of a folder with its tokenizer.json changed."""
    file = Path(folder) / "tokenizer.json"
    settings = json.loads(file.read_text())
    change(settings)
    Tokenizer.from_str(json.dumps(settings)).save(str(file))


def with_template(folder, template=CHATML):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def rows_of(place, pair, **settings):
    config = DataConfig(train_file=(place["train_file"],), **settings)
    bad = BadRows([place["train_file"]], 0)
    return prepared(
        config, pair, read_examples(config, [place["train_file"]], None, bad, True), bad, quiet=True, training=True
    )


def test_a_pair_loads_with_a_bridge_and_a_sentence(place):
    pair = load(place)
    bridge = pair.bridges[""]
    assert bridge.student.tokenizer is pair.tokenizer and bridge.teacher.tokenizer is not pair.tokenizer
    assert pair.vocab_size == len(tokenizer_of("coarse")) and bridge.teacher.vocab_size == len(tokenizer_of("fine"))
    (note,) = [warning for warning in pair.warnings if "different tokenizers" in warning]
    assert "match one to one" in note and "between words" in note


def test_equal_tokenizers_have_no_bridge(tmp_path):
    place = across_on_disk(tmp_path, "coarse", "coarse")
    pair = load(place)
    assert pair.bridges == {} and not any("tokenizers" in warning for warning in pair.warnings)
    assert all(row.teacher_completion_ids is None for row in rows_of(place, pair, template="none"))


def test_models_in_python(place):
    student, teacher = model_of("coarse", seed=1), model_of("fine", seed=2)
    pair = pair_of(teacher, student, tokenizer_of("coarse"), teacher_tokenizer=tokenizer_of("fine"))
    assert pair.bridges[""].teacher.vocab_size == len(tokenizer_of("fine"))
    assert not pair_of(student, student, tokenizer_of("coarse")).bridges


@pytest.mark.parametrize(
    ("normalizer", "words"),
    [
        (normalizers.Lowercase(), "changes text.*'Hello' becomes 'hello'"),
        (normalizers.NFKC(), "changes text"),
        (normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]), "changes text"),
    ],
)
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_tokenizer_that_changes_text_is_refused_before_weights_are_read(place, normalizer, words, role, monkeypatch):
    folder = dict(zip(("teacher", "student"), names(place), strict=True))[role]
    state = json.loads(normalizer.__getstate__())
    changed(folder, lambda settings: settings.update(normalizer=state))
    monkeypatch.setattr("switchkd.models.pair.load_student", None)
    with pytest.raises(
        VocabularyError, match=f"(?s)the {role}'s tokenizer {words}.*keeps every character.*they differ: teacher"
    ):
        load(place)


def test_a_vocabulary_without_single_bytes_is_refused(place):
    def drop(settings):
        settings["model"]["vocab"] = {
            t: i for t, i in settings["model"]["vocab"].items() if t != "\u0120" and len(t) != 1
        }
        settings["model"]["merges"] = []

    changed(names(place)[0], drop)
    with pytest.raises(VocabularyError, match=r"no token for \d+ single bytes .*no byte fallback.*can write any text"):
        load(place)


def test_marks_that_mean_the_same(place):
    for folder, mark in zip(names(place), ("<think>", "<thought>"), strict=True):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_special_tokens({"additional_special_tokens": [mark]})
        tokenizer.save_pretrained(folder)
    _resize(place)
    plain, marked = load(place), load(place, marks={"<thought>": "<think>"})
    assert len(marked.bridges[""].shared[0]) == len(plain.bridges[""].shared[0]) + 1
    with pytest.raises(VocabularyError, match=r"student's tokenizer has no token '<think>', which shared_marks names"):
        load(place, marks={"<think>": "<think>"})


def _resize(place):
    for folder in names(place):
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.resize_token_embeddings(len(AutoTokenizer.from_pretrained(folder)))
        model.save_pretrained(folder)


# --- prompts and answers ------------------------------------------------------------------------------------------


def test_each_model_reads_prompts_under_its_own_template(place):
    with_template(names(place)[0])
    pair = load(place)
    assert any("under the template 'alpaca' and the teacher under 'chat'" in warning for warning in pair.warnings)
    row = rows_of(place, pair)[0]
    spelling, own = pair.bridges[""].teacher.spelling, pair.bridges[""].student.spelling
    assert own.decode(row.prompt_ids).decode() == alpaca_prompt("What is 0 and 0?")
    assert (
        spelling.decode(row.teacher_reads).decode()
        == "<|im_start|>user\nWhat is 0 and 0?<|im_end|>\n<|im_start|>assistant\n"
    )
    answer = "It is 0, and that is all."
    assert (
        own.decode(row.completion_ids[:-1]).decode() == spelling.decode(row.teacher_completion[:-1]).decode() == answer
    )
    assert (
        row.completion_ids[-1] == pair.bridges[""].student.end
        and row.teacher_completion[-1] == pair.bridges[""].teacher.end
    )
    with pytest.raises(ConfigError, match=r"the student's tokenizer has no chat template.*leave template 'auto'"):
        load(place, template="chat")


def test_a_cut_answer_is_cut_for_both_also_within_a_character(place):
    with open(place["train_file"], "w") as file:
        file.write(json.dumps({"prompt": "Say it", "completion": "xxx 東京東京"}) + "\n")
    pair = load(place)
    bridge = pair.bridges[""]
    whole = rows_of(place, pair, template="none")[0]
    for length in range(1, len(whole.completion_ids)):
        (row,) = rows_of(place, pair, template="none", max_completion_length=length)
        texts = [
            b"".join(s.bytes_of(i))
            for s, i in zip(bridge.sides, (row.completion_ids, row.teacher_completion), strict=True)
        ]
        assert row.truncated and texts[0] == texts[1] and len(row.completion_ids) == length


def test_a_run_says_what_cannot_be(place, tmp_path, capsys):
    def says(*more):
        flags = [
            "--teacher", names(place)[0], "--student", names(place)[1], "--train-file", place["train_file"], "--template", "none",
            "--max-prompt-length", "60", "--max-new-tokens", "9", "--max-completion-length", "40", "--eval-samples", "0",
            "--max-steps", "1",
        ]  # fmt: skip
        status = main(["train", *more, *flags, "--output-dir", str(tmp_path / "run")])
        return status, capsys.readouterr().err

    for method, words in (
        ("skd", "skd blends the two models' probabilities"),
        ("relay", "relay"),
        ("minillm", "turns of words"),
        ("kd --alignment prefix --objective reverse_kl", "reverse_kl is infinite"),
    ):
        status, error = says(*method.split())
        assert status == 1 and words in " ".join(error.split()), error


def test_check_says_what_is_shared(place, capsys):
    flags = [
        "--teacher",
        names(place)[0],
        "--student",
        names(place)[1],
        "--train-file",
        place["train_file"],
        "--template",
        "none",
    ]
    lengths = [
        "--max-prompt-length",
        "60",
        "--max-new-tokens",
        "9",
        "--max-completion-length",
        "40",
        "--eval-samples",
        "0",
    ]
    assert main(["check", "cross_switch", *flags, *lengths]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for words in (
        "two tokenizers, of the student and the teacher",
        "without a match",
        "of the student's probability",
        "student tokens match",
    ):
        assert words in out, out


def test_an_unknown_alignment_is_refused():
    from switchkd.training.settings import TrainConfig

    with pytest.raises(ConfigError, match="alignment"):
        dataclasses.replace(TrainConfig(), alignment="best")  # type: ignore[arg-type]


def test_a_tokenizer_without_a_file_is_refused(place, monkeypatch):
    monkeypatch.setattr(PreTrainedTokenizerFast, "backend_tokenizer", None)
    with pytest.raises(VocabularyError, match=r"no tokenizer\.json"):
        from switchkd.crossing.spelling import Spelling

        Spelling(tokenizer_of("coarse"), "student")


def test_distil_in_python_takes_models_and_names(place, tmp_path):
    """Loaded or named, both have the tokenizers of their own folders, and the losses are equal."""
    losses = set()
    for loaded in ("teacher", "student", "both", "neither"):
        teacher, student = (
            AutoModelForCausalLM.from_pretrained(folder, dtype="auto") if loaded in (role, "both") else folder
            for folder, role in zip(names(place), ("teacher", "student"), strict=True)
        )
        run = distil(
            teacher, student, place["train_file"], method="cross_kd", output_dir=tmp_path / f"run-{loaded}", template="none",
            max_prompt_length=60, max_completion_length=40, eval_samples=0, max_steps=1, dtype="float64", learning_rate=1e-3,
            sample_steps=0,
        )  # fmt: skip
        losses.add(run.metrics[0]["loss"])
        assert run.metrics[0]["cross/coverage"] > 0.9
    assert len(losses) == 1
