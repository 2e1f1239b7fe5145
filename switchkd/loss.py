"""The training loss: an objective at every response token, from hidden states of the two models.

No ``[tokens, V]`` pair of logits ever exists: both output layers, the objective and its gradient are computed for a chunk
of tokens at a time, the gradient together with the value, so that nothing is computed twice and only gradients are kept.

Letters in shapes: B batch, T token position, H hidden size, V vocabulary, N response tokens of a batch in row-major order.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from switchkd import divergences
from switchkd.cache import evaluating, head_inputs
from switchkd.data import Batch
from switchkd.ends import NO_ENDS, Ends
from switchkd.errors import ModelError
from switchkd.models import batch_inputs, context_length, context_note, exact_lengths
from switchkd.objectives import Objective, Tokens
from switchkd.proof import prove


class Sizes(NamedTuple):
    """How much of the loss is worked on at once, in bytes of one model's fp32 logits."""

    chunk: int  # of a product with the output layer: enough tokens for an efficient one
    piece: int  # of these, what the divergence works on; autograd holds about sixteen tensors of this size


# A CPU works fastest in its cache. A GPU wants few and large calls: at 150,000 token ids, a piece of a CPU's size is three tokens.
CPU_SIZES, DEVICE_SIZES = Sizes(2**24, 2**21), Sizes(2**29, 2**28)


def sizes_on(device: torch.device) -> Sizes:
    """How much of the loss is worked on at once on this device."""
    return CPU_SIZES if device.type == "cpu" else DEVICE_SIZES


@dataclass(frozen=True, eq=False)
class Head:
    """The way from what enters the output layer, ``[..., H]``, to logits ``[..., vocab_size]``.

    ``softcap · tanh(scale · (W h + b) / softcap)``, without the cap where it is None.
    """

    linear: nn.Linear
    vocab_size: int
    scale: float = 1.0
    softcap: float | None = None
    ends: Ends = NO_ENDS

    @staticmethod
    def of(model: PreTrainedModel, vocab_size: int, ends: Ends = NO_ENDS) -> "Head":
        """The model's own head, cut to the first ``vocab_size`` ids; ``ends`` say what of its law is merged.

        Raises:
            ModelError: on a probe the head does not give the model's own logits, or it is more than a linear layer;
            or the model is not read exactly in batches (`switchkd.proof`).
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
        cap = getattr(config, "final_logit_softcapping", None)
        prove(model)
        # MiniCPM scales what enters the layer already.
        return Head._checked(model, [Head(linear, vocab_size, each, cap, ends) for each in dict.fromkeys((scale, 1.0))])

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

    def log_probs(self, logits: Tensor) -> Tensor:
        """Log-probabilities ``[..., vocab_size]`` of the next token as the pair compares them, fp32 or wider."""
        return self.ends.log_probs(logits)

    def parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight ``[vocab_size, H]`` and bias ``[vocab_size]``, if there is one."""
        weight, bias = self.linear.weight, self.linear.bias
        if len(weight) == self.vocab_size:
            return weight, bias  # a slice would cost a second gradient of the weight's size
        return weight[: self.vocab_size], None if bias is None else bias[: self.vocab_size]

    @staticmethod
    @torch.no_grad()
    def _checked(model: PreTrainedModel, heads: Sequence["Head"]) -> "Head":
        """The first of the heads that gives the model's own logits on a probe."""
        vocab_size, device = heads[0].vocab_size, heads[0].linear.weight.device
        ids = torch.arange(4, device=device).remainder(vocab_size).unsqueeze(0)
        with evaluating(model), head_inputs(model) as entered, torch.autocast(device.type, enabled=False):
            logits = model(input_ids=ids, use_cache=False).logits[..., :vocab_size]
            wide = torch.promote_types(logits.dtype, torch.float32)
            errors = [(head(entered[0]).to(wide) - logits.to(wide)).abs().max().item() for head in heads]
        size = max(logits.abs().max().item(), 1e-9)
        # The same product of the same numbers, rounded once, or as often as there are a scale and a cap.
        tolerance = {torch.float64: 1e-9 if logits.dtype == torch.float64 else 1e-6, torch.float32: 1e-5}.get(
            model.dtype, 1e-2
        )
        for head, error in zip(heads, errors, strict=True):
            if error < tolerance * size:
                return head
        raise ModelError(
            f"{model.config.model_type} does something to its logits after the output layer that is not a scale or a soft cap "
            f"named in its config: on a probe they are off by {errors[0] / size:.2g} (relative); choose another model"
        )


