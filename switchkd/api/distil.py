"""``distil`` and ``evaluate``: what the commands `train` and `evaluate` do, for Python."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from switchkd.api.run import Run
from switchkd.base.errors import ConfigError, DataError, nearest
from switchkd.base.storage import unused_folder, write_file
from switchkd.data.settings import with_template
from switchkd.methods.policy import StudentOnly
from switchkd.models.loading import default_device, load_model, load_tokenizer, made, silent_libraries
from switchkd.models.pair import Pair, pair_of
from switchkd.models.settings import with_dtypes
from switchkd.runs import distil as runs
from switchkd.runs.continuation import ROWS, check_run
from switchkd.runs.heldout import eval_settings, load_heldout, score
from switchkd.runs.opening import open_pair
from switchkd.training.settings import TrainConfig, load_recipe

if TYPE_CHECKING:
    from datasets import Dataset

    from switchkd.evaluation.results import Evaluation
    from switchkd.training.trainer import OnStep

Model: TypeAlias = str | os.PathLike[str] | PreTrainedModel
"""A model: its name on the hub, its folder, `demo`, or the model itself, loaded."""
Data: TypeAlias = "str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Iterable[Mapping[str, Any]] | Dataset"
"""Rows: a file or several (any kind that `--train-file` takes), a list of dictionaries, or a ``datasets.Dataset``."""


def distil(
    teacher: Model,
    student: Model,
    data: Data,
    *,
    method: str = "adaswitch",
    eval_data: Data | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    on_step: OnStep = lambda *_: None,
    output_dir: str | os.PathLike[str] = "",
    **settings: Any,
) -> Run:
    """Distil ``teacher`` into ``student`` on ``data``; returns the run: the trained student, its scores, and all that was written.

    Example:
        >>> run = distil("Qwen/Qwen2.5-3B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct", [{"prompt": "Name a river."}], max_steps=100)
        >>> run.student.save_pretrained("my-student")

    Args:
        teacher: the model that teaches.
        student: the model that learns. A loaded one is trained in place, in float32 or wider.
        data: rows to train on. Rows that are given as dictionaries or as a ``Dataset`` are written into the run's directory first,
            so that the run can go on, be reported and be made again like any other.
        method: a recipe: a name that ``switchkd methods`` lists, or a YAML file.
        eval_data: rows to score on. Without any, a twentieth of ``data`` is held out (``eval_split``).
        tokenizer: of a student that is loaded already; default the one of the folder or name that it was loaded from. A teacher
            that was loaded from a folder may have another one there.
        on_step: called after every step with its metrics, as they stand in ``metrics.jsonl``, and the texts generated in it.
        output_dir: the run's directory; default ``runs/METHOD``, numbered where that is there already.
        settings: any other setting of `TrainConfig` by its name, such as ``max_steps=100`` or ``use_peft=True``.

    Raises:
        ConfigError: an unknown setting, or settings that contradict each other.
        DataError: data that cannot be read or used, with its file and row.
        SwitchKDError: the others of ``switchkd.runs.distil.distil``.
    """
    run = Path(output_dir) if output_dir else unused_folder(f"runs/{Path(method).stem}")
    models = {"teacher_model_name_or_path": _name(teacher), "student_model_name_or_path": _name(student)}
    files = {"train_file": _sources(data, run, "train"), "eval_file": _sources(eval_data, run, "eval")}
    config = _config(method, settings, **models, **files, output_dir=str(run))
    check_run(run, config)
    for name, rows in (("train", data), ("eval", eval_data)):
        if rows is not None and not _are_files(rows):
            _write_rows(run / ROWS / f"{name}.jsonl", rows)
    with silent_libraries():
        runs.distil(config, _loaded(teacher, student, tokenizer, config), on_step)
    return Run(run)


def evaluate(
    student: Model,
    teacher: Model,
    data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **settings: Any,
) -> dict[str, Evaluation]:
    """Score ``student`` and ``teacher`` on the rows of ``data``, and return their scores by these two names.

    ``settings`` are those of `TrainConfig` that say how text is read and scored, such as ``task``, ``eval_samples`` (default 64, -1
    for all rows) and ``eval_max_new_tokens``. ``evaluate(…)["student"].means()`` is a dictionary of numbers.

    Raises what ``distil`` raises.
    """
    models = {"teacher_model_name_or_path": _name(teacher), "student_model_name_or_path": _name(student)}
    config = _config("", settings, **models, eval_file=_sources(data, Path(), ""))
    config = with_dtypes(config, default_device())
    with silent_libraries():
        return _scores(config, _loaded(teacher, student, tokenizer, config))


def _scores(config: TrainConfig, loaded: Pair | None) -> dict[str, Evaluation]:
    pair = open_pair(config, loaded=loaded)
    config = with_template(config, pair.tokenizer, others=pair.other_tokenizers)
    heldout = load_heldout(config, pair)
    how = eval_settings(config, StudentOnly())
    return {
        name: score(pair, model, heldout, how, name)
        for name, model in vars(pair).items()
        if name in ("teacher", "student")
    }


def _config(method: str, settings: Mapping[str, Any], **own: Any) -> TrainConfig:
    """The settings of a recipe with these in place of its own."""
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    if unknown := [name for name in settings if name not in names]:
        raise ConfigError(
            f"there is no setting {unknown[0]!r}{nearest(unknown[0], names)}; docs/reference/settings.md lists them"
        )
    if twice := [name for name in settings if own.get(name)]:
        raise ConfigError(f"{twice[0]} is what another argument of this function says already; leave it out")
    recipe = load_recipe(method) if method else TrainConfig()
    return dataclasses.replace(recipe, **own | dict(settings))


def _name(model: Model) -> str:
    """What the settings call a model: of a loaded one, where it was loaded from."""
    if isinstance(model, PreTrainedModel):
        return model.name_or_path or f"loaded-{type(model).__name__}"
    return os.fspath(model)


def _loaded(
    teacher: Model, student: Model, tokenizer: PreTrainedTokenizerBase | None, config: TrainConfig
) -> Pair | None:
    """The pair, where one of its models is loaded already; None where the settings name both."""
    if not (isinstance(teacher, PreTrainedModel) or isinstance(student, PreTrainedModel)):
        return None
    if config.teachers:
        raise ConfigError("several teachers are given by their names or folders, and so are student and teacher then")
    own = with_dtypes(config, default_device())
    tokenizer = tokenizer or _students_tokenizer(teacher, student)
    if not isinstance(student, PreTrainedModel):
        student = load_model(_name(student), "float32" if own.dtype != "float64" else own.dtype)
    if not isinstance(teacher, PreTrainedModel):
        teacher = load_model(_name(teacher), own.teacher_dtype)
    lora = config if config.use_peft else None
    return pair_of(
        teacher, student, tokenizer, lora=lora, seed=config.seed, template=config.prompts, marks=config.shared_marks,
        teacher_tokenizer=_other_tokenizer(teacher, tokenizer),
    )  # fmt: skip


def _other_tokenizer(teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase | None:
    """The teacher's own tokenizer, where it is known and is not the student's."""
    if not teacher.name_or_path or not Path(teacher.name_or_path).is_dir():
        return None
    own = load_tokenizer(teacher.name_or_path)
    return None if own.get_vocab() == tokenizer.get_vocab() else own


def _students_tokenizer(teacher: Model, student: Model) -> PreTrainedTokenizerBase:
    """The tokenizer of a loaded student; of one that is named, the loaded teacher's, unless the student's is another one."""
    if isinstance(student, PreTrainedModel):
        return _tokenizer(student)
    theirs, own = _tokenizer(teacher), load_tokenizer(made(_name(student), "student"))
    return theirs if own.get_vocab() == theirs.get_vocab() else own


def _tokenizer(model: Model) -> PreTrainedTokenizerBase:
    name = _name(model)
    if isinstance(model, PreTrainedModel) and not model.name_or_path:
        raise ConfigError(
            "the model was not loaded from a folder or a hub, so its tokenizer is not known; give tokenizer="
        )
    return load_tokenizer(name)


# --- rows that are given in Python --------------------------------------------------------------------------------


def _are_files(data: Data) -> bool:
    if isinstance(data, (str, os.PathLike)):
        return True
    return isinstance(data, Sequence) and len(data) > 0 and all(isinstance(one, (str, os.PathLike)) for one in data)


def _sources(data: Data | None, run: Path, name: str) -> tuple[str, ...]:
    """What the settings call the data: its files, or the one that its rows are written to."""
    if data is None:
        return ()
    if isinstance(data, (str, os.PathLike)):
        return (os.fspath(data),)
    if _are_files(data):
        return tuple(os.fspath(one) for one in data)  # type: ignore[arg-type]
    return (str(run / ROWS / f"{name}.jsonl"),)


def _write_rows(file: Path, rows: Any) -> None:
    """Write rows as JSON lines. Raises DataError, with its place, for one that is no dictionary of JSON values."""
    lines = []
    for place, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError(f"row {place} of the data must be a dictionary, not {type(row).__name__}")
        try:
            lines.append(json.dumps(dict(row), ensure_ascii=False, allow_nan=False) + "\n")
        except (TypeError, ValueError) as error:
            raise DataError(
                f"row {place} of the data holds what JSON cannot: {error}; give text, numbers, lists and objects"
            ) from error
    text = "".join(lines)
    if file.exists() and file.read_text(encoding="utf-8") != text:
        raise ConfigError(
            f"{file} holds the rows that the run began with, and these are others; give those, or another output_dir"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, text)
