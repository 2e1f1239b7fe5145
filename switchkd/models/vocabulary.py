"""Whether models can share text: one tokenizer id by id, logits for every id; and what differs in prompts."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from switchkd.base.errors import VocabularyError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# Digits, spaces, contractions, accents and code: where pre-tokenizers over one and the same vocabulary part ways.
PROBE = "It's 20,483 km/h; isn't   3.14159?\n\n\tdef f(x): return x**2  # naïve café, 東京 42\r\nDON'T stop — №7…"


def check_vocabulary(teacher_tokenizer: "PreTrainedTokenizerBase", student_tokenizer: "PreTrainedTokenizerBase") -> int:
    """The shared vocabulary size (highest id + 1) of two tokenizers, added tokens included.

    Where they differ only from some id on, and all that either has from there on are added tokens that no text needs, such as one
    more padding token, the vocabulary ends before them: what lies beyond is never drawn.

    Raises VocabularyError unless both have the same token at every id and cut a probe text into the same ids: a
    pre-tokenizer that does not split digits has the same vocabulary, and still writes other tokens.
    """
    teacher_vocab, student_vocab = teacher_tokenizer.get_vocab(), student_tokenizer.get_vocab()
    size = max(teacher_vocab.values()) + 1
    if differing := sorted({token_id for _, token_id in teacher_vocab.items() ^ student_vocab.items()}):
        size = differing[0]
        if not (_needs_none_from(size, teacher_tokenizer) and _needs_none_from(size, student_tokenizer)):
            raise VocabularyError(_differing_tokens(differing, teacher_vocab, student_vocab))
    teacher_ids = teacher_tokenizer.encode(PROBE, add_special_tokens=False)
    student_ids = student_tokenizer.encode(PROBE, add_special_tokens=False)
    if teacher_ids != student_ids:
        raise VocabularyError(_differing_cut(teacher_tokenizer, teacher_ids, student_ids))
    return size


def check_logits_rows(
    model: "PreTrainedModel", vocab_size: int, role: str, tokenizer: "PreTrainedTokenizerBase | None" = None
) -> int:
    """The ids of a vocabulary that ``model`` has logits for: all, or those before added tokens of ``tokenizer`` that no text needs.

    Raises VocabularyError if there are fewer.
    """
    rows: int = model.get_output_embeddings().weight.shape[0]
    if rows >= vocab_size:
        return vocab_size
    if tokenizer is not None and _needs_none_from(rows, tokenizer):
        return rows
    raise VocabularyError(
        f"the {role} has {rows} logits rows for {vocab_size} token ids, so some tokens could never be scored; "
        "take the tokenizer that belongs to this model"
    )


def left_out_note(tokenizers: "Iterable[PreTrainedTokenizerBase]", vocab_size: int) -> tuple[str, ...]:
    """A sentence about the tokens that lie beyond the shared vocabulary, if there are any."""
    vocabs = [tokenizer.get_vocab() for tokenizer in tokenizers]
    beyond = sorted({(i, token) for vocab in vocabs for token, i in vocab.items() if i >= vocab_size})
    if not beyond:
        return ()
    shown = ", ".join(f"{i} {token!r}" for i, token in beyond[:5])
    more = f" and {len(beyond) - 5} more" if len(beyond) > 5 else ""
    return (
        f"note: not all of the models know the added tokens {shown}{more}; they are never drawn, and examples that hold one are "
        "left out",
    )


def prompt_warnings(teacher: "PreTrainedTokenizerBase", student: "PreTrainedTokenizerBase") -> tuple[str, ...]:
    """What teacher and student would write differently around a prompt, in sentences."""
    found = []
    if student.chat_template is None and teacher.chat_template is not None:
        found.append("note: the student has no chat template; the teacher's is used for both")
    elif student.chat_template != teacher.chat_template:
        found.append(
            "note: the teacher has no chat template; the student's is used for both"
            if teacher.chat_template is None
            else "teacher and student have different chat templates; the teacher's is used for both, or with teacher_template own "
            "each reads under its own"
        )
    if teacher.encode("a") != student.encode("a"):
        found.append(
            f"teacher and student put different special tokens around a text ({teacher.encode('a')} and "
            f"{student.encode('a')} for 'a'); the teacher's are used for both"
        )
    return tuple(found)


def other_prompts(
    tokenizer: "PreTrainedTokenizerBase", named: "Mapping[str, PreTrainedTokenizerBase]"
) -> tuple[str, ...]:
    """The same of more teachers, by name, beside the default one with ``tokenizer``."""
    return tuple(
        f"teacher {name!r} writes prompts otherwise; the default teacher's chat template and special tokens are used for all"
        for name, other in named.items()
        if other.chat_template != tokenizer.chat_template or other.encode("a") != tokenizer.encode("a")
    )


def _needs_none_from(size: int, tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether all ids from ``size`` on are added tokens, and none that the tokenizer puts into text, or cuts it into, by itself."""
    beyond = {i for i in tokenizer.get_vocab().values() if i >= size}
    own = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, *tokenizer.encode(PROBE)}
    return beyond <= tokenizer.added_tokens_decoder.keys() and beyond.isdisjoint(own)