@dataclass(frozen=True, eq=False)
class TeacherStates:
    """What the teacher says at N tokens, as what enters its output layer there, ``[N, H]``, and the layer."""

    head: Head
    hidden: Tensor

    def at(self, rows: slice) -> Callable[[slice, Tensor], tuple[Tensor, Tensor]]:
        """For a chunk of the tokens: a function of a piece of it and the student's ``logq`` there to ``(logp, logq)``."""
        logits = self.head(self.hidden[rows])
        return lambda piece, logq: (self.head.log_probs(logits[piece]), logq)


@dataclass(frozen=True, eq=False)
class TeacherTopK:
    """What is known of the teacher at N tokens: its k largest log-probabilities ``[N, k]``, fp32 or wider, and their ``ids``.

    Both models are compared on these and one bucket with all other tokens (``divergences.coarsened``).
    """

    ids: Tensor
    log_probs: Tensor

    def at(self, rows: slice) -> Callable[[slice, Tensor], tuple[Tensor, Tensor]]:
        ids, logs = self.ids[rows], self.log_probs[rows]
        return lambda piece, logq: divergences.coarsened(logs[piece], ids[piece], logq)


@dataclass(frozen=True, eq=False)
class SeveralTeachers:
    """What several teachers say at N tokens, each at its own: ``places[i]``, ascending, are the tokens of ``parts[i]``."""

    parts: Sequence[TeacherStates]
    places: Sequence[Tensor]

    def at(self, rows: slice) -> Callable[[slice, Tensor], tuple[Tensor, Tensor]]:
        found = []
        for part, places in zip(self.parts, self.places, strict=True):
            inside = (places >= rows.start) & (places < rows.stop)
            found.append((places[inside] - rows.start, part.head(part.hidden[inside])))
        logits = torch.cat([own for _, own in found])
        order = torch.cat([places for places, _ in found]).argsort()
        logits, law = logits[order], self.parts[0].head.log_probs  # all of one pair
        return lambda piece, logq: (law(logits[piece]), logq)


Teacher = TeacherStates | TeacherTopK | SeveralTeachers


def total(objective: Objective, teacher: Teacher | None, head: Head, hidden: Tensor, tokens: Tokens) -> Tensor:
    """Sum of the objective over N tokens, from the student's ``hidden`` states ``[N, H]``; 0 for no tokens.

    Where ``tokens`` know the lengths of their texts, it is the sum of the means over each text.

    Gradients reach ``hidden`` and the student's ``head``; the teacher is a constant, and None if the objective does not ask
    it.
    """
    tokens = replace(tokens, ids=head.ends.events(tokens.ids))
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
        teacher: Teacher | None,
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


def _says(teacher: Teacher | None, rows: slice) -> Callable[[slice, Tensor], tuple[Tensor, Tensor]]:
    """What the teacher says of a chunk; where none is asked, the student's own words stand in, and nobody looks."""
    return teacher.at(rows) if teacher is not None else lambda _, logq: (logq.detach(), logq)


@torch.no_grad()
def _of_text(
    objective: Objective, teacher: Teacher, head: Head, hidden: Tensor, tokens: Tokens
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


def response_hidden(model: PreTrainedModel, batch: Batch) -> Tensor:
    """What enters the output layer where the response tokens are predicted, ``[N, H]``: for the token at t, at t − 1.

    The output layer itself is run on one position only.
    """
    _check_length(model, batch.input_ids.shape[1])
    predicts = batch.loss_mask.roll(-1, dims=1)
    predicts[:, -1] = False
    with head_inputs(model, lambda hidden: hidden[:1, :1]) as entered:
        model(**batch_inputs(model, batch))
    return entered[0][predicts]


def _check_length(model: PreTrainedModel, tokens: int) -> None:
    """Raise ModelError for rows so long that the logits of one would depend on the others."""
    if tokens > min(exact_lengths(model.config.get_text_config()).values(), default=math.inf):
        raise ModelError(
            f"a text of {tokens} tokens exceeds the {context_length(model):g} that {model.config.model_type} reads exactly"
            f"{context_note(model)}; lower max_prompt_length, max_completion_length or max_new_tokens"
        )


def response_tokens(batch: Batch, speakers: Sequence[Sequence[int]]) -> Tokens:
    """The N response tokens that ``response_hidden`` predicts; ``speakers`` says for each row who wrote each."""
    device = batch.input_ids.device
    said = torch.tensor([speaker for row in speakers for speaker in row], dtype=torch.int64, device=device)
    return Tokens(batch.input_ids[batch.loss_mask], said, batch.loss_mask.nonzero()[:, 0])
