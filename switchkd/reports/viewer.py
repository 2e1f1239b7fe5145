"""What the rollout viewer of a report shows, as JSON for its script: texts by token, with what was seen at each.

Numbers are rounded to what a person reads; the run directory holds them whole.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any

from rich.text import Text

from switchkd.base.errors import ModelError
from switchkd.base.plain import Lines, spread
from switchkd.base.terminal import visible
from switchkd.methods.policy import STUDENT, TEACHER
from switchkd.reports.record import RunRecord

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from switchkd.decoding.rollouts import Rollout


# Texts of the training run that are shown, at most, and looks at a prompt over training.
TRAINING_TEXTS, LOOKS = 200, 40
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
        notes.append(f"{len(shown)} of {len(steps)} looks at the prompts are shown, evenly spread.")
    return found | {"notes": notes}


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
        "stop": record["stop_reason"],
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
