"""EleutherAI's lm-evaluation-harness (lm-eval) on a model that switchkd trained or can open.

The harness asks and scores exactly as it does for a model from a hub; switchkd opens the model, run directories and adapters
included, and keeps what the numbers depend on.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switchkd.base import __version__
from switchkd.base.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# lm-eval seeds Python's, NumPy's and torch's generators and its choice of few-shot examples; these are its own defaults.
SEEDS = {"random_seed": 0, "numpy_random_seed": 1234, "torch_random_seed": 1234, "fewshot_random_seed": 1234}
PACKAGES = ("lm_eval", "transformers", "torch", "datasets")
# What of the harness's answer is kept; the rest describes the machine.
KEPT = ("results", "groups", "n-shot", "n-samples", "higher_is_better", "versions", "configs")


@dataclass(frozen=True)
class Metric:
    """One number of one task or group: ``stderr`` None where the harness gives none, ``samples`` None for a group."""

    task: str
    name: str
    value: float
    stderr: float | None
    shots: int | None
    samples: int | None


def find_tasks(tasks: Sequence[str], include_path: str | None = None) -> Any:
    """lm-eval's task manager, which knows all of ``tasks`` (tasks, groups or tags). Takes some seconds.

    Raises ConfigError if lm-eval is not installed, or for a name that neither it nor a YAML file under ``include_path`` has.
    """
    manager_class = _require("lm_eval.tasks").TaskManager
    if not tasks:
        raise ConfigError("no task given; name some, such as --tasks arc_easy hellaswag")
    if include_path and not Path(include_path).is_dir():
        raise ConfigError(f"include_path {include_path} is no folder; name the one that holds the tasks' YAML files")
    manager = manager_class(include_path=include_path)
    for name in tasks:
        if name not in manager.all_tasks:
            close = get_close_matches(name, manager.all_tasks, n=3)
            hint = f"did you mean {', '.join(close)}?" if close else "`lm-eval ls tasks` lists them"
            raise ConfigError(f"lm-eval has no task {name!r}; {hint} (own tasks: include_path)")
    return manager


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    manager: Any,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    apply_chat_template: bool = False,
) -> dict[str, Any]:
    """The harness's own answer for ``tasks`` of the `find_tasks` ``manager``, under SEEDS.

    ``num_fewshot`` None is each task's own number. The process's global random state is another afterwards.
    Raises DataError if a task's data cannot be read, ConfigError for what the harness refuses.
    """
    if batch_size < 1 or (limit is not None and limit < 1) or (num_fewshot is not None and num_fewshot < 0):
        raise ConfigError(
            f"batch_size and limit must be at least 1, num_fewshot at least 0; got {batch_size}, {limit} and {num_fewshot}"
        )
    evaluator, huggingface = _require("lm_eval.evaluator"), _require("lm_eval.models.huggingface")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # warns of a model object that is none of its own
    lm = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    try:
        return evaluator.simple_evaluate(
            lm,
            tasks=list(tasks),
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=batch_size,
            apply_chat_template=apply_chat_template,
            log_samples=False,
            **SEEDS,
        )
    except OSError as error:
        raise DataError(
            f"the data of {', '.join(tasks)} cannot be read: {error}; lm-eval's tasks fetch theirs from the Hugging Face hub, "
            "so a network is needed, or an earlier run's cache (HF_HOME); a task on a local file is given with include_path"
        ) from error
    except ValueError as error:
        raise ConfigError(f"lm-eval refuses {', '.join(tasks)}: {error}") from error


def metrics(answer: dict[str, Any]) -> Iterator[Metric]:
    """The numbers in a harness's answer, in its order. A filter that is not "none" follows the metric's name."""
    for task, values in answer["results"].items():
        for key, value in values.items():
            name, comma, chosen = key.partition(",")
            if not comma or name.endswith("_stderr"):
                continue
            stderr = values.get(f"{name}_stderr,{chosen}")
            yield Metric(
                values.get("alias", task),
                name if chosen == "none" else f"{name} ({chosen})",
                value,
                stderr if isinstance(stderr, float) else None,
                answer["n-shot"].get(task),
                answer["n-samples"].get(task, {}).get("effective"),
            )


def record(answer: dict[str, Any], settings: dict[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """What to keep: the numbers with the settings, seeds, versions and task definitions that they depend on."""
    return {
        "settings": settings,
        "seeds": SEEDS,
        "packages": {"switchkd": __version__, **{name: version(name) for name in PACKAGES}},
        "model": {"dtype": str(model.dtype), "generation_config": model.generation_config.to_diff_dict()},
        **{name: answer[name] for name in KEPT if name in answer},
    }


def _require(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"lm-eval is needed and cannot be imported ({error}); pip install 'switchkd[lm-eval]'"
        ) from error
