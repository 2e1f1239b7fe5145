"""Text to numbers: how a completion is scored against a reference, in percent, higher is better.

Every function is pure and needs no model. What a task computes of these, and which paper does so, is in ``evaluation.tasks``.
"""

from __future__ import annotations

import itertools
import re
import string
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from typing import TYPE_CHECKING

from switchkd.base.errors import DataError

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer


SCORES = {
    "rouge_1": "ROUGE-1 F1, stemmed, best of the references",
    "rouge_2": "ROUGE-2 F1, stemmed, best of the references",
    "rouge_l": "ROUGE-L F1, stemmed, best of the references",
    "rouge_1_first": "ROUGE-1 F1 to the first reference",
    "rouge_2_first": "ROUGE-2 F1 to the first reference",
    "rouge_l_first": "ROUGE-L F1 to the first reference",
    "rouge_1_mean": "ROUGE-1 F1, mean over the references",
    "rouge_2_mean": "ROUGE-2 F1, mean over the references",
    "rouge_l_mean": "ROUGE-L F1, mean over the references",
    "rouge_1_best": "ROUGE-1 F1, best of the references",
    "rouge_2_best": "ROUGE-2 F1, best of the references",
    "rouge_l_best": "ROUGE-L F1, best of the references",
    "exact_match": "equal to a reference without case and punctuation",
    "strict": "the number after the first ####, as GSM8K's authors score",
    "flexible": "the last number, as lm-evaluation-harness's flexible-extract",
    "accuracy": "the answer as GSM-Plus's authors extract it",
    "right": "all of the answer is right: its number after ####, or every word",
    "until_mistake": "how far the answer goes until its first mistake",
    "math_equal": "the answer equals the reference's, by math-verify",
}
"""What each score says; all are percentages (shares of right answers, or F1) and higher is better."""

_ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}


# --- overlap with a reference -------------------------------------------------------------------------------------


def rouge(text: str, reference: str) -> dict[str, float]:
    """``rouge_1``, ``rouge_2``, ``rouge_l``: F1 × 100 by the rouge-score package with the Porter stemmer (Lin, 2004).

    Its words are runs of a-z and 0-9, so text in another script scores 0.
    """
    found = _rouge_scorer().score(reference, text)
    return {name: 100 * found[theirs].fmeasure for name, theirs in _ROUGE.items()}


def best_rouge(text: str, references: Sequence[str]) -> dict[str, float]:
    """The best of each ROUGE over the references; another reference may be the best one for each."""
    found = [rouge(text, reference) for reference in references]
    return {name: max(one[name] for one in found) for name in _ROUGE}


@cache
def _rouge_scorer() -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(_ROUGE.values()), use_stemmer=True)


def exact_match(text: str, reference: str) -> float:
    """100 if both are the same without case, punctuation and extra white space (MiniLLM's ``rouge_metric.py``), else 0."""
    return _percent(bool(text.strip()) and _plain(text) == _plain(reference))


def _plain(text: str) -> str:
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _percent(right: bool) -> float:
    return 100.0 if right else 0.0


# --- GSM8K --------------------------------------------------------------------------------------------------------

_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


def gsm8k_strict(text: str, reference: str) -> float:
    """100 if the first ``#### N`` of both is the same string without commas, else 0: ``dataset.py`` of GSM8K's authors.

    So ``#### 18.`` and ``#### $18`` are wrong for 18. Raises DataError for a reference without one.
    """
    gold = _after_marks(reference)
    if gold is None:
        raise DataError(f"the reference has no '#### N' to score against: {_tail(reference)}")
    return _percent(_after_marks(text) == gold)


def _after_marks(text: str) -> str | None:
    found = _STRICT.search(text)
    return found[1].replace(",", "") if found else None


def gsm8k_flexible(text: str, reference: str) -> float:
    """100 if the last number of ``text`` is the reference's answer, else 0: lm-evaluation-harness, gsm8k 3.0, flexible-extract.

    As there, dollar signs, commas, one full stop at the end and, of the reference, all up to the last ``#### `` do not
    count; 18.00 is not 18, and dots that stand alone ("...") are taken for a number.
    """
    found = _FLEXIBLE.findall(text)
    return _percent(bool(found) and _harness_plain(found[-1]) == _harness_plain(reference))


