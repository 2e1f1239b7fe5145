"""Where a NaN or an infinity comes from: which model, on which samples, or which weight."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from switchkd.data.texts import Text
from switchkd.forward.modes import evaluating
from switchkd.forward.sharding import local
from switchkd.training.optimizer import Masters

if TYPE_CHECKING:
    from switchkd.methods.objective import Objective
    from switchkd.training.trainer import Trainer


@torch.no_grad()
def blame(trainer: Trainer, parts: Sequence[tuple[Sequence[Text], Objective]]) -> str:
    """What is not finite in a step and on which samples, found by reading its rows one by one; ``parts``: rows, objective."""
    found: dict[str, list[str]] = defaultdict(list)
    every = []
    with evaluating(trainer.student):
        for rows, objective in parts:
            for row in rows:
                found[_broken(trainer, row, objective)].append(row.name)
                every.append(row.name)
    found.pop("", None)
    if not found:
        return f"the student's gradient is not finite on {', '.join(every)}"
    return "; ".join(f"{what} on {', '.join(samples)}" for what, samples in found.items())


def _broken(trainer: Trainer, row: Text, objective: Objective) -> str:
    if not row.completion_ids:
        return ""
    hidden, _, teacher = trainer.read([row], objective)
    logq = trainer.head.log_probs(trainer.head(hidden))
    # Log-softmax spreads one NaN or +inf over its whole row; a log-probability of −inf is a masked token.
    if teacher is not None and teacher.at(slice(0, len(logq)))(slice(None), logq)[0].isnan().any():
        return "the teacher's logits are not finite"
    if logq.isnan().any():
        return "the student's logits are not finite"
    return "" if trainer._loss([row], objective).isfinite() else "the loss is not finite"


@torch.no_grad()
def broken_weight(masters: Masters, optimizer: torch.optim.Optimizer) -> str:
    """The first trained weight, or moment of the optimizer, that is not finite, in words; "" if all that this rank has are."""
    for name, weight in masters.named.items():
        values = {"": weight} | optimizer.state.get(weight, {})
        for key, value in values.items():
            if not local(value).isfinite().all():
                return f"the optimizer's {key} of {name}" if key else f"the student's weight {name}"
    return ""
