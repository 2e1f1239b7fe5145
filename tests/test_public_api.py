"""The public names and their meaning are pinned: a change here is a change for every user."""

import inspect
import subprocess
import sys

import switchkd


def test_names():
    assert switchkd.__all__ == [
        "AdaSwitch", "Decision", "Mix", "Objective", "Pair", "Policy", "Rollout", "Run", "StudentOnly", "Switch",
        "TeacherOnly", "TrainConfig", "Trainer", "__version__", "decode", "decode_reference", "distil", "divergences", "evaluate",
        "load_pair", "show",
    ]  # fmt: skip
    assert all(getattr(switchkd, name) is not None for name in switchkd.__all__)


def test_decode_signature():
    parameters = inspect.signature(switchkd.decode).parameters
    assert {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty} == {
        "max_new_tokens": 128, "temperature": 1.0, "seed": 0, "sample_ids": None, "block_size": "auto",
        "top_p": 1.0, "top_k": 0, "min_p": 0.0,
        "eos_token_ids": None, "batch_size": None, "drafter": "auto", "costs": (),
        "memory_gib": None, "keep_hidden": False, "graphs": False, "vocab_size": None,
        "teacher_prompt_ids": None, "progress": None, "watch": None,
    }  # fmt: skip
    assert list(parameters)[:4] == ["student", "teacher", "prompt_ids", "policy"]
    assert list(inspect.signature(switchkd.load_pair).parameters)[:2] == ["teacher", "student"]


def test_rollout_fields():
    assert list(switchkd.Rollout.__dataclass_fields__) == [
        "id", "prompt_ids", "completion_ids", "speakers", "teacher_prompt_ids", "teacher_completion_ids", "teacher", "said",
        "divergences", "thresholds", "stop_reason", "error",
    ]  # fmt: skip


def test_importing_policies_and_settings_does_not_load_torch():
    code = (
        "import sys, switchkd.cli.main; from switchkd import Switch, TrainConfig; Switch(), TrainConfig(); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
