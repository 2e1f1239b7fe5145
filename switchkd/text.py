"""Token ids as text that people read, one piece a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTEXT = 4  # tokens before a piece that are decoded with it: a tokenizer may write a space only between two words
_LONGEST = 4  # tokens that one character may take; what is still broken then stays broken
BROKEN = "\ufffd"


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
