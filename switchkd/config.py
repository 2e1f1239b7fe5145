"""Settings as dataclasses: a YAML recipe gives the defaults, the command line wins, unknown names are errors.

Names are those that TRL and transformers users know. Nothing here imports torch, so that ``--help`` is quick.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import sys
import types
import typing
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from switchkd.errors import ConfigError, nearest
from switchkd.mixes import MIXES, Generated, Mix
from switchkd.objectives import OBJECTIVES, MiniLLM, Objective, SkewReverseKL
from switchkd.paths import expand_settings, expanded
from switchkd.plain import read_yaml, shown
from switchkd.policies import POLICIES, MixIn, Policy, StudentOnly, Switch
from switchkd.sampling import Sampling
from switchkd.template_inputs import Template
from switchkd.templates import check_teacher_prompt

# The settings that name a rule, with the base class of each and the names that ship with the package.
NOUNS: dict[str, tuple[type, dict[str, type]]] = {
    "policy": (Policy, dict(POLICIES)),
    "objective": (Objective, dict(OBJECTIVES)),
    "mix": (Mix, dict(MIXES)),
}

# Settings that may change between a run and its continuation: they move time, disk or rounding, never a decision.
FREE_ON_RESUME = {
    "resume", "resume_from", "save_steps", "save_total_limit", "output_dir", "merge",
    "block_size", "generation_batch_size", "generation_memory_gib", "repeatable", "static_step", "method", "teacher_store_dir",
    "eval_on_start", "fsdp", "sample_steps", "sample_prompts", "per_device_eval_batch_size",
    "report_to", "quiet", "allow_change", "save_dtype",
}  # fmt: skip

TRACKERS = ("tensorboard", "trackio", "wandb")
BASE = "base"  # as a teacher: the model under the student's adapter
INPUT_ONLY = ("bf16",)  # another name for a setting, under which nothing is recorded


def check_at_least(config: Any, least: dict[str, float]) -> None:
    """Raise ConfigError for the first setting that is below its least value, infinite or NaN."""
    for name, low in least.items():
        value = getattr(config, name)
        if not low <= value < math.inf:
            raise ConfigError(f"{name} must be at least {low}, got {value}")


class Settings:
    """The end of the chain of checks: a command's settings are checked by every class that they come from, paths being whole."""

    def __post_init__(self) -> None:
        for setting in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, setting.name)
            if isinstance(value, str) and str(setting.type).startswith("tuple["):  # it would be taken for its letters
                raise ConfigError(
                    f"{setting.name} must be several values, got the text {shown(value)}; give ({value!r},)"
                )
        expand_settings(self)


