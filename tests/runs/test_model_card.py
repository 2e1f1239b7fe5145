"""The card beside a student: metadata and settings that can be read back, scores, licences, and no text of anybody else's."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants
from tiny import pair_on_disk, toy_examples, toy_pair
from transformers import AutoModelForCausalLM, AutoTokenizer

from switchkd import load_pair
from switchkd.base.settings import from_dict
from switchkd.base.terminal import number
from switchkd.evaluation.results import Evaluation
from switchkd.evaluation.statistics import Values
from switchkd.methods.mixes import GroundTruth
from switchkd.models.settings import with_dtypes
from switchkd.reports.record import read_config
from switchkd.runs import distil as runs
from switchkd.runs.model_card import model_card, public_settings
from switchkd.training.settings import TrainConfig
from switchkd.training.trainer import Trainer


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A run of seconds on a pair and data on disk."""
    folder = tmp_path_factory.mktemp("pair")
    return TrainConfig(
        **pair_on_disk(folder, "Zebras are how many, {0}?", "Exactly {1} zebras."),
        eval_samples=2, eval_max_new_tokens=4, max_new_tokens=6,
        max_completion_length=12, per_device_train_batch_size=2, max_steps=2, learning_rate=1e-4, method="SWITCH: Koo *et al.*",
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "mine"
    return folder, runs.distil(dataclasses.replace(settings, output_dir=str(folder)))


def card_of(config, results=None, evaluated=None, pair=None):
    """The card of a toy student, as a run of these settings would have it."""
    return ModelCard(model_card(Trainer(pair or toy_pair(), toy_examples(), config), results or {}, evaluated or {}))


def embedded(card):
    """The settings that stand in a card, with as many backticks around them as they need."""
    [(_, text)] = re.findall(r"^(`{3,})yaml\n(.*?)^\1$", card.text, re.DOTALL | re.MULTILINE)
    return from_dict(TrainConfig, yaml.safe_load(text), "the card")


def test_the_card_of_a_run_says_what_was_made_how_and_how_good_it_is(run, settings):
    folder, results = run
    card = ModelCard.load(folder / "student" / "README.md")
    assert card.data.library_name == "transformers" and card.data.tags == ["switchkd", "knowledge-distillation"]
    assert (card.data.license, card.data.license_name) == ("other", "see-licences-in-the-card")
    assert card.data.base_model is None and card.data.datasets is None
    trained = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["num_tokens"]
    teacher = sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(settings.teacher_model_name_or_path).parameters()
    )
    for words in (
        "# `mine`", f"- teacher: `teacher`, {teacher:,} parameters", "dtype: float32",
        r"SWITCH: Koo \*et al.\*", "the teacher writes where JSD(p, q) is above the threshold", "data: `data.jsonl`, 12 examples",
        f"2 optimizer steps on {trained} response tokens", "- task: `references version 1`", "- max_new_tokens: `4`",
        "unknown: check where it came from", "switchkd train config.yaml", f"torch {torch.__version__}",
    ):  # fmt: skip
        assert words in card.text, words
    assert "| score | teacher | student before | student after | examples |" in card.text
    [row] = [line for line in card.text.splitlines() if line.startswith("| `rouge_l` |")]
    estimate = results["student after"].summary["rouge_l"]
    assert row.split(" | ")[-2:] == [
        f"{number(estimate.mean)}† [{number(estimate.low)}, {number(estimate.high)}]",
        "2 |",
    ]


def test_the_settings_in_a_card_are_the_runs(run, settings):
    folder, _ = run
    card = ModelCard.load(folder / "student" / "README.md")
    used = with_dtypes(dataclasses.replace(settings, output_dir=str(folder)), torch.device("cpu"))
    # What is measured at the start, and chosen for the tokenizer.
    used = dataclasses.replace(used, costs=read_config(folder).costs, template="chat")
    assert read_config(folder) == used and embedded(card) == public_settings(used) and len(used.costs) == 6
    # A run that was resumed is made again from its start.
    assert not embedded(card_of(dataclasses.replace(settings, resume=True))).resume


