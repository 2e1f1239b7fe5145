"""What a report shows of texts, as JSON for its script: held-out answers side by side, and texts by token with what was seen there.

Numbers are rounded to what a person reads; the run directory holds them whole.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.text import Text

from switchkd.base.errors import ModelError
from switchkd.base.plain import Lines, spread
from switchkd.base.terminal import number, visible
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
    notes: list[str] = []
    try:
        decode = _decoder(run.tokenizer())
    except ModelError as error:
        notes.append(f"Token ids stand in place of words, as the tokenizer could not be opened: {error}")
        decode = _as_numbers
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
        "prompts": _prompts(samples, decode),
        "texts": [_text(record, decode) for record in run.rollouts(TRAINING_TEXTS)],
    }
    while len(json.dumps(found)) > most_bytes and max(len(shown), len(found["texts"])) > 1:
        shown = _half(shown)
        found = _thinned(found, set(shown))
    if len(shown) < len(steps):
        notes.append(
            f"The prompts were answered at {len(steps)} points of training; {len(shown)} of these are shown, evenly spread."
        )
    return found | {"notes": notes}


# Who writes the next token, in words.
RULES = {
    "student_only": "The student writes every token.",
    "teacher_only": "The teacher writes every token.",
    "switch": "The teacher writes where the two models disagree more than a threshold that depends on the place in the text; the "
    "student writes everywhere else.",
    "adaswitch": "The student writes until the two models suddenly disagree far more than before; then the teacher goes on.",
    "mix_in": "Each token is drawn from a mixture of the two models.",
    "skd": "The student writes; a token that is not among the teacher's most likely ones is written by the teacher instead.",
    "ssd": "The teacher writes where the two models disagree more than a fixed threshold; the student writes everywhere else.",
    "hysteresis": "The teacher takes over where the two models disagree much, and hands back where they agree again.",
    "ca_opd": "The student writes; a token that the teacher finds too unlikely is written by the teacher instead.",
    "trb": "Each token is drawn from a blend of the two models, as close to the teacher as a limit allows.",
    "relay": "The student writes; where the teacher would stop to think again, it writes a few paragraphs.",
}


def rule_words(settings: Mapping[str, Any]) -> str:
    """Who writes the next token in a run of these settings, in a sentence; "" for a rule that does not ship with the package."""
    return RULES.get(settings["policy"]["name"], "")


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


def _decoder(tokenizer: PreTrainedTokenizerBase) -> Pieces:
    return lambda ids: pieces(tokenizer, ids)


def _as_numbers(ids: Sequence[int]) -> list[str]:
    return [f"⟨{token}⟩" for token in ids]


def _vocabulary(samples: Lines, decode: Pieces) -> dict[int, str]:
    """The text of every token that is among the most probable somewhere."""
    ids = {token for sample in samples for model in sample["top"] for best in model for token, _ in best}
    return {token: "".join(decode([token])) for token in sorted(ids)}


def _prompts(samples: Lines, decode: Pieces) -> list[dict[str, Any]]:
    """The samples by prompt, in the order of their steps."""
    by_prompt: dict[int, Lines] = {}
    for sample in samples:
        by_prompt.setdefault(sample["sample_id"], []).append(sample)
    return [
        {
            "prompt": "".join(decode(looks[0]["prompt_ids"])),
            "reference": looks[0]["reference"],
            "looks": [_look(look, decode) for look in sorted(looks, key=lambda look: look["step"])],
        }
        for looks in by_prompt.values()
    ]


def _look(sample: dict[str, Any], decode: Pieces) -> dict[str, Any]:
    """A completion with what both models say of every token."""
    return {
        **_completion(sample, decode),
        "scores": dict(zip(sample["scores"], _rounded(list(sample["scores"].values())), strict=True)),
        "jsd": _rounded(sample["jsd"]),
        "logProbs": [_rounded(sample["log_probs"][who]) for who in (STUDENT, TEACHER)],
        "top": [[[[token, _log_prob(logp)] for token, logp in best] for best in model] for model in sample["top"]],
    }


def _text(record: dict[str, Any], decode: Pieces) -> dict[str, Any]:
    """A text of training: a prompt with one look."""
    look = _completion(record, decode) | {"scores": {}}
    return {"prompt": "".join(decode(record["prompt_ids"])), "reference": None, "looks": [look]}


def _completion(record: dict[str, Any], decode: Pieces) -> dict[str, Any]:
    return {
        "step": record["step"],
        "end": ENDS.get(record["stop_reason"], record["stop_reason"]),
        "tokens": decode(record["completion_ids"]),
        "speakers": "".join(map(str, record["speakers"])),
        "divergences": _rounded(record["divergences"]),
        "thresholds": _rounded(record["thresholds"]),
    }


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
