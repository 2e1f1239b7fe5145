"""`distil` and `evaluate` from Python: names or models, files or rows, and a run like any other."""

import dataclasses
import json
import math
from html.parser import HTMLParser
from types import SimpleNamespace

import datasets
import pytest
import torch
from tiny import pair_on_disk
from transformers import AutoModelForCausalLM, AutoTokenizer

import switchkd
from switchkd import Run, distil, evaluate, show
from switchkd.base.errors import ConfigError, DataError
from switchkd.decoding.rollouts import Rollout
from switchkd.reports.record import RunRecord
from switchkd.runs.distil import distil as distil_by_config
from switchkd.training.settings import load_recipe

SMALL = {
    "max_steps": 2, "max_new_tokens": 6, "eval_max_new_tokens": 6, "per_device_train_batch_size": 2, "eval_samples": 2,
    "learning_rate": 1e-3, "quiet": True,
}  # fmt: skip
ROWS = [{"prompt": f"Name a river near {i}."} for i in range(12)]


@pytest.fixture
def names(tmp_path, monkeypatch):
    monkeypatch.setenv("SWITCHKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    made = pair_on_disk(tmp_path)
    return made["teacher_model_name_or_path"], made["student_model_name_or_path"], made["train_file"]


def test_rows_of_python_give_the_run_that_a_file_of_them_gives(names, tmp_path):
    teacher, student, _ = names
    told = []
    run = distil(
        teacher, student, ROWS, on_step=lambda metrics, texts: told.append((metrics["step"], len(texts))), **SMALL
    )
    assert run.path.as_posix() == "runs/adaswitch" and told == [(1, 2), (2, 2)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    same = [
        distil(teacher, student, data, output_dir=tmp_path / name, **SMALL)
        for name, data in (("file", file), ("files", [str(file)]), ("table", datasets.Dataset.from_list(ROWS)))
    ]
    for other in same:
        assert [line["loss"] for line in other.metrics] == [line["loss"] for line in run.metrics]
        assert other.scores.keys() == run.scores.keys() == {"teacher", "student before", "student after"}
    by_settings = dataclasses.replace(
        load_recipe("adaswitch"), teacher_model_name_or_path=teacher, student_model_name_or_path=student,
        train_file=str(file), output_dir=str(tmp_path / "config"), **SMALL,
    )  # fmt: skip
    distil_by_config(by_settings)
    assert RunRecord.read(tmp_path / "config").metrics[-1]["loss"] == run.metrics[-1]["loss"]
    assert distil(teacher, student, ROWS, **SMALL).path.as_posix() == "runs/adaswitch-2", "nothing is written over"


def test_a_run_knows_its_student_texts_and_report_and_can_be_opened_again(names, tmp_path):
    teacher, student, data = names
    run = Run(distil(teacher, student, data, method="switch", output_dir=tmp_path / "run", **SMALL).path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student", dtype="auto")
    assert all(torch.equal(a, b) for a, b in zip(run.student.parameters(), saved.parameters(), strict=True))
    before = AutoModelForCausalLM.from_pretrained(student, dtype="auto")
    assert any(not torch.equal(a, b) for a, b in zip(run.student.parameters(), before.parameters(), strict=True))
    assert run.evaluations["student after"].means() == pytest.approx(run.scores["student after"], nan_ok=True)
    assert run.report().read_text().startswith("<!DOCTYPE html") or "<html" in run.report().read_text()[:200]
    assert run.report(tmp_path / "page.html").parent == tmp_path
    texts = run.rollouts(3)
    assert len(texts) <= 3 and all(isinstance(text, Rollout) for text in texts) and len(texts[:1]) == min(1, len(texts))


def test_loaded_models_give_the_run_of_their_folders(names, tmp_path):
    teacher, student, data = names
    by_name = distil(teacher, student, data, output_dir=tmp_path / "names", **SMALL)
    models = {name: AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32) for name in (teacher, student)}
    loaded = distil(models[teacher], models[student], data, output_dir=tmp_path / "models", **SMALL)
    mixed = distil(teacher, AutoModelForCausalLM.from_pretrained(student), data, output_dir=tmp_path / "mixed", **SMALL)
    for other in (loaded, mixed):
        assert [line["loss"] for line in other.metrics] == [line["loss"] for line in by_name.metrics]
        assert str(other.scores) == str(by_name.scores)
        assert other.record.settings["student_model_name_or_path"] == student
    half = AutoModelForCausalLM.from_pretrained(student, dtype=torch.bfloat16)
    distil(teacher, half, data, output_dir=tmp_path / "half", **SMALL)
    assert half.dtype == torch.float32, "what is trained is updated in float32"
    assert Run(tmp_path / "half").student.dtype == torch.bfloat16, "and saved as it came"


def test_a_model_that_was_never_in_a_folder_needs_its_tokenizer(names, tmp_path):
    teacher, student, data = names
    model, tokenizer = AutoModelForCausalLM.from_pretrained(student), AutoTokenizer.from_pretrained(student)
    model.name_or_path = model.config._name_or_path = ""
    with pytest.raises(ConfigError, match="its tokenizer is not known; give tokenizer="):
        distil(teacher, model, data, output_dir=tmp_path / "a", **SMALL)
    run = distil(teacher, model, data, tokenizer=tokenizer, output_dir=tmp_path / "b", **SMALL)
    assert run.record.settings["student_model_name_or_path"] == "loaded-LlamaForCausalLM"


def test_a_loaded_student_can_be_trained_by_an_adapter(names, tmp_path):
    teacher, student, data = names
    base = AutoModelForCausalLM.from_pretrained(student)
    run = distil(teacher, base, data, use_peft=True, lora_r=2, output_dir=tmp_path / "run", **SMALL)
    assert (tmp_path / "run" / "student" / "adapter_config.json").is_file()
    assert run.student.num_parameters() > AutoModelForCausalLM.from_pretrained(student).num_parameters()
    with pytest.raises(ConfigError, match="the student has an adapter already"):
        distil(teacher, base, data, use_peft=True, output_dir=tmp_path / "again", **SMALL)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"learning_rat": 1}, ConfigError, "no setting 'learning_rat'; did you mean 'learning_rate'"),
        (
            {"train_file": "other.jsonl"},
            ConfigError,
            "train_file is what another argument of this function says already",
        ),
        ({"method": "adaswich"}, ConfigError, "did you mean 'adaswitch'"),
        ({"method": "kd"}, DataError, "a prompt without the answer"),
        ({"data": [{"prompt": "a"}, "b"]}, DataError, "row 1 of the data must be a dictionary, not str"),
        ({"data": [{"prompt": b"a"}]}, DataError, "row 0 of the data holds what JSON cannot"),
        ({"data": [{"prompt": float("nan")}]}, DataError, "row 0 of the data holds what JSON cannot"),
        ({"data": []}, DataError, "no usable row"),
        ({"data": "none.jsonl"}, DataError, "none.jsonl: no such file"),
    ],
)
def test_what_is_wrong_is_said(names, tmp_path, settings, error, words):
    given = {"data": ROWS, "method": "on_policy", "output_dir": tmp_path / "run"} | SMALL | settings
    with pytest.raises(error, match=words):
        distil(names[0], names[1], **given)