def _harness_plain(text: str) -> str:
    return re.sub(r"\.$", "", re.sub(r"(?s).*#### ", "", re.sub(r"[,$]", "", text))).strip().lower()


# --- GSM-Plus -----------------------------------------------------------------------------------------------------

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:/\d+)?")
_NO_ANSWER = "None"
CRITICAL_THINKING = "critical thinking"
"""GSM-Plus's questions that lack a needed fact: their answer is None, and saying so is right."""
_SAYS_SO = re.compile(
    r"(?:not|doesn't) (?:provide|specify|mention)|can't (?:provide|calculate|determine)|cannot (?:calculate|determine)"
    r"|(?:don't|do not) know|do not have enough|don't have enough information|missing necessary information|none"
)


def gsm_plus_accuracy(text: str, reference: str, group: str = "") -> float:
    """100 if the answer is right, else 0, as ``extract_ans.py`` of GSM-Plus's authors extracts and compares it (prompt type cot).

    Of the text before the first "Question": the first number of the last ``####`` line that has one, else the last number;
    numbers are integers, decimals and fractions and are compared by value (5/8 is 0.625). Where the reference's answer is
    None, or ``group`` is "critical thinking", a text is right that has no ``####`` or says that something is missing. Unlike
    there, an empty text is always wrong. Raises DataError for a reference without an answer.
    """
    gold = _gsm_plus_gold(reference)
    if not text.strip():
        return 0.0
    text = text.rstrip(".").replace(",", "")
    if gold == _NO_ANSWER or group == CRITICAL_THINKING:
        says_so = "####" not in text or _SAYS_SO.search(text.lower()) is not None
        return _percent(says_so and gold == _NO_ANSWER)
    value = _value(_gsm_plus_number(text))
    return _percent(value is not None and value == _value(gold))


def _gsm_plus_gold(reference: str) -> str:
    marked = re.findall(r"####(.*)", reference.strip().rstrip(".").replace(",", ""))
    answer = marked[-1].strip() if marked else ""
    number = _NUMBER.search(answer)
    if answer != _NO_ANSWER and not number:
        raise DataError(f"the reference has no '#### N' or '#### None' to score against: {_tail(reference)}")
    return number[0] if number else _NO_ANSWER


def _gsm_plus_number(text: str) -> str:
    text = text.split("Question")[0]
    marked = re.findall(r"####(.*)", text)
    number = _NUMBER.search(marked[-1]) if marked else None
    return number[0] if number else (_NUMBER.findall(text) or [""])[-1]


def _value(number: str) -> Fraction | None:
    numerator, _, denominator = number.partition("/")
    try:
        return Fraction(numerator) / Fraction(denominator or 1)
    except (ValueError, ZeroDivisionError):  # no number, one of thousands of digits, or something over 0
        return None


# --- the small pair's tasks -----------------------------------------------------------------------------------------


def small_right(text: str, reference: str) -> float:
    """100 if the answer is right, else 0: the number after ``####`` where the reference has one, else every word."""
    return (exact_match if _after_marks(reference) is None else gsm8k_strict)(text, reference)


def until_mistake(text: str, reference: str) -> float:
    """Which part of the reference is in ``text`` before its first mistake, in percent.

    It is counted in numbers, however they are worded, where the reference has ``####``, else in words.
    """
    parts = str.split if _after_marks(reference) is None else _DIGITS.findall
    wanted, found = parts(reference), parts(text)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(wanted, found, strict=False))
    return 100 * sum(1 for _ in same) / max(len(wanted), 1)


_DIGITS = re.compile(r"[0-9]+")


# --- mathematics --------------------------------------------------------------------------------------------------


def math_equal(text: str, reference: str) -> float:
    """100 if math-verify finds an answer in ``text`` (behind its last ``####``, if any) that equals the reference's, else 0.

    The reference's answer is what follows its last ``####``, else what is in its ``\\boxed{}`` or between dollar signs, else
    the whole of it if it is one expression, else its last number. Raises ConfigError without the extra "math", DataError for
    a reference in which there is no answer.
    """
    from switchkd.evaluation.math_answers import checker

    return _percent(checker().equal(text, reference))


def _tail(text: str) -> str:
    return repr(text if len(text) <= 80 else "…" + text[-80:])
