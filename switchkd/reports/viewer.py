"""What a report shows of texts, as JSON for its script: held-out answers side by side, and texts by token with what was seen there.

Numbers are rounded to what a person reads; the run directory holds them whole.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.text import Text

from switchkd.base.errors import DataError, ModelError
from switchkd.base.plain import Lines, spread
from switchkd.base.terminal import number, visible
from switchkd.crossing.bridge import Side
from switchkd.crossing.readings import groups
from switchkd.evaluation.results import Completion, Question
from switchkd.evaluation.statistics import by_example
from switchkd.methods.policy import STUDENT, TEACHER
from switchkd.reports.record import RunRecord

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from switchkd.decoding.rollouts import Rollout
    from switchkd.evaluation.results import Evaluation


# Texts of the training run that are shown, at most, and looks at a prompt over training.
TRAINING_TEXTS, LOOKS = 200, 40
# How a text ended, in words.
ENDS = {"eos": "ended by itself", "length": "cut at the limit", "policy": "ended by the rule"}
MOST_TOKENS = 100_000  # of looks that are read: some times as many as a page holds

Pieces = Callable[[Sequence[int]], list[str]]


def payload(run: RunRecord, label: str, most_bytes: int) -> dict[str, Any]:
    """A run for the viewer, in at most about ``most_bytes`` of JSON: fewer looks and texts are then shown, and a note says so.

    ``prompts``: the watched prompts, each with its ``looks`` over training; ``texts``: those of training itself.
    """
    reading = _Reading(run)
    notes, decode = reading.notes, reading.decode
    tokens = Counter[int]()
    for step, count in run.looks:
        tokens[step] += count
    steps = sorted(tokens)
    shown = [steps[place] for place in spread(len(steps), LOOKS)]
    while len(shown) > 1 and sum(tokens[step] for step in shown) > MOST_TOKENS:
        shown = _half(shown)
    samples, left_out = _samples(run, set(shown))
    if left_out:
        notes.append(f"{left_out} prompts are left out: together they are too long to be shown.")
    found = {
        "label": label,
        "unit": run.metrics.unit,
        "vocabulary": _vocabulary(samples, decode),
        "prompts": _prompts(samples, reading),
        "texts": [_text(record, reading) for record in run.rollouts(TRAINING_TEXTS)],
    }
    while len(json.dumps(found)) > most_bytes and max(len(shown), len(found["texts"])) > 1:
        shown = _half(shown)
        found = _thinned(found, set(shown))
    if len(shown) < len(steps):
        notes.append(
            f"The prompts were answered at {len(steps)} points of training; {len(shown)} of these are shown, evenly spread."
        )
    return found | {"notes": notes}


# --- held-out answers -----------------------------------------------------------------------------------------------


def answers(
    results: Mapping[str, Evaluation], label: str, models: Sequence[str], by: str, most_bytes: int
) -> dict[str, Any]:
    """The held-out answers of those of ``models`` that were scored, in at most about ``most_bytes`` of JSON, else evenly spread.

    ``items`` are the examples: number, prompt and references ("" and [] where an old file does not know them), and by model its
    answer with the scores of that very text. ``first`` is the one to begin with: its score ``by`` moved most like the mean.
    """
    found = {model: results[model] for model in models if model in results and results[model].completions}
    empty = {"label": label, "items": [], "first": 0, "notes": [], "models": list(found)}
    if not found:
        return empty
    some = next(iter(found.values()))
    ids: list[int] = list(some.made_with["ids"])
    asked = some.questions or [Question("", ())] * len(ids)
    notes = (
        [] if some.questions else ["What was asked is not known: an older version of switchkd made this evaluation."]
    )
    seed = some.completions[0].seed
    if seed is not None and len({text.seed for text in some.completions}) > 1:
        notes.append(f"Several answers were sampled to each question; these are the ones of seed {seed}.")
    texts = {m: {text.example: text for text in r.completions if text.seed == seed} for m, r in found.items()}
    scores = {m: {n: by_example(n, v)[0] for n, v in r.scores.items() if "@" not in n} for m, r in found.items()}
    items: list[dict[str, Any]] = [
        {
            "number": place + 1,
            "prompt": visible(asked[place].prompt),
            "references": [visible(reference) for reference in asked[place].references],
            "models": {m: _answer(texts[m][i], {n: v[place] for n, v in scores[m].items()}) for m in found},
        }
        for place, i in enumerate(ids)
        if all(i in texts[m] for m in found)
    ]
    first, size = _typical([each[by] for each in scores.values() if by in each]), len(ids)
    if by:
        notes.insert(0, f"The first one shown is typical: its {by} changed as the mean does.")
    kept = items
    while len(kept) > 1 and len(json.dumps(kept)) > most_bytes:
        kept = _half(kept)
    if len(kept) < len(items):
        notes.append(f"{len(kept)} of {len(items)} answers are shown, evenly spread, to keep the page small.")
    nearest = min(range(len(kept)), key=lambda place: abs(kept[place]["number"] - 1 - first), default=0)
    return empty | {"items": kept, "first": nearest, "notes": notes, "all": size}


def _answer(text: Completion, scores: Mapping[str, float]) -> dict[str, Any]:
    kept = {name: value for name, value in scores.items() if math.isfinite(value)}
    return {
        "text": visible(text.text),
        "length": f"{text.tokens} token{'s' * (text.tokens != 1)}",
        "end": ENDS.get(text.stop_reason, text.stop_reason),
        "scores": {name: number(value) for name, value in kept.items()},
    }


def _typical(scores: Sequence[NDArray[np.float64]]) -> int:
    """The example whose score moved from the first model to the second most like the mean of all."""
    if len(scores) < 2:
        return 0
    moved = scores[1] - scores[0]
    return int(np.nanargmin(np.abs(moved - np.nanmean(moved)))) if np.isfinite(moved).any() else 0


# --- texts by token -------------------------------------------------------------------------------------------------


def _thinned(found: dict[str, Any], steps: set[int]) -> dict[str, Any]:
    """What is left with the looks at these steps and half of the texts."""
    prompts = [p | {"looks": [look for look in p["looks"] if look["step"] in steps]} for p in found["prompts"]]
    tops = (look["top"] for prompt in prompts for look in prompt["looks"])
    ids = {token for top in tops for model in top for best in model for token, _ in best}
    texts = found["texts"]
    return found | {
        "vocabulary": {token: text for token, text in found["vocabulary"].items() if token in ids},
        "prompts": prompts,
        "texts": _half(texts),
    }


def _half(items: Sequence[Any]) -> list[Any]:
    """Half of them, evenly spread, at least one of any."""
    return [items[place] for place in spread(len(items), max(len(items) // 2, 1))]


def _samples(run: RunRecord, steps: Collection[int]) -> tuple[Lines, int]:
    """The samples of these steps, as many as may be held, and how many are left out."""
    wanted = [place for place, (step, _) in enumerate(run.looks) if step in steps]
    sizes = accumulate(run.looks[place][1] for place in wanted)
    kept = {place for place, size in zip(wanted, sizes, strict=True) if size <= MOST_TOKENS}
    return run.samples_at(kept), len(wanted) - len(kept)


class _Reading:
    """How the token ids of a run become text, and in ``notes`` what could not be had for that."""

    def __init__(self, run: RunRecord):
        self.notes: list[str] = []
        self._run, self._unread = run, set[str]()
        try:
            tokenizer = run.tokenizer()
            self.decode: Pieces = lambda ids: pieces(tokenizer, ids)
        except ModelError as error:
            self.notes.append(f"Token ids stand in place of words, as the tokenizer could not be opened: {error}")
            self.decode = _as_numbers

    def words(self, record: Mapping[str, Any]) -> list[Word] | None:
        """The words of a text that a teacher with another tokenizer read; None of any other, and where its tokens are not known."""
        teacher = record["teacher"]
        if "teacher_completion_ids" not in record or self.decode is _as_numbers or teacher in self._unread:
            return None
        try:
            return words(self._run.sides(teacher), record["completion_ids"], record["teacher_completion_ids"])
        except (DataError, ModelError) as error:
            self._unread.add(teacher)
            whose = f"the teacher {teacher!r}" if teacher else "the teacher"
            self.notes.append(f"Texts stand by the student's tokens alone, as those of {whose} are not known: {error}")
            return None


def _as_numbers(ids: Sequence[int]) -> list[str]:
    return [f"⟨{token}⟩" for token in ids]


def _vocabulary(samples: Lines, decode: Pieces) -> dict[int, str]:
    """The text of every token that is among the most probable somewhere."""
    ids = {token for sample in samples for model in sample["top"] for best in model for token, _ in best}
    return {token: "".join(decode([token])) for token in sorted(ids)}


def _prompts(samples: Lines, reading: _Reading) -> list[dict[str, Any]]:
    """The samples by prompt, in the order of their steps."""
    by_prompt: dict[int, Lines] = {}
    for sample in samples:
        by_prompt.setdefault(sample["sample_id"], []).append(sample)
    return [
        {
            "prompt": "".join(reading.decode(looks[0]["prompt_ids"])),
            "reference": looks[0]["reference"],
            "looks": [_look(look, reading) for look in sorted(looks, key=lambda look: look["step"])],
        }
        for looks in by_prompt.values()
    ]


def _look(sample: dict[str, Any], reading: _Reading) -> dict[str, Any]:
    """A completion with what both models say of every token; of a word, what they say of it whole, and where it begins."""
    found, places = _completion(sample, reading)
    firsts = [place.start for place in places]
    return {
        **found,
        "scores": dict(zip(sample["scores"], _rounded(list(sample["scores"].values())), strict=True)),
        "jsd": _rounded([sample["jsd"][t] for t in firsts]),
        "logProbs": [_rounded([_sum(sample["log_probs"][who], own) for own in places]) for who in (STUDENT, TEACHER)],
        "top": [[[[token, _log_prob(logp)] for token, logp in model[t]] for t in firsts] for model in sample["top"]],
    }


def _sum(log_probs: Sequence[float | None], places: range) -> float | None:
    """The log-probability of some tokens together; None if one of them is not known."""
    own = [log_probs[t] for t in places]
    return None if None in own else sum(value for value in own if value is not None)


def _text(record: dict[str, Any], reading: _Reading) -> dict[str, Any]:
    """A text of training: a prompt with one look."""
    look = _completion(record, reading)[0] | {"scores": {}}
    return {"prompt": "".join(reading.decode(record["prompt_ids"])), "reference": None, "looks": [look]}


def _completion(record: dict[str, Any], reading: _Reading) -> tuple[dict[str, Any], list[range]]:
    """A completion by token, or by word with the tokens of both models; and which of the student's tokens each stands for."""
    ids, found = record["completion_ids"], reading.words(record)
    places = [range(t, t + 1) for t in range(len(ids))] if found is None else [word.places for word in found]
    firsts = [place.start for place in places]
    shown = {
        "step": record["step"],
        "end": ENDS.get(record["stop_reason"], record["stop_reason"]),
        "tokens": reading.decode(ids) if found is None else [word.text for word in found],
        "speakers": "".join(str(record["speakers"][t]) for t in firsts),
        "divergences": _rounded([record["divergences"][t] for t in firsts]),
        "thresholds": _rounded([record["thresholds"][t] for t in firsts]),
    }
    return shown if found is None else shown | {"readings": [word.tokens for word in found]}, places


