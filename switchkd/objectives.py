"""The training loss: a divergence between teacher and student at every response token, from hidden states.

No ``[tokens, V]`` pair of logits ever exists: both output layers, the divergence and its gradient are computed for a chunk
of tokens at a time, the gradient together with the value, so that nothing is computed twice and only gradients are kept.

Letters in shapes: B batch, T token position, H hidden size, V vocabulary, N response tokens of a batch in row-major order.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from switchkd import divergences
from switchkd.cache import evaluating, head_inputs
from switchkd.data import Batch
from switchkd.errors import ModelError

# Bytes of fp32 logits of one model that exist at once: enough tokens for efficient matrix products.
CHUNK_BYTES = 2**24
# Of these, what the divergence works on at once; autograd holds about sixteen tensors of this size, best in the CPU's cache.
PIECE_BYTES = 2**21


@dataclass(frozen=True, eq=False)
class Head:
    """The way from what enters the output layer, ``[..., H]``, to logits ``[..., vocab_size]``.

    ``softcap · tanh(scale · (W h + b) / softcap)``, without the cap where it is None.
    """

    linear: nn.Linear
    vocab_size: int
    scale: float = 1.0
    softcap: float | None = None

    @staticmethod
    def of(model: PreTrainedModel, vocab_size: int) -> "Head":
        """The model's own head, cut to the first ``vocab_size`` ids.

        Raises:
            ModelError: on a probe the head does not give the model's own logits, or it is more than a linear layer.
        """
        linear = model.get_output_embeddings()
        if not isinstance(linear, nn.Linear):
            raise ModelError(
                f"the output layer of {model.config.model_type} is a {type(linear).__name__}; the loss needs an nn.Linear. "
                "If it is an adapter, adapt the layers of the body only"
            )
        config = model.config.get_text_config()
        # Cohere multiplies, Granite divides, Gemma caps.
        scale = getattr(config, "logit_scale", None) or 1.0 / getattr(config, "logits_scaling", 1.0)
        head = Head(linear, vocab_size, scale, getattr(config, "final_logit_softcapping", None))
        head._check(model)
        return head

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.finish(self.raw(hidden))

    def raw(self, hidden: Tensor) -> Tensor:
        """The linear part, ``W h + b``."""
        weight, bias = self.parameters()
        return nn.functional.linear(hidden.to(weight.dtype), weight, bias)

    def finish(self, raw: Tensor) -> Tensor:
        """Scale and cap."""
        logits = raw if self.scale == 1.0 else raw * self.scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()

    def parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight ``[vocab_size, H]`` and bias ``[vocab_size]``, if there is one."""
        weight, bias = self.linear.weight, self.linear.bias
        if len(weight) == self.vocab_size:
            return weight, bias  # a slice would cost a second gradient of the weight's size
        return weight[: self.vocab_size], None if bias is None else bias[: self.vocab_size]

    @torch.no_grad()
    def _check(self, model: PreTrainedModel) -> None:
        ids = torch.arange(4, device=self.linear.weight.device).remainder(self.vocab_size).unsqueeze(0)
        with evaluating(model), head_inputs(model) as entered:
            output = model(input_ids=ids, use_cache=False)
        expected = output.logits[..., : self.vocab_size].double()
        error = (self(entered[0]).double() - expected).abs().max().item() / max(expected.abs().max().item(), 1e-9)
        if not error < {torch.float64: 1e-9, torch.float32: 1e-4}.get(model.dtype, 0.1):
            raise ModelError(
                f"{model.config.model_type} does something to its logits after the output layer that is not a scale or a "
                f"soft cap named in its config: on a probe they are off by {error:.2g} (relative); choose another model"
            )


@dataclass(frozen=True)
class Objective:
    """A divergence by name with its parameters, at a loss temperature.

    The value is what is back-propagated: no factor T² is added at a temperature other than 1.
    """

    divergence: str
    alpha: float = 0.1
    beta: float = 0.5
    temperature: float = 1.0

    def per_token(self, teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
        """Divergence ``[N]`` of logits ``[N, V]``, in the divergence's unit."""
        function = divergences.by_name(self.divergence, alpha=self.alpha, beta=self.beta)
        logp = divergences.log_probs(teacher_logits, self.temperature)
        return function(logp, divergences.log_probs(student_logits, self.temperature))

    def total(self, head_p: Head, hidden_p: Tensor, head_q: Head, hidden_q: Tensor) -> Tensor:
        """Sum over the N tokens of teacher ``hidden_p`` and student ``hidden_q``, both ``[N, H]``; 0 for no tokens.

        Gradients reach ``hidden_q`` and the student's head; the teacher is a constant.
        """
        weight, bias = head_q.parameters()
        return _Total.apply(self, head_p, hidden_p.detach(), head_q, hidden_q, weight, bias)


class _Total(torch.autograd.Function):
    """The loss with its gradient, chunk by chunk over the tokens; the backward pass only scales what is there."""

    @staticmethod
    def forward(
        ctx: Any,
        objective: Objective,
        head_p: Head,
        hidden_p: Tensor,
        head_q: Head,
        hidden_q: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=weight.device)
        wants = ctx.needs_input_grad[4:]
        d_hidden, d_weight, d_bias = (
            torch.zeros_like(x, dtype=wide) if want and x is not None else None
            for want, x in zip(wants, (hidden_q, weight, bias), strict=True)
        )
        for rows in _slices(len(hidden_q), CHUNK_BYTES, head_q.vocab_size):
            h = hidden_q[rows].to(weight.dtype)
            raw, logits_p = head_q.raw(h), head_p(hidden_p[rows])
            for piece in _slices(len(h), PIECE_BYTES, head_q.vocab_size):
                with torch.enable_grad():
                    leaf = raw[piece].detach().requires_grad_(any(wants))
                    loss = objective.per_token(logits_p[piece], head_q.finish(leaf)).sum()
                total += loss.detach()
                if any(wants):
                    (raw[piece],) = torch.autograd.grad(loss, leaf)  # the logits are not needed any more
            if d_hidden is not None:
                d_hidden[rows] = raw @ weight
            if d_weight is not None:
                _add_product(d_weight, raw.T, h)
            if d_bias is not None:
                d_bias += raw.sum(0)
        grads = zip((d_hidden, d_weight, d_bias), (hidden_q, weight, bias), strict=True)
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
        return None, None, None, None, *(d if d is None else d.mul_(grad) for d in gradients)


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


def response_hidden(model: PreTrainedModel, batch: Batch, forward: Callable[..., Any] | None = None) -> Tensor:
    """What enters the output layer where the response tokens are predicted, ``[N, H]``: for the token at t, at t − 1.

    The output layer itself is run on one position only. ``forward`` is the model as wrapped for training (DDP), if it is.
    """
    predicts = batch.loss_mask.roll(-1, dims=1)
    predicts[:, -1] = False
    with head_inputs(model, lambda hidden: hidden[:1, :1]) as entered:
        (forward or model)(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        )
    return entered[0][predicts]


def response_tokens(batch: Batch) -> Tensor:
    """The response token ids ``[N]`` that ``response_hidden`` predicts."""
    return batch.input_ids[batch.loss_mask]
