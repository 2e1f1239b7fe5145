"""The commands that score: `evaluate` on held-out examples, `lm-eval` on the benchmarks of that library."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from rich.table import Table

from switchkd.base.settings import Settings
from switchkd.base.storage import expanded, write_file, write_output
from switchkd.base.terminal import console
from switchkd.data.settings import DataConfig, template_settings, with_template
from switchkd.evaluation.settings import EvalConfig
from switchkd.methods.policy import Policy, StudentOnly
from switchkd.models.settings import ModelConfig
from switchkd.training.records import CONFIG
from switchkd.training.settings import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from switchkd.evaluation.harness import Metric


@dataclass(frozen=True)
class EvaluateConfig(ModelConfig, DataConfig, EvalConfig):
    """Score teacher and student on held-out examples."""

    eval_samples: int = -1
    """Held-out examples to evaluate on, the first of the file; -1 takes all."""
    policy: Policy = field(default_factory=StudentOnly)
    """Who writes the completions that are scored as the student's; the teacher always writes its own alone."""
    only: Literal["", "teacher", "student"] = ""
    """Evaluate this one alone."""
    output_file: str = ""
    """Write scores and settings here as JSON, the text beside it; default evaluation-TASK.json in the run given."""


@dataclass(frozen=True)
class LmEvalConfig(Settings):
    """Score a student, or any model, on the benchmarks of lm-eval; needs the extra `lm-eval`."""

    model_name_or_path: tyro.conf.Positional[str] = "demo"
    """A run directory (its student), a local folder, a hub name, or `demo`, `qwen-coder` or `small` (their student)."""
    tasks: tuple[str, ...] = ()
    """lm-eval's tasks, groups or tags, such as arc_easy hellaswag."""
    num_fewshot: int | None = None
    """Examples before each question; default each task's own number. A task that fixes 0 keeps it."""
    limit: int | None = None
    """Only the first so many examples of each task: a trial, not a score."""
    batch_size: int = 8
    """Rows of a forward; with padding, rounding differs with it."""
    apply_chat_template: bool = False
    """Ask through the model's chat template."""
    include_path: str | None = None
    """A folder of your own tasks' YAML files."""
    dtype: Literal["float32", "bfloat16", "float64"] | None = None
    """Dtype of the weights; default that of the run, else float32."""
    output_file: str | None = None
    """Write numbers, settings, seeds, versions and task definitions here as JSON."""


def evaluate(config: EvaluateConfig) -> None:
    from switchkd.forward.served import NO_TEXT, ServedModel
    from switchkd.models.loading import default_device
    from switchkd.models.saved_student import SavedStudent
    from switchkd.models.settings import with_dtypes
    from switchkd.reports.tables import print_results
    from switchkd.runs.heldout import all_settings, eval_settings, load_heldout, run_of, score, write_scores
    from switchkd.runs.opening import open_pair

    # The default teacher alone is compared with.
    config = with_dtypes(dataclasses.replace(config, teachers={}, teacher_field=""), default_device())
    run = run_of(config.student_model_name_or_path)
    saved = SavedStudent.of(run) if run else None
    pair = open_pair(config)
    config = with_template(config, pair.tokenizer, others=pair.other_tokenizers)
    heldout = load_heldout(config, pair)
    models = {"teacher": (pair.teacher, StudentOnly(), None), "student": (pair.student, config.policy, saved)}
    if isinstance(pair.teacher, ServedModel):
        del models["teacher"]
        console.print(NO_TEXT, soft_wrap=True)
    results = {
        name: score(pair, model, heldout, eval_settings(config, policy), name, saved=of)
        for name, (model, policy, of) in models.items()
        if config.only in ("", name)
    }
    settings = all_settings(config, pair, heldout, eval_settings(config, config.policy))
    print_results(results, heldout.shown() | settings)
    file = Path(config.output_file) if config.output_file else run and run / f"evaluation-{heldout.task.name}.json"
    if file:
        write_scores(file, heldout, settings, results, write_output if config.output_file else write_file)
        console.print(f"scores in {file}", soft_wrap=True)


def lm_eval(config: LmEvalConfig) -> None:
    from switchkd.evaluation.harness import SEEDS, find_tasks, metrics, record, run_tasks

    console.print("reading lm-eval's list of tasks …")
    manager = find_tasks(config.tasks, config.include_path)
    run = _recipe_of(config.model_name_or_path)
    model, tokenizer = _open(config.model_name_or_path, run, config.dtype)
    told: dict[str, Any] = {}
    if config.apply_chat_template and tokenizer.chat_template:
        # What the run was trained with, else today's date.
        template = with_template(dataclasses.replace(run or TrainConfig(), template="chat"), tokenizer).prompts
        told, tokenizer.chat_template = template_settings(template, tokenizer), template.text(tokenizer)
    asked = {name: getattr(config, name) for name in ("num_fewshot", "limit", "batch_size", "apply_chat_template")}
    answer = run_tasks(model, tokenizer, manager, config.tasks, **asked)
    console.print(_table(metrics(answer)))
    console.print(f"{model.dtype}; " + ", ".join(f"{name} {seed}" for name, seed in SEEDS.items()), soft_wrap=True)
    if config.output_file:
        # A task's definition may hold functions.
        kept = json.dumps(record(answer, dataclasses.asdict(config) | told, model), indent=1, default=str)
        write_output(Path(config.output_file), kept)


def _recipe_of(name: str) -> TrainConfig | None:
    """The settings of the run directory ``name``; None if it is none."""
    from switchkd.reports.record import read_config

    run = Path(expanded(name))
    return read_config(run) if (run / CONFIG).is_file() else None


def _open(name: str, recipe: TrainConfig | None, dtype: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The student of a run with this ``recipe``, or the model that ``name`` is as in `load_pair`; of a pair that is
    made the student.

    ``dtype`` None is the run's own, float32 for a model alone. A run with a 4-bit base opens it in 4 bits.
    Raises ConfigError for a run that has no student yet, ModelError for a model that cannot be used.
    """
    from switchkd.models.loading import load_model, load_tokenizer, made
    from switchkd.models.saved_student import verify_saved
    from switchkd.reports.record import trained_student

    source = trained_student(Path(expanded(name))) if recipe else made(name, "student")
    verify_saved(Path(expanded(source)))
    dtype, in_4bit = dtype or (recipe.dtype if recipe else "float32"), bool(recipe and recipe.load_in_4bit)
    return load_model(source, dtype, load_in_4bit=in_4bit), load_tokenizer(source)


def _table(metrics: Iterable[Metric]) -> Table:
    """A harness's numbers, a line each; a group of tasks has no examples of its own."""
    table = Table("task", "metric", title_justify="left")
    for name in ("shots", "value", "stderr", "n"):
        table.add_column(name, justify="right")
    for m in metrics:
        stderr = "-" if m.stderr is None else f"{m.stderr:.4f}"
        shots, samples = ("-" if count is None else str(count) for count in (m.shots, m.samples))
        table.add_row(m.task, m.name, shots, f"{m.value:.4f}", stderr, samples)
    return table