def _rounded(values: Sequence[float | None]) -> list[float | None]:
    """Four significant digits; None where there is no finite number."""
    return [None if v is None or not math.isfinite(v) else float(f"{v:.4g}") for v in values]


def _log_prob(value: float) -> float:
    """A number also where a probability is 0."""
    return round(min(max(-999.0, value), 0.0), 3)


# --- token ids as text that people read ---------------------------------------------------------------------------

_CONTEXT = 4  # tokens before a piece that are decoded with it: a tokenizer may write a space only between two words
_LONGEST = 4  # tokens that one character may take; what is still broken then stays broken
BROKEN = "\ufffd"

SPEAKERS = ("", "bold magenta")  # the styles of the student's and the teacher's words
BARS, NO_BAR = "▁▂▃▄▅▆▇█", "·"


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token where it stands, special tokens spelt out; together they are the text of ``ids``.

    A character whose bytes lie in several tokens stands with the last of them, and the others are "".
    """
    found: list[str] = []
    done = 0  # tokens whose text has been found
    for end in range(1, len(ids) + 1):
        start = max(done - _CONTEXT, 0)
        before, now = tokenizer.decode(ids[start:done]), tokenizer.decode(ids[start:end])
        if now.endswith(BROKEN) and end < len(ids) and end - done < _LONGEST:
            found.append("")
        else:
            found.append(now[len(before) :])
            done = end
    return found


# --- words of two tokenizers --------------------------------------------------------------------------------------

Sides = tuple[Side, Side]  # how student and teacher spell text


@dataclass(frozen=True)
class Word:
    """A stretch of text at whose ends both readings have a token end: one model wrote it.

    ``places`` are those of the student's tokens of it; ``tokens``, by STUDENT and TEACHER, are the tokens of it as text, in which
    a part of a character is its bytes.
    """

    text: str
    places: range
    tokens: tuple[list[str], list[str]]

    @property
    def told(self) -> str:
        """The tokens of both models in a line."""
        student, teacher = (" ".join(json.dumps(token, ensure_ascii=False) for token in own) for own in self.tokens)
        return f"student: {student} · teacher: {teacher}"


def words(sides: Sides, student_ids: Sequence[int], teacher_ids: Sequence[int]) -> list[Word]:
    """The words of a completion in the student's and in the teacher's tokens; special tokens are spelt out.

    Raises DataError where the two spell two texts.
    """
    spelt = [side.bytes_of(ids) for side, ids in zip(sides, (student_ids, teacher_ids), strict=True)]
    names = [
        [data or _name(side, token).encode() for data, token in zip(own, ids, strict=True)]
        for side, own, ids in zip(sides, spelt, (student_ids, teacher_ids), strict=True)
    ]
    found = []
    for places in groups(*spelt):
        own, others = (name[place.start : place.stop] for name, place in zip(names, places, strict=True))
        found.append(Word(b"".join(own).decode(errors="replace"), places[STUDENT], (_shown(own), _shown(others))))
    return found


def _shown(tokens: Sequence[bytes]) -> list[str]:
    return [
        _LONE.sub(lambda byte: f"<0x{ord(byte[0]) - 0xDC00:02X}>", data.decode(errors="surrogateescape"))
        for data in tokens
    ]


_LONE = re.compile("[\udc80-\udcff]")  # bytes that are no character, as surrogateescape has them


def _name(side: Side, token: int) -> str:
    return side.tokenizer.convert_ids_to_tokens(token) or f"⟨{token}⟩"


def drawn(rollout: Rollout, tokenizer: PreTrainedTokenizerBase, sides: Sides | None) -> list[Word]:
    """What a text is drawn in: its words where its teacher has another tokenizer and both sides are given, else its tokens."""
    if rollout.teacher_completion_ids is None or sides is None:
        shown = enumerate(pieces(tokenizer, rollout.completion_ids))
        return [Word(piece, range(t, t + 1), ([], [])) for t, piece in shown]
    return words(sides, rollout.completion_ids, rollout.teacher_completion_ids)


def spoken(rollout: Rollout, tokenizer: PreTrainedTokenizerBase, brackets: bool = False) -> Text:
    """The completion with the teacher's words in colour, and in ⟦brackets⟧ for where there is none."""
    text = Text()
    words = zip(rollout.speakers, pieces(tokenizer, rollout.completion_ids), strict=True)
    for speaker, run in groupby(words, key=lambda word: word[0]):
        said = visible("".join(piece for _, piece in run))
        text.append(f"⟦{said}⟧" if speaker and brackets else said, style=SPEAKERS[speaker])
    return text


def bars(values: Sequence[float], low: float, high: float) -> str:
    """A bar of one character for each value, lowest at ``low`` and below, highest at ``high`` and above; a dot for NaN."""

    def bar(value: float) -> str:
        if math.isnan(value):
            return NO_BAR
        share = min(max((value - low) / ((high - low) or 1.0), 0.0), 1.0)
        return BARS[round(share * (len(BARS) - 1))]

    return "".join(map(bar, values))
