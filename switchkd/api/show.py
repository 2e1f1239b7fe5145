"""How texts and scores look in a notebook: HTML in which the colour of a token says who wrote it.

What a model wrote is escaped, so that it is shown and never run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from types import MappingProxyType
from typing import TYPE_CHECKING, overload

from switchkd.base.terminal import number
from switchkd.methods.policy import TEACHER
from switchkd.reports.record import sides_of
from switchkd.reports.viewer import Sides, Word, drawn, pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from switchkd.decoding.rollouts import Rollout

# Readable on white and on black, also without colour: what the teacher wrote is underlined too.
_TEACHER = "background:rgba(192,38,211,.25);border-bottom:2px solid #c026d3"
_LEGEND = f'<p><small>Plain: written by the student. <span style="{_TEACHER}">Marked</span>: written by the teacher.</small></p>'


@dataclass(frozen=True)
class Shown(Sequence["Rollout"]):
    """Texts that show themselves in a notebook, with the tokenizer that they are read with."""

    rollouts: tuple[Rollout, ...]
    tokenizer: PreTrainedTokenizerBase
    sides: Mapping[str, Sides] = field(default_factory=dict)  # by teacher, of those with another tokenizer

    def __len__(self) -> int:
        return len(self.rollouts)

    @overload
    def __getitem__(self, place: int) -> Rollout: ...
    @overload
    def __getitem__(self, place: slice) -> Shown: ...
    def __getitem__(self, place: int | slice) -> Rollout | Shown:
        return replace(self, rollouts=self.rollouts[place]) if isinstance(place, slice) else self.rollouts[place]

    def __repr__(self) -> str:
        return f"<{len(self)} texts; in a notebook they show who wrote each token>"

    def _repr_html_(self) -> str:
        return texts_html(self.rollouts, self.tokenizer, self.sides)


def show(
    rollouts: Rollout | Iterable[Rollout],
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> Shown:
    """One decoded text or several, as a notebook shows them: the teacher's tokens marked, the divergence at each when one points
    at it.

    ``tokenizer`` is the student's. With a ``teacher_tokenizer``, texts that such a teacher had a part in are shown by words, with
    the tokens of both.
    """
    from switchkd.decoding.rollouts import Rollout

    texts = (rollouts,) if isinstance(rollouts, Rollout) else tuple(rollouts)
    if teacher_tokenizer is None:
        return Shown(texts, tokenizer)
    sides = sides_of(tokenizer, teacher_tokenizer)
    return Shown(texts, tokenizer, {rollout.teacher: sides for rollout in texts})


def texts_html(
    rollouts: Iterable[Rollout], tokenizer: PreTrainedTokenizerBase, sides: Mapping[str, Sides] = MappingProxyType({})
) -> str:
    """Prompts and completions, the teacher's tokens marked."""
    return _LEGEND + "".join(_text_html(rollout, tokenizer, sides.get(rollout.teacher)) for rollout in rollouts)


def _text_html(rollout: Rollout, tokenizer: PreTrainedTokenizerBase, sides: Sides | None) -> str:
    prompt = escape("".join(pieces(tokenizer, rollout.prompt_ids)))
    said = "".join(_word_html(rollout, word) for word in drawn(rollout, tokenizer, sides))
    return (
        f'<details><summary><small>prompt</small></summary><pre style="white-space:pre-wrap">{prompt}</pre></details>'
        f'<pre style="white-space:pre-wrap">{said}</pre>'
    )


def _word_html(rollout: Rollout, word: Word) -> str:
    """A token; where there are two tokenizers a word, with its tokens."""
    t = word.places.start
    seen = {"divergence": rollout.divergences[t], "threshold": rollout.thresholds[t]}
    title = ", ".join(f"{name} {number(value)}" for name, value in seen.items() if math.isfinite(value))
    if any(word.tokens):
        title = " · ".join(part for part in (word.told, title) if part)
    style = f' style="{_TEACHER}"' if rollout.speakers[t] == TEACHER else ""
    return f'<span title="{escape(title)}"{style}>{escape(word.text)}</span>'


def scores_html(scores: Mapping[str, Mapping[str, float]]) -> str:
    """A table of scores, a row for each score, a column for each model."""
    names = dict.fromkeys(name for own in scores.values() for name in own)
    head = "".join(f"<th>{escape(model)}</th>" for model in scores)
    rows = "".join(
        f"<tr><td>{escape(name)}</td>{''.join(f'<td>{_cell(own.get(name))}</td>' for own in scores.values())}</tr>"
        for name in names
    )
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _cell(value: float | None) -> str:
    return "" if value is None else number(value)
