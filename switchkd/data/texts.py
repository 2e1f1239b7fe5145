"""Data files to examples, examples to token ids, token ids to batches.

Text becomes ids once, in ``tokenize``; from there on only ids travel. Letters in shapes: B batch, T token position.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from switchkd.base.errors import ConfigError, DataError
from switchkd.data.conversations import PROBE
from switchkd.data.examples import Example, logger, read_rows
from switchkd.data.fields import Fields, Message, counted
from switchkd.data.files import BadRows
from switchkd.data.settings import Template, check_teacher_prompt
from switchkd.data.templates import Encoder, OtherTokenizer, TeacherReads, named
from switchkd.methods.policy import REFERENCE

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


# What a teacher says at T tokens, as it is kept with a text: what entered its output layer before each, ``[T, H]``; or the ids
# of its k likeliest tokens there and their log-probabilities, ``[T, k]`` each.
Said: TypeAlias = "Tensor | tuple[Tensor, Tensor]"


# --- token ids ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """A prompt and its completion as token ids, T of them, and the teacher that is asked about it: of the data, or decoded.

    ``speakers[t]`` wrote ``completion_ids[t]``: STUDENT, TEACHER, or the data (REFERENCE). ``id`` is the row of the data file, or
    what keys the noise that the text was drawn with.
    """

    id: int
    prompt_ids: list[int]
    completion_ids: list[int]
    speakers: list[int]
    teacher_prompt_ids: list[int] | None = field(default=None, kw_only=True)
    """What the teacher reads in the prompt's place; None where it reads the prompt."""
    teacher_completion_ids: list[int] | None = field(default=None, kw_only=True)
    """The completion in the tokens of a teacher with another tokenizer; None where it reads the completion's own ids."""
    teacher: str = field(default="", kw_only=True)
    """The name of its teacher; "" is the default one."""
    said: Said | None = field(default=None, repr=False, compare=False, kw_only=True)
    """What the teacher says of the completion, where that is known already."""

    def __post_init__(self) -> None:
        if len(self.speakers) != len(self.completion_ids):
            raise DataError(f"{self.name}: {len(self.speakers)} speakers for {len(self.completion_ids)} tokens")

    @property
    def teacher_reads(self) -> list[int]:
        """The prompt as the teacher reads it."""
        return self.prompt_ids if self.teacher_prompt_ids is None else self.teacher_prompt_ids

    @property
    def teacher_completion(self) -> list[int]:
        """The completion as the teacher reads it."""
        return self.completion_ids if self.teacher_completion_ids is None else self.teacher_completion_ids

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"sample {self.id}"


@dataclass(frozen=True)
class TokenizedExample(Text):
    """A text of the data. ``completion_ids`` ends with the end-of-turn token unless it is ``truncated``.

    Its speaker is the data, or the teacher where its text took the data's place.
    """

    references: tuple[str, ...]
    truncated: bool
    source: str
    """Where it stands: file and row."""
    group: str = ""
    """The part of its data set that it belongs to; "" for none."""

    @property
    def name(self) -> str:
        return self.source


@dataclass(frozen=True)
class DropCounts:
    """What ``tokenize`` left out or cut, in examples. ``truncated`` ones are kept."""

    long_prompts: int
    end_tokens_in_text: int
    truncated: int
    long_teacher_prompts: int = 0


