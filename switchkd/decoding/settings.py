"""TODO."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from switchkd.base.settings import Settings
from switchkd.methods.policies import Switch
from switchkd.methods.policy import Policy
from switchkd.methods.sampling import Sampling


@dataclass(frozen=True)
class DecodeConfig(Settings):
    """How text is generated."""

    policy: Policy = field(default_factory=Switch)
    """Who writes the next token: a name of `switchkd methods`, or my_module:MyRule."""
    max_new_tokens: int = 256
    """Token budget of a generated completion."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy. Reaches neither the policy's decision nor the loss."""
    top_p: float = 1.0
    """Draw from the fewest tokens whose probability reaches this; 1 keeps all. Reaches neither decision nor loss."""
    top_k: int = 0
    """Draw from this many most probable tokens; 0 keeps all."""
    min_p: float = 0.0
    """Draw from tokens with at least this share of the best one's probability; 0 keeps all."""
    block_size: int = 0
    """Positions decided in one round; 0 lets the engine choose. Moves time, never tokens."""
    generation_batch_size: int = 32
    """Rows decoded together. Moves time, never tokens."""
    generation_memory_gib: float = 0.0
    """GiB for key/value caches and block buffers, which may allow fewer rows; 0 sets no limit."""
    static_step: bool = False
    """Run the student's one-token steps on buffers that never move, on CUDA as one graph."""
    repeatable: bool = True
    """Plan rounds without looking at the clock, so that equal runs are equal to the last bit; false measures costs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        Sampling(self.temperature, self.top_p, self.top_k, self.min_p)

    def decode_arguments(self) -> dict[str, Any]:
        """What these settings say to ``decode``."""
        return {
            "policy": self.policy,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "block_size": self.block_size or "auto",
            "batch_size": self.generation_batch_size,
            "memory_gib": self.generation_memory_gib or None,
            "static_step": self.static_step,
            "repeatable": self.repeatable,
        }
