"""Where a text may change hands: against the definition, against what the tokenizers do, and in hand-made cases."""

from functools import cache
from itertools import product

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from two_tokenizers import LINES, bridge_of, side, tokenizer_of

from switchkd.crossing.boundaries import Beginnings, Boundaries, first_character, last_character, words
from switchkd.crossing.bridge import Bridge, Side
from switchkd.crossing.spelling import Spelling
from switchkd.forward.ends import Ends

PAIRS = [
    ("coarse", "fine"),
    ("fine", "sentencepiece"),
    ("gemma", "coarse"),
    ("unigram", "metaspace"),
    ("coarse", "coarse"),
]


class Tokens:
    """As much of a spelling as boundaries look at."""

    def __init__(self, *tokens: bytes):
        self.bytes_of = list(tokens)


def is_cut(left, right, tokens):
    """The definition, written down slowly: between two whole characters, and no token can lie across.

    A token lies across if what it has before the place can end a text that ends with ``left``, and what it has behind can be the
    beginning of one that goes on with ``right``.
    """
    try:
        if len(left.decode()) != 1:
            return False
    except UnicodeDecodeError:
        return False
    if not right or 0x80 <= right[0] < 0xC0:
        return False
    for token in tokens:
        for at in range(1, len(token)):
            before, behind = token[:at], token[at:]
            if not (left.endswith(before) or before.endswith(left)):
                continue
            if behind.startswith(right) or right.startswith(behind):
                return False
    return True


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_a_boundary_is_where_no_token_of_either_can_lie_across(student, teacher):
    bridge = bridge_of(student, teacher)
    tokens = {data for side in bridge.sides for data in side.spelling.bytes_of if len(data) > 1}
    shown = sorted({*"".join(LINES), *"zQ🙂本é…́"})
    both = [each.encode() for each in shown]
    cut = [b"\xe6", b"\xe6\x9d", b"\xf0\x9f\x99", b"\x82", b"\xff", b""]
    found = [bridge.boundaries.between(left, right) for left, right in product(both + cut, both + cut)]
    expected = [is_cut(left, right, tokens) for left, right in product(both + cut, both + cut)]
    assert found == expected
    assert 0.05 < sum(found) / len(found) < 0.95


# --- what tokenizers do ----------------------------------------------------------------------------------------------


def token_ends(spelling, data):
    at, found = 0, {0}
    for index in spelling.encode(data):
        at += len(spelling.bytes_of[index])
        found.add(at)
    return found


PIECES = [
    "the", " the", " cat", "s", " sat", "don", "'", "t", "'t", " ", "  ", "\n", "\n\n", "\t", "return", "def add(x", ", y):",
    "42", "1", "345", "東京", "東", "。", "é", "e\u0301", "naï", "café", "🙂", "👩‍👩‍👧", "▁", "<|end|>", "</s>", "A", "_",
    "…", "\u00a0", "x = ", ";",
]  # fmt: skip
MIXED = st.lists(st.sampled_from(PIECES), min_size=1, max_size=7).map("".join)
CONTINUED = ["", "s", " ", "t", "\n", "'", "0", "é", "\u0301", "東", "🙂", "▁", "cat", " sat on", "。", "_", "…"]


@cache
def spellings(name):
    return Spelling(tokenizer_of(name), "student")


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(text=MIXED)
@example(text="the cat sat 東京。 12345 don't\n\n  x")
def test_at_a_boundary_both_have_a_token_end_whatever_follows(student, teacher, text):
    bridge, data = bridge_of(student, teacher), text.encode()
    places = [at for at in range(1, len(data)) if bridge.boundaries.between(data[:at], data[at:])]
    characters = {len(text[:at].encode()) for at in range(len(text) + 1)}
    assert set(places) <= characters
    # Cut anywhere behind the boundary, also within a character, and gone on with in many ways.
    texts = [data[:end] for end in range(1, len(data) + 1)] + [data + more.encode() for more in CONTINUED]
    for own in bridge.sides:
        for each in texts:
            ends = token_ends(own.spelling, each)
            assert all(at in ends for at in places if at < len(each)), (each, places, ends)


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_there_are_boundaries_between_words(student, teacher):
    """The property above holds where there are none at all."""
    bridge = bridge_of(student, teacher)
    text = LINES[1].encode()
    places = [at for at in range(1, len(text)) if bridge.boundaries.between(text[:at], text[at:])]
    assert len(places) >= text.count(b" ") / 2
    assert words([bytes([byte]) for byte in text], bridge.boundaries) == 1 + len(places)


