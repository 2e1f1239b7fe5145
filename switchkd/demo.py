"""The demonstration: a method's recipe with the sizes of two cores."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path

from switchkd.config import Settings, TrainConfig, load_recipe


@dataclass(frozen=True)
class DemoConfig(Settings):
    """Distil a real 81M student from a real 135M teacher on this machine, no hub needed."""

    method: str = "switch"
    """A name that `switchkd methods` lists."""
    max_steps: int = 24
    """Optimizer steps."""
    output_dir: str | None = None
    """The run directory; default runs/demo-METHOD, numbered if there is one already."""
    seed: int = 0
    """Key of all randomness."""


def demo_settings(config: DemoConfig) -> TrainConfig:
    """The method's recipe with the sizes of a demonstration on two cores."""
    recipe: TrainConfig = load_recipe(config.method)
    return dataclasses.replace(
        recipe,
        template="chat",
        max_prompt_length=160,
        max_completion_length=128,
        max_new_tokens=min(64, recipe.max_new_tokens),
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        learning_rate=5e-4,
        warmup_steps=4,
        max_steps=config.max_steps,
        eval_samples=32,
        eval_max_new_tokens=64,
        sample_steps=6,
        save_steps=12,
        seed=config.seed,
        output_dir=config.output_dir or _unused(f"runs/demo-{config.method}"),
    )


def _unused(folder: str) -> str:
    """``folder``, or the first of folder-2, folder-3, … that is not there yet."""
    names = itertools.chain([folder], (f"{folder}-{number}" for number in itertools.count(2)))
    return next(name for name in names if not Path(name).exists())
