"""Settings as dataclasses: a YAML recipe gives the defaults, the command line wins, unknown names are errors.

Names are those that TRL and transformers users know. Nothing here imports torch, so that ``--help`` is quick.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from switchkd.base.errors import ConfigError, nearest
from switchkd.base.plain import read_yaml
from switchkd.base.settings import Config, check_at_least, from_dict, named_file
from switchkd.data.settings import DataConfig
from switchkd.decoding.settings import DecodeConfig
from switchkd.evaluation.settings import EvalConfig
from switchkd.methods.mixes import Generated, Mix
from switchkd.methods.objective import Objective
from switchkd.methods.objectives import MiniLLM, SkewReverseKL
from switchkd.methods.policies import MixIn
from switchkd.methods.policy import StudentOnly
from switchkd.methods.rules import name_of
from switchkd.models.settings import ModelConfig

# Settings that may change between a run and its continuation: they move time, disk or rounding, never a decision.
FREE_ON_RESUME = {
    "save_steps", "save_total_limit", "output_dir", "merge",
    "block_size", "generation_batch_size", "generation_memory_gib", "costs", "graphs", "method", "teacher_store_dir",
    "eval_on_start", "fsdp", "sample_steps", "sample_prompts", "per_device_eval_batch_size",
    "report_to", "save_dtype", "hub_private_repo", "teacher_device",
    "teacher_tensor_parallel", "teacher_expert_parallel", "teacher_files", "teacher_writer",
}  # fmt: skip

TRACKERS = ("tensorboard", "trackio", "wandb")


@dataclass(frozen=True)
class TrainConfig(ModelConfig, DataConfig, DecodeConfig, EvalConfig):
    """Everything that a training run depends on. A YAML recipe holds the same names."""

    method: str = ""
    """Name and source of the method, for lists; moves nothing."""
    objective: Objective = field(default_factory=SkewReverseKL)
    """What is lowered at every response token: a name of `switchkd methods`, or my_module:MyObjective."""
    alignment: Literal["strict", "prefix", "sorted"] = "strict"
    """Where teacher and student have different tokenizers, what the objective compares: the tokens that both have, where they match
    one to one (strict); every student token, with the teacher's tokens that begin like it (prefix); probabilities by rank, whatever
    the tokens are (sorted, the ULD loss)."""
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
    validation_file: tuple[str, ...] = ()
    """Data of the validation loss that the adaptive mix looks at; default eval_file."""
    lm_file: tuple[str, ...] = ()
    """Data with plain `text` rows for a language-modelling loss beside the objective."""
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
    """Forwards and backwards in one optimizer step. Eight rows at once, four rows twice or one row eight times: one gradient."""
    fsdp: bool = False
    """Over several processes: keep the student's weights, gradients and moments in shards (FSDP2), gathered once a step."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    learning_rate: Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="(default: by size)")] = (
        None
    )
    """Peak learning rate of AdamW. Without one it is chosen by the size of the student, and whether an adapter is trained; the run
    says which it is, and records it."""
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
    push_to_hub: str = ""
    """Put `student/`, and nothing else, on the Hugging Face Hub under this name when the run is done. A run that goes on, or is
    made again from its settings, does so only if it is told so again."""
    hub_private_repo: bool = True
    """What push_to_hub makes there is private; one that is there already stays as it is."""
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
            "max_grad_norm": 0.0, "seed": 0, "save_steps": 0, "save_total_limit": 2,
            "temperature": 0.0, "max_new_tokens_start": 0, "teacher_cache_top_k": 1, "lm_weight": 0.0,
            "eval_steps": 0, "sample_steps": 0, "sample_prompts": 1, "max_train_tokens": 0, "max_train_seconds": 0.0,
            "adam_beta1": 0.0, "adam_beta2": 0.0, "adam_epsilon": 0.0, "warmup_ratio": 0.0, "min_lr": 0.0, "min_lr_rate": 0.0,
        }  # fmt: skip
        check_at_least(self, least)
        for name in ("learning_rate", "router_aux_loss_coef"):
            if getattr(self, name) is not None:
                check_at_least(self, {name: 0.0})
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
        if self.fsdp and (self.use_peft or self.graphs):
            why = "use_peft: an adapter is small" if self.use_peft else "graphs: its weights may never move"
            raise ConfigError(f"fsdp does not go with {why}; drop one of them")
        if self.graphs and (self.teacher_tensor_parallel > 1 or self.teacher_device):
            raise ConfigError(
                "graphs are recorded on one device: leave teacher_device and teacher_tensor_parallel out, or graphs"
            )
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

    @property
    def peak_rate(self) -> float:
        """``learning_rate`` as a number; raises ConfigError while none is given and none has been chosen."""
        if self.learning_rate is None:
            raise ConfigError("learning_rate is not given, and is chosen where the student is known: give a number")
        return self.learning_rate

    def token_budget(self, progress: float) -> int:
        """Tokens that a completion of training may have at this ``progress``; a sample may always have the most."""
        start, end = self.max_new_tokens_start, self.max_new_tokens
        return round(start + (end - start) * progress) if start else end

    def anew(self) -> TrainConfig:
        """The same settings for a run that begins, that somebody looks at, and that goes nowhere unasked."""
        return dataclasses.replace(self, resume=False, resume_from="", allow_change=(), quiet=False, push_to_hub="")

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
            if self.min_lr_rate > 1 or (self.learning_rate is not None and self.min_lr > self.learning_rate):
                raise ConfigError(
                    f"the floor, min_lr {floors[0]:g} or min_lr_rate {floors[1]:g}, is above learning_rate"
                    f"{'' if self.learning_rate is None else f' {self.learning_rate:g}'}; lower it"
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
                "the objective minillm corrects for text drawn from the blend alpha p + (1 - alpha) q with "
                f"alpha={self.objective.alpha:g}, and the policy {name_of(self.policy)} writes "
                f"{'otherwise' if wrote is None else f'with alpha={wrote:g}'}; use the policy "
                "mix_in with the same alpha, or student_only with objective.alpha 0"
            )


def load_recipe(path: str, cls: type[Config] = TrainConfig) -> Config:  # type: ignore[assignment]
    """Read a recipe: a YAML file, or the name of one that ships with the package (``switch``, ``adaswitch``, …).

    Raises:
        ConfigError: the file is missing or no YAML, or holds an unknown name (the nearest is suggested) or a wrong type.
    """
    file = named_file(path, "recipes")
    return from_dict(cls, read_yaml(file), str(file))
