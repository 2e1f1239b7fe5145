"""The result of an evaluation: every score of every example, what was written, and all that the scores depend on.

``evaluation.json`` holds questions, scores and settings, ``evaluation.completions.jsonl`` beside it the text that was scored.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from switchkd.base.errors import DataError
from switchkd.base.manifest import file_sha256
from switchkd.base.plain import check_type, json_object, read_lines, shown
from switchkd.base.storage import write_file
from switchkd.evaluation.statistics import Estimate, Values, estimate, score, spearman

EVALUATION = "evaluation.json"  # a run's own; those of ``switchkd evaluate`` have the task's name behind it
FORMAT = 1
# Completions of so many tokens are one group where scores are shown by length (SWITCH, table 2).
LENGTH_BANDS = {"1-10": (1, 10), "11-50": (11, 50), "51+": (51, math.inf)}


@dataclass(frozen=True)
class Completion:
    """One completion that was scored. ``seed`` is None for a greedy one; ``stop_reason`` as in a Rollout."""

    example: int
    seed: int | None
    text: str
    tokens: int
    stop_reason: str


@dataclass(frozen=True)
class Question:
    """What was asked in a held-out example: the prompt as the models read it, and the reference answers."""

    prompt: str
    references: Sequence[str]


@dataclass(frozen=True)
class Evaluation:
    """One model's scores on held-out examples.

    ``scores`` by name hold a value for each sampling seed and example, ``groups`` the examples' groups, ``model`` name and
    checksum; ``made_with`` is all that scores depend on beside the model, where that is known. Divergence and perplexity are of
    the reference tokens: one seed, weighted by tokens. ``questions`` are in the order of the scores' values; older files have none.
    """

    scores: dict[str, Values]
    primary: str
    groups: Sequence[str] = ()
    model: Mapping[str, str] = field(default_factory=dict)
    completions: Sequence[Completion] = field(default=(), repr=False)
    questions: Sequence[Question] = field(default=(), repr=False)
    made_with: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def summary(self) -> dict[str, Estimate]:
        """Each score's mean with its interval."""
        return {name: estimate(name, values) for name, values in self.scores.items()}

    @cached_property
    def by_group(self) -> dict[str, Estimate]:
        """The primary score of each group of examples; none where all are of one."""
        values, names = self.scores[self.primary], dict.fromkeys(self.groups)
        if len(names) < 2:
            return {}
        inside = {name: np.array([group == name for group in self.groups]) for name in names}
        return {name: estimate(self.primary, values.only(mask)) for name, mask in inside.items()}

    @cached_property
    def length_correlation(self) -> dict[str, dict[str, float]]:
        """Spearman's correlation of ROUGE-L with the divergence to the teacher on the model's own text, by its length.

        Over completions of all seeds; SWITCH, table 2. None where the own text was not scored.
        """
        if "own_forward_kl" not in self.scores or "rouge_l" not in self.scores:
            return {}
        loss, rouge, length = (self.scores[name].values.ravel() for name in ("own_forward_kl", "rouge_l", "length"))
        found = {}
        for band, (low, high) in LENGTH_BANDS.items():
            inside = (low <= length) & (length <= high)
            found[band] = {"spearman": spearman(loss[inside], rouge[inside]), "completions": int(inside.sum())}
        return found

    def means(self) -> dict[str, float]:
        """Each score's mean alone."""
        return {name: score(name, values) for name, values in self.scores.items()}


def write_results(
    file: Path,
    task: Mapping[str, Any],
    data: Mapping[str, Any],
    settings: Mapping[str, Any],
    results: Mapping[str, Evaluation],
    write: Callable[[Path, str], None] = write_file,
) -> None:
    """Write evaluations by the name of their model; what they depend on stands beside them.

    Into a pipe or device go the scores alone: nothing can lie beside it.
    """
    lines = [{"model": name, **asdict(text)} for name, result in results.items() for text in result.completions]
    texts = "".join(json.dumps(line) + "\n" for line in lines)
    questions = next((result.questions for result in results.values() if result.questions), ())
    asked = {"prompts": [q.prompt for q in questions], "references": [list(q.references) for q in questions]}
    record = {
        "format": FORMAT,
        "task": task,
        "data": dict(data) | (asked if questions else {}),
        "settings": settings,
        "completions_sha256": hashlib.sha256(texts.encode()).hexdigest(),
        "results": {name: _to_json(result) for name, result in results.items()},
    }
    scores = ",\n".join(f"{json.dumps(key)}: {json.dumps(_no_nan(value))}" for key, value in record.items())
    file.parent.mkdir(parents=True, exist_ok=True)
    # Two files cannot change in one moment: scores that stand beside the text of others are told by the checksum.
    if file.is_file() or not file.exists():
        write(completions_file(file), texts)
    write(file, f"{{\n{scores}\n}}\n")


class _Task(TypedDict):
    primary: str


class _Questions(TypedDict, total=False):
    prompts: list[str]
    references: list[list[str]]


class _Data(_Questions):
    ids: list[int]
    groups: list[str]


class _Values(TypedDict):
    values: list[list[float | None]]
    weights: list[float] | None


class _Result(TypedDict):
    model: dict[str, str]
    scores: dict[str, _Values]