def test_rows_do_not_go_into_a_folder_that_holds_something(names, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years")
    with pytest.raises(ConfigError, match="full already exists and is not empty"):
        distil(names[0], names[1], ROWS, output_dir=tmp_path / "full", **SMALL)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]


def test_a_run_of_python_goes_on(names, tmp_path):
    settings = SMALL | {"max_steps": 4, "save_steps": 2}
    straight = distil(names[0], names[1], ROWS, output_dir=tmp_path / "a", **settings)

    def stop(metrics, texts):
        if metrics["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distil(names[0], names[1], ROWS, output_dir=tmp_path / "b", on_step=stop, **settings)
    again = distil(names[0], names[1], ROWS, output_dir=tmp_path / "b", resume=True, **settings)
    assert [line["loss"] for line in again.metrics] == [line["loss"] for line in straight.metrics]
    with pytest.raises(ConfigError, match=r"train.jsonl holds the rows that the run began with, and these are others"):
        distil(names[0], names[1], ROWS[1:], output_dir=tmp_path / "b", resume=True, **settings)


def test_evaluate_scores_both_models(names):
    teacher, student, data = names
    scores = evaluate(student, teacher, data, eval_max_new_tokens=6, eval_samples=5)
    assert scores.keys() == {"teacher", "student"} and scores["teacher"].means()["forward_kl"] == 0
    assert len(scores["student"].scores["rouge_l"].values[0]) == 5
    loaded = evaluate(
        AutoModelForCausalLM.from_pretrained(student), teacher, data, eval_max_new_tokens=6, eval_samples=5
    )
    assert str(loaded["student"].means()) == str(scores["student"].means())


class Page(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_texts_in_a_notebook_mark_the_teachers_tokens_and_run_nothing():
    words = [
        "<script>alert(1)</script>",
        " & ",
        "é",
        "<b>Hi</b>",
    ]  # whole tags in one token, as large vocabularies have them
    tokenizer = SimpleNamespace(decode=lambda ids: "".join(words[index] for index in ids))
    seen = {"divergences": [0.25] * 3, "thresholds": [math.nan] * 3}
    rollout = Rollout(0, [3], [0, 1, 2], [0, 1, 0], **seen, stop_reason="length")
    page = Page(show(rollout, tokenizer)._repr_html_())
    tags = [tag for tag, _ in page.tags]
    assert "script" not in tags and "b" not in tags
    assert "<script>alert(1)</script> & é" in page.text and "<b>Hi</b>" in page.text
    tokens = [attrs for tag, attrs in page.tags if tag == "span" and "title" in attrs]
    assert [("style" in attrs) for attrs in tokens] == [False, True, False]
    assert tokens[0]["title"] == "divergence 0.250"
    assert switchkd.show([rollout, rollout], tokenizer)._repr_html_().count("<details>") == 2


def test_a_run_shows_scores_and_texts(names, tmp_path):
    run = distil(*names, output_dir=tmp_path / "run", **SMALL)
    page = Page(run._repr_html_())
    assert "Finished after 2 steps" in page.text and "student after" in page.text and "forward_kl" in page.text
