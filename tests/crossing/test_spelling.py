"""Bytes of every token, and ids of any bytes, for all kinds of tokenizers; and what is refused."""

import json
from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from two_tokenizers import LINES, TOKENIZERS, byte_level, sentencepiece, tokenizer_of

from switchkd.base.errors import DataError, VocabularyError
from switchkd.crossing import spelling
from switchkd.crossing.bridge import Bridge, Side
from switchkd.crossing.spelling import Spelling
from switchkd.forward.ends import Ends


@cache
def spelling_of(name: str) -> Spelling:
    return Spelling(tokenizer_of(name), "student")


def rebuilt(tokenizer, change):
    """The same tokenizer with other settings in its file."""
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    change(settings)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(settings)), eos_token=tokenizer.eos_token
    )


def with_normalizer(tokenizer, *normalizer):
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    own = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = normalizers.Sequence([*normalizer, *own])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=tokenizer.eos_token)


# --- the bytes of a token --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_bytes_of_a_token_are_what_it_adds_to_a_text(name):
    """Asked of the tokenizer's own decoder, behind a token that keeps a text's first space from being dropped."""
    tokenizer, own = tokenizer_of(name), spelling_of(name)
    before = own.encode(b"x")
    known = 0
    for index, data in enumerate(own.bytes_of):
        shown = tokenizer.decode([*before, index], clean_up_tokenization_spaces=False)
        if index in tokenizer.all_special_ids:
            assert data == b""
        elif "�" not in shown:
            assert f"x{data.decode()}" == shown, index
            known += 1
    assert known > len(own.bytes_of) / 3


def test_special_tokens_have_no_bytes_and_other_added_ones_those_of_their_text():
    tokenizer = byte_level(320)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|mark|>"]})
    tokenizer.add_tokens([AddedToken("<think> é")])
    own, vocab = Spelling(tokenizer, "student"), tokenizer.get_vocab()
    assert own.bytes_of[vocab["<|mark|>"]] == own.bytes_of[tokenizer.eos_token_id] == b""
    assert own.bytes_of[vocab["<think> é"]] == "<think> é".encode()
    assert own.encode("a<think> é".encode())[-1] == vocab["<think> é"]


def test_ids_without_a_token_have_no_bytes():
    holes = []

    def leave_a_hole(settings):
        vocab, merges = settings["model"]["vocab"], settings["model"]["merges"]
        parts = {part for pair in merges for part in pair}
        made = next(pair for pair in merges if "".join(pair) not in parts)
        merges.remove(made)
        holes.append(vocab.pop("".join(made)))

    own = Spelling(rebuilt(sentencepiece(), leave_a_hole), "student")
    assert len(own.bytes_of) == len(sentencepiece())
    assert own.bytes_of[holes[0]] == b""
    assert own.decode(own.encode(LINES[0].encode())) == LINES[0].encode()


@pytest.mark.parametrize("name", ["sentencepiece", "gemma", "unigram"])
def test_of_two_tokens_with_the_same_bytes_the_first_is_the_one_that_text_is_cut_into(name):
    vocab, own = tokenizer_of(name).get_vocab(), spelling_of(name)
    assert own.bytes_of[vocab["<0x41>"]] == own.bytes_of[vocab["A"]] == b"A" if "A" in vocab else True
    for letter in "aet":
        assert own.ids[letter.encode()] == [vocab[letter], vocab[f"<0x{ord(letter):02X}>"]]
        assert own.encode(letter.encode()) == [vocab[letter]]


# --- ids of bytes ----------------------------------------------------------------------------------------------------

TEXTS = [
    "the cat sat on the mat",
    " the cat",
    "  two spaces\n\n\n\tand lines \n",
    "▁ a literal ▁▁mark ▁the",
    "<|end|></s><s><unk>",
    "<0x41> and A",
    "é e\u0301 naïve café 東京。 Ǆ ﬁ ½",
    "🙂👩‍👩‍👧🏽",
    "\x00\x01\x7f",
    "don't  I'll 12345 x_y",
    "\u2028\u00a0\ufeff\r\n",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_any_text_comes_back_and_so_does_each_part_of_it(name, text):
    own, data = spelling_of(name), text.encode()
    for at in range(len(data) + 1):
        for part in (data[:at], data[at:]):
            assert own.decode(own.encode(part)) == part


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.one_of(st.binary(max_size=12), st.text(max_size=12).map(str.encode)))
@example(data=bytes(range(256)))
@example(data=b"\xe2\x96\x81the \xe2\x96")
def test_any_bytes_come_back(name, data):
    own = spelling_of(name)
    ids = own.encode(data)
    assert own.decode(ids) == data
    assert all(own.bytes_of[index] for index in ids)  # nothing that means something else than text


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ordinary_text_is_cut_as_the_tokenizer_cuts_it_within_a_text(name):
    """A first space is none that the tokenizer puts there: it would have put it before the x."""
    tokenizer, own = tokenizer_of(name), spelling_of(name)
    for text in [line for line in LINES if "é" not in line] + ["\nthe cat sat", "\n  x = 1\n\n"]:
        ids = tokenizer.encode(f"\n{text}", add_special_tokens=False)
        put = tokenizer.convert_ids_to_tokens(ids)[0].startswith("▁")
        assert own.encode(f"\n{text}".encode()) == (ids[1:] if put else ids)


