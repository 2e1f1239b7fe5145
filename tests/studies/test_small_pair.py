"""The small pair at its tiny scale: one command, two models that fit, found by name, repeated bit for bit."""

import json

import pytest
import torch

from switchkd.base.errors import ConfigError, DataError, ModelError
from switchkd.cli.main import main
from switchkd.data.examples import load_examples
from switchkd.data.small_data import FILES, FOLDER, SMALL_MODELS, STUDENTS, student_folder
from switchkd.data.texts import tokenize
from switchkd.models.loading import load_model, load_tokenizer
from switchkd.models.pair import load_pair
from switchkd.runner.architecture import num_parameters
from switchkd.studies.small_pair import MAX_COMPLETION, MAX_PROMPT, SCALES, _settings, make_pair, new_model


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache in which ``switchkd make-pair --scale tiny`` put its pair."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SWITCHKD_CACHE", str(folder))
        assert main(["make-pair", "--scale", "tiny", "--jobs", "3"]) == 0
    return folder


@pytest.fixture
def found(cache, monkeypatch):
    monkeypatch.setenv("SWITCHKD_CACHE", str(cache))
    return cache / FOLDER


def test_the_folder_holds_both_models_the_data_and_how_they_were_made(found):
    models = {"teacher", *map(student_folder, STUDENTS)}
    names = {"pair.json", *models, *(f"{name}.jsonl" for name in FILES)}
    assert {path.name for path in found.iterdir()} == names
    record = json.loads((found / "pair.json").read_text())
    assert record["seed"] == 0 and record["scale"] == "tiny"
    assert set(record["models"]) == models
    for name, of_it in record["models"].items():
        assert of_it["parameters"] == num_parameters(load_model(str(found / name)))
        assert set(of_it["right_by_task"]) == {"arithmetic", "text", "order"} and 0 <= of_it["until_mistake"] <= 100


def test_a_student_is_trained_further_from_start_to_start(found):
    cold, warm, near = (load_model(f"small:little-{start}").lm_head.weight for start in ("cold", "warm", "near"))
    assert not torch.equal(cold, warm) and not torch.equal(warm, near)
    assert torch.equal(load_pair("small").student.lm_head.weight, warm)
    for name in SMALL_MODELS[1:]:
        pair = load_pair("small", name)
        size = num_parameters(load_model(name))
        assert num_parameters(pair.student) == size < num_parameters(pair.teacher)


def test_small_names_the_pair_and_its_data(found):
    pair = load_pair("small")
    assert num_parameters(pair.teacher) > num_parameters(pair.student)
    assert pair.warnings == () and pair.vocab_size == len(pair.tokenizer)
    assert len(load_examples("small:text-heldout")) == SCALES["tiny"].heldout
    # Both shapes of a row are one prompt: the mixed file has the tokens of the two others.
    mixed, *single = (load_examples(f"small:{name}train") for name in ("", "arithmetic-", "text-", "order-"))
    limits = {"max_prompt_length": MAX_PROMPT, "max_completion_length": MAX_COMPLETION}
    ids = [tokenize(rows, pair.tokenizer, template="chat", **limits)[0] for rows in (mixed, *single)]
    assert [(e.prompt_ids, e.completion_ids) for e in ids[0]] == [
        (e.prompt_ids, e.completion_ids) for turn in zip(*ids[1:], strict=True) for e in turn
    ]
    assert all(e.completion_ids[-1] == pair.tokenizer.eos_token_id and not e.truncated for e in ids[0])


def test_text_comes_back_from_the_tokenizer_and_digits_stand_alone(found):
    tokenizer = load_tokenizer("small")
    words = [example.completion for example in load_examples("small:train")] + ["Ünïcode 🙂\t 12345\n\n x  y ."]
    for text in words:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    digits = tokenizer("12345 67")["input_ids"]
    assert [tokenizer.decode([token]) for token in digits] == ["1", "2", "3", "4", "5", " ", "6", "7"]


def test_a_pair_made_twice_is_the_same(found, tmp_path):
    make_pair(tmp_path / "again", scale="tiny", jobs=1)
    for name in (
        "teacher/model.safetensors",
        "student-big-near/model.safetensors",
        "teacher/tokenizer.json",
        "train.jsonl",
    ):
        assert (tmp_path / "again" / name).read_bytes() == (found / name).read_bytes(), name
    assert main(["make-pair", "--scale", "tiny", "--seed", "1", "--output-dir", str(tmp_path / "other")]) == 0
    assert (tmp_path / "other/train.jsonl").read_bytes() != (found / "train.jsonl").read_bytes()


def test_a_new_model_leaves_the_global_random_state_alone(found):
    before = torch.random.get_rng_state()
    tokenizer = load_tokenizer("small")
    one, other = (new_model(SCALES["tiny"].teacher, tokenizer, seed, "teacher") for seed in (0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_a_pair_that_was_not_made_is_an_error_that_says_how(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SWITCHKD_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="switchkd make-pair"):
        load_pair("small", "demo")
    with pytest.raises(ModelError, match="switchkd make-pair"):
        load_model("small:big-near")
    with pytest.raises(DataError, match="switchkd make-pair"):
        load_examples("small:train")
    assert list(tmp_path.iterdir()) == []


def test_a_taken_folder_and_a_failure_leave_what_was_there(found, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="already exists"):
        make_pair(scale="tiny")
    monkeypatch.setitem(SCALES, "odd", SCALES["tiny"])  # of which no other process knows
    with pytest.raises(KeyError, match="odd"):
        make_pair(tmp_path / "pair", scale="odd", jobs=1)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="jobs must be at least 0, got -1"):
        make_pair(tmp_path / "pair", scale="tiny", jobs=-1)


def test_a_students_learning_rate_stays_and_a_teachers_comes_down():
    """A short run could otherwise teach the student nothing: it would first lose what coming down had gained."""
    for sizes in SCALES.values():
        shapes = (sizes.teacher, *sizes.students.values())
        rates = [_settings(shape, 10, sizes.batch_size, 0).lr_scheduler_type for shape in shapes]
        assert rates == ["cosine", "constant", "constant"]
