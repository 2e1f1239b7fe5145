"""Tiny random models and tabular toys that the tests share."""

from types import SimpleNamespace

import torch
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 23
_ROPE = dict(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=1,
)


def _gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=4, n_positions=64, bos_token_id=None, eos_token_id=1)
    )


def _opt() -> PreTrainedModel:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=16,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    )


FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_ROPE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_ROPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_ROPE, head_dim=4)),
    "gpt2": _gpt2,
    "opt": _opt,
    "mistral-sliding": lambda: MistralForCausalLM(MistralConfig(**_ROPE, sliding_window=4)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**_ROPE, head_dim=4)),
    "gemma3-hybrid": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **_ROPE, head_dim=4, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
        )
    ),
}


def tiny_model(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 12.0):
    """A random model whose next-token distributions are peaked enough (``scale``) to differ visibly by context."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = FAMILIES[family]().to(dtype).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.35)
            model.get_output_embeddings().weight.mul_(scale / 12.0)
    return model


class TabularModel(nn.Module):
    """Looks the next-token logits up by the last token: the smallest thing with a causal model's interface."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.table = nn.Parameter(logits)
        self.config = SimpleNamespace(vocab_size=logits.shape[1])

    def forward(self, input_ids: torch.Tensor, **_):
        return SimpleNamespace(logits=self.table[input_ids])