def test_no_space_is_put_before_a_text():
    for name in TOKENIZERS:
        assert spelling_of(name).bytes_of[spelling_of(name).encode(b"the")[0]][:1] == b"t"


def test_a_byte_level_tokenizer_that_puts_a_space_before_texts_does_not():
    """As those of RoBERTa and OPT may."""
    tokenizer = byte_level(300)
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    cuts = [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Sequence(cuts)])
    own = Spelling(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>"), "student")
    assert own.decode(own.encode(b"the cat 12")) == b"the cat 12"
    assert own.encode(b"the cat") == tokenizer.encode("the cat")


@pytest.mark.parametrize("name", ["sentencepiece", "gemma", "metaspace"])
def test_a_character_that_the_tokenizer_would_change_leaves_the_rest_of_a_text_as_it_is(name):
    own = spelling_of(name)
    around = own.encode(b"the cat sat on the mat")
    assert own.encode("the cat sat on the mat▁the cat sat on the mat".encode()) == [
        *around, *(own._single[byte] for byte in "▁".encode()), *around,
    ]  # fmt: skip


def test_what_came_back_may_be_changed():
    own = spelling_of("coarse")
    own.encode(b"the cat").append(0)
    assert own.decode(own.encode(b"the cat")) == b"the cat"


def test_words_are_kept_and_long_texts_are_not(monkeypatch):
    """Of texts of a run's length, the ids of 65,536 would be gigabytes."""
    monkeypatch.setattr(spelling, "_KEPT", 3)
    own = Spelling(tokenizer_of("coarse"), "student")
    for word in ("a", "b", "c", "d", "e", "x" * 1000):
        own.encode(word.encode())
        assert 0 < len(own._known) <= 3
    assert max(map(len, own._known)) == 1


# --- what is refused -------------------------------------------------------------------------------------------------


def whole_words():
    backend = Tokenizer(models.WordLevel({"the": 0, "<unk>": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<unk>")


def word_pieces():
    backend = Tokenizer(models.WordPiece({"the": 0, "##n": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="[UNK]")


def without_decoder():
    def drop(settings):
        settings["decoder"] = None

    return rebuilt(byte_level(300), drop)


def without_spaces():
    backend = Tokenizer.from_str(byte_level(300).backend_tokenizer.to_str())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def without(*letters):
    """A byte-level tokenizer that lacks some bytes."""

    def drop(settings):
        shown = {character for character, byte in spelling._ALPHABET.items() if byte in letters}
        vocab = settings["model"]["vocab"]
        kept = [token for token in sorted(vocab, key=vocab.get) if not shown & set(token)]
        settings["model"]["vocab"] = {token: index for index, token in enumerate(kept)}
        settings["model"]["merges"] = [pair for pair in settings["model"]["merges"] if not shown & set("".join(pair))]

    return rebuilt(byte_level(300), drop)


REFUSED = {
    "lower case": (lambda: with_normalizer(byte_level(300), normalizers.Lowercase()), "'Hello' becomes 'hello'.*take a"),
    "NFKC": (lambda: with_normalizer(byte_level(300), normalizers.NFKC()), "'ﬁne' becomes 'fine'.*take a"),
    "NFKC of pieces": (lambda: with_normalizer(sentencepiece(), normalizers.NFKC()), "'ﬁne' becomes 'fine'"),
    "accents": (
        lambda: with_normalizer(byte_level(300), normalizers.NFD(), normalizers.StripAccents()),
        "'naïve' becomes 'naive'",
    ),
    "decomposed": (lambda: with_normalizer(byte_level(300), normalizers.NFD()), "'naïve' becomes 'nai\u0308ve'"),
    "spaces at the ends": (lambda: with_normalizer(byte_level(300), normalizers.Strip()), "white space is not kept"),
    "no spaces": (without_spaces, "becomes"),
    "no byte fallback": (
        lambda: sentencepiece(fallback=False),
        r"no token for 211 single bytes \(0x09, 0x0A.*no byte fallback.*take a",
    ),
    "missing letters": (lambda: without(0x41, 0x7A), r"no token for 2 single bytes \(0x41, 0x7A"),
    "word pieces": (word_pieces, r"decoder WordPiece\) do not say which bytes.*byte-level \(GPT-2.*SentencePiece"),
    "whole words": (whole_words, r"decoder none\) do not say"),
    "no decoder": (without_decoder, r"decoder none\) do not say"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_a_tokenizer_that_cannot_spell_every_text_is_refused(kind):
    make, message = REFUSED[kind]
    with pytest.raises(VocabularyError, match=f"^(the teacher's tokenizer|tokens of this kind).*{message}"):
        Spelling(make(), "teacher")


def test_a_slow_tokenizer_is_refused():
    class Slow:
        pass

    with pytest.raises(VocabularyError, match=r"student's tokenizer \(Slow\) has no tokenizer.json.*fast tokenizer"):
        Spelling(Slow(), "student")


def test_composition_alone_is_taken_and_left_out():
    """Qwen composes letters and accents (NFC). A text stays what it is, in the tokens that it has without that."""
    tokenizer = sentencepiece(lines=[*LINES, "e\u0301 " * 200])
    own = Spelling(with_normalizer(tokenizer, normalizers.NFC()), "student")
    data = "e\u0301 é".encode()
    assert own.decode(own.encode(data)) == data
    assert own.encode("e\u0301".encode()) == [tokenizer.get_vocab()["e\u0301"]]


def test_a_character_whose_bytes_are_changed_in_part_is_written_whole():
    """A closing quotation mark in place of the opening one: two bytes of three are right."""
    own = Spelling(with_normalizer(sentencepiece(), normalizers.Replace("“", "”")), "student")
    data = "the “cat” sat".encode()
    assert own.decode(own.encode(data)) == data
    assert own.encode("“".encode()) == [own._single[byte] for byte in "“".encode()]


def test_text_that_spells_a_special_token_is_cut_as_any_other():
    lines = [*LINES, "<|end|> " * 200]
    plain, marked = (Spelling(byte_level(300, lines, eos), "student") for eos in ("<|stop|>", "<|end|>"))
    assert marked.encode(b"a<|end|>") == plain.encode(b"a<|end|>")
    assert len(plain.encode(b"<|end|>")) < 4


def test_what_is_put_around_texts_is_left_out():
    def surround(settings):
        end = {"id": "<|end|>", "ids": [settings["added_tokens"][0]["id"]], "tokens": ["<|end|>"]}
        single = [{"SpecialToken": {"id": "<|end|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        settings["post_processor"] = {
            "type": "TemplateProcessing",
            "pair": [],
            "special_tokens": {"<|end|>": end},
            "single": single,
        }
        settings["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
        settings["padding"] = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None}
        settings["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|end|>"}
        settings["model"]["dropout"] = 0.9

    tokenizer = rebuilt(byte_level(300), surround)
    own = Spelling(tokenizer, "student")
    assert own.encode(LINES[0].encode()) == Spelling(byte_level(300), "student").encode(LINES[0].encode())


# --- bytes that are missing ------------------------------------------------------------------------------------------

# Those that SmolLM2 lacks, among others that UTF-8 never has.
SELDOM = (0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2)


def side(tokenizer, role):
    return Side(tokenizer, len(tokenizer), Ends((tokenizer.eos_token_id,)), role)


def test_seldom_bytes_may_be_missing_and_a_reading_stops_before_the_first():
    bridge = Bridge(side(tokenizer_of("coarse"), "student"), side(without(*SELDOM), "teacher"))
    student, teacher = bridge.student.spelling, bridge.teacher.spelling
    assert teacher.missing == set(SELDOM)
    assert not student.missing
    with pytest.raises(DataError, match=r"teacher's tokenizer has no tokens for b'\\x04'"):
        teacher.encode(b"a\x04")
    end = [bridge.student.end]
    whole = student.encode(b"the cat") + end
    assert bridge.teacher_reading(whole) == [*teacher.encode(b"the cat"), bridge.teacher.end]
    cut = student.encode("the cat\x04 sat \U00050000".encode()) + end
    assert teacher.decode(bridge.teacher_reading(cut)) == b"the cat"
    assert bridge.teacher.end not in bridge.teacher_reading(cut)
    left, right = bridge.matches(cut, bridge.teacher_reading(cut))
    assert len(left) == len(right) > 0  # the rest of the text matches nothing, and is no fault
    assert len(bridge.student_reading(teacher.encode(b"the cat"))) == 2


def test_tokens_that_the_other_cannot_spell_are_named():
    tokenizer = byte_level(300, [*LINES, "\x04" * 1000])
    bridge = Bridge(side(tokenizer, "student"), side(without(*SELDOM), "teacher"))
    expected = [i for i, data in enumerate(bridge.student.spelling.bytes_of) if set(data) & set(SELDOM)]
    assert len(expected) > len(SELDOM)
    assert bridge.unspelt == (expected, [])