def tokenize(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str | Template,
    max_prompt_length: int,
    max_completion_length: int,
    teacher: TeacherReads = TeacherReads(),  # noqa: B008 - it is frozen
    eos_token_ids: Collection[int] = (),
    bad: BadRows | None = None,
) -> tuple[list[TokenizedExample], DropCounts]:
    """Prompts and completions as token ids; lengths are in tokens, the end-of-turn token counts. A prompt alone has no completion.

    A prompt longer than ``max_prompt_length`` is dropped: a cut prompt is another question. A longer completion is cut
    and gets no end token. ``eos_token_ids`` stop generation (a pair's; default: the tokenizer's eos token, and what the template
    closes with). An example whose own text spells out one of them is dropped, since generation would have stopped there.
    ``teacher`` says what a teacher reads in the prompt's place; an example of which that is longer than ``teacher_prompt_limit`` is
    dropped too. A row that the template or
    the tokenizer cannot express is a bad one, counted in ``bad``, beside those that reading found; by default none is tolerated.
    Raises ConfigError for a template or tokenizer that cannot be used or an end at which nothing stops, DataError when nothing is
    left or more rows are bad than may be.
    """
    if min(max_prompt_length, max_completion_length) < 1:
        raise ConfigError(f"lengths must be at least 1 token, not {max_prompt_length} and {max_completion_length}")
    kept: list[TokenizedExample] = []
    long_prompts = long_teacher_prompts = end_tokens = 0
    encode, shared = Encoder(tokenizer, template, frozenset(eos_token_ids)), _Shared()
    limit = teacher_prompt_limit(tokenizer, teacher, max_prompt_length, max_completion_length)
    bad = BadRows("examples") if bad is None else bad  # one without rows counts as false
    of_teachers = teacher_ids(examples, encode, teacher)
    for example, ids, of_teacher in zip(examples, encode.each(examples), of_teachers, strict=True):
        if isinstance(ids, DataError) or isinstance(of_teacher, DataError):
            bad.add(example.source, next(each for each in (ids, of_teacher) if isinstance(each, DataError)))
            continue
        prompt_ids, completion_ids = map(shared, ids)
        own_ids, read = map(shared, of_teacher) if of_teacher else (None, completion_ids)
        other = teacher.others.get(example.teacher)
        if example.teacher in teacher.templates and read != completion_ids:
            bad.add(example.source, DataError(_OTHER_ANSWER))
            continue
        if len(prompt_ids) > max_prompt_length:
            long_prompts += 1
        elif len(own_ids or ()) > limit:
            long_teacher_prompts += 1
        elif _spells_end(example.completion, completion_ids, eos_token_ids, tokenizer):
            end_tokens += 1
        elif eos_token_ids and completion_ids and completion_ids[-1] not in eos_token_ids:
            raise ConfigError(_stops_nothing(example.source, completion_ids[-1], eos_token_ids, tokenizer))
        else:
            cut = completion_ids[:max_completion_length]
            kept.append(_with_ids(example, prompt_ids, cut, own_ids, other, truncated=len(cut) < len(completion_ids)))
    if encode.left_out:
        logger.warning(
            "%s: the chat template leaves out fields of earlier turns: %s", bad.path, counted(encode.left_out)
        )
    counts = DropCounts(long_prompts, end_tokens, sum(example.truncated for example in kept), long_teacher_prompts)
    if not kept:
        limits = f"max_prompt_length={max_prompt_length}", limit if teacher else None
        raise DataError(_none_left(len(examples), counts, limits, bad))
    return kept, counts


class _Shared:
    """Lists of ids in which equal ids are one object: 14 bytes a token in place of 35."""

    def __init__(self) -> None:
        self._ids: dict[int, int] = {}

    def __call__(self, ids: list[int]) -> list[int]:
        return [self._ids.setdefault(index, index) for index in ids]


def _with_ids(
    example: Example,
    prompt_ids: list[int],
    completion_ids: list[int],
    teacher_ids: list[int] | None,
    other: OtherTokenizer | None,
    truncated: bool,
) -> TokenizedExample:
    return TokenizedExample(
        example.id, prompt_ids, completion_ids, [REFERENCE] * len(completion_ids), example.references, truncated,
        example.source, example.group, teacher_prompt_ids=teacher_ids, teacher=example.teacher,
        teacher_completion_ids=None if other is None else other.reading(completion_ids),
    )  # fmt: skip


