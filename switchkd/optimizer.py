"""AdamW, its learning rate at every step, and how many steps there are."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from switchkd.config import TrainConfig
from switchkd.errors import ConfigError


def learning_rate(config: TrainConfig, step: int, total_steps: float) -> float:
    """Rate of the update after ``step`` updates: linear warm-up, then constant or half a cosine down to 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.lr_scheduler_type == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def total_steps(config: TrainConfig, examples: int, rows_per_step: int) -> float:
    """Steps after which a run ends at the latest; infinite where a budget of tokens or time alone ends it."""
    if config.max_steps >= 0:
        return config.max_steps
    if config.max_train_tokens or config.max_train_seconds:
        return math.inf
    return math.ceil(config.num_train_epochs * examples / rows_per_step)


def adamw(weights: Sequence[nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over ``weights``, which it updates, with its moments, in their own dtype.

    Raises:
        ConfigError: there are none, or some are narrower than float32, in which a small update is rounded away.
    """
    if not weights:
        raise ConfigError("the student has no trainable parameters")
    if narrow := {str(weight.dtype) for weight in weights if weight.element_size() < 4}:
        raise ConfigError(
            f"AdamW would update weights in {', '.join(sorted(narrow))}, in which an update much smaller than the weight is lost: "
            "give it masters in float32 (switchkd.masters.Masters)"
        )
    groups = [
        {"params": [w for w in weights if w.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [w for w in weights if w.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (config.adam_beta1, config.adam_beta2)
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon, fused=True)
    # As the first update would make them; made here, the first checkpoint already has the size of all others.
    for weight in weights:
        step = torch.zeros((), dtype=torch.float32, device=weight.device)
        moments = {name: torch.zeros_like(weight, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[weight] = {"step": step, **moments}
    return optimizer
