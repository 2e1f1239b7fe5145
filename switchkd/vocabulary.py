"""Whether models can share text: one tokenizer id by id, logits for every id; and what differs in prompts."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from switchkd.errors import VocabularyError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Digits, spaces, contractions, accents and code: where pre-tokenizers over one and the same vocabulary part ways.
PROBE = "It's 20,483 km/h; isn't   3.14159?\n\n\tdef f(x): return x**2  # naïve café, 東京 42\r\nDON'T stop — №7…"


def check_vocabulary(teacher_tokenizer: "PreTrainedTokenizerBase", student_tokenizer: "PreTrainedTokenizerBase") -> int:
    """The shared vocabulary size (highest id + 1) of two tokenizers, added tokens included.

    Raises VocabularyError unless both have the same token at every id and cut a probe text into the same ids: a
    pre-tokenizer that does not split digits has the same vocabulary, and still writes other tokens.
    """
    teacher_vocab, student_vocab = teacher_tokenizer.get_vocab(), student_tokenizer.get_vocab()
    if differing := sorted({token_id for _, token_id in teacher_vocab.items() ^ student_vocab.items()}):
        raise VocabularyError(_differing_tokens(differing, teacher_vocab, student_vocab))
    teacher_ids = teacher_tokenizer.encode(PROBE, add_special_tokens=False)
    student_ids = student_tokenizer.encode(PROBE, add_special_tokens=False)
    if teacher_ids != student_ids:
        raise VocabularyError(_differing_cut(teacher_tokenizer, teacher_ids, student_ids))
    return max(teacher_vocab.values()) + 1


def check_logits_rows(model: "PreTrainedModel", vocab_size: int, role: str) -> None:
    """Raise VocabularyError if ``model`` has fewer logits rows than there are token ids."""
    rows = model.get_output_embeddings().weight.shape[0]
    if rows < vocab_size:
        raise VocabularyError(
            f"the {role} has {rows} logits rows for {vocab_size} token ids, so some tokens could never be scored; "
            "take the tokenizer that belongs to this model"
        )


def prompt_warnings(teacher: "PreTrainedTokenizerBase", student: "PreTrainedTokenizerBase") -> tuple[str, ...]:
    """What teacher and student would write differently around a prompt, in sentences."""
    found = []
    if student.chat_template is None and teacher.chat_template is not None:
        found.append("note: the student has no chat template; the teacher's is used for both")
    elif student.chat_template != teacher.chat_template:
        which = "has none, so prompts stay plain" if teacher.chat_template is None else "is used for both"
        found.append(f"teacher and student have different chat templates; the teacher's {which}")
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


def _differing_tokens(ids: list[int], teacher_vocab: dict[str, int], student_vocab: dict[str, int]) -> str:
    teacher = {token_id: repr(token) for token, token_id in teacher_vocab.items()}
    student = {token_id: repr(token) for token, token_id in student_vocab.items()}
    shown = "; ".join(
        f"id {i}: teacher {teacher.get(i, 'nothing')}, student {student.get(i, 'nothing')}" for i in ids[:5]
    )
    return (
        f"teacher ({len(teacher)} tokens) and student ({len(student)} tokens) differ at {len(ids)} ids: {shown}. "
        "A pair must share one tokenizer id by id: choose both models from one family"
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
