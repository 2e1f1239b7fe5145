"""Token ids as text that people read: a piece a token, speakers in colour, numbers as bars, and nothing that a terminal obeys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.text import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from switchkd.rollouts import Rollout

_CONTEXT = 4  # tokens before a piece that are decoded with it: a tokenizer may write a space only between two words
_LONGEST = 4  # tokens that one character may take; what is still broken then stays broken
BROKEN = "\ufffd"

SPEAKERS = ("", "bold magenta")  # the styles of the student's and the teacher's words
BARS, NO_BAR = "▁▂▃▄▅▆▇█", "·"

# C0 has pictures in Unicode; C1, which some terminals obey too, has none, and neither have the marks that turn the direction of
# what follows, so that a line reads otherwise than it is. Newline and tab stay.
_SHOWN: dict[int, str] = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"}
_SHOWN |= {0x7F: "␡"} | {code: f"\\x{code:02x}" for code in range(0x80, 0xA0)}
_SHOWN |= {code: f"\\u{code:04x}" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}


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


def visible(text: str) -> str:
    """``text`` with control characters as pictures (␛) and marks of direction spelt out, so that a terminal shows them and obeys
    none; newline and tab stay."""
    return text.translate(_SHOWN)


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
