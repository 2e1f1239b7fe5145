"""TODO."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from switchkd.base.storage import write_file, write_output
from switchkd.data.settings import DataConfig, with_date
from switchkd.evaluation.settings import EvalConfig
from switchkd.methods.policy import Policy, StudentOnly
from switchkd.models.settings import ModelConfig

if TYPE_CHECKING:
    pass


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


def evaluate(config: EvaluateConfig) -> None:
    from switchkd.base.terminal import console
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
    config = with_date(config, pair.tokenizer)
    heldout = load_heldout(config, pair)
    models = {"teacher": (pair.teacher, StudentOnly(), None), "student": (pair.student, config.policy, saved)}
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
