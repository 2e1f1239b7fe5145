"""Recipes hold what was published, and say of every number where it is from."""

import re
from pathlib import Path

import pytest

from switchkd.base.settings import shipped
from switchkd.cli.train import DemoConfig, demo_settings
from switchkd.methods.objectives import JSD, DistiLLM2, ReplacedCE, ReverseKL, Veto
from switchkd.methods.policies import CAOPD, TRB
from switchkd.studies.plan import cells, load_plan
from switchkd.training.optimizer import learning_rate
from switchkd.training.settings import load_recipe

NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d.]*(?:e[-+]?\d+)?(?![\w.])")
SOURCE = re.compile(r"(paper|code|ours)\b")


def unmarked(recipe):
    """Lines that set a number, and do not begin their comment with where it is from: the paper, its code, or us."""
    found = []
    for line in recipe.splitlines():
        setting, _, comment = line.partition(" #")
        if line.startswith(("method:", "#")) or not NUMBER.search(setting.partition(":")[2] or setting):
            continue
        if not SOURCE.match(comment.strip()):
            found.append(line)
    return found


@pytest.mark.parametrize("name", shipped("recipes"))
def test_every_number_has_a_source(name):
    assert unmarked(shipped("recipes")[name].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "learning_rate: 1e-4",
        "learning_rate: 1e-4               # searched: 5e-4",
        "  window: 4   # from here on ours",
        "mix: {name: generated, lmbda: 0.5}",
        "lora_alpha: 128                   # the paper's",
        "  - 3",
    ],
)
def test_a_number_without_a_source_is_refused(line):
    assert unmarked(line + "\n") == [line]
    assert unmarked(line.partition(" #")[0] + "   # code: of GPT-2\n") == []


def test_names_and_words_are_no_numbers():
    assert unmarked('method: "X, arXiv 2410.19503"\nobjective: distillm2\n# 3 epochs\n  tau_0_of: tau_0\n') == []


# Numbers that papers or their code have, read there.
PUBLISHED = {
    "switch": {"num_train_epochs": 20, "lr_scheduler_type": "cosine", "max_grad_norm": 1.0},
    "minillm": {
        "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 100, "max_steps": 5000, "rows": 16,
        "lm_weight": 0.5,
    },
    "distillm": {"lr_scheduler_type": "cosine_with_min_lr", "min_lr": 1e-7, "lm_weight": 1.0},
    "distillm2": {
        "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "num_train_epochs": 1.0, "temperature": 0.8,
        "lora_r": 16, "lora_alpha": 128, "objective": DistiLLM2(beta=1.0, detach_mixture=True),
    },
    "skd": {"lr_scheduler_type": "linear", "warmup_steps": 0, "max_new_tokens": 768},
    "ca_opd": {
        "lr_scheduler_type": "constant", "warmup_steps": 0, "max_steps": 471, "rows": 32,
        "policy": CAOPD(0.5, 0.25, 0.1), "objective": ReplacedCE(divergence="forward_kl", top_k=64),
    },
    "trb": {
        "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 15, "rows": 64, "max_new_tokens": 7168,
        "policy": TRB(0.01, 25), "objective": ReverseKL(top_k=16),
    },
    "veto": {"warmup_ratio": 0.1, "num_train_epochs": 3, "objective": Veto(beta=0.8)},
    "taid": {"rows": 64, "num_train_epochs": 5},
    "opd": {"lora_r": 128, "max_new_tokens": 4096, "temperature": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_hold_what_was_published(name):
    recipe = load_recipe(name)
    rows = recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps
    assert {key: rows if key == "rows" else getattr(recipe, key) for key in PUBLISHED[name]} == PUBLISHED[name]


# Rates that papers or their code have, for their own models.
RATES = {
    "switch": "5e-4", "distillm": "5e-4", "minillm": "5e-6", "distillm2": "5e-5", "skd": "1e-5", "ca_opd": "1e-6", "trb": "1e-5",
    "veto": "1e-5", "taid": "1e-4", "opd": "5e-5", "relay": "1e-6", "cross_kd": "1e-6", "cross_on_policy": "1e-6",
}  # fmt: skip


@pytest.mark.parametrize("name", shipped("recipes"))
def test_a_rate_that_was_published_is_told_and_not_given_to_other_models(name):
    """A paper's rate is for its own students; that of another one goes by its size."""
    assert load_recipe(name).learning_rate is None
    rate = next((RATES[known] for known in RATES if name == known or name.startswith(f"{known}_")), None)
    told = re.search(
        r"^# learning_rate: by the size of the student; the (?:paper|code) has (\S+?)[;,\s]", _text(name), re.M
    )
    assert (told and told.group(1)) == rate


def _text(name):
    return shipped("recipes")[name].read_text(encoding="utf-8")


@pytest.mark.parametrize("name", shipped("plans"))
def test_a_plan_has_one_rate_for_all_of_its_runs(name):
    plan = load_plan(name)
    rates = {
        size: {cell.config.learning_rate for cell in cells(plan, plan.sized(size), Path("out"))} for size in plan.sizes
    }
    assert rates and all(len(own) == 1 for own in rates.values()), rates


def test_the_methods_that_average_over_texts_first():
    by_text = {name for name in shipped("recipes") if load_recipe(name).loss_over == "sequences"}
    assert by_text == {"gkd", "on_policy", "skd", "adaswitch", "cross_adaswitch", "ssd", "ca_opd", "distillm2"}


@pytest.mark.parametrize("name", shipped("recipes"))
def test_the_demo_runs_every_recipe_at_its_own_size(name, tmp_path):
    """Published batches and lengths are no business of two cores."""
    settings = demo_settings(DemoConfig(method=name, output_dir=str(tmp_path)))
    assert settings.per_device_train_batch_size * settings.gradient_accumulation_steps == 8
    assert settings.max_steps == 24 and settings.max_new_tokens <= 64
    assert learning_rate(settings, 3, 24) == settings.learning_rate == 5e-4


def test_the_main_plan_has_the_baselines_of_its_table():
    plan = load_plan("which_method")
    made = {size: cells(plan, plan.sized(size), Path("out")) for size in plan.sizes}
    for runs in made.values():
        assert {cell.config.objective for cell in runs if cell.method == "gkd"} == {JSD(beta=0.1)}
        shared = (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "learning_rate",
            "lr_scheduler_type",
            "warmup_steps",
        )
        for name in (*shared, "min_lr", "min_lr_rate", "max_steps", "max_train_tokens"):
            assert len({getattr(cell.config, name) for cell in runs}) == 1, name
        assert all(cell.config.max_steps == -1 for cell in runs)  # MiniLLM's 5,000 are of other machines
