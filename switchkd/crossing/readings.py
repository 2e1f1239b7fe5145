"""Which tokens of two readings of one text match, by the bytes at which they begin and end."""

from collections.abc import Sequence

import numpy as np

from switchkd.base.errors import DataError


def spans(tokens: Sequence[bytes]) -> np.ndarray:
    """Where each token begins and ends in the text that they spell, ``[n, 2]`` bytes."""
    ends = np.cumsum([len(token) for token in tokens], dtype=np.int64)
    return np.stack([np.concatenate([[0], ends[:-1]])[: len(tokens)], ends], 1)


def one_to_one(one: Sequence[bytes], other: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of two readings that have the same bytes at the same place: their places in each, ascending.

    Tokens without bytes match nothing. One of the two may read the beginning of the text alone.
    Raises DataError where they spell two texts.
    """
    text = _check(one, other)
    mine, theirs = spans(one), spans(other)
    length = len(text) + 1
    filled = [np.flatnonzero(each[:, 1] > each[:, 0]) for each in (mine, theirs)]
    keys = [each[places, 0] * length + each[places, 1] for each, places in zip((mine, theirs), filled, strict=True)]
    _, left, right = np.intersect1d(keys[0], keys[1], assume_unique=True, return_indices=True)
    return filled[0][left], filled[1][right]


def groups(one: Sequence[bytes], other: Sequence[bytes]) -> list[tuple[range, range]]:
    """The shortest stretches of a text at whose ends both readings have a token end, as places of tokens in each, in order.

    None ends within a character. Tokens without bytes: of ``one`` each is a stretch unless it lies within one, of ``other`` they
    stand with what is before them, and the last of both readings are one stretch. Where ``other`` reads the beginning of the text
    alone, each of the tokens behind that is a stretch. Raises DataError where the two spell two texts.
    """
    text = _check(one, other)
    if one and other and not one[-1] and not other[-1]:
        last = range(len(one) - 1, len(one)), range(len(other) - 1, len(other))
        return [*groups(one[:-1], other[:-1]), last]
    ends = spans(other)[:, 1].tolist()
    found: list[tuple[range, range]] = []
    first = (0, 0)  # of the stretch that is open
    place = 0  # how many tokens of the other end no later
    for count, end in enumerate(spans(one)[:, 1].tolist(), start=1):
        while place < len(ends) and ends[place] <= end:
            place += 1
        ended = place == len(ends) or (ends[place - 1] if place else 0) == end
        if ended and not _is_within(text, end):
            found.append((range(first[0], count), range(first[1], place)))
            first = count, place
    return found


def _is_within(text: bytes, place: int) -> bool:
    """Whether a place lies within a character of UTF-8."""
    return place < len(text) and text[place] & 0xC0 == 0x80


def _check(one: Sequence[bytes], other: Sequence[bytes]) -> bytes:
    """The text of which two readings have all, or the beginning."""
    short, text = sorted((b"".join(one), b"".join(other)), key=len)
    if not text.startswith(short):
        raise DataError(f"two readings spell two texts: {_shown(one)} and {_shown(other)}")
    return text


def _shown(tokens: Sequence[bytes]) -> str:
    text = b"".join(tokens).decode(errors="replace")
    return repr(text if len(text) <= 60 else f"{text[:30]} … {text[-30:]}")