def test_no_text_of_the_data_or_of_a_model_stands_in_a_card(run):
    folder, results = run
    text = (folder / "student" / "README.md").read_text()
    assert "ebras" not in text and "Exactly" not in text
    assert results["student after"].completions
    assert not [c.text for result in results.values() for c in result.completions if len(c.text) > 2 and c.text in text]


def test_a_student_with_its_card_opens_as_before(run, settings):
    student = str(run[0] / "student")
    AutoModelForCausalLM.from_pretrained(student)
    AutoTokenizer.from_pretrained(student)
    assert load_pair(settings.teacher_model_name_or_path, student).vocab_size


@pytest.mark.parametrize("merge", [False, True])
def test_an_adapter_says_that_it_lies_alone_or_is_merged(settings, tmp_path, merge):
    changes = {"use_peft": True, "merge": merge, "eval_samples": 0, "output_dir": str(tmp_path / "run")}
    runs.distil(dataclasses.replace(settings, **changes))
    card = ModelCard.load(tmp_path / "run" / "student" / "README.md")
    assert card.data.library_name == ("transformers" if merge else "peft")
    assert ("is merged into the weights" if merge else "lies here alone") in card.text
    assert "None: the run was not evaluated." in card.text and re.search(r"peft \d", card.text)
    assert re.search(r"- student: .* parameters, [\d,]+ trained", card.text)
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")


def test_an_adapter_is_said_to_come_from_its_base(tmp_path, settings):
    config = dataclasses.replace(
        settings, use_peft=True, eval_samples=0, output_dir=str(tmp_path / "first"), max_steps=1
    )
    runs.distil(config)
    adapter = str(tmp_path / "first" / "student")
    again = dataclasses.replace(config, student_model_name_or_path=adapter, teacher_model_name_or_path="base")
    text = card_of(again).text
    assert "- student base, an adapter `student`: `other`, by its README.md" in text
    for role in ("student base", "teacher"):
        assert f"- {role} `student`: unknown" in text


def test_a_score_that_is_no_number_and_scores_over_few_examples_are_marked(settings):
    values = {"rouge_l": Values(np.array([[1.0, 2.0]])), "forward_kl@51+": Values(np.array([[0.0, 0.0]]), np.zeros(2))}
    card = card_of(settings, {"student after": Evaluation(values, "rouge_l")}, {"task": "references version 1"})
    assert "| `forward_kl@51+` | - | 0 |" in card.text
    assert "| `rouge_l` | 1.50† [1.00, 2.00] | 2 |" in card.text


def test_the_demo_is_known_to_be_smollm2_and_gsm8k():
    card = card_of(TrainConfig())
    assert card.data.license == "apache-2.0" and card.data.license_name is None
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct" and card.data.datasets == ["openai/gsm8k"]
    assert "- training data `gsm8k-sample:train`: `mit`" in card.text and "unknown" not in card.text
    qwen = card_of(TrainConfig(teacher_model_name_or_path="qwen-coder", student_model_name_or_path="qwen-coder"))
    assert qwen.data.license == "apache-2.0" and qwen.data.base_model == "Qwen/Qwen2.5-Coder-0.5B-Instruct"
    made = card_of(TrainConfig(teacher_model_name_or_path="small", student_model_name_or_path="small"))
    assert made.data.license == "other" and "- teacher `small`: made by `switchkd make-pair`" in made.text


def model(folder, license):
    folder.mkdir()
    (folder / "README.md").write_text(f"---\n{license}\n---\n# A model\n" if license is not None else "# A model\n")
    return str(folder)


