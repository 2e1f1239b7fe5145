"""Settings as dataclasses: a YAML recipe gives the defaults, the command line wins, unknown names are errors.

Names are those that TRL and transformers users know. Nothing here imports torch, so that ``--help`` is quick.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
import yaml

from switchkd import divergences
from switchkd.errors import ConfigError, nearest
from switchkd.policies import POLICIES, AdaSwitch, Policy, StudentOnly, Switch, TeacherOnly

AnyPolicy = Annotated[StudentOnly | TeacherOnly | Switch | AdaSwitch, tyro.conf.AvoidSubcommands]


@dataclass(frozen=True)
class ModelConfig:
    """Which pair, in which numbers."""

    teacher_model_name_or_path: str = "demo"
    """Hub name or local folder of the teacher; `demo` is SmolLM2-135M-Instruct, which needs no hub."""
    student_model_name_or_path: str = "demo"
    """Hub name or local folder of the student; `demo` is the 15-layer student made from the demo teacher."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Dtype of both models' weights. Divergences and decisions are computed in float32 or better in any case."""
    use_peft: bool = False
    """Train a LoRA adapter on the frozen student; needs the extra `peft`. Goes on with the student's own if it is an adapter."""
    lora_r: int = 16
    """Rank of the adapter."""
    lora_alpha: int = 32
    """The adapter's update is scaled by lora_alpha / lora_r."""
    lora_dropout: float = 0.0
    """Dropout on what enters the adapter."""
    lora_target_modules: tuple[str, ...] = ()
    """Names of the linear layers to adapt, such as q_proj v_proj; without any, all of the body."""
    load_in_4bit: bool = False
    """QLoRA: the frozen student in 4 bits (NF4), products in dtype; needs the extra `qlora`."""

    def __post_init__(self) -> None:
        if self.lora_r < 1 or self.lora_alpha < 1:
            raise ConfigError(f"lora_r and lora_alpha must be at least 1, got {self.lora_r} and {self.lora_alpha}")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout must be from 0 to below 1, got {self.lora_dropout}")
        if self.load_in_4bit and not self.use_peft:
            raise ConfigError(
                "load_in_4bit without use_peft: weights in 4 bits cannot be trained; set use_peft, or drop it"
            )
        if self.load_in_4bit and self.dtype == "float64":
            raise ConfigError("load_in_4bit has no products in float64; set dtype to bfloat16 or float32")


@dataclass(frozen=True)
class DataConfig:
    """Which text, and how it becomes token ids."""

    train_file: str = "gsm8k-sample:train"
    """JSONL file, plain or gzip: prompt+completion, messages, Alpaca, GSM8K or DialogSum fields."""
    eval_file: str = "gsm8k-sample:heldout"
    """Held-out JSONL file for the table of before and after."""
    template: Literal["chat", "alpaca", "none"] = "chat"
    """The model's chat template, the Alpaca template, or the prompt as it is."""
    max_prompt_length: int = 256
    """Longer prompts are dropped and counted, never cut."""
    max_completion_length: int = 256
    """Longer reference completions are cut, without a false end token."""
    skip_bad: int = 0
    """Unusable rows tolerated in a data file before the run stops."""


@dataclass(frozen=True)
class DecodeConfig:
    """How text is generated."""

    policy: AnyPolicy = field(default_factory=Switch)
    """Who writes the next token."""
    max_new_tokens: int = 256
    """Token budget of a generated completion."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy. Reaches neither the policy's decision nor the loss."""
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

    def decode_arguments(self) -> dict[str, Any]:
        """What these settings say to ``decode``."""
        return {
            "policy": self.policy,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "block_size": self.block_size or "auto",
            "batch_size": self.generation_batch_size,
            "memory_gib": self.generation_memory_gib or None,
            "static_step": self.static_step,
            "repeatable": self.repeatable,
        }