def _differing_tokens(ids: list[int], teacher_vocab: dict[str, int], student_vocab: dict[str, int]) -> str:
    teacher = {token_id: repr(token) for token, token_id in teacher_vocab.items()}
    student = {token_id: repr(token) for token, token_id in student_vocab.items()}
    shown = "; ".join(
        f"id {i}: teacher {teacher.get(i, 'nothing')}, student {student.get(i, 'nothing')}" for i in ids[:5]
    )
    return (
        f"teacher ({len(teacher)} tokens) and student ({len(student)} tokens) differ at {len(ids)} ids: {shown}. "
        "A pair must share one tokenizer id by id, but for added tokens at its end that no text needs: choose both models from one "
        "family"
    )


def _differing_cut(tokenizer: "PreTrainedTokenizerBase", teacher_ids: list[int], student_ids: list[int]) -> str:
    pairs = zip(teacher_ids, student_ids, strict=False)
    first = next((i for i, (t, s) in enumerate(pairs) if t != s), min(len(teacher_ids), len(student_ids)))
    teacher_part = tokenizer.convert_ids_to_tokens(teacher_ids[first : first + 5])
    student_part = tokenizer.convert_ids_to_tokens(student_ids[first : first + 5])
    return (
        f"teacher and student tokenizers have the same tokens but cut text differently: at token {first} of a probe "
        f"text the teacher writes {teacher_part}, the student {student_part}; copy the teacher's tokenizer files "
        "into the student's folder if the student was trained with them, else choose another pair"
    )


# --- saving a tokenizer -------------------------------------------------------------------------------------------

TOKENIZER_CONFIG = "tokenizer_config.json"


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Save a tokenizer for ``from_pretrained``, without a word on where it was found.

    Its chat template is written into chat_template.jinja, and into tokenizer_config.json too, where older programs look for it.
    """
    tokenizer.save_pretrained(folder)
    file = folder / TOKENIZER_CONFIG
    settings = json.loads(file.read_text(encoding="utf-8"))
    kept = {name: value for name, value in settings.items() if name not in HOW_FOUND and not is_path(value)}
    if isinstance(tokenizer.chat_template, dict):
        kept["chat_template"] = [{"name": name, "template": text} for name, text in tokenizer.chat_template.items()]
    elif tokenizer.chat_template is not None:
        kept["chat_template"] = tokenizer.chat_template
    file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# How transformers found a tokenizer here, which it writes down with it.
HOW_FOUND = ("name_or_path", "is_local", "local_files_only", "cache_dir")


def is_path(value: Any) -> bool:
    if not isinstance(value, str) or "\n" in value:
        return False
    return (value.startswith("/") and len(Path(value).parts) > 2) or PureWindowsPath(value).is_absolute()
