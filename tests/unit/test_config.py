"""Recipes: defaults, types, and errors with the nearest name."""

import dataclasses

import pytest
import yaml

from switchkd import AdaSwitch, Switch
from switchkd.config import TrainConfig, from_dict, load_recipe, shipped, to_dict
from switchkd.errors import ConfigError
from switchkd.mixes import Generated
from switchkd.objectives import ForwardKL, SkewReverseKL


@pytest.mark.parametrize("name", shipped("recipes"))
def test_recipes_load_and_round_trip(name):
    config = load_recipe(name)
    assert from_dict(TrainConfig, yaml.safe_load(yaml.safe_dump(to_dict(config))), "again") == config


def test_the_recipes_by_name():
    assert set(shipped("recipes")) == {
        "sft", "kd", "seqkd", "imitkd", "gkd", "on_policy", "minillm", "distillm", "distillm2", "skd", "ssd", "ca_opd", "trb",
        "relay", "hysteresis", "fast_opd", "opd", "veto", "taid", "akl", "adaswitch", "switch", "switch_linear", "switch_growth",
        "switch_constant", "switch_mix_in", "switch_random",
    }  # fmt: skip


def test_the_papers_settings():
    switch, ada = load_recipe("switch"), load_recipe("adaswitch")
    assert switch.policy == Switch(schedule="exponential", tau_0=1.0, decay=0.1)
    assert switch.objective == SkewReverseKL(0.1) and switch.mix == Generated(0.5)
    assert (switch.temperature, switch.template, switch.max_prompt_length, switch.max_new_tokens) == (
        1.0,
        "alpaca",
        256,
        256,
    )
    assert switch.learning_rate == 5e-4 and switch.num_train_epochs == 20
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
        ({"template": "chatml"}, "template must be 'chat', 'alpaca', 'none', got 'chatml'"),
        ({"max_steps": "many"}, "max_steps must be int, got 'many'"),
        ({"max_steps": True}, "max_steps must be int, got True"),
        ({"learning_rate": "fast"}, "learning_rate must be float"),
        ({"resume": 1}, "resume must be bool"),
        ({"report_to": ["tensorbord"]}, "report_to: unknown tracker 'tensorbord'; did you mean 'tensorboard'"),
        ({"mix": {"name": "generated", "lmbda": 1.5}}, "lmbda is a probability"),
        ({"mix": "replay"}, "unknown mix 'replay'"),
        ({"lmbda": 0.5}, "unknown setting 'lmbda'"),
        ({"temperature": -1}, "temperature must be at least 0"),
        ({"objective": {"name": "tvd", "temperature": 0}}, "temperature of the objective must be above 0"),
        ({"objective": "jds"}, "unknown objective 'jds'; did you mean 'jsd'"),
        ({"objective": {"name": "jsd", "beta": 1}}, "beta must lie strictly between"),
        ({"objective": {"name": "tvd", "alpha": 0.1}}, "objective tvd: unknown setting 'alpha'"),
        ({"objective": "minillm"}, "minillm weighs text .* from a mix-in of alpha=0.2, and switch writes otherwise"),
        ({"objective": "minillm", "policy": "mix_in", "max_new_tokens_start": 300}, "a budget grows"),
        ({"objective": "minillm", "policy": "student_only"}, "student_only writes with alpha=0"),
        ({"policy": {"name": "relay", "triggers": "Wait"}}, "triggers must be"),
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


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().seed = 3
