"""Tokens as text: a piece for each, and together the text."""

import math
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import byte_level_tokenizer

from switchkd.base.terminal import visible
from switchkd.reports.viewer import BROKEN, bars, pieces

TOKENIZER = byte_level_tokenizer()


@given(st.text())
def test_pieces_are_one_a_token_and_together_the_text(text):
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    found = pieces(TOKENIZER, ids)
    assert len(found) == len(ids) and "".join(found) == TOKENIZER.decode(ids)


def test_a_character_of_several_tokens_stands_with_the_last():
    ids = TOKENIZER.encode("a🙂b", add_special_tokens=False)
    assert len(ids) == 6
    assert pieces(TOKENIZER, ids) == ["a", "", "", "", "🙂", "b"]


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_broken_bytes_are_shown_and_do_not_swallow_what_follows(cut):
    ids = TOKENIZER.encode("🙂", add_special_tokens=False)[:cut] + TOKENIZER.encode("yes", add_special_tokens=False)
    found = pieces(TOKENIZER, ids)
    assert found[-2:] == ["e", "s"] and BROKEN in "".join(found)
    assert "".join(found) == TOKENIZER.decode(ids)


def test_control_characters_have_pictures_but_for_newline_and_tab():
    codes = "".join(map(chr, [*range(0x20), *range(0x7F, 0xA0)]))
    shown = visible(codes)
    assert {c for c in shown if unicodedata.category(c) == "Cc"} == {"\n", "\t"}
    assert shown.startswith("␀␁") and "␛" in shown and "␡\\x80" in shown
    assert visible("é ␛ 好🙂\u00a0") == "é ␛ 好🙂\u00a0"


def test_bars():
    assert bars([0, 0.5, 1, -3, 9, math.inf, math.nan], 0, 1) == "▁▅█▁██·"
    assert bars([7.0], 7.0, 7.0) == "▁" and bars([], 0, 1) == ""
    assert bars([3, 2, 1], 1, 3) == "█▅▁"


def test_bytes_that_never_become_a_character_are_not_held_back_for_ever():
    [first, *_] = TOKENIZER.encode("🙂", add_special_tokens=False)
    found = pieces(TOKENIZER, [first] * 10)
    assert "".join(found) == TOKENIZER.decode([first] * 10)
    assert [bool(piece) for piece in found] == [False, False, False, True] * 2 + [False, True]
