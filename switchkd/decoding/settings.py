"""How text is decoded: what ``decode`` is told, and the settings of recipes and command lines that say so."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

from switchkd.base.errors import ConfigError
from switchkd.base.settings import Settings
from switchkd.methods import rules  # noqa: F401  # by which a policy is read from its name, and written down
from switchkd.methods.policies import Switch
from switchkd.methods.policy import Policy
from switchkd.methods.sampling import Sampling

Drafter = Literal["auto", "student", "teacher"]


@dataclass(frozen=True)
class DecodeSettings:
    """How text is decoded, beside models and prompts: what decides its tokens, and what moves time alone.

    The former are ``policy``, ``max_new_tokens``, ``temperature``, ``top_p``, ``top_k``, ``min_p`` and ``seed``; ``decode`` says
    what each of them means.

    Raises:
        ConfigError: for one that is out of range.
    """

    policy: Policy
    max_new_tokens: int = 128
    temperature: float = 1.0
    seed: int = 0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    block_size: int | Literal["auto"] = "auto"
    batch_size: int | None = None
    drafter: Drafter = "auto"
    costs: tuple[float, ...] = ()
    memory_gib: float | None = None
    keep_hidden: bool = False
    graphs: bool = False

    def __post_init__(self) -> None:
        _ = self.sampling  # which raises
        if self.max_new_tokens < 0:
            raise ConfigError(f"max_new_tokens must be at least 0, got {self.max_new_tokens}")
        if self.block_size != "auto" and self.block_size < 1:
            raise ConfigError(f"block_size must be 'auto' or at least 1, got {self.block_size}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.drafter not in get_args(Drafter):
            raise ConfigError(f"drafter must be 'auto', 'student' or 'teacher', got {self.drafter!r}")

    @cached_property
    def sampling(self) -> Sampling:
        """How a token is drawn from the target distribution."""
        return Sampling(self.temperature, self.top_p, self.top_k, self.min_p)


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
    graphs: bool = False
    """Record drafts and verifying forwards as CUDA graphs, for batches of 1, 2, 4 … 64 rows. Not yet run on a GPU."""
    costs: tuple[float, ...] = ()
    """Seconds that forwards take, by which rounds are planned; measured at the start and written into config.yaml.

    Runs with equal costs are equal to the last bit. They are six: of a forward of n tokens of the student a + b n, of the teacher's
    c + d n, of deciding n positions e + f n.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        Sampling(self.temperature, self.top_p, self.top_k, self.min_p)

    def decoding(self, **more: Any) -> DecodeSettings:
        """What these settings say to ``decode``; ``more`` of its settings win."""
        same = ("policy", "max_new_tokens", "temperature", "top_p", "top_k", "min_p", "graphs", "costs")
        own = {name: getattr(self, name) for name in same} | {
            "block_size": self.block_size or "auto",
            "batch_size": self.generation_batch_size,
            "memory_gib": self.generation_memory_gib or None,
        }
        return DecodeSettings(**own | more)
