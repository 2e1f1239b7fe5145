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
    texts = sorted((b"".join(one), b"".join(other)), key=len)
    if not texts[1].startswith(texts[0]):
        raise DataError(f"two readings spell two texts: {_shown(one)} and {_shown(other)}")
    mine, theirs = spans(one), spans(other)
    length = len(texts[1]) + 1
    filled = [np.flatnonzero(each[:, 1] > each[:, 0]) for each in (mine, theirs)]
    keys = [each[places, 0] * length + each[places, 1] for each, places in zip((mine, theirs), filled, strict=True)]
    _, left, right = np.intersect1d(keys[0], keys[1], assume_unique=True, return_indices=True)
    return filled[0][left], filled[1][right]


def _shown(tokens: Sequence[bytes]) -> str:
    text = b"".join(tokens).decode(errors="replace")
    return repr(text if len(text) <= 60 else f"{text[:30]} … {text[-30:]}")
