"""The loop that a researcher would write with transformers."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from switchkd.methods.policy import Policy
from switchkd.runner.cache import CACHE


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
            model(ids, attention_mask=mask, position_ids=places, logits_to_keep=1, **{CACHE: cache})
            .logits[:, -1, :vocab_size]
            .log_softmax(-1)
            for model, cache in zip((student, teacher), caches, strict=True)
        )
        decision = policy.step(state, logq, logp, torch.full((len(prompts),), t, device=ids.device))
        ids = torch.multinomial(decision.log_probs.exp(), 1, generator=generator)
        state = policy.spoke(policy.observe(decision.state, ids[:, 0]), decision.speaker)
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        tokens.append(ids)
    return torch.cat(tokens, 1)