@dataclass(frozen=True)
class EvalConfig:
    """How before and after are compared."""

    eval_samples: int = 64
    """Held-out examples to evaluate on."""
    eval_max_new_tokens: int = 128
    """Token budget of a completion that ROUGE-L is computed on."""
    eval_temperature: float = 0.0
    """Sampling temperature of these completions; 0 is greedy."""
    seed: int = 0
    """Key of all randomness, with the step or with the sample and position."""


@dataclass(frozen=True)
class TrainConfig(ModelConfig, DataConfig, DecodeConfig, EvalConfig):
    """Everything that a training run depends on. A YAML recipe holds the same names."""

    lmbda: float = 0.5
    """Probability that a step trains on text generated under the policy; otherwise it trains on the data."""
    divergence: str = "skew_reverse_kl"
    """Objective: forward_kl, reverse_kl, jsd, tvd, skew_kl or skew_reverse_kl, averaged over response tokens."""
    alpha: float = 0.1
    """Skew of skew_kl and skew_reverse_kl."""
    beta: float = 0.5
    """Teacher's weight in the mixture of jsd."""
    loss_temperature: float = 1.0
    """Temperature of both distributions in the loss; reaches neither sampling nor the policy."""
    max_steps: int = -1
    """Optimizer steps; -1 counts num_train_epochs."""
    num_train_epochs: float = 1.0
    """Passes over the training file where max_steps is -1."""
    per_device_train_batch_size: int = 8
    """Rows in one forward and backward of one process."""
    gradient_accumulation_steps: int = 1
    """Forwards and backwards in one optimizer step; 8x1, 4x2 and 1x8 give the same gradient."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW."""
    lr_scheduler_type: Literal["cosine", "constant"] = "cosine"
    """Learning rate after warm-up: to 0 by half a cosine, or constant."""
    warmup_steps: int = 0
    """Steps in which the learning rate grows linearly from 0."""
    weight_decay: float = 0.01
    """Decoupled weight decay on matrices (not on biases and norms)."""
    adam_beta1: float = 0.9
    """AdamW's decay of the first moment."""
    adam_beta2: float = 0.999
    """AdamW's decay of the second moment."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 does not clip."""
    save_steps: int = 100
    """Steps between checkpoints; 0 saves at the end only."""
    save_total_limit: int = 2
    """Checkpoints kept."""
    output_dir: str = "runs/switchkd"
    """The run directory: settings, metrics, rollouts, checkpoints, student, evaluation."""
    merge: bool = False
    """Save `student/` as a whole model with the adapter added to its weights, which opens without peft."""
    resume: bool = False
    """Go on from the newest checkpoint in output_dir."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least = {
            "max_prompt_length": 1, "max_completion_length": 1, "skip_bad": 0, "max_new_tokens": 1, "block_size": 0,
            "generation_batch_size": 1, "generation_memory_gib": 0.0, "eval_samples": 0, "eval_max_new_tokens": 1, "max_steps": -1,
            "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "warmup_steps": 0, "weight_decay": 0.0,
            "max_grad_norm": 0.0, "seed": 0, "save_steps": 0, "save_total_limit": 1, "learning_rate": 0.0,
            "temperature": 0.0, "eval_temperature": 0.0,
        }  # fmt: skip
        for name, low in at_least.items():
            value = getattr(self, name)
            if not low <= value < math.inf:
                raise ConfigError(f"{name} must be at least {low}, got {value}")
        if not 0 <= self.lmbda <= 1:
            raise ConfigError(f"lmbda is a probability, got {self.lmbda}; give a number from 0 to 1")
        if not 0 < self.loss_temperature < math.inf:
            raise ConfigError(f"loss_temperature must be above 0, got {self.loss_temperature}")
        if self.max_steps < 0 and not 0 < self.num_train_epochs < math.inf:
            raise ConfigError(f"num_train_epochs must be above 0 where max_steps is -1, got {self.num_train_epochs}")
        if self.merge and (not self.use_peft or self.load_in_4bit):
            why = "there is no adapter: set use_peft" if not self.use_peft else "weights in 4 bits would round it away"
            raise ConfigError(f"merge adds an adapter to the student's weights, and {why}; or drop merge")
        divergences.by_name(self.divergence, alpha=self.alpha, beta=self.beta)


Config = TypeVar("Config")


def load_recipe(path: str, cls: type[Config] = TrainConfig) -> Config:  # type: ignore[assignment]
    """Read a recipe: a YAML file, or the name of one that ships with the package (``switch``, ``adaswitch``, …).

    Raises:
        ConfigError: the file is missing or no YAML, or holds an unknown name (the nearest is suggested) or a wrong type.
    """
    file = _recipe_file(path)
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file} must hold settings as `name: value` lines, not {type(values).__name__}")
    return from_dict(cls, values, str(file))


def recipes() -> dict[str, Path]:
    """The recipes that ship with the package, by name."""
    package = Path(str(files("switchkd")))
    folders = [package / "recipes", package.parent / "recipes"]  # in a wheel; in a source tree
    return {file.stem: file for folder in folders if folder.is_dir() for file in sorted(folder.glob("*.yaml"))}


def from_dict(cls: type[Config], values: dict[str, Any], source: str) -> Config:
    """An instance of a settings dataclass from plain values; ``source`` names their file in error messages."""
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for name in values:
        if name not in names:
            raise ConfigError(f"{source}: unknown setting {name!r}{nearest(str(name), names)}")
    given = {name: _typed(value, hints[name], f"{source}: {name}") for name, value in values.items()}
    return cls(**given)


def to_dict(config: Any) -> dict[str, Any]:
    """Plain values of a settings dataclass, such that ``from_dict`` gives it back."""
    plain = dataclasses.asdict(config)
    if isinstance(policy := getattr(config, "policy", None), Policy):
        plain["policy"] = {"name": policy_name(policy), **plain["policy"]}
    return plain


def policy_name(policy: Policy) -> str:
    """The name by which recipes call this policy."""
    return next((name for name, cls in POLICIES.items() if cls is type(policy)), type(policy).__name__)


def _policy(value: Any, source: str) -> Policy:
    settings = {"name": value} if isinstance(value, str) else value
    if not isinstance(settings, dict) or not isinstance(settings.get("name"), str):
        raise ConfigError(f"{source} must be a name or `{{name: …, setting: value}}`, got {value!r}")
    name = settings["name"]
    if name not in POLICIES:
        raise ConfigError(f"{source}: unknown policy {name!r}{nearest(name, POLICIES)}")
    return from_dict(POLICIES[name], {k: v for k, v in settings.items() if k != "name"}, f"{source} {name}")


def _typed(value: Any, hint: Any, source: str) -> Any:
    """``value`` as the type that the field wants; YAML reads ``1e-4`` as text and ``1`` as an int."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    if any(isinstance(o, type) and issubclass(o, Policy) for o in options):
        return _policy(value, source)
    for option in options:
        if typing.get_origin(option) is tuple and isinstance(value, (list, tuple)):
            return tuple(_typed(item, typing.get_args(option)[0], f"{source}[{i}]") for i, item in enumerate(value))
        if typing.get_origin(option) is Literal and value in typing.get_args(option):
            return value
        if option is type(value) or (option is types.NoneType and value is None):
            return value
        if option is float and isinstance(value, (int, str)) and not isinstance(value, bool):
            try:
                return float(value)
            except ValueError:
                continue
    wanted = " or ".join(
        ", ".join(map(repr, typing.get_args(o))) if typing.get_origin(o) is Literal else getattr(o, "__name__", str(o))
        for o in options
    )
    raise ConfigError(f"{source} must be {wanted}, got {value!r}")


def _recipe_file(path: str) -> Path:
    if Path(path).is_file():
        return Path(path)
    known = recipes()
    if path in known:
        return known[path]
    raise ConfigError(f"no recipe {path!r}: neither a file nor one that ships with switchkd{nearest(path, known)}")
