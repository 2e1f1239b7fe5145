"""Tasks: what a data set's papers score, from which data, and which score they quote.

``docs/evaluation.md`` has the table with licences and exact definitions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from switchkd.base.errors import ConfigError, DataError, nearest
from switchkd.evaluation.math_answers import check_installed
from switchkd.evaluation.scores import (
    CRITICAL_THINKING,
    best_rouge,
    exact_match,
    gsm8k_flexible,
    gsm8k_strict,
    gsm_plus_accuracy,
    math_equal,
    rouge,
    small_right,
    until_mistake,
)

if TYPE_CHECKING:
    from switchkd.data.examples import Example
    from switchkd.data.files import BadRows


Score = Callable[[str, Sequence[str], str], dict[str, float]]
"""(completion, references, group) to every score by name."""

AUTO = "auto"


@dataclass(frozen=True)
class Task:
    """How completions are scored.

    ``score`` takes a completion without special tokens, its references and its example's group, and gives every score in
    percent; an empty completion scores 0 throughout. It raises DataError for a reference that cannot be scored against,
    whatever the completion, so ``score("", references, group)`` checks an example before anything is generated.
    ``primary`` is the score that papers quote. ``version`` is raised when a score could change. ``hub`` names the default
    data, "" for none; ``formats`` are the row layouts it can be scored on (``switchkd.data.formats``), () for all. Totals are also
    given without the examples whose group is in ``leave_out``.
    """

    name: str
    version: int
    score: Score
    primary: str
    description: str
    source: str
    hub: str = ""
    formats: tuple[str, ...] = ()
    leave_out: tuple[str, ...] = ()


def task_named(name: str, source_format: str) -> Task:
    """The task ``name`` for rows of the layout ``source_format``; "auto" is the layout's own task, ``references`` if it has none.

    Raises ConfigError for an unknown name, a task that cannot be scored on such rows, or one whose package is missing.
    """
    if name == AUTO:
        name = _OWN_TASK.get(source_format, "references")
    if name not in TASKS:
        raise ConfigError(f"there is no task {name!r}{nearest(name, [*TASKS, AUTO])}")
    task = TASKS[name]
    if task.formats and source_format not in task.formats:
        raise ConfigError(
            f"task {name} is scored on rows of the layout {' or '.join(task.formats)}, not {source_format!r}; use task 'auto' or "
            "'references'"
        )
    if task.name == "math":
        check_installed()
    return task


def scorable(task: Task, examples: Sequence[Example], bad: BadRows) -> list[Example]:
    """The examples whose references the task can score against, and those that have none yet; the others are bad rows."""
    kept = []
    for example in examples:
        try:
            if example.references:
                task.score("", example.references, example.group)
            kept.append(example)
        except DataError as error:
            bad.add(example.source, DataError(f"task {task.name}: {error}"))
    return kept


def eval_sources(eval_file: tuple[str, ...], task: str) -> tuple[str, ...]:
    """Where the examples come from: ``eval_file`` if one is given, else the data of the task ``task``.

    Raises ConfigError for an unknown task, or where neither says where the examples are.
    """
    if task != AUTO and task not in TASKS:
        raise ConfigError(f"there is no task {task!r}{nearest(task, [*TASKS, AUTO])}")
    if eval_file:
        return eval_file
    if task == AUTO:
        raise ConfigError("nothing to evaluate on: give eval_file, or a task that has data of its own")
    if not TASKS[task].hub:
        raise ConfigError(f"task {task} has no data of its own; give eval_file. {TASKS[task].source}")
    return (TASKS[task].hub,)


# --- scores of a completion ---------------------------------------------------------------------------------------


def _score_references(text: str, references: Sequence[str], group: str) -> dict[str, float]:
    return best_rouge(text, references) | {"exact_match": max(exact_match(text, one) for one in references)}


def _score_dialogsum(text: str, references: Sequence[str], group: str) -> dict[str, float]:
    found = [rouge(text, reference) for reference in references]
    scores = {f"{name}_first": value for name, value in found[0].items()}
    if len(found) > 1:
        for name in found[0]:
            values = [one[name] for one in found]
            scores |= {f"{name}_mean": sum(values) / len(values), f"{name}_best": max(values)}
    return scores


def _score_gsm8k(text: str, references: Sequence[str], group: str) -> dict[str, float]:
    return {
        "strict": max(gsm8k_strict(text, reference) for reference in references),
        "flexible": max(gsm8k_flexible(text, reference) for reference in references),
        "rouge_l": best_rouge(text, references)["rouge_l"],
    }


def _score_gsm_plus(text: str, references: Sequence[str], group: str) -> dict[str, float]:
    return {
        "accuracy": max(gsm_plus_accuracy(text, reference, group) for reference in references),
        "rouge_l": best_rouge(text, references)["rouge_l"],
    }


def _score_math(text: str, references: Sequence[str], group: str) -> dict[str, float]:
    return {
        "math_equal": max(math_equal(text, reference) for reference in references),
        "flexible": max(gsm8k_flexible(text, _boxed(reference)) for reference in references),
        "rouge_l": best_rouge(text, references)["rouge_l"],
    }


def _score_small(text: str, references: Sequence[str], group: str) -> dict[str, float]:
    return {
        "right": max(small_right(text, reference) for reference in references),
        "until_mistake": max(until_mistake(text, reference) for reference in references),
        "rouge_l": best_rouge(text, references)["rouge_l"],
    }


def _boxed(solution: str) -> str:
    """What a MATH solution boxes last; another text as it is."""
    boxes = re.findall(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}", solution)
    return boxes[-1] if boxes else solution


# --- the tasks ----------------------------------------------------------------------------------------------------

_PAIRS = ("pair", "messages", "instruction")
_INSTRUCTIONS = (*_PAIRS, "instances")
_MINILLM = "MiniLLM (arXiv 2306.08543), microsoft/LMOps minillm: rouge_metric.py"
_OWN_TASK = {"gsm8k": "gsm8k", "gsm_plus": "gsm_plus", "math": "math", "dialogue": "dialogsum"}

_ALL = (
    Task(
        "dolly",
        version=1,
        score=_score_references,
        primary="rouge_l",
        description="500 held-out instructions of databricks-dolly-15k",
        source=_MINILLM,
        hub="hub:MiniLLM/dolly/valid.jsonl:train",
        formats=_INSTRUCTIONS,
    ),
    Task(
        "self_instruct",
        version=1,
        score=_score_references,
        primary="rouge_l",
        description="instructions that people wrote for applications they use (MiniLLM's 242 of 252)",
        source=f"Self-Instruct (arXiv 2212.10560), user_oriented_instructions; scored as {_MINILLM}",
        hub="hub:MiniLLM/self-inst/valid.jsonl:train",
        formats=_INSTRUCTIONS,
    ),
    Task(
        "vicuna",
        version=1,
        score=_score_references,
        primary="rouge_l",
        description="80 questions in 9 categories, with gpt-3.5-turbo's answers as references",
        source=f"Vicuna (LMSYS, 2023); scored as {_MINILLM}",
        hub="hub:MiniLLM/Vicuna/valid.jsonl:train",
        formats=_INSTRUCTIONS,
    ),
    Task(
        "super_natural_instructions",
        version=1,
        score=_score_references,
        primary="rouge_l",
        description="the official English test tasks as MiniLLM sampled them, answers of 11 tokens and more",
        source=f"Super-NaturalInstructions (arXiv 2204.07705); scored as {_MINILLM}",
        hub="hub:MiniLLM/sinst/11_/valid.jsonl:train",
        formats=_INSTRUCTIONS,
    ),
    Task(
        "unnatural_instructions",
        version=1,
        score=_score_references,
        primary="rouge_l",
        description="instructions that a model wrote; papers take 10,000 of the core set with long answers",
        source=f"Unnatural Instructions (arXiv 2212.09689), orhonovich/unnatural-instructions; scored as {_MINILLM}",
        formats=_INSTRUCTIONS,
    ),
    Task(
        "dialogsum",
        version=1,
        score=_score_dialogsum,
        primary="rouge_l_first",
        description="summaries of dialogues; three annotators in the test split",
        source="DialogSum (arXiv 2105.06762), cylnlp/dialogsum",
        hub="hub:knkarthick/dialogsum:test",
        formats=("dialogue", *_PAIRS),
    ),
    Task(
        "gsm8k",
        version=1,
        score=_score_gsm8k,
        primary="strict",
        description="grade-school word problems with a number as the answer",
        source="GSM8K (arXiv 2110.14168), openai/grade-school-math: dataset.py; lm-evaluation-harness: gsm8k 3.0",
        hub="hub:openai/gsm8k/main:test",
        formats=("gsm8k", *_PAIRS),
    ),
    Task(
        "gsm_plus",
        version=1,
        score=_score_gsm_plus,
        primary="accuracy",
        description="GSM8K's test questions, each perturbed in eight ways",
        source="GSM-Plus (arXiv 2402.19255), qtli/GSM-Plus: extract_ans.py",
        hub="hub:qintongli/GSM-Plus:test",
        formats=("gsm_plus",),
        leave_out=(CRITICAL_THINKING,),
    ),
    Task(
        "math",
        version=1,
        score=_score_math,
        primary="math_equal",
        description="competition problems with an expression as the answer",
        source="MATH (arXiv 2103.03874); answers compared by huggingface/Math-Verify",
        hub="hub:HuggingFaceH4/MATH-500:test",
        formats=("math", "gsm8k", *_PAIRS),
    ),
    Task(
        "small",
        version=1,
        score=_score_small,
        primary="right",
        description="the generated tasks of the small pair: running totals, rows in another order, notes retold",
        source="switchkd make-pair; its held-out rows are small:heldout",
        hub="small:heldout",
        formats=("instruction", "gsm8k"),
    ),
    Task(
        "references",
        version=1,
        score=_score_references,
        primary="rouge_l",
        description="any rows with one reference or more",
        source=f"scored as {_MINILLM}",
    ),
)
TASKS = {task.name: task for task in _ALL}
"""Every task by its name."""
