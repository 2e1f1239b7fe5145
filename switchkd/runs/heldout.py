"""The held-out examples of a run: where they come from, and how a model is scored on them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from switchkd.base.errors import ConfigError, nearest
from switchkd.base.manifest import json_sha256
from switchkd.base.storage import write_file
from switchkd.base.terminal import bar, console
from switchkd.data.examples import Example, split
from switchkd.data.files import SAMPLE, BadRows
from switchkd.data.settings import SOME_DAY, template_settings
from switchkd.data.texts import TokenizedExample
from switchkd.evaluation.evaluate import evaluate, score_names, work
from switchkd.evaluation.results import Evaluation, write_results
from switchkd.evaluation.settings import EvalConfig, EvalSettings
from switchkd.evaluation.tasks import AUTO, TASKS, Task, eval_sources, scorable, task_named
from switchkd.methods.policy import Policy
from switchkd.models.pair import Pair
from switchkd.models.saved_student import STUDENT, SavedStudent
from switchkd.runs.model_card import public_name
from switchkd.runs.opening import prepared, read_examples, reads_sample, splits, train_limit, with_teachers_answers
from switchkd.teachers.store import weights_sha256
from switchkd.training.records import CONFIG
from switchkd.training.settings import TrainConfig

DEFAULT_HELDOUT = f"{SAMPLE}:heldout"


@dataclass(frozen=True)
class Heldout:
    """Held-out examples, the task that they are of, and the teacher that they are judged by.

    ``origin`` says how they came about where they are not as they lie in their files.
    """

    task: Task
    sources: tuple[str, ...]
    examples: list[TokenizedExample]
    teacher: PreTrainedModel
    on_some_day: list[TokenizedExample]
    """The same examples with the prompts of one fixed day. Their checksum is the same on every day; `examples` are what is read."""
    origin: str = ""

    @cached_property
    def teacher_sha256(self) -> str:
        """Checksum of the teacher's weights, taken when it is asked for: of a large model that takes a while."""
        return weights_sha256(self.teacher)

    def shown(self) -> dict[str, Any]:
        """Task and data in words, to stand before the settings."""
        names = ", ".join(map(public_name, self.sources))
        return {
            "task": f"{self.task.name} version {self.task.version}",
            "data": f"{names}{self.origin}, sha256 {self.sha256[:12]}…",
        }

    @cached_property
    def sha256(self) -> str:
        """One checksum of prompts, references and ids, and of what the teacher reads in a prompt's place."""
        own = [example.teacher_prompt_ids for example in self.on_some_day]
        rows = [[e.id, e.prompt_ids, e.completion_ids, e.references] for e in self.on_some_day]
        return json_sha256([rows, own] if any(own) else rows)

    def to_json(self) -> dict[str, Any]:
        """Which examples."""
        ids, groups = [e.id for e in self.examples], [e.group for e in self.examples]
        return {"file": ", ".join(self.sources) + self.origin, "sha256": self.sha256, "ids": ids, "groups": groups}


def heldout_sources(config: Any) -> tuple[str, ...]:
    """Where held-out examples come from; none where nothing is held out.

    Raises ConfigError for an unknown task, or one without data of its own.
    """
    if splits(config):
        return config.train_file
    task = getattr(config, "task", AUTO)
    if task == AUTO and not config.eval_file and not reads_sample(config):
        return ()
    return eval_sources(config.eval_file or ((DEFAULT_HELDOUT,) if task == AUTO else ()), task)


def heldout_rows(
    config: Any, sources: Sequence[str], limit: int | None, bad: BadRows, answers: bool = False, **teachers: Any
) -> list[Example]:
    """The first rows of ``sources`` that are held out, with or without answers; ``teachers`` as `read_examples` takes them."""
    if not splits(config):
        return read_examples(config, sources, limit, bad, answers, **teachers)
    examples = read_examples(config, config.train_file, train_limit(config), bad, answers, **teachers)
    return split(examples, config.eval_split)[1][:limit]


def prompts_to_complete(config: Any, pair: Pair, limit: int) -> list[TokenizedExample]:
    """The first held-out prompts, of the sample where nothing is held out; a teacher may read its own in their place."""
    sources = heldout_sources(config) or (DEFAULT_HELDOUT,)
    bad = BadRows(sources, config.skip_bad)
    teachers = {"teacher_field": config.teacher_field, "teachers": pair.teachers}
    examples = heldout_rows(config, sources, limit, bad, "{completion}" in config.teacher_prompt, **teachers)
    tokenized = prepared(config, pair, examples, bad, training=True, teacher_field=config.teacher_field)
    bad.tell()
    return tokenized


