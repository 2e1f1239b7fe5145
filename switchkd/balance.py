"""The balancing loss of a mixture of experts, which keeps its routers from sending every token to the same few experts.

Switch Transformer (arXiv 2101.03961, equations 4 to 6), as transformers computes it for each family: the number of experts times
the sum over experts of (share of tokens sent there) times (mean probability of being sent there). It is a product of two means
over the tokens of one forward, so it belongs to a micro-batch: 8x1 and 1x8 rows give different values, as in every trainer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from switchkd.cache import evaluating
from switchkd.errors import ConfigError
from switchkd.models import has_router_logits


def balance_coefficient(student: PreTrainedModel, given: float | None) -> float:
    """What the balancing loss is multiplied by: ``given``, or the student's own where that is None; 0 where it has none.

    Raises:
        ConfigError: a coefficient is given for a student without routers that are balanced.
    """
    own = _own_coefficient(student)
    if given == 0 or (given is None and not own):
        return 0.0
    if not _has_balancing_loss(student):
        if given is None:
            return 0.0
        raise ConfigError(
            f"router_aux_loss_coef {given:g}: {student.config.model_type} has no balancing loss of its routers; leave it out"
        )
    return own if given is None else given


def _own_coefficient(student: PreTrainedModel) -> float:
    config = student.config.get_text_config()
    places = (config, "router_aux_loss_coef"), (config, "aux_loss_coef"), (student, "router_aux_loss_coef")
    return next((float(own) for place, name in places if (own := getattr(place, name, None)) is not None), 0.0)


@torch.no_grad()
def _has_balancing_loss(student: PreTrainedModel) -> bool:
    if not has_router_logits(student):
        return False
    try:
        with evaluating(student), balancing(student, True) as found, torch.enable_grad():
            student(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=student.device), use_cache=False)
    except (TypeError, IndexError, ValueError, RuntimeError):  # a family that may have routers, and here has none
        return False
    return bool(found)


@contextmanager
def balancing(student: PreTrainedModel, wanted: bool) -> Iterator[list[Tensor]]:
    """Collect the balancing loss of every forward of ``student`` in the context that gradients flow through, if ``wanted``."""
    found: list[Tensor] = []
    if not wanted:
        yield found
        return

    def ask(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # Not a teacher that shares the student's weights.
        return args, {**kwargs, "output_router_logits": True} if torch.is_grad_enabled() else kwargs

    def collect(_: Any, __: Any, output: Any) -> None:
        loss = getattr(output, "aux_loss", None)
        if torch.is_grad_enabled() and isinstance(loss, Tensor):
            found.append(loss)

    handles = [student.register_forward_pre_hook(ask, with_kwargs=True), student.register_forward_hook(collect)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