def _none_left(examples: int, drops: DropCounts, limits: tuple[str, int | None], bad: BadRows) -> str:
    """Why no example is left; ``limits`` are those of prompts: the setting, and tokens of the teacher's own, if it has some."""
    setting, own = limits
    others = (
        "" if own is None else f", {drops.long_teacher_prompts} prompts of the teacher are longer than {own} tokens"
    )
    refused = f", {len(bad)} rows are bad: {'; '.join(bad.first())}" if len(bad) else ""
    return (
        f"none of {examples} examples is left: {drops.long_prompts} prompts are longer than {setting} tokens (raise it), "
        f"{drops.end_tokens_in_text} completions spell out the end token{others}{refused}"
    )


def _spells_end(
    text: str, completion_ids: list[int], eos_token_ids: Collection[int], tokenizer: PreTrainedTokenizerBase
) -> bool:
    """Whether a completion holds an end token that is its own, and not its end."""
    if not completion_ids:
        return False
    ends = {*(eos_token_ids or (tokenizer.eos_token_id,)), completion_ids[-1]}
    marks = (str(token) for index, token in tokenizer.added_tokens_decoder.items() if index in ends)
    return not ends.isdisjoint(completion_ids[:-1]) or any(mark in text for mark in marks)


def _stops_nothing(source: str, end: int, stops: Collection[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return (
        f"{source}: the template closes the completion with {named([end], tokenizer)}, at which nothing stops: texts end at "
        f"{named(stops, tokenizer)}. Load the pair for that template (load_pair's template), use 'alpaca' or 'none', or add the id "
        "to eos_token_id in both models' generation_config.json"
    )


def teacher_prompt_limit(
    tokenizer: PreTrainedTokenizerBase, teacher: TeacherReads, max_prompt_length: int, max_completion_length: int
) -> int:
    """Tokens that the teacher's prompt may have: the longest prompt, the longest completion where that may be in it, its own words.

    A teacher that reads nothing else reads the student's prompt.
    """
    if not teacher:
        return max_prompt_length
    words = sum(
        len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (teacher.prompt, teacher.system)
    )
    probe = Example(0, (Message("user", PROBE),), "", (), "a probe")
    encoders = [Encoder(tokenizer, template) for template in teacher.templates.values()]
    own = [
        len(next(encoder([probe]))[0]) for encoder in [*encoders, *(other.encoder for other in teacher.others.values())]
    ]
    # Another tokenizer may cut a text into more tokens; twice as many it seldom does.
    longest = (max_prompt_length + (max_completion_length if teacher.prompt else 0)) * (2 if teacher.others else 1)
    return longest + words + max(own, default=0)


_OTHER_ANSWER = (
    "the teacher's own chat template writes this answer, or its end, as other tokens than the student's does; leave "
    "teacher_template as it is (shared), so that both read one text"
)


def teacher_ids(
    examples: Sequence[Example], encode: Encoder, teacher: TeacherReads
) -> Iterator[tuple[list[int], list[int]] | DataError | None]:
    """Prompt and completion of each example as its teacher reads them, if that is something else, or why it cannot."""
    if not teacher:
        return repeat(None, len(examples))
    if teacher.prompt:
        check_teacher_prompt(teacher.prompt)
    found: list[tuple[list[int], list[int]] | DataError | None] = [None] * len(examples)
    for name, places in by_teacher(examples).items():
        own = replace(encode, template=teacher.templates.get(name, encode.template))
        own = teacher.others[name].encoder if name in teacher.others else own
        encoded = own.each([examples[place] for place in places], teacher.of)
        for place, ids in zip(places, encoded, strict=True):
            found[place] = ids
    return iter(found)


def by_teacher(rows: Sequence[Text | Example]) -> dict[str, list[int]]:
    """Places of each teacher's rows, ascending; teachers in the order of their first row."""
    places: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(row.teacher, []).append(place)
    return places


# --- order and batches --------------------------------------------------------------------------------------------


def batch_indices(n_examples: int, batch_size: int, first: int, seed: int) -> list[int]:
    """Indices of the next examples, ``first`` having been read before; that number is the whole data cursor.

    Epochs are permutations keyed by (seed, epoch) and laid end to end, so a batch may cross from one to the next and
    every example occurs once an epoch. Raises ConfigError for numbers out of range.
    """
    if min(n_examples, batch_size) < 1 or first < 0 or not 0 <= seed < 2**64:
        raise ConfigError(
            f"no batch for {n_examples=}, {batch_size=}, {first=}, {seed=}: counts from 1, 0 <= seed < 2**64"
        )
    positions = range(first, first + batch_size)
    epochs = range(positions[0] // n_examples, positions[-1] // n_examples + 1)
    orders = {epoch: _permutation(n_examples, seed, epoch) for epoch in epochs}
    return [int(orders[position // n_examples][position % n_examples]) for position in positions]


def _permutation(n_examples: int, seed: int, epoch: int) -> np.ndarray:
    # Sorting the raw stream: NumPy keeps it the same in every release, which it does not promise for Generator methods.
    key = np.array([seed, epoch], dtype=np.uint64)  # a list with a seed above 2**63 would become floats
    return np.argsort(np.random.Philox(key=key).random_raw(n_examples), kind="stable")


@dataclass(frozen=True)
class Batch:
    """Right-padded rows. ``input_ids``, ``attention_mask``, ``position_ids``: [B, T] int64; ``loss_mask``: [B, T] bool.

    ``loss_mask[b, t]`` says that ``input_ids[b, t]`` is a completion token. The logits at ``t - 1`` predict the token
    at ``t``; shifting is the trainer's.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    loss_mask: torch.Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``."""
        return Batch(
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.position_ids.to(device),
            self.loss_mask.to(device),
        )


def collate(rows: Sequence[tuple[list[int], list[int]]], pad_id: int = 0) -> Batch:
    """One batch of (prompt_ids, completion_ids) rows, padded to the longest; a completion may be empty.

    Masks come from positions and lengths alone, so ``pad_id`` may be any token, also the end token. Raises DataError
    for no rows or an empty prompt (nothing would predict the first completion token).
    """
    import torch

    if not rows or not all(prompt for prompt, _ in rows):
        raise DataError(f"a batch needs rows with a prompt; prompt lengths: {[len(prompt) for prompt, _ in rows]}")
    starts = torch.tensor([[len(prompt)] for prompt, _ in rows])
    ends = torch.tensor([[len(prompt) + len(completion)] for prompt, completion in rows])
    width = int(ends.max())
    padded = [
        [*prompt, *completion] + [pad_id] * (width - len(prompt) - len(completion)) for prompt, completion in rows
    ]
    position_ids = torch.arange(width).repeat(len(rows), 1)
    return Batch(
        input_ids=torch.tensor(padded, dtype=torch.int64),
        attention_mask=(position_ids < ends).long(),
        position_ids=position_ids,
        loss_mask=(position_ids >= starts) & (position_ids < ends),
    )


def load_text(
    sources: str | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    skip_bad: int | BadRows = 0,
    streaming: bool = False,
) -> list[TokenizedExample]:
    """The ``text`` fields of data files for language modelling: all tokens but the first are a completion.

    Texts are cut at ``max_length`` tokens; those of fewer than two have nothing to predict and are left out. Bad rows and errors
    are those of `load_examples`.
    """

    def read(row: Fields, index: int, source: str) -> list[TokenizedExample]:
        ids = tokenizer(row.text("text"))["input_ids"]
        cut = ids[1:max_length]
        text = TokenizedExample(index, ids[:1], cut, [REFERENCE] * len(cut), (), len(ids) > max_length, source)
        return [text] if len(ids) > 1 else []

    return read_rows(sources, None, skip_bad, read, streaming)
