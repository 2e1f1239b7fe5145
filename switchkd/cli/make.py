"""The commands that make models, and give one away: `prune` a student out of a model, `make-pair` a small teacher and student from
nothing, `push` the student of a run to the hub.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from switchkd.base.errors import ConfigError
from switchkd.base.settings import Settings


@dataclass(frozen=True)
class PruneConfig(Settings):
    """Make a student by dropping the layers of least influence from a model."""

    model_name_or_path: str = "demo"
    """Hub name or local folder of the model."""
    output_dir: str = "pruned"
    """Where the smaller model goes; must be empty or absent."""
    layers: int = 15
    """Layers to keep."""
    seed: int = 0
    """Key of the choice of texts that influence is measured on."""


@dataclass(frozen=True)
class MakePairConfig(Settings):
    """Make the small pair for studies on two CPU cores, with its data, from generated text."""

    output_dir: str | None = None
    """Where the pair goes; default in the user's cache, where the model name `small` finds it."""
    seed: int = 0
    """Key of all randomness."""
    scale: Literal["full", "tiny"] = "full"
    """`tiny` makes untrained models in seconds, to try the command."""


@dataclass(frozen=True)
class PushConfig(Settings):
    """Put the student of a run, and nothing else of it, on the Hugging Face Hub."""

    run: tyro.conf.Positional[str] = ""
    """The run directory, or its student/."""
    name: tyro.conf.Positional[str] = ""
    """The name on the hub, my-name/my-student."""
    private: bool = True
    """What is made there is private; one that is there already stays as it is."""


def prune(config: PruneConfig) -> None:
    from switchkd.models.pruning import prune as prune_model

    prune_model(config.model_name_or_path, Path(config.output_dir), config.layers, seed=config.seed)


def make_pair(config: MakePairConfig) -> None:
    from switchkd.studies.small_pair import make_pair as make_small_pair

    make_small_pair(Path(config.output_dir) if config.output_dir else None, config.seed, config.scale)


def push(config: PushConfig) -> None:
    from switchkd.base.terminal import console
    from switchkd.runs.finishing import push as push_student

    if not config.run or not config.name:
        raise ConfigError("a run and a name on the hub are needed: switchkd push runs/mine my-name/my-student")
    console.print(
        f"student put on the hub: {push_student(Path(config.run), config.name, config.private)}", soft_wrap=True
    )
