"""The training loss: an objective at every response token, from hidden states of the two models.

No ``[tokens, V]`` pair of logits ever exists: both output layers, the objective and its gradient are computed for a chunk
of tokens at a time, the gradient together with the value, so that nothing is computed twice and only gradients are kept.

Letters in shapes: B batch, T token position, H hidden size, V vocabulary, N response tokens of a batch in row-major order.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from switchkd.base.errors import ConfigError
from switchkd.data.texts import Batch
from switchkd.forward.head import Head, sizes_on
from switchkd.methods.objective import Objective, Tokens
from switchkd.runner.architecture import has_router_logits
from switchkd.runner.modes import evaluating
from switchkd.teachers.across import TeacherAcross
from switchkd.teachers.said import Teacher


def total(
    objective: Objective, teacher: Teacher | TeacherAcross | None, head: Head, hidden: Tensor, tokens: Tokens
) -> Tensor:
    """Sum of the objective over N tokens, from the student's ``hidden`` states ``[N, H]``; 0 for no tokens.

    Where ``tokens`` know the lengths of their texts, it is the sum of the means over each text.

    Gradients reach ``hidden`` and the student's ``head``; the teacher is a constant, and None if the objective does not ask
    it.
    """
    ids = head.ends.events(tokens.ids)
    tokens = replace(tokens, ids=teacher.events(ids) if isinstance(teacher, TeacherAcross) else ids)
    if objective.looks_ahead:
        assert teacher is not None
        tokens = objective.look_ahead(tokens, *_of_text(objective, teacher, head, hidden, tokens))
    weight, bias = head.parameters()
    # Within autograd.Function nothing tells whether somebody wants gradients.
    return _Total.apply(objective, teacher, head, tokens, torch.is_grad_enabled(), hidden, weight, bias)


class _Total(torch.autograd.Function):
    """The loss with its gradient, chunk by chunk over the tokens; the backward pass only scales what is there."""

    @staticmethod
    def forward(
        ctx: Any,
        objective: Objective,
        teacher: Teacher | TeacherAcross | None,
        head: Head,
        tokens: Tokens,
        learns: bool,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=weight.device)
        wants = [learns and want for want in ctx.needs_input_grad[5:]]
        sizes = sizes_on(weight.device)
        d_hidden, d_weight, d_bias = (
            torch.zeros_like(x, dtype=wide) if want and x is not None else None
            for want, x in zip(wants, (hidden, weight, bias), strict=True)
        )
        for rows in _slices(len(hidden), sizes.chunk, head.vocab_size):
            h = hidden[rows].to(weight.dtype)
            raw, says = head.raw(h), _says(teacher, rows)
            for piece in _slices(len(h), sizes.piece, head.vocab_size):
                with torch.set_grad_enabled(any(wants)):
                    leaf = raw[piece].detach().requires_grad_(any(wants))
                    logp, logq = says(piece, head.log_probs(head.finish(leaf)))
                    here = tokens[rows][piece]
                    losses = objective.loss(logp, logq, here)
                    loss = (losses if here.lengths is None else losses / here.lengths).sum()
                total += loss.detach()
                if any(wants):
                    (raw[piece],) = torch.autograd.grad(loss, leaf)  # the logits are not needed any more
            if d_hidden is not None:
                d_hidden[rows] = raw @ weight
            if d_weight is not None:
                _add_product(d_weight, raw.T, h)
            if d_bias is not None:
                d_bias += raw.sum(0)
        grads = zip((d_hidden, d_weight, d_bias), (hidden, weight, bias), strict=True)
        ctx.gradients = [None if d is None or x is None else d.to(x.dtype) for d, x in grads]
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "the loss can be back-propagated once: its gradients are scaled in place; compute it again"
            )
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, None, None, None, *(d if d is None else d.mul_(grad) for d in gradients)


def _says(teacher: Teacher | TeacherAcross | None, rows: slice) -> Callable[[slice, Tensor], tuple[Tensor, Tensor]]:
    """What the teacher says of a chunk; where none is asked, the student's own words stand in, and nobody looks."""
    return teacher.at(rows) if teacher is not None else lambda _, logq: (logq.detach(), logq)


@torch.no_grad()
def _of_text(
    objective: Objective, teacher: Teacher | TeacherAcross, head: Head, hidden: Tensor, tokens: Tokens
) -> tuple[Tensor, Tensor]:
    """Log-probabilities ``[N]`` of the tokens written, under teacher and student, at the objective's temperature."""
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for rows in _slices(len(hidden), sizes_on(hidden.device).chunk, head.vocab_size):
        pair = _says(teacher, rows)(slice(None), head.log_probs(head(hidden[rows])))
        for logs, part in zip(pair, found, strict=True):
            part.append(objective.soften(logs).gather(1, tokens.ids[rows].unsqueeze(1))[:, 0])
    empty = hidden.new_zeros(0)
    return torch.cat([empty, *found[0]]), torch.cat([empty, *found[1]])


def _slices(tokens: int, size: int, vocab_size: int) -> Iterator[slice]:
    """Consecutive slices of ``tokens`` whose fp32 logits take about ``size`` bytes."""
    step = max(1, size // (4 * vocab_size))
    return (slice(start, start + step) for start in range(0, tokens, step))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``, where ``total`` may be wider than the factors."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def response_tokens(batch: Batch, speakers: Sequence[Sequence[int]]) -> Tokens:
    """The N response tokens that ``response_hidden`` predicts; ``speakers`` says for each row who wrote each."""
    device = batch.input_ids.device
    said = torch.tensor([speaker for row in speakers for speaker in row], dtype=torch.int64, device=device)
    return Tokens(batch.input_ids[batch.loss_mask], said, batch.loss_mask.nonzero()[:, 0])


# --- a loss that balances experts ---------------------------------------------------------------------------------


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
