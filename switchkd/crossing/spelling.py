"""What bytes each token of a tokenizer stands for, and how bytes become tokens.

Two tokenizers are compared by bytes, never by the strings of their tokens: ``Ġthe`` of one and ``▁the`` of another are the same
four bytes.
"""

import json
import re
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from switchkd.base.errors import DataError, VocabularyError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase


_SPACE = "▁"  # what stands for a space in the tokens of SentencePiece
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Bytes that a tokenizer may lack: UTF-8 never has them, or only in control characters and planes without characters.
_SELDOM = frozenset((0xC0, 0xC1, *range(0xF1, 0x100), *range(0x20), 0x7F)) - frozenset(b"\t\n\r\xf3\xf4")
# Capitals, marks, ligatures, full-width forms and white space: what a tokenizer that normalises text would change.
PROBE = "Hello WORLD  naïve Ångström ﬁne ½ Ａｂ ①\n\n\tx = 42;  東京 🙂 don't…"
# Words come again and again: the ids of so many texts of at most so many bytes are kept.
_KEPT, _WORD = 2**16, 64


class Spelling:
    """The bytes of every token of a tokenizer, and the ids of any bytes.

    ``bytes_of[i]`` is b"" for tokens that stand for no text: special ones, and ids without a token. No space is put before a text,
    and text that spells out a special token stays text.

    Raises:
        VocabularyError: the tokenizer changes text, or has no tokens for single bytes, so that some text has no ids.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", role: str):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise VocabularyError(
                f"the {role}'s tokenizer ({type(tokenizer).__name__}) has no tokenizer.json, from which the bytes of its tokens "
                "are read; save it as a fast tokenizer, or take a model that has one"
            )
        settings = json.loads(backend.to_str())
        self.role, self._by_bytes = role, _kinds(settings["decoder"], settings["pre_tokenizer"])
        self.bytes_of = self._bytes_of(tokenizer)
        self._plain = _plain(settings)
        self._known: dict[bytes, tuple[int, ...]] = {}
        self._check()

    @cached_property
    def lengths(self) -> np.ndarray:
        """How many bytes each token has."""
        return np.array([len(data) for data in self.bytes_of], dtype=np.int64)

    @cached_property
    def ids(self) -> dict[bytes, list[int]]:
        """The tokens of some bytes: of several the one that text is cut into is the first."""
        found: dict[bytes, list[int]] = {}
        for index, data in enumerate(self.bytes_of):
            if data:
                found.setdefault(data, []).append(index)
        return {data: same if len(same) == 1 else self._usual_first(data, same) for data, same in found.items()}

    def _usual_first(self, data: bytes, same: list[int]) -> list[int]:
        own = self.encode(data)
        return sorted(same, key=lambda index: own != [index])

    def encode(self, data: bytes) -> list[int]:
        """The ids of these bytes, which need not be whole characters: ``decode(encode(data)) == data``.

        Raises DataError for bytes that no ids spell.
        """
        if data in self._known:
            return list(self._known[data])
        ids: list[int] = []
        for part in _characters(data):
            ids += self._encode(text) if (text := _text(part)) else self._bytewise(part)
        if len(data) <= _WORD:
            if len(self._known) >= _KEPT:
                self._known.clear()
            self._known[data] = tuple(ids)
        return ids

    def decode(self, ids: list[int]) -> bytes:
        """The bytes that tokens stand for."""
        return b"".join(self.bytes_of[index] for index in ids)

    def _encode(self, text: str) -> list[int]:
        """Ids as the tokenizer cuts a text; a character that it would change is written in bytes, and the rest cut anew."""
        found: list[int] = []
        while text:
            data = text.encode()
            ids = self._plain.encode(text, add_special_tokens=False).ids
            if self.decode(ids) == data:
                return found + ids
            kept, length = self._right(ids, data)
            text = data[length:].decode()
            found += kept + self._character(text[0])
            text = text[1:]
        return found

    def _right(self, ids: list[int], data: bytes) -> tuple[list[int], int]:
        """The first of these tokens, as far as they spell whole characters of ``data``, and how many bytes these are."""
        kept = length = at = 0
        for place, index in enumerate(ids):
            own = self.bytes_of[index]
            if not own or not data.startswith(own, at):
                break
            at += len(own)
            if at == len(data) or data[at] & 0xC0 != 0x80:
                kept, length = place + 1, at
        return ids[:kept], length

    def _character(self, character: str) -> list[int]:
        ids: list[int] = self._plain.encode(character, add_special_tokens=False).ids
        data = character.encode()
        return ids if self.decode(ids) == data else self._bytewise(data)

    def _bytewise(self, data: bytes) -> list[int]:
        if not self.spells(data):
            raise DataError(f"the {self.role}'s tokenizer has no tokens for {data!r}")
        return [self._single[byte] for byte in data]

    @cached_property
    def missing(self) -> frozenset[int]:
        """Single bytes that no ids spell, such as seldom control characters."""
        return frozenset(range(256)) - self._single.keys()

    def spells(self, data: bytes) -> bool:
        """Whether there are ids for all of these bytes."""
        return self.missing.isdisjoint(data)

    @cached_property
    def _single(self) -> dict[int, int]:
        """The token of each byte that has one."""
        if self._by_bytes:
            return {data[0]: index for index, data in reversed(list(enumerate(self.bytes_of))) if len(data) == 1}
        return self._fallback

    def _bytes_of(self, tokenizer: "PreTrainedTokenizerBase") -> list[bytes]:
        added = tokenizer.added_tokens_decoder
        marks = set(tokenizer.all_special_ids) | {index for index, token in added.items() if token.special}
        vocab = tokenizer.get_vocab()
        found = [b""] * (max(vocab.values()) + 1)
        self._fallback: dict[int, int] = {}
        for token, index in vocab.items():
            if index in marks:
                continue
            if self._by_bytes:
                found[index] = token.encode() if index in added else _of_alphabet(token)
            elif byte := _BYTE.fullmatch(token):
                found[index] = bytes([int(byte[1], 16)])
                self._fallback[found[index][0]] = index
            else:
                found[index] = token.replace(_SPACE, " ").encode()
        return found

    def _check(self) -> None:
        if missing := sorted(self.missing - _SELDOM):
            shown = ", ".join(f"0x{byte:02X}" for byte in missing[:5])
            raise VocabularyError(
                f"the {self.role}'s tokenizer has no token for {len(missing)} single bytes ({shown} …; no byte fallback), so that "
                "some texts of the other model cannot be spelled with it; take a model whose tokenizer can write any text"
            )
        text = f" {PROBE} "
        ids = self._plain.encode(text, add_special_tokens=False).ids
        if (found := self.decode(ids)) != text.encode():
            raise VocabularyError(
                f"the {self.role}'s tokenizer changes text before it cuts it: {_difference(text, found)}. The two models would "
                "not read one text; take a model whose tokenizer keeps every character"
            )


def _kinds(decoder: Any, cut: Any) -> bool:
    """Whether tokens are strings of bytes, each written as a character of its own; if not, they are text with byte fallback.

    Raises VocabularyError for any other kind of tokenizer.
    """
    kinds = {part["type"] for part in _parts(decoder, "decoders")}
    if "ByteLevel" in kinds:
        return True
    cuts = {part["type"] for part in _parts(cut, "pretokenizers")}
    if kinds & {"ByteFallback", "Metaspace", "Replace"} or "Metaspace" in cuts:
        return False
    raise VocabularyError(
        f"tokens of this kind (decoder {', '.join(sorted(kinds)) or 'none'}) do not say which bytes they stand for; teacher and "
        "student may have different tokenizers where each is byte-level (GPT-2, Llama 3, Qwen) or SentencePiece with byte fallback "
        "(Llama 2, Gemma, Mistral)"
    )


def _parts(setting: Any, several: str) -> list[dict[str, Any]]:
    """The parts of a normalizer, pre-tokenizer or decoder, which may be a sequence of them."""
    if setting is None:
        return []
    return [each for part in setting[several] for each in _parts(part, several)] if several in setting else [setting]


def _plain(settings: dict[str, Any]) -> "Tokenizer":
    """The tokenizer without what it puts around a text, and without Unicode's composition (NFC), which would change its bytes."""
    from tokenizers import Tokenizer

    settings = {**settings, "truncation": None, "padding": None}
    if settings["model"].get("dropout"):
        settings["model"] = {**settings["model"], "dropout": None}
    kept = [part for part in _parts(settings["normalizer"], "normalizers") if part["type"] not in ("Prepend", "NFC")]
    settings["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    for part in _parts(settings["pre_tokenizer"], "pretokenizers"):
        if part["type"] == "Metaspace":
            part["prepend_scheme"] = "never"
        if part["type"] == "ByteLevel":
            part["add_prefix_space"] = False
    plain = Tokenizer.from_str(json.dumps(settings))
    plain.encode_special_tokens = True
    return plain


def _alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for (GPT-2's ``bytes_to_unicode``, turned round)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + at): byte for at, byte in enumerate(hidden)}


_ALPHABET = _alphabet()


def _of_alphabet(token: str) -> bytes:
    """The bytes of a byte-level token; b"" if it is not one."""
    found = [_ALPHABET.get(character) for character in token]
    return b"" if None in found else bytes(found)  # type: ignore[arg-type]


def _text(part: bytes) -> str:
    """``part`` as text, "" if it is no whole characters."""
    try:
        return part.decode()
    except UnicodeDecodeError:
        return ""


def _characters(data: bytes) -> Iterator[bytes]:
    """``data`` in parts that are whole characters, and single bytes between them that belong to none."""
    whole = data.decode(errors="surrogateescape")
    for part in re.findall("[^\udc80-\udcff]+|[\udc80-\udcff]", whole):
        yield part.encode(errors="surrogateescape")


def _difference(text: str, found: bytes) -> str:
    """The first word of ``text`` that came back as another one."""
    back = found.decode(errors="replace").split()
    for word, other in zip(text.split(), [*back, *[""] * len(text)], strict=False):
        if word != other:
            return f"{word!r} becomes {other!r}"
    return "white space is not kept"
