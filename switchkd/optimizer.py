"""AdamW, its learning rate at every step, and how many steps there are."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from switchkd.config import TrainConfig
from switchkd.errors import ConfigError


def learning_rate(config: TrainConfig, step: int, total_steps: float) -> float:
    """Rate of the update after ``step`` updates: warm-up, then ``lr_scheduler_type`` as transformers' scheduler of that name.

    As there, what falls would reach its end with the update after the last. Warm-up is one step ahead of theirs, so that no
    update has rate 0: ``learning_rate / warmup`` is the first, ``learning_rate`` the last of it. ``constant`` warms up too.
    """
    warmup = _warmup(config, total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.lr_scheduler_type.startswith("constant"):
        return config.learning_rate
    done = (step - warmup) / max(total_steps - warmup, 1)
    if config.lr_scheduler_type == "linear":
        return config.learning_rate * max(1 - done, 0.0)
    floor = config.min_lr + config.min_lr_rate * config.learning_rate  # one of the two, or 0
    return floor + (config.learning_rate - floor) * 0.5 * (1 + math.cos(math.pi * done))


def _warmup(config: TrainConfig, total_steps: float) -> float:
    """Steps of warm-up; where they are a share of a run whose length nobody can tell yet, there is no end to them."""
    if config.warmup_steps or not config.warmup_ratio:
        return config.warmup_steps
    return math.ceil(config.warmup_ratio * total_steps) if math.isfinite(total_steps) else math.inf


def schedule_progress(step: int, total_steps: float) -> float:
    """How far schedules over training are after ``step`` updates: 0 in the first step of a run, 1 in its last and behind it.

    A run of one step is at its start. ``total_steps`` may be an estimate: what is not whole takes one step more.
    """
    if math.isinf(total_steps):
        return 0.0
    last = math.ceil(total_steps * (1 - 1e-9)) - 1  # a quotient of whole numbers is whole but for rounding
    return min(step / last, 1.0) if last > 0 else float(step > 0)


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