class _Record(TypedDict):
    """What is read of an evaluation file."""

    task: _Task
    data: _Data
    settings: dict[str, Any]
    results: dict[str, _Result]


class _Text(TypedDict):
    """A line of the text that was scored."""

    model: str
    example: int
    seed: int | None
    text: str
    tokens: int
    stop_reason: str


def read_results(file: Path) -> dict[str, Evaluation]:
    """The evaluations in a file, by the name of their model; raises DataError for one that this version did not write."""
    try:
        record = json_object(file.read_bytes())
        if record.get("format") != FORMAT:
            raise DataError(f"format {shown(record.get('format'))}, this is {FORMAT}")
        found = results_of(record)
        texts = _read_texts(completions_file(file), record)
        return {model: replace(result, completions=texts.get(model, ())) for model, result in found.items()}
    except (OSError, DataError) as error:
        raise DataError(
            f"{file} cannot be read as an evaluation: {error}; make it again with `switchkd evaluate`"
        ) from error


def _read_texts(file: Path, record: Mapping[str, Any]) -> dict[str, list[Completion]]:
    """The text that was scored, by the name of its model; raises DataError where it is not that of the scores."""
    if not file.is_file():
        raise DataError(f"there is no {file.name} beside it")
    ids, seen = set(record["data"]["ids"]), set()
    texts: dict[str, list[Completion]] = {model: [] for model in record["results"]}
    for number, line in enumerate(read_lines(file, _Text), start=1):
        place = line["model"], line["seed"], line["example"]
        if line["model"] not in texts or line["example"] not in ids or place in seen:
            what = "is there twice" if place in seen else "is of no model and example that was scored"
            raise DataError(f"{file}, line {number}: the text of {shown(place)} {what}")
        seen.add(place)
        texts[line["model"]].append(Completion(*(line[f.name] for f in fields(Completion))))
    if record.get("completions_sha256", sha256 := file_sha256(file)) != sha256:
        raise DataError(f"{file} beside it is of another evaluation, or damaged")
    return texts


def take_out(file: Path, results: Mapping[str, Evaluation], models: Collection[str]) -> bool:
    """Take those of ``models`` out of the ``results`` in an evaluation file; False, and nothing is done, if none would be left."""
    record = json_object(file.read_bytes())
    kept = {name: result for name, result in results.items() if name not in models}
    if kept and len(kept) < len(results):
        write_results(file, record["task"], record["data"], record.get("settings", {}), kept)
    return bool(kept)


def results_of(record: Mapping[str, Any]) -> dict[str, Evaluation]:
    """The evaluations in a parsed file, by the name of their model, without the text.

    Raises:
        DataError: it is no such file, or a score has not a value for every example.
    """
    check_type(record, _Record)
    if len(set(record["data"]["ids"])) < len(record["data"]["ids"]):
        raise DataError("an example is there twice in its ids")
    primary, groups, examples = record["task"]["primary"], record["data"]["groups"], len(record["data"]["ids"])
    if len(groups) not in (0, examples):
        raise DataError(f"there are {len(groups)} groups for {examples} examples")
    questions = _questions(record["data"], examples)
    task = {name: record["task"].get(name) for name in ("name", "version", "primary")}
    made_with = {"task": task, "ids": record["data"]["ids"], "data sha256": record["data"].get("sha256")} | record[
        "settings"
    ]
    results = {}
    for model, result in record["results"].items():
        scores = {name: _values(name, **values) for name, values in result["scores"].items()}
        for name, values in scores.items():
            if values.values.shape[1] != examples:
                raise DataError(f"{name} has {values.values.shape[1]} values a seed for {examples} examples")
        if primary not in scores:
            raise DataError(f"{model} has no score {primary!r}, the task's primary one")
        results[model] = Evaluation(scores, primary, groups, result["model"], questions=questions, made_with=made_with)
    return results


def _questions(data: Mapping[str, Any], examples: int) -> list[Question]:
    """What was asked, in the order of the examples; none in a file of a version that did not keep it."""
    asked = [data.get(name, []) for name in ("prompts", "references")]
    if any(len(each) not in (0, examples) for each in asked) or len(asked[0]) != len(asked[1]):
        raise DataError(f"there are {len(asked[0])} prompts and {len(asked[1])} references for {examples} examples")
    return [Question(prompt, tuple(references)) for prompt, references in zip(*asked, strict=True)]


def _values(name: str, values: Any, weights: Any) -> Values:
    try:
        return Values(values, weights)
    except ValueError as error:  # rows of different lengths, too
        raise DataError(f"{name}: {error}") from error


def completions_file(file: Path) -> Path:
    """Where the text of an evaluation lies."""
    return file.with_suffix(".completions.jsonl")


def _to_json(result: Evaluation) -> dict[str, Any]:
    return {
        "model": dict(result.model),
        "summary": {name: found.to_json() for name, found in result.summary.items()},
        "by_group": {name: found.to_json() for name, found in result.by_group.items()},
        "length_correlation": result.length_correlation,
        "scores": {
            name: {"values": values.values.tolist(), "weights": np.asarray(values.weights).tolist()}
            for name, values in result.scores.items()
        },
    }


def _no_nan(value: Any) -> Any:
    """The value with null for NaN, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _no_nan(item) for key, item in value.items()}
    return [_no_nan(item) for item in value] if isinstance(value, (list, tuple)) else value
