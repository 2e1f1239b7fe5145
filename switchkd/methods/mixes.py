"""Which text a training step reads: each mix is a frozen dataclass with explicit memory.

The choice of a step depends on a number keyed by (seed, step), on how far training is, and on the memory, so it is the same
on every rank and after a resume.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from switchkd.base.errors import ConfigError

# The examples' completions · fresh text of the policy · text that earlier steps generated · examples and fresh text at once
Source = Literal["examples", "policy", "replay", "pairs"]
Memory = dict[str, Any]


@dataclass(frozen=True)
class Mix:
    """Which text a training step reads. Subclass and implement ``source``; a mix that changes with a validation loss also
    implements ``memory`` and ``remember``."""

    generates = True  # whether a step may have the policy write
    wants_teacher_text = False  # whether the teacher's completions, made once, replace the examples' own
    reads_completions = True  # whether a step may train on the examples' own completions; if not, prompts are enough
    capacity = 0  # rollouts kept for replay
    validation_steps = 0  # steps between looks at the validation loss; 0 never looks

    def source(self, chance: float, progress: float, buffered: int, memory: Memory) -> Source:
        """The text of a step: ``chance`` is uniform in [0, 1), ``buffered`` counts the rollouts that could be replayed."""
        raise NotImplementedError

    def memory(self) -> Memory:
        return {}

    def remember(self, memory: Memory, validation_loss: float) -> Memory:
        return memory


@dataclass(frozen=True)
class GroundTruth(Mix):
    """The answers of the data. Nothing is generated."""

    generates = False

    def source(self, chance: float, progress: float, buffered: int, memory: Memory) -> Source:
        return "examples"


@dataclass(frozen=True)
class TeacherText(GroundTruth):
    """SeqKD (arXiv 1606.07947): the teacher's completion of every prompt, generated once, stored and read again."""

    wants_teacher_text = True
    reads_completions = False


@dataclass(frozen=True)
class Generated(Mix):
    """With probability ``lmbda`` (GKD's name) the policy writes the step's text, else it is the data's."""

    lmbda: float = 1.0  # probability that a step's text is generated

    def __post_init__(self) -> None:
        if not 0 <= self.lmbda <= 1:
            raise ConfigError(f"lmbda is a probability, got {self.lmbda}; give a number from 0 to 1")

    @property
    def reads_completions(self) -> bool:  # type: ignore[override] # which Mix has as a plain value
        return self.lmbda < 1

    def source(self, chance: float, progress: float, buffered: int, memory: Memory) -> Source:
        return "policy" if chance < self.lmbda else "examples"


@dataclass(frozen=True)
class Pairs(Mix):
    """DistiLLM-2 (arXiv 2503.07067): for every prompt the teacher's stored completion and a fresh one of the policy."""

    wants_teacher_text = True
    reads_completions = False

    def source(self, chance: float, progress: float, buffered: int, memory: Memory) -> Source:
        return "pairs"


@dataclass(frozen=True)
class Adaptive(Mix):
    """DistiLLM's adaptive off-policy mix (arXiv 2402.03898, and its released code for what the paper leaves open).

    A share φ of the steps reads generated text. φ starts at ``share``; where the validation loss is ``tolerance`` or more
    above the one that φ was last raised at (at first: the loss before training), φ rises by ``increment``. Of these steps
    φ (1 − progress) generate, as do all until ``capacity`` rollouts are there; the others replay rollouts.
    """

    share: float = 0.0  # of steps on generated text, at the start
    increment: float = 0.1  # of the share
    tolerance: float = 0.1  # rise of the validation loss that raises the share, in nats
    capacity: int = 1000  # rollouts in the buffer
    validation_steps: int = 100  # steps between looks at the validation loss

    def __post_init__(self) -> None:
        if not (0 <= self.share <= 1 and 0 <= self.increment <= 1):
            raise ConfigError(f"share and increment lie in 0..1, got {self.share} and {self.increment}")
        if self.capacity < 1 or self.validation_steps < 1:
            raise ConfigError(
                f"capacity and validation_steps start at 1, got {self.capacity} and {self.validation_steps}"
            )

    def source(self, chance: float, progress: float, buffered: int, memory: Memory) -> Source:
        if chance >= memory["share"]:
            return "examples"
        return "policy" if chance < memory["share"] * (1 - progress) or buffered < self.capacity else "replay"

    def memory(self) -> Memory:
        return {"share": self.share, "loss": None}

    def remember(self, memory: Memory, validation_loss: float) -> Memory:
        before, share = memory["loss"], memory["share"]
        if before is None:
            return {"share": share, "loss": validation_loss}
        if validation_loss >= before + self.tolerance:
            return {"share": min(1.0, share + self.increment), "loss": validation_loss}
        return memory


MIXES: dict[str, type[Mix]] = {
    "ground_truth": GroundTruth,
    "teacher_text": TeacherText,
    "generated": Generated,
    "pairs": Pairs,
    "adaptive": Adaptive,
}