@pytest.mark.parametrize(
    "teacher,student,inherited",
    [
        ("license: mit", "license: MIT", "mit"),
        ("license: mit", "license: apache-2.0", "other"),
        ("license: mit", None, "other"),
        (None, None, "other"),
        ("license: other", "license: other", "other"),
        ("license: [mit, gpl-3.0]", "license: [mit, gpl-3.0]", "other"),
        ("license: [mit", "license: mit", "other"),
        ("- mit", "license: mit", "other"),
    ],
)
def test_the_card_has_a_licence_only_where_all_models_have_that_one(tmp_path, monkeypatch, teacher, student, inherited):
    monkeypatch.setattr("huggingface_hub.repocard.logger.warning", lambda text: pytest.fail(text))
    names = {"teacher_model_name_or_path": model(tmp_path / "teacher", teacher)}
    card = card_of(TrainConfig(**names, student_model_name_or_path=model(tmp_path / "student", student)))
    assert card.data.license == inherited and (card.data.license_name is None) == (inherited != "other")
    for role, name, metadata in (("teacher", "teacher", teacher), ("student base", "student", student)):
        plain = re.fullmatch(r"license: ([\w.-]+)", metadata or "")
        terms = f"`{plain[1].lower()}`, by its README.md" if plain else "unknown: check where it came from"
        assert f"- {role} `{name}`: {terms}\n" in card.text


def test_another_teacher_of_another_licence_counts(tmp_path):
    mit, gpl = model(tmp_path / "mit", "license: mit"), model(tmp_path / "gpl", "license: gpl-3.0")
    config = TrainConfig(teacher_model_name_or_path=mit, student_model_name_or_path=mit)
    assert card_of(config).data.license == "mit"
    pair = dataclasses.replace(toy_pair(), teachers={"code": toy_pair().teacher})
    card = card_of(dataclasses.replace(config, teachers={"code": gpl}, teacher_field="kind"), pair=pair)
    assert card.data.license == "other" and "- teacher `code` `gpl`: `gpl-3.0`" in card.text


def test_a_hub_name_is_read_from_the_cache_and_never_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for kind in ("models--org--known", "datasets--org--rows"):
        (tmp_path / kind / "snapshots" / "abc").mkdir(parents=True)
        (tmp_path / kind / "refs").mkdir()
        (tmp_path / kind / "refs" / "main").write_text("abc")
        (tmp_path / kind / "snapshots" / "abc" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    monkeypatch.setattr("socket.socket", None)
    names = {"teacher_model_name_or_path": "org/other", "student_model_name_or_path": "org/known"}
    card = card_of(TrainConfig(**names, train_file="hub:org/rows/main:train@v1", lm_file="hub:org/text:train"))
    assert card.data.base_model == "org/known" and card.data.datasets == ["org/rows", "org/text"]
    assert "- teacher `org/other`: unknown: check https://huggingface.co/org/other\n" in card.text
    assert "- student base `org/known`: `cc-by-4.0`, by its README.md" in card.text
    assert "- training data `hub:org/rows/main:train@v1`: `cc-by-4.0`" in card.text
    assert "unknown: check https://huggingface.co/datasets/org/text\n" in card.text


def test_names_are_no_markup(settings):
    odd = "runs/a_b*c*<img src=x>``x\n# head"
    config = dataclasses.replace(settings, output_dir=odd, train_file=odd, teacher_prompt="{prompt}\n```\n</details>")
    card = card_of(config)
    assert card.text.strip().splitlines()[0] == "# ``` a_b*c*<img src=x>``x # head ```"
    assert "- training data: ``` runs/a_b*c*<img src=x>``x # head ```, 12 examples" in card.text
    assert dataclasses.replace(embedded(card), costs=()) == public_settings(config)


def test_only_rules_that_were_asked_stand_in_a_card(settings):
    assert "Who writes" in card_of(settings).text
    assert "Who writes" not in card_of(dataclasses.replace(settings, mix=GroundTruth())).text


def test_the_weights_are_said_to_be_the_best_where_they_are(settings):
    config = dataclasses.replace(settings, metric_for_best_model="rouge_l", eval_steps=1)
    trainer = Trainer(toy_pair(), toy_examples(), config)
    trainer.best = {"step": 5, "score": 12.5}
    assert "those of step 5, the best of the run by `rouge_l` 12.5" in model_card(trainer, {}, {})
