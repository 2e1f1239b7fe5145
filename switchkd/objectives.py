"""The training loss: a divergence between teacher and student at every response token.

Letters in shapes: B batch, T token position, V vocabulary, N response tokens of a batch in row-major order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from switchkd import divergences
from switchkd.data import Batch

# Tokens whose log-probabilities exist at once; the rest of the loss keeps nothing of size V but the logits.
CHUNK = 256


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

    def total(self, teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
        """Sum over the tokens, a scalar; 0 for no tokens. Log-probabilities are recomputed in the backward pass."""
        parts = [
            checkpoint(self._chunk_total, p, q, use_reentrant=False, preserve_rng_state=False)
            for p, q in zip(teacher_logits.split(CHUNK), student_logits.split(CHUNK), strict=True)
        ]
        return torch.stack(parts).sum()

    def _chunk_total(self, teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
        return self.per_token(teacher_logits, student_logits).sum()


def response_logits(
    model: PreTrainedModel, batch: Batch, vocab_size: int, forward: Callable[..., Any] | None = None
) -> Tensor:
    """Logits ``[N, vocab_size]`` that predict the response tokens: for the token at t, those at t − 1.

    Only these positions go through the output layer, and they go through the model's own, so that a head bias, a logit
    scale or soft-capping is never missed. ``forward`` is the model as wrapped for training (DDP), if it is.
    """
    predicts = batch.loss_mask.roll(-1, dims=1)
    predicts[:, -1] = False

    def keep_response(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0][predicts].unsqueeze(0), *inputs[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(keep_response)
    try:
        output = (forward or model)(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        )
    finally:
        handle.remove()
    return output.logits[0, :, :vocab_size]


def response_tokens(batch: Batch) -> Tensor:
    """The response token ids ``[N]`` that ``response_logits`` predicts."""
    return batch.input_ids[batch.loss_mask]
