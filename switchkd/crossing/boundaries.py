"""Where a text may change hands: between two characters that no token of either tokenizer can hold together.

At such a place a token ends in both readings, whatever follows: a tokenizer could cut otherwise only with a token that lies across
it, and has none. In "the cat sat" that is before each space; within "cats" it is not, since "ats" or the like is a token. Nothing
is asked of pre-tokenizers, whose cuts may move with the next character ("don" | "'" is one word with the t that follows) and which
some tokenizers do not have.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np

from switchkd.crossing.spelling import Spelling


class Boundaries:
    """The places at which both of two tokenizers have a token end."""

    def __init__(self, *spellings: Spelling):
        self._across: dict[bytes, set[bytes]] = {}
        for spelling in spellings:
            for token in spelling.bytes_of:
                for left, right in _inner(token):
                    self._across.setdefault(left, set()).add(right)
        self._known: dict[tuple[bytes, bytes], bool] = {}

    def between(self, before: bytes, token: bytes) -> bool:
        """Whether a text that ends with ``before``, its last character at least, has a boundary before ``token``.

        There is none within a character, and none before a token without bytes.
        """
        key = last_character(before), first_character(token)
        if key not in self._known:
            self._known[key] = self._between(*key)
        return self._known[key]

    def _between(self, left: bytes, right: bytes) -> bool:
        if not left or not right or not _is_whole(left) or _continues(right[0]):
            return False
        for first in range(len(left)):
            for other in self._across.get(left[first:], ()):
                # Of a character of which a token has the first bytes only, any ending is possible.
                if right.startswith(other) or other.startswith(right):
                    return False
        return True


class Beginnings:
    """Which tokens of one vocabulary begin a word behind a text: those with a boundary before them, and ends."""

    def __init__(self, boundaries: Boundaries, spelling: Spelling, ends: Iterable[int]):
        self.boundaries, self.ends = boundaries, frozenset(ends)
        firsts = [b"" if index in self.ends else first_character(data) for index, data in enumerate(spelling.bytes_of)]
        self.classes = sorted(set(firsts))
        place = {first: at for at, first in enumerate(self.classes)}
        self._class_of = [place[first] for first in firsts]
        self.bytes_of = spelling.bytes_of
        self._behind: dict[bytes, np.ndarray] = {}

    @cached_property
    def class_of(self) -> np.ndarray:
        """For each id its place in a row of ``behind``; the last place is that of ends."""
        found = np.array(self._class_of, dtype=np.int64)
        found[[index for index in self.ends if index < len(found)]] = len(self.classes)
        return found

    def behind(self, before: bytes) -> np.ndarray:
        """For each class of tokens whether they begin a word behind a text that ends with ``before``, bool."""
        end = last_character(before)
        if end not in self._behind:
            self._behind[end] = np.array([*(self.boundaries.between(end, first) for first in self.classes), True])
        return self._behind[end]

    def begins(self, before: bytes, token: int) -> bool:
        """Whether a token begins a word there."""
        return token in self.ends or self.boundaries.between(before, self.bytes_of[token])


def last_character(data: bytes) -> bytes:
    """The last character of ``data``, or what there is of it."""
    for length in range(1, min(4, len(data)) + 1):
        if not _continues(data[-length]):
            return data[-length:]
    return data[-4:]


def first_character(data: bytes) -> bytes:
    """The first character of ``data``, or what there is of it; of bytes that begin within one, these bytes."""
    return data[: _length(data[0])] if data else b""


def _inner(token: bytes) -> Iterable[tuple[bytes, bytes]]:
    """The characters, or what the token has of them, on both sides of each place within it at which one begins."""
    return [
        (last_character(token[:at]), first_character(token[at:]))
        for at in range(1, len(token))
        if not _continues(token[at])
    ]


def _continues(byte: int) -> bool:
    """Whether a byte goes on with a character of UTF-8."""
    return byte & 0xC0 == 0x80


def _length(lead: int) -> int:
    """Bytes of the character that begins with this one; of a byte that begins none, 1."""
    return 1 if lead < 0xC0 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4


def _is_whole(character: bytes) -> bool:
    return not _continues(character[0]) and len(character) == _length(character[0])


def words(spelling_bytes: Sequence[bytes], boundaries: Boundaries) -> int:
    """How many words a text has whose tokens have these bytes: 1 and the boundaries at its token ends."""
    text, found = b"", 0
    for token in spelling_bytes:
        found += not text or boundaries.between(text[-4:], token)
        text = text[-4:] + token
    return found
