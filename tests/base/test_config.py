"""Recipes: defaults, types, and errors with the nearest name."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import yaml

from switchkd import AdaSwitch, StudentOnly, Switch
from switchkd.base.errors import ConfigError, DataError
from switchkd.base.plain import check_type
from switchkd.base.settings import from_dict, shipped, to_dict
from switchkd.methods.mixes import Generated
from switchkd.methods.objectives import ForwardKL, SkewReverseKL
from switchkd.runs.heldout import eval_settings
from switchkd.training.settings import TrainConfig, load_recipe


@pytest.mark.parametrize("name", shipped("recipes"))
def test_recipes_load_and_round_trip(name):
    config = load_recipe(name)
    assert from_dict(TrainConfig, yaml.safe_load(yaml.safe_dump(to_dict(config))), "again") == config


def test_the_recipes_by_name():
    assert set(shipped("recipes")) == {
        "sft", "kd", "seqkd", "imitkd", "gkd", "on_policy", "minillm", "distillm", "distillm2", "skd", "ssd", "ca_opd", "trb",
        "relay", "hysteresis", "fast_opd", "opd", "veto", "taid", "akl", "adaswitch", "switch", "switch_linear", "switch_growth",
        "switch_constant", "switch_mix_in", "switch_random", "cross_kd", "cross_on_policy", "cross_switch", "cross_adaswitch",
    }  # fmt: skip


def test_the_papers_settings():
    switch, ada = load_recipe("switch"), load_recipe("adaswitch")
    assert switch.policy == Switch(schedule="exponential", tau_0=1.0, decay=0.1)
    assert switch.objective == SkewReverseKL(0.1) and switch.mix == Generated(0.5)
    assert (switch.temperature, switch.max_prompt_length, switch.max_new_tokens) == (1.0, 256, 256)
    assert switch.template == ada.template == "auto", (
        "an instruct model reads its own chat template, whatever the paper's did"
    )
    assert switch.num_train_epochs == 20
    assert isinstance(ada.policy, AdaSwitch) and ada.policy.ratio == 3.0 and ada.policy.divergence == "forward_kl"
    assert ada.objective == ForwardKL() and ada.mix == Generated(1.0)


@pytest.mark.parametrize(
    "values,words",
    [
        ({"learning_rat": 1}, "unknown setting 'learning_rat'; did you mean 'learning_rate'"),
        ({"policy": "swich"}, "unknown policy 'swich'; did you mean 'switch'"),
        ({"policy": {"name": "switch", "dekay": 1}}, "policy switch: unknown setting 'dekay'; did you mean 'decay'"),
        ({"policy": {"decay": 1}}, "must be a name or"),
        ({"policy": {"name": "switch", "schedule": "cubic"}}, "schedule must be 'exponential'"),
        ({"template": "chatml"}, "template must be 'auto', 'chat', 'alpaca', 'none', got 'chatml'"),
        ({"max_steps": "many"}, "max_steps must be int, got 'many'"),
        ({"max_steps": True}, "max_steps must be int, got True"),
        ({"learning_rate": "fast"}, "learning_rate must be float"),
        ({"resume": 1}, "resume must be bool"),
        ({"report_to": ["tensorbord"]}, "report_to: unknown tracker 'tensorbord'; did you mean 'tensorboard'"),
        ({"mix": {"name": "generated", "lmbda": 1.5}}, "lmbda is a probability"),
        ({"mix": "replay"}, "unknown mix 'replay'"),
        ({"lmbda": 0.5}, "unknown setting 'lmbda'"),
        ({"temperature": -1}, "temperature must be at least 0"),
        ({"top_p": 0}, "r.yaml: top_p must be above 0 and at most 1"),
        ({"top_k": -1}, "r.yaml: top_k must be at least 0"),
        ({"min_p": 2}, "r.yaml: min_p must be from 0"),
        ({"eval_top_p": 1.2}, "r.yaml: eval_top_p must be above 0 and at most 1"),
        ({"eval_min_p": -1}, "r.yaml: eval_min_p must be from 0"),
        ({"objective": {"name": "tvd", "temperature": 0}}, "temperature of the objective must be above 0"),
        ({"objective": "jds"}, "unknown objective 'jds'; did you mean 'jsd'"),
        ({"objective": {"name": "jsd", "beta": 1}}, "beta must lie strictly between"),
        ({"objective": {"name": "tvd", "alpha": 0.1}}, "objective tvd: unknown setting 'alpha'"),
        (
            {"objective": "minillm"},
            "minillm corrects for text .* with alpha=0.2, and the policy switch writes otherwise",
        ),
        ({"objective": "minillm", "policy": "mix_in", "max_new_tokens_start": 300}, "a budget grows"),
        ({"objective": "minillm", "policy": "student_only"}, "student_only writes with alpha=0"),
        ({"policy": {"name": "relay", "triggers": 3}}, "triggers must be"),
        ({"num_train_epochs": 0}, "num_train_epochs must be above 0"),
    ],
)
def test_wrong_settings_are_explained(values, words):
    with pytest.raises(ConfigError, match=words):
        from_dict(TrainConfig, values, "r.yaml")


def test_yaml_numbers_are_read_as_people_write_them(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("learning_rate: 1e-4\nmix: {name: generated, lmbda: 1}\npolicy: adaswitch\n")
    config = load_recipe(str(file))
    assert config.learning_rate == 1e-4 and config.mix == Generated(1.0) and config.policy == AdaSwitch()


@pytest.mark.parametrize(
    "text,words", [("- a\n", "must hold settings"), ("a: [", "not valid YAML"), (None, "no recipe")]
)
def test_files_that_are_no_recipe(tmp_path, text, words):
    file = tmp_path / "r.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_recipe(str(file))


def test_cuts_of_what_is_drawn_reach_decoding_and_evaluation_each_their_own():
    values = {
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.1,
        "eval_top_p": 0.8,
        "eval_top_k": 5,
        "eval_min_p": 0.2,
        "eval_temperature": 1.0,
    }
    config = from_dict(TrainConfig, values, "r.yaml")
    told = config.decoding()
    assert {name: getattr(told, name) for name in ("top_p", "top_k", "min_p")} == {
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.1,
    }
    settings = eval_settings(config, config.policy)
    assert (settings.top_p, settings.top_k, settings.min_p) == (0.8, 5, 0.2)
    written = settings.to_json()
    assert (written["top_p"], written["top_k"], written["min_p"]) == (0.8, 5, 0.2)
    # Files of before min_p was a setting say nothing of it, and can be compared with.
    plain = eval_settings(TrainConfig(), StudentOnly()).to_json()
    assert (plain["top_p"], plain["top_k"]) == (1.0, 0) and "min_p" not in plain


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().seed = 3


def test_settings_made_in_python_are_read_as_those_of_a_recipe():
    made = TrainConfig(policy="adaswitch", learning_rate="1e-4", eval_seeds=[1, 2], eval_temperature=1)
    assert (made.policy, made.learning_rate, made.eval_seeds) == (AdaSwitch(), 1e-4, (1, 2))
    assert type(made.eval_temperature) is float


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"policy": "adaswich"}, "policy: unknown policy 'adaswich'; did you mean 'adaswitch'"),
        ({"policy": 3}, "policy must be a name or"),
        ({"policy": StudentOnly}, "policy must be a name or"),
        ({"seed": "3"}, "seed must be int, got '3'"),
        ({"seed": True}, "seed must be int, got True"),
        ({"learning_rate": "fast"}, "learning_rate must be float, got 'fast'"),
        ({"dtype": "int8"}, "dtype must be 'auto', 'float32', 'bfloat16', 'float64', got 'int8'"),
        ({"report_to": 3}, "report_to must be several values, got 3"),
        ({"policy": AdaSwitch(require_full_window="no")}, "policy: require_full_window must be bool, got .no."),
    ],
)
def test_settings_of_another_type_made_in_python_are_explained(settings, words):
    with pytest.raises(ConfigError, match=words):
        TrainConfig(**settings)


def test_a_policy_is_read_by_name_wherever_settings_have_one():
    """Whatever else is imported: rules are known as soon as there are settings that name them."""
    code = "from switchkd.decoding.settings import DecodeConfig; print(DecodeConfig(policy='adaswitch').policy.window)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "4\n"


def test_numbers_of_numpy_and_paths_are_plain_settings():
    made = TrainConfig(
        seed=np.int64(3), learning_rate=np.float64(0.5), weight_decay=np.float32(0.25), output_dir=Path("x")
    )
    values = made.seed, made.learning_rate, made.weight_decay, made.output_dir
    assert values == (3, 0.5, 0.25, "x") and [type(value) for value in values] == [int, float, float, str]


@pytest.mark.parametrize(
    ("value", "hint", "words"),
    [
        ([1, "a"], list[int] | dict[str, int], "n must be list or dict"),
        ({"a": "b"}, list[int] | dict[str, int], "n must be list or dict"),
        (["a"], list[int] | None, r"n\[0\] must be int"),
        (True, int | float, "n must be int or float"),
        ({1: 2}, dict[str, int], "n, the name must be str, got 1"),
        ("b", Literal["a"], "n must be 'a', got 'b'"),
    ],
)
def test_a_value_is_of_one_of_its_types_with_all_that_is_in_it(value, hint, words):
    with pytest.raises(DataError, match=words):
        check_type(value, hint, "n")


def test_values_of_one_of_several_types():
    for value, hint in [
        ([1], list[int] | dict[str, int]),
        ({"a": 1}, list[int] | dict[str, int]),
        (None, list[int] | None),
    ]:
        check_type(value, hint)


def test_settings_that_are_gone_are_passed_over_in_files_of_before():
    """They moved time alone; a run that was begun with them can be read and gone on with. What is mistyped is still told."""
    config = from_dict(TrainConfig, {"repeatable": False, "static_step": True, "seed": 3}, "config.yaml")
    assert config == TrainConfig(seed=3) and not {"repeatable", "static_step"} & set(to_dict(config))
    with pytest.raises(ConfigError, match="unknown setting 'repeatabel'"):
        from_dict(TrainConfig, {"repeatabel": False}, "config.yaml")
