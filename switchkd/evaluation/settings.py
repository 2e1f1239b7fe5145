"""How a model is scored: what ``evaluate`` is told, and the settings of recipes and command lines that say so."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any, Literal

from switchkd.base.errors import ConfigError
from switchkd.base.settings import Settings, check_at_least
from switchkd.decoding.settings import DecodeSettings
from switchkd.methods.policy import Policy, StudentOnly
from switchkd.methods.sampling import Sampling


@dataclass(frozen=True)
class EvalSettings:
    """Everything the scores depend on beside task, models and examples; stored with them."""

    max_new_tokens: int
    temperature: float = 0.0
    seeds: tuple[int, ...] = (10, 20, 30, 40, 50)
    own_text: bool = False
    backend: str = "engine"
    policy: Policy = field(default_factory=StudentOnly)
    batch_size: int = 32
    score_batch_size: int = 8
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    @property
    def passes(self) -> tuple[int | None, ...]:
        """The seeds of the completions of each example; greedy ones are made once and have none."""
        return self.seeds if self.temperature else (None,)

    def decoding(self, seed: int) -> DecodeSettings:
        """What these settings say to ``decode`` in the pass of this seed."""
        same = ("policy", "max_new_tokens", "temperature", "top_p", "top_k", "min_p", "batch_size")
        return DecodeSettings(seed=seed, **{name: getattr(self, name) for name in same})

    def to_json(self) -> dict[str, Any]:
        """What moves a score, with the rules and versions that do."""
        sampling = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
        settings = asdict(self) | {"policy": repr(self.policy), "seeds": [s for s in self.passes if s is not None]}
        del settings["score_batch_size"]  # rounding alone
        if not self.min_p:
            del settings["min_p"]  # files of before it was a setting can be compared with
        if self.backend == "engine":
            del settings["batch_size"]  # generate draws for a whole batch from one generator
        rouge = f"rouge-score {version('rouge-score')}, F1 x 100, use_stemmer=True"
        return {**settings, **sampling, "rouge": rouge, "intervals": "95 %, percentile bootstrap over examples"}


@dataclass(frozen=True)
class EvalConfig(Settings):
    """How a model is scored on held-out examples."""

    task: str = "auto"
    """How completions are scored: a name of `switchkd tasks`, or auto, which goes by the fields of eval_file."""
    eval_samples: int = 64
    """Held-out examples to evaluate on, the first of the file; -1 takes all, 0 none."""
    eval_max_new_tokens: int = 128
    """Token budget of a completion that is scored."""
    eval_temperature: float = 0.0
    """Sampling temperature of these completions; 0 is greedy."""
    eval_top_p: float = 1.0
    """Draw them from the fewest tokens whose probability reaches this; 1 keeps all."""
    eval_top_k: int = 0
    """Draw them from this many most probable tokens; 0 keeps all."""
    eval_min_p: float = 0.0
    """Draw them from tokens with at least this share of the best one's probability; 0 keeps all."""
    eval_seeds: tuple[int, ...] = (10, 20, 30, 40, 50)
    """Seeds of sampled completions, one of each example under each; greedy ones are made once."""
    eval_own_text: bool = False
    """Also measure the divergence to the teacher on the completions, and how ROUGE-L goes with it by length."""
    eval_backend: Literal["engine", "generate"] = "engine"
    """What writes the completions: this project's engine, or transformers' generate to check it against."""
    per_device_eval_batch_size: int = 32
    """Rows decoded together in evaluation. Moves time, never a score."""

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"eval_samples": -1, "eval_max_new_tokens": 1, "eval_temperature": 0.0, "per_device_eval_batch_size": 1}
        check_at_least(self, least)
        try:
            Sampling(self.eval_temperature, self.eval_top_p, self.eval_top_k, self.eval_min_p)
        except ConfigError as error:
            raise ConfigError(f"eval_{error}") from error
        if self.eval_temperature and not self.eval_seeds:
            raise ConfigError(f"eval_temperature {self.eval_temperature:g} needs eval_seeds, at least one")
        if min(self.eval_seeds, default=0) < 0 or len(set(self.eval_seeds)) < len(self.eval_seeds):
            raise ConfigError(f"eval_seeds must be different numbers from 0, got {list(self.eval_seeds)}")
