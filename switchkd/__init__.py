"""switchkd: distil a language model by deciding, token by token, who writes the next token."""

import importlib
from typing import TYPE_CHECKING, Any

from switchkd.base import __version__

if TYPE_CHECKING:
    from switchkd.api.distil import distil, evaluate
    from switchkd.api.run import Run
    from switchkd.api.show import show
    from switchkd.decoding.decode import decode, decode_reference
    from switchkd.decoding.rollouts import Rollout
    from switchkd.methods import divergences
    from switchkd.methods.mixes import Mix
    from switchkd.methods.objective import Objective
    from switchkd.methods.policies import AdaSwitch, Switch
    from switchkd.methods.policy import Decision, Policy, StudentOnly, TeacherOnly
    from switchkd.models.pair import Pair, load_pair
    from switchkd.training.settings import TrainConfig
    from switchkd.training.trainer import Trainer

# Names load on first use, so that `switchkd --help` does not wait for torch.
_HOME = {
    "decode": "decoding.decode",
    "decode_reference": "decoding.decode",
    "Rollout": "decoding.rollouts",
    "Mix": "methods.mixes",
    "Objective": "methods.objective",
    "AdaSwitch": "methods.policies",
    "Switch": "methods.policies",
    "Decision": "methods.policy",
    "Policy": "methods.policy",
    "StudentOnly": "methods.policy",
    "TeacherOnly": "methods.policy",
    "Pair": "models.pair",
    "load_pair": "models.pair",
    "TrainConfig": "training.settings",
    "Trainer": "training.trainer",
    "distil": "api.distil",
    "evaluate": "api.distil",
    "Run": "api.run",
    "show": "api.show",
}

__all__ = [
    "AdaSwitch",
    "Decision",
    "Mix",
    "Objective",
    "Pair",
    "Policy",
    "Rollout",
    "Run",
    "StudentOnly",
    "Switch",
    "TeacherOnly",
    "TrainConfig",
    "Trainer",
    "__version__",
    "decode",
    "decode_reference",
    "distil",
    "divergences",
    "evaluate",
    "load_pair",
    "show",
]


def __getattr__(name: str) -> Any:
    if name == "divergences":
        return importlib.import_module("switchkd.methods.divergences")
    if name in _HOME:
        return getattr(importlib.import_module(f"switchkd.{_HOME[name]}"), name)
    raise AttributeError(f"module 'switchkd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