@dataclass(frozen=True)
class ModelConfig(Settings):
    """Which pair, in which numbers."""

    teacher_model_name_or_path: Annotated[str, tyro.conf.arg(aliases=["--teacher"])] = "demo"
    """Hub name or local folder of the teacher; `demo` is SmolLM2-135M-Instruct, `small` what `make-pair` made."""
    student_model_name_or_path: Annotated[str, tyro.conf.arg(aliases=["--student"])] = "demo"
    """Hub name or local folder of the student; `demo` and `small` are made for the teachers of these names."""
    teachers: dict[str, str] = field(default_factory=dict)
    """More teachers, by the name that a row's teacher_field gives them; rows that name none have the teacher above."""
    teacher_field: str = ""
    """The field of a training row that names its teacher, one of `teachers`."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """What the student multiplies in; auto is bfloat16 on a GPU that is good at it, else float32. Trained weights and moments are
    kept and updated in float32 in any case (in float64 with float64), and so are divergences and decisions."""
    bf16: bool = False
    """The same as dtype bfloat16, by the name that transformers has for it; it is recorded as dtype."""
    teacher_dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """Dtype of the teachers' weights and products; auto is bfloat16 on a GPU that is good at it, else float32."""
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

    @property
    def teacher_is_base(self) -> bool:
        """Whether the teacher is the model under the student's adapter."""
        return self.teacher_model_name_or_path == BASE

    def _take_bf16(self) -> None:
        """``bf16`` is another way to say ``dtype``; a flag for one may meet a recipe's word on the other."""
        if self.bf16 and self.dtype not in ("auto", "bfloat16"):
            raise ConfigError(
                f"bf16 means dtype bfloat16, and dtype is {self.dtype}; give --dtype bfloat16 alone, or drop bf16"
            )
        if self.bf16:
            object.__setattr__(self, "dtype", "bfloat16")
            object.__setattr__(self, "bf16", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._take_bf16()
        if self.teacher_is_base and self.teacher_dtype not in ("auto", self.dtype):
            raise ConfigError(
                f"the teacher {BASE!r} is on the student's own weights, so it cannot be in teacher_dtype {self.teacher_dtype} "
                f"beside dtype {self.dtype}; leave teacher_dtype out"
            )
        if bool(self.teachers) != bool(self.teacher_field):
            missing = "teacher_field, the field of a row that names one" if self.teachers else "teachers, by name"
            raise ConfigError(
                f"teachers {self.teachers} with teacher_field {self.teacher_field!r}: give {missing}, or neither"
            )
        if not all(name and source for name, source in self.teachers.items()):
            raise ConfigError(f"teachers needs a name and a model in each entry, got {self.teachers}")
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
class DataConfig(Settings):
    """Which text, and how it becomes token ids."""

    train_file: str = "gsm8k-sample:train"
    """JSONL file, plain or gzip: prompt+completion, messages, Alpaca, GSM8K or DialogSum fields."""
    train_samples: int = -1
    """Rows of train_file to use, the first of it; -1 takes all."""
    eval_file: str = ""
    """Held-out JSONL file to score on; default the task's own data on the hub, and for no task `gsm8k-sample:heldout`."""
    template: Literal["chat", "alpaca", "none"] = "chat"
    """The model's chat template, the Alpaca template, or the prompt as it is."""
    template_date: str = ""
    """The day that a chat template writes as today's date, such as 2026-11-29; by default the day on which the run starts. It is
    recorded where prompts depend on it."""
    chat_template_kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Variables of the chat template, by name, such as enable_thinking False."""
    max_prompt_length: int = 256
    """Longer prompts are dropped and counted, never cut."""
    max_completion_length: int = 256
    """Longer reference completions are cut, without a false end token."""
    skip_bad: int = 0
    """Unusable rows tolerated in a data file before the run stops."""
    teacher_prompt: str = ""
    """What the teacher reads in place of a training row's last user turn; fields {prompt} and {completion}. Not in evaluation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_samples == 0 or self.train_samples < -1:
            raise ConfigError(f"train_samples must be at least 1, or -1 for all, got {self.train_samples}")
        if self.teacher_prompt:
            check_teacher_prompt(self.teacher_prompt)
        _ = self.prompts  # which raises

    @property
    def prompts(self) -> Template:
        """How text becomes prompts; raises ConfigError for what no template can be told."""
        return Template(self.template, self.template_date, self.chat_template_kwargs)


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


@dataclass(frozen=True)
class TrainConfig(ModelConfig, DataConfig, DecodeConfig, EvalConfig):
    """Everything that a training run depends on. A YAML recipe holds the same names."""

    method: str = ""
    """Name and source of the method, for lists; moves nothing."""
    objective: Objective = field(default_factory=SkewReverseKL)
    """What is lowered at every response token: a name of `switchkd methods`, or my_module:MyObjective."""
    mix: Mix = field(default_factory=lambda: Generated(lmbda=0.5))
    """Which text a step reads: ground_truth, teacher_text, generated, pairs or adaptive."""
    max_new_tokens_start: int = 0
    """Token budget at the first step, which grows linearly to max_new_tokens; 0 does not grow."""
    teacher_cache: Literal["none", "hidden", "top_k"] = "none"
    """For runs on fixed text: keep on disk what the teacher says of it, as hidden states (exact) or its top_k probabilities."""
    teacher_cache_top_k: int = 64
    """Tokens a position that the top_k cache keeps; all others are one bucket, and the loss a lower bound."""
    teacher_store_dir: str = ""
    """Folder of the teacher's stored text or cache; default in the user's cache, by settings. Contents are checked."""
    validation_file: str = ""
    """File of the validation loss that the adaptive mix looks at; default eval_file."""
    lm_file: str = ""
    """JSONL of plain `text` rows for a language-modelling loss beside the objective."""
    lm_weight: float = 1.0
    """Weight of that loss, a mean over its own tokens."""
    seed: int = 0
    """Key of all randomness in training, with the step or with the sample and position."""
    max_steps: int = -1
    """Optimizer steps; -1 counts num_train_epochs, or goes on until a budget below is spent."""
    num_train_epochs: float = 1.0
    """Passes over the training file where max_steps is -1 and there is no other budget."""
    max_train_tokens: int = 0
    """End after the step in which so many response tokens have been trained on; 0 sets no such budget."""
    max_train_seconds: float = 0.0
    """End after the step in which training has taken so long, evaluation not counted; 0 sets no such budget."""
    per_device_train_batch_size: int = 8
    """Rows in one forward and backward of one process."""
    gradient_accumulation_steps: int = 1
    """Forwards and backwards in one optimizer step; 8x1, 4x2 and 1x8 give the same gradient."""
    fsdp: bool = False
    """Over several processes: keep the student's weights, gradients and moments in shards (FSDP2), gathered once a step."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW."""
    loss_over: Literal["tokens", "sequences"] = "tokens"
    """The objective is a mean over all response tokens, or over the texts' own means, where short texts count like long ones."""
    lr_scheduler_type: Literal["linear", "cosine", "cosine_with_min_lr", "constant", "constant_with_warmup"] = "cosine"
    """Learning rate after warm-up, by transformers' names: to 0 by a line or half a cosine, to a floor (min_lr), or constant."""
    warmup_steps: int = 0
    """Steps in which the learning rate grows linearly from 0; above 0 they stand, whatever warmup_ratio is."""
    warmup_ratio: float = 0.0
    """The same as a share of all steps, such as 0.1."""
    min_lr: float = 0.0
    """Floor of cosine_with_min_lr, as a learning rate."""
    min_lr_rate: float = 0.0
    """The same as a share of learning_rate; give one of the two."""
    weight_decay: float = 0.01
    """Decoupled weight decay on matrices (not on biases and norms)."""
    adam_beta1: float = 0.9
    """AdamW's decay of the first moment."""
    adam_beta2: float = 0.999
    """AdamW's decay of the second moment."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    router_aux_loss_coef: float | None = None
    """Weight of the loss that balances the experts of a student that has some; default the student's own, 0 leaves it out."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 does not clip."""
    save_steps: int = 100
    """Steps between checkpoints; 0 saves at the end only."""
    save_total_limit: int = 2
    """Checkpoints kept, at least two: the newest may turn out to be damaged."""
    eval_on_start: bool = True
    """Score teacher and untrained student before the first step."""
    eval_steps: int = 0
    """Steps between evaluations of the student in the run, into metrics.jsonl; 0 evaluates at the end only."""
    metric_for_best_model: str = ""
    """Score by which the best student that eval_steps saw becomes `student/`; without one, the last does."""
    sample_steps: int = 50
    """Steps between looks at the same few prompts, for reports: what the student writes by now, token by token; 0 looks never."""
    sample_prompts: int = 8
    """How many prompts: the first that are held out, or without any, the first to train on."""
    output_dir: str = "runs/switchkd"
    """The run directory: settings, metrics, rollouts, checkpoints, student, evaluation."""
    report_to: tuple[str, ...] = ()
    """Trackers to which the lines of metrics.jsonl go too: tensorboard, trackio, wandb; needs the extra `track`."""
    save_dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """Dtype in which `student/` is saved; auto is that of the folder that the student came from, and for an adapter that it is
    trained in. The student is rounded to it before it is scored for the last time. Checkpoints are not rounded."""
    merge: bool = False
    """Save `student/` as a whole model with the adapter added to its weights, which opens without peft."""
    resume: bool = False
    """Go on from the newest checkpoint in output_dir that is whole."""
    resume_from: str = ""
    """Go on from this checkpoint of output_dir and no other, such as checkpoint-100; later ones are set aside."""
    allow_change: tuple[str, ...] = ()
    """Settings in which the run may differ from the one that it resumes; one that names a file allows other text in it."""
    quiet: bool = False
    """Print warnings, errors and where the student lies, and nothing else; the files are the same."""

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {
            "max_prompt_length": 1, "max_completion_length": 1, "skip_bad": 0, "max_new_tokens": 1, "block_size": 0,
            "generation_batch_size": 1, "generation_memory_gib": 0.0, "max_steps": -1,
            "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "warmup_steps": 0, "weight_decay": 0.0,
            "max_grad_norm": 0.0, "seed": 0, "save_steps": 0, "save_total_limit": 2, "learning_rate": 0.0,
            "temperature": 0.0, "max_new_tokens_start": 0, "teacher_cache_top_k": 1, "lm_weight": 0.0,
            "eval_steps": 0, "sample_steps": 0, "sample_prompts": 1, "max_train_tokens": 0, "max_train_seconds": 0.0,
            "adam_beta1": 0.0, "adam_beta2": 0.0, "adam_epsilon": 0.0, "warmup_ratio": 0.0, "min_lr": 0.0, "min_lr_rate": 0.0,
        }  # fmt: skip
        check_at_least(self, least)
        if self.router_aux_loss_coef is not None:
            check_at_least(self, {"router_aux_loss_coef": 0.0})
        if max(self.adam_beta1, self.adam_beta2) >= 1:
            raise ConfigError(f"adam_beta1 and adam_beta2 must be below 1, got {self.adam_beta1} and {self.adam_beta2}")
        if self.max_steps < 0 and not 0 < self.num_train_epochs < math.inf:
            raise ConfigError(f"num_train_epochs must be above 0 where max_steps is -1, got {self.num_train_epochs}")
        if self.max_new_tokens_start > self.max_new_tokens:
            raise ConfigError(
                f"max_new_tokens_start {self.max_new_tokens_start} is above max_new_tokens {self.max_new_tokens}; a budget grows"
            )
        if self.merge and (not self.use_peft or self.load_in_4bit):
            why = "there is no adapter: set use_peft" if not self.use_peft else "weights in 4 bits would round it away"
            raise ConfigError(f"merge adds an adapter to the student's weights, and {why}; or drop merge")
        if self.fsdp and (self.use_peft or self.static_step):
            why = "use_peft: an adapter is small" if self.use_peft else "static_step: its weights may never move"
            raise ConfigError(f"fsdp does not go with {why}; drop one of them")
        if self.metric_for_best_model and not (self.eval_steps and self.eval_samples):
            raise ConfigError(
                f"metric_for_best_model {self.metric_for_best_model!r} needs evaluations in the run: give eval_steps, eval_samples"
            )
        if unknown := [name for name in self.report_to if name not in TRACKERS]:
            raise ConfigError(f"report_to: unknown tracker {unknown[0]!r}{nearest(unknown[0], TRACKERS)}")
        names = [f.name for f in dataclasses.fields(TrainConfig)]
        if unknown := [name for name in self.allow_change if name not in names]:
            raise ConfigError(f"allow_change: unknown setting {unknown[0]!r}{nearest(unknown[0], names)}")
        if self.allow_change and not self.resumes:
            raise ConfigError(f"allow_change {' '.join(self.allow_change)} is for a run that goes on: give resume too")
        self._check_importance_weights()
        self._check_teacher_cache()
        self._check_learning_rate()

    @property
    def resumes(self) -> bool:
        """Whether the run goes on from a checkpoint."""
        return self.resume or bool(self.resume_from)

    def anew(self) -> TrainConfig:
        """The same settings for a run that begins, and that somebody looks at."""
        return dataclasses.replace(self, resume=False, resume_from="", allow_change=(), quiet=False)

    def _check_learning_rate(self) -> None:
        if self.warmup_ratio >= 1:
            raise ConfigError(f"warmup_ratio is a share of the steps, below 1, got {self.warmup_ratio}")
        floors = self.min_lr, self.min_lr_rate
        if self.lr_scheduler_type == "cosine_with_min_lr":
            if all(floors) or not any(floors):
                raise ConfigError(
                    f"cosine_with_min_lr needs its floor once, got min_lr {floors[0]:g} and min_lr_rate {floors[1]:g}; give one "
                    "of them, such as min_lr_rate 0.1 for a tenth of learning_rate"
                )
            if self.min_lr > self.learning_rate or self.min_lr_rate > 1:
                raise ConfigError(
                    f"the floor, min_lr {floors[0]:g} or min_lr_rate {floors[1]:g}, is above learning_rate "
                    f"{self.learning_rate:g}; lower it"
                )
        elif any(floors) and self.lr_scheduler_type in ("linear", "cosine"):
            raise ConfigError(
                f"{self.lr_scheduler_type} falls to 0, below min_lr {floors[0]:g}, min_lr_rate {floors[1]:g}; use "
                "lr_scheduler_type cosine_with_min_lr, or set both to 0"
            )

    def _check_teacher_cache(self) -> None:
        if self.teacher_cache == "none":
            return
        name = f"teacher_cache {self.teacher_cache!r}"
        if self.teachers:
            raise ConfigError(
                f"{name} keeps the words of one teacher, and there are {len(self.teachers) + 1}; use 'none'"
            )
        if self.mix.generates:
            raise ConfigError(f"{name} is for fixed text, and the mix {name_of(self.mix)} generates; use ground_truth")
        if not self.objective.reads_teacher:
            raise ConfigError(f"{name} would never be read: {name_of(self.objective)} asks no teacher")
        if self.teacher_cache == "top_k" and not self.objective.takes_coarse:
            raise ConfigError(
                f"{name} knows the teacher's largest probabilities only, which serve objectives that compare distributions, at "
                f"temperature 1 and ce_weight 0, not {self.objective}; use teacher_cache 'hidden'"
            )

    def _check_importance_weights(self) -> None:
        if not isinstance(self.objective, MiniLLM):
            return
        wrote = 0.0 if isinstance(self.policy, StudentOnly) else None
        if isinstance(self.policy, MixIn):
            wrote = self.policy.alpha
        if wrote != self.objective.alpha:
            raise ConfigError(
                f"minillm weighs text back to the student's from a mix-in of alpha={self.objective.alpha:g}, and "
                f"{name_of(self.policy)} writes {'otherwise' if wrote is None else f'with alpha={wrote:g}'}; use the policy "
                "mix_in with the same alpha, or student_only with objective.alpha 0"
            )


Config = TypeVar("Config")


def load_recipe(path: str, cls: type[Config] = TrainConfig) -> Config:  # type: ignore[assignment]
    """Read a recipe: a YAML file, or the name of one that ships with the package (``switch``, ``adaswitch``, …).

    Raises:
        ConfigError: the file is missing or no YAML, or holds an unknown name (the nearest is suggested) or a wrong type.
    """
    file = named_file(path, "recipes")
    return from_dict(cls, read_yaml(file), str(file))


def shipped(kind: str) -> dict[str, Path]:
    """The ``recipes`` or ``plans`` that ship with the package, by name."""
    package = Path(str(files("switchkd")))
    folders = [package / kind, package.parent / kind]  # in a wheel; in a source tree
    return {file.stem: file for folder in folders if folder.is_dir() for file in sorted(folder.glob("*.yaml"))}


def named_file(path: str, kind: str) -> Path:
    """The file ``path``, or the one that ships under that name; raises ConfigError if there is neither."""
    if (file := Path(expanded(path))).is_file():
        return file
    known = shipped(kind)
    if path in known:
        return known[path]
    one = kind.removesuffix("s")
    where = "neither a file, nor a run directory, nor" if kind == "recipes" else "neither a file nor"
    raise ConfigError(f"no {one} {path!r}: {where} one that ships with switchkd{nearest(path, known)}")


def from_dict(cls: type[Config], values: dict[str, Any], source: str) -> Config:
    """An instance of a settings dataclass from plain values; ``source`` names their file in error messages."""
    if not isinstance(values, dict):
        raise ConfigError(f"{source} must hold settings as `name: value`, got {shown(values)}")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for name in values:
        if name not in names:
            raise ConfigError(f"{source}: unknown setting {shown(name)}{nearest(name, names)}")
    given = {name: _typed(value, hints[name], f"{source}: {name}") for name, value in values.items()}
    try:
        return cls(**given)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def to_dict(config: Any) -> dict[str, Any]:
    """Plain values of a settings dataclass, such that ``from_dict`` gives it back."""
    plain = {name: value for name, value in dataclasses.asdict(config).items() if name not in INPUT_ONLY}
    for noun in NOUNS:
        if hasattr(config, noun):
            plain[noun] = {"name": name_of(getattr(config, noun)), **plain_values(plain[noun])}
    return plain_values(plain)


def plain_values(values: dict[str, Any]) -> dict[str, Any]:
    """Settings as YAML has them, lists for tuples."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def name_of(rule: Any) -> str:
    """The name by which recipes call a policy, objective or mix; a dotted path for one from elsewhere."""
    known = (name for _, table in NOUNS.values() for name, cls in table.items() if cls is type(rule))
    return next(known, f"{type(rule).__module__}:{type(rule).__qualname__}")


def rule(noun: str, value: Any, source: str) -> Any:
    """The policy, objective or mix that a recipe's ``name`` or ``{name: …, setting: value}`` means.

    Raises:
        ConfigError: no such name (the nearest is suggested) or dotted path, or not a dataclass of that kind.
    """
    settings = {"name": value} if isinstance(value, str) else value
    if not isinstance(settings, dict) or not isinstance(settings.get("name"), str):
        raise ConfigError(f"{source} must be a name or `{{name: …, setting: value}}`, got {shown(value)}")
    name = settings["name"]
    cls = _imported(noun, name, source) if ":" in name else NOUNS[noun][1].get(name)
    if cls is None:
        raise ConfigError(
            f"{source}: unknown {noun} {shown(name)}{nearest(name, NOUNS[noun][1])}; your own is my_module:MyClass"
        )
    return from_dict(cls, {k: v for k, v in settings.items() if k != "name"}, f"{source} {name}")


def _imported(noun: str, path: str, source: str) -> type:
    """The class behind ``module:Class``; modules are looked for in the working directory too."""
    module_name, _, class_name = path.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{source}: cannot import {path!r}: {error}; give it as my_module:MyClass") from error
    base = NOUNS[noun][0]
    if not (isinstance(cls, type) and issubclass(cls, base) and dataclasses.is_dataclass(cls)):
        raise ConfigError(f"{source}: {path} is not a frozen dataclass that inherits from switchkd.{base.__name__}")
    return cls


def _typed(value: Any, hint: Any, source: str) -> Any:
    """``value`` as the type that the field wants; YAML reads ``1e-4`` as text and ``1`` as an int."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    for noun, (base, _) in NOUNS.items():
        if hint is base:
            return rule(noun, value, source)
    for option in options:
        if typing.get_origin(option) is tuple and isinstance(value, (list, tuple)):
            return tuple(_typed(item, typing.get_args(option)[0], f"{source}[{i}]") for i, item in enumerate(value))
        if typing.get_origin(option) is dict and isinstance(value, dict):
            kind = typing.get_args(option)[1]
            items = (
                (_typed(k, str, f"{source}, the name"), _typed(v, kind, f"{source} {k}")) for k, v in value.items()
            )
            return dict(items)
        if typing.get_origin(option) is Literal and value in typing.get_args(option):
            return value
        if option is Any or option is type(value) or (option is types.NoneType and value is None):
            return value
        if option is float and isinstance(value, (int, str)) and not isinstance(value, bool):
            try:
                return float(value)
            except (ValueError, OverflowError):
                continue
    wanted = " or ".join(
        ", ".join(map(repr, typing.get_args(o))) if typing.get_origin(o) is Literal else getattr(o, "__name__", str(o))
        for o in options
    )
    raise ConfigError(f"{source} must be {wanted}, got {shown(value)}")