def load_heldout(config: Any, pair: Pair, quiet: bool = False) -> Heldout:
    """The held-out examples that a run or an evaluation asks for, perhaps none, and their task."""
    sources = heldout_sources(config) if config.eval_samples else ()
    if not sources:
        if config.eval_samples and not quiet:
            console.print(
                "nothing is held out, so nothing is scored: give --eval-file, or --eval-split above 0", soft_wrap=True
            )
        return Heldout(TASKS["references"], (), [], pair.teacher, [])
    bad = BadRows(sources, config.skip_bad)
    examples = heldout_rows(config, sources, config.eval_samples if config.eval_samples > 0 else None, bad)
    origin, which = (f", {config.eval_split:.3g} of it held out", ", held out") if splits(config) else ("", "")
    answered = all(example.references for example in examples)
    task = task_named(config.task if answered or config.task != AUTO else "references", examples[0].format)
    examples = scorable(task, examples, bad) if bad.tolerated else examples
    now = some_day = prepared(config, pair, examples, bad, quiet, which=which)
    if config.prompts.reads_date(pair.tokenizer):
        some_day = prepared(replace(config, template_date=SOME_DAY), pair, examples, bad, quiet=True)
    bad.tell()
    if not answered:
        origin += ", answered by the teacher where a row has no answer"
        now = with_teachers_answers(config, pair, now, quiet)
        written = {example.id: example for example in now}
        some_day = [
            replace(written[e.id], prompt_ids=e.prompt_ids, teacher_prompt_ids=e.teacher_prompt_ids) for e in some_day
        ]
    return Heldout(task, tuple(sources), now, pair.teacher, some_day, origin)


def score(
    pair: Pair,
    model: PreTrainedModel,
    heldout: Heldout,
    settings: EvalSettings,
    name: str,
    quiet: bool = False,
    saved: SavedStudent | None = None,
) -> Evaluation:
    """Evaluate one model of the pair, with a progress bar; the result says which weights it is of, and how they are ``saved``."""
    with bar(f"evaluate {name}", work(heldout.examples, settings), quiet) as shown:
        result = evaluate(pair, model, heldout.examples, heldout.task, settings, shown.advance)
    sha256 = heldout.teacher_sha256 if model is heldout.teacher else weights_sha256(model)
    return replace(result, model={"sha256": sha256} | (saved.mark() if saved else {}))


def write_scores(
    file: Path,
    heldout: Heldout,
    settings: dict[str, Any],
    results: dict[str, Evaluation],
    write: Callable[[Path, str], None] = write_file,
) -> None:
    """Evaluations with everything they depend on, as JSON."""
    task = {"name": heldout.task.name, "version": heldout.task.version, "primary": heldout.task.primary}
    write_results(file, task, heldout.to_json(), settings, results, write)


def eval_settings(config: EvalConfig, policy: Policy) -> EvalSettings:
    """How completions are made, as ``evaluate`` wants to know it."""
    return EvalSettings(
        config.eval_max_new_tokens, config.eval_temperature, config.eval_seeds, config.eval_own_text, config.eval_backend, policy,
        config.per_device_eval_batch_size, top_p=config.eval_top_p, top_k=config.eval_top_k, min_p=config.eval_min_p,
    )  # fmt: skip


def all_settings(config: Any, pair: Pair, heldout: Heldout, settings: EvalSettings) -> dict[str, Any]:
    """Every setting that a score depends on, beside the examples."""
    names = "template", "max_prompt_length", "max_completion_length", "dtype", "teacher_dtype"
    text = {name: getattr(config, name) for name in names}
    text |= template_settings(config.prompts, pair.tokenizer)
    # What the teacher alone reads, where it reads anything: files of before it was a setting can be compared with.
    alone = {"teacher_system_prompt": config.teacher_system_prompt, "teacher_template": config.teacher_template}
    text |= {name: value for name, value in alone.items() if value not in ("", "shared")}
    return settings.to_json() | text | {"teacher_sha256": heldout.teacher_sha256}


def run_of(student: str) -> Path | None:
    """The run directory whose student that is, if it is one's; a checkpoint is another student than the run's."""
    folder = Path(student)
    return folder.parent if folder.name == STUDENT and (folder.parent / CONFIG).is_file() else None


def check_metric(config: TrainConfig, heldout: Heldout) -> None:
    """Raise ConfigError if the best student is to be chosen by a score that there will not be."""
    name = config.metric_for_best_model
    if name and name not in (known := score_names(heldout.task, heldout.examples)):
        raise ConfigError(
            f"metric_for_best_model: no score {name!r} in the task {heldout.task.name}{nearest(name, known)}"
        )
