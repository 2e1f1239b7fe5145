"""AdamW, its learning rate at every step, and how many steps there are."""

import math

import torch

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


def adamw(model: torch.nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over what is trainable; raises ConfigError if nothing is."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ConfigError("the student has no trainable parameters")
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (config.adam_beta1, config.adam_beta2)
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon, fused=True)
    # As the first update would make them; made here, the first checkpoint already has the size of all others.
    for parameter in parameters:
        step = torch.zeros((), dtype=torch.float32, device=parameter.device)
        moments = {name: torch.zeros_like(parameter, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": step, **moments}
    return optimizer