# --- characters that are cut -----------------------------------------------------------------------------------------


def test_last_and_first_characters():
    assert last_character("a東".encode()) == "東".encode()
    assert last_character("東a".encode()) == b"a"
    assert last_character(b"a\xe6\x9d") == b"\xe6\x9d"
    assert last_character("x🙂".encode()) == "🙂".encode()
    assert last_character(b"") == b""
    assert last_character(b"\x9d\xb1") == b"\x9d\xb1"  # of a character whose first byte is in another token
    assert last_character(b"\x80" * 9) == b"\x80" * 4
    assert first_character("東a".encode()) == "東".encode()
    assert first_character(b"\xe6\x9d") == b"\xe6\x9d"
    assert first_character(b"\x9d\xb1a") == b"\x9d"
    assert first_character(b"") == b""
    assert first_character("🙂x".encode()) == "🙂".encode()


def test_a_token_that_has_part_of_a_character_counts_for_every_character_that_it_may_be_part_of():
    tokens = Tokens(b"a\xe6", b"\xac b", b"\x9d\xb1.", *(bytes([byte]) for byte in range(256)))
    between = Boundaries(tokens).between
    assert not between(b"a", "東".encode())  # e6 9d b1
    assert not between(b"a", b"\xe6")  # a character of which the next token has no more
    assert between(b"a", "é".encode())
    assert not between("東".encode(), b".")
    assert between("京".encode(), b".")  # e4 ba ac
    assert not between("京".encode(), b" ")
    assert not between("€".encode()[:2], b" ")  # no whole character
    assert between(b"b", b"a")


def test_there_is_none_within_a_character_and_none_before_a_token_without_bytes():
    between = Boundaries(Tokens(b"a", b"b")).between
    data = "東".encode()
    assert not any(between(data[:at], data[at:]) for at in range(1, len(data)))
    assert not between(b"a", b"")
    assert not between(b"", b"a")
    assert between(b"a", b"b")


# --- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_what_begins_a_word_is_said_of_all_tokens_as_of_each(student, teacher):
    bridge = bridge_of(student, teacher)
    for own, beginnings in zip(bridge.sides, bridge.beginnings, strict=True):
        for before in (b"the", b"don'", b" ", "京".encode(), b"\xe6\x9d", b"4"):
            behind = beginnings.behind(before)[beginnings.class_of]
            expected = [
                index in own.ends.ids or (bool(data) and bridge.boundaries.between(before, data))
                for index, data in enumerate(own.spelling.bytes_of)
            ]
            assert behind.tolist() == expected
            assert [beginnings.begins(before, index) for index in range(len(expected))] == expected


def test_an_end_that_has_bytes_begins_a_word_and_a_token_without_any_does_not():
    tokens = Tokens(b"a", b"b", b"ab", b"")
    beginnings = Beginnings(Boundaries(tokens), tokens, [2])
    assert beginnings.behind(b"a")[beginnings.class_of].tolist() == [True, False, True, False]


def test_special_tokens_that_are_no_ends_begin_no_word():
    tokenizer = tokenizer_of("sentencepiece")
    student = Side(tokenizer, len(tokenizer), Ends((tokenizer.eos_token_id,)))
    beginnings = Bridge(student, side("coarse", "teacher")).beginnings[0]
    assert not beginnings.begins(b"the", tokenizer.bos_token_id)
    assert beginnings.begins(b"the", tokenizer.eos_token_id)
