"""Special tokens that a text spells out are text: a user who types ``<|im_end|>`` ends no turn.

Before a template writes a row, each such mark is replaced by a private character, which no tokenizer sees: where one stands in
what the template wrote, the mark is encoded as ordinary text, and the template's own marks around it as tokens.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from switchkd.errors import DataError
from switchkd.plain import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FIRST, _LAST = 0xF0000, 0xFFFFD  # private characters of Unicode's plane 15
_PRIVATE = re.compile(f"[{chr(_FIRST)}-{chr(_LAST)}]")


class Marks:
    """The tokens of a tokenizer that texts can spell out, each with the private character that stands for it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = {str(token): index for index, token in tokenizer.added_tokens_decoder.items() if str(token)}
        self._ids = added
        self._hidden = {mark: chr(_FIRST + place) for place, mark in enumerate(added)}
        self._shown = {character: mark for mark, character in self._hidden.items()}
        special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special and str(token)]
        self._special = one_of(special)

    def hide(self, value: Any, marks: re.Pattern[str]) -> Any:
        """A text, or all texts inside a JSON value, with the marks in them hidden. Raises DataError for private characters."""
        if isinstance(value, dict):
            return {name: self.hide(one, marks) for name, one in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self.hide(one, marks) for one in value)
        if not isinstance(value, str):
            return value
        if found := _PRIVATE.search(value):
            raise DataError(
                f"it holds the private character {shown(found[0])}, which has no meaning in text; take it out"
            )
        return marks.sub(lambda found: self._hidden[found[0]], value)

    def spelled(self, text: str) -> str:
        """``text`` with the hidden marks as they were."""
        return _PRIVATE.sub(lambda found: self._shown.get(found[0], found[0]), text)

    def hides(self, text: str) -> bool:
        """Whether a mark is hidden in ``text``."""
        return bool(_PRIVATE.search(text))

    def encode(self, text: str, **settings: bool) -> list[int]:
        """The ids of a text with hidden marks, which are encoded as ordinary text.

        Raises DataError if the tokenizer cannot do that: it has them as tokens that are always found, or what stands between two
        tokens has other ids when it is encoded alone.
        """
        harmless = _PRIVATE.sub("x", text)
        ids = self._apart(text, **settings)
        hidden = {self._shown[character] for character in _PRIVATE.findall(text)}
        stuck = [mark for mark in hidden if ids.count(self._ids[mark]) != text.count(mark)]
        if stuck or self._apart(harmless, **settings) != self._tokenizer(harmless, **settings)["input_ids"]:
            marks = ", ".join(sorted(stuck or hidden))
            raise DataError(f"it spells out {marks}, which this tokenizer can only read as tokens; take that out")
        return ids

    def _apart(self, text: str, add_special_tokens: bool) -> list[int]:
        """What stands between the text's own special tokens, piece by piece."""
        ids: list[int] = []
        place = 0
        for found in [*self._special.finditer(text), None]:
            piece = self.spelled(text[place : found.start() if found else len(text)])
            if piece or not ids:
                first = add_special_tokens and not ids
                ids += self._tokenizer(piece, add_special_tokens=first, split_special_tokens=True)["input_ids"]
            if found:
                ids.append(self._ids[found[0]])
                place = found.end()
        return ids


def one_of(marks: Collection[str]) -> re.Pattern[str]:
    """A pattern that finds any of ``marks``, the longest first; without any it finds nothing."""
    return re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True))) or r"(?!)")
