"""The loop that a researcher would write with transformers, and a policy that mixes the two models token by token."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from switchkd.policies import Decision, Policy, State


@dataclass(frozen=True)
class SpeculativeKD(Policy):
    """After SKD (Xu et al., arXiv 2410.11325): the student proposes, the teacher replaces what is not in its top K.

    m(y) = q(y) · [y in top K of p] + (1 − q(top K)) · p(y). The speaker is the more likely author; the divergence is the
    probability that the proposal is replaced.
    """

    top_k: int = 25

    def step(self, state: State, logp_student: Tensor, logp_teacher: Tensor, position: Tensor) -> Decision:
        top = logp_teacher.topk(min(self.top_k, logp_teacher.shape[1])).indices
        accepted = logp_student.gather(1, top).exp()
        replaced = (1 - accepted.sum(1)).clamp(0, 1)
        target = (replaced.unsqueeze(1) * logp_teacher.exp()).scatter_add(1, top, accepted)
        return Decision(target.log(), (replaced > 0.5).long(), replaced, state)


def left_padded(prompts: Sequence[Sequence[int]], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """``input_ids`` and ``attention_mask`` of prompts that end together, as ``generate`` wants them."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return ids, mask


@torch.no_grad()
def naive_decode(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    policy: Policy,
    max_new_tokens: int,
    vocab_size: int,
) -> Tensor:
    """Tokens ``[B, max_new_tokens]``: both models read each token once, the policy chooses, ``multinomial`` draws."""
    ids, mask = left_padded(prompts, student.device)
    generator = torch.Generator(student.device).manual_seed(0)
    caches = [DynamicCache(config=model.config) for model in (student, teacher)]
    state = policy.init(len(prompts), student.device)
    tokens = []
    for t in range(max_new_tokens):
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        logq, logp = (
            model(ids, attention_mask=mask, position_ids=places, past_key_values=cache, logits_to_keep=1)
            .logits[:, -1, :vocab_size]
            .log_softmax(-1)
            for model, cache in zip((student, teacher), caches, strict=True)
        )
        decision = policy.step(state, logq, logp, torch.full((len(prompts),), t, device=ids.device))
        state = decision.state
        ids = torch.multinomial(decision.log_probs.exp(), 1, generator=generator)
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        tokens.append(ids)
    return torch.cat(tokens, 1)
