"""The way from a model's last hidden states to log-probabilities, and what a model says of whole texts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from switchkd.base.errors import ModelError
from switchkd.data.texts import Batch, collate
from switchkd.forward.ends import NO_ENDS, Ends
from switchkd.forward.parallel import whole_linear
from switchkd.forward.proof import prove
from switchkd.runner.architecture import batch_inputs, beyond_context
from switchkd.runner.modes import evaluating, head_inputs


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

        Of a model in shards it is gathered, once, and all processes that run the model must ask for it.

        Raises:
            ModelError: on a probe the head does not give the model's own logits, or it is more than a linear layer;
            or the model is not read exactly in batches (`switchkd.forward.proof`).
        """
        prove(model)
        return Head._checked(model, Head._named(model, vocab_size, ends))

    @staticmethod
    @torch.no_grad()
    def of_states(model: PreTrainedModel) -> "Head":
        """The same of all ids, for the states behind the last layer, which other software gives out; nothing else is proved.

        Raises:
            ModelError: as ``of``; or something stands between the last layer and the output layer.
        """
        head = Head._checked(model, Head._named(model, model.get_output_embeddings().out_features, NO_ENDS))
        ids = torch.arange(4, device=head.linear.weight.device).unsqueeze(0)
        with evaluating(model), head_inputs(model) as entered:
            model(input_ids=ids, use_cache=False)
            last = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        if last.shape != entered[0].shape or not torch.allclose(last, entered[0]):
            raise ModelError(
                f"{model.config.model_type} does something to its last hidden states before they enter the output layer, so that "
                "those of a server cannot be told from what enters it; choose another model, or load it in this process"
            )
        return head

    @staticmethod
    def _named(model: PreTrainedModel, vocab_size: int, ends: Ends) -> "list[Head]":
        """The heads that the model's config may mean."""
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
        # MiniCPM scales what enters the layer already.
        linear = whole_linear(linear)
        return [Head(linear, vocab_size, each, cap, ends) for each in dict.fromkeys((scale, 1.0))]

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.finish(self.raw(hidden))

    def raw(self, hidden: Tensor) -> Tensor:
        """The linear part, ``W h + b``."""
        weight, bias = self.parameters()
        return nn.functional.linear(hidden.to(weight), weight, bias)

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
            errors = [(head(entered[0]).to(logits.device, wide) - logits.to(wide)).abs().max().item() for head in heads]
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


def response_hidden(model: PreTrainedModel, batch: Batch) -> Tensor:
    """What enters the output layer where the response tokens are predicted, ``[N, H]``: for the token at t, at t − 1.

    The output layer itself is run on one position only.
    """
    _check_length(model, batch.input_ids.shape[1])
    predicts = batch.loss_mask.roll(-1, dims=1)
    predicts[:, -1] = False
    with head_inputs(model, lambda hidden: hidden[:1, :1]) as entered:
        model(**batch_inputs(model, batch))
    return entered[0][predicts.to(entered[0].device)]


def _check_length(model: PreTrainedModel, tokens: int) -> None:
    """Raise ModelError for rows so long that the model does not read them as it was made to."""
    if words := beyond_context(tokens, "model's", model):
        raise ModelError(f"{tokens} tokens {words}; lower max_prompt_length, max_completion_length or max_new_tokens")


class Scorer:
    """What a model says of texts, read as they are: its next-token distributions at each token of a completion.

    Raises:
        ModelError: as `Head.of`, which checks the model by a forward once.
    """

    def __init__(self, model: PreTrainedModel, vocab_size: int, ends: Ends = NO_ENDS):
        self.model, self.head = model, Head.of(model, vocab_size, ends)

    @torch.no_grad()
    def hidden(self, rows: Sequence[tuple[list[int], list[int]]]) -> Tensor:
        """What enters the output layer before each of the N tokens of the rows' completions, ``[N, H]``.

        A row is the token ids of a prompt and its completion. The model is in evaluation mode meanwhile.
        """
        device = self.head.linear.weight.device  # of a model over several devices, that of its output layer
        batch = collate(rows).to(device)
        with evaluating(self.model):
            return response_hidden(self.model, batch).to(device)

    def log_probs(self, hidden: Tensor) -> Tensor:
        """Log-probabilities of the next token, ``[..., vocab_size]``, fp32 or wider."""
        return self.head.log_probs(self.head(hidden))
