"""Prompt templates: how an example's text becomes prompt and completion token ids."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from switchkd.base.errors import ConfigError, DataError
from switchkd.data.conversations import PROBE, Conversations, Marks, one_of
from switchkd.data.fields import Message
from switchkd.data.settings import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from switchkd.data.examples import Example


_CHUNK, _CHUNK_TEXT = 256, 2**20  # examples and characters that are encoded together


def alpaca_prompt(instruction: str, context: str = "") -> str:
    """The Alpaca prompt as MiniLLM, DistiLLM and SWITCH use it, in its variants with and without an input."""
    pairing = ", paired with an input that provides further context" if context.strip() else ""
    section = f"### Input:\n{context}\n\n" if context.strip() else ""
    return (
        f"Below is an instruction that describes a task{pairing}. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n{section}### Response:\n"
    )


def _plain_prompt(instruction: str, context: str = "") -> str:
    return f"{instruction}\n\n{context}" if context.strip() else instruction


_Written = tuple[str, "str | None"]  # a prompt, and its completion if it has one


def _with_some_answer(example: Example) -> Example:
    """The example, or a prompt alone with an answer that nobody reads: a chat template is tried on whole conversations."""
    return example if example.references else replace(example, completion=PROBE)


@dataclass(frozen=True)
class OtherTokenizer:
    """What a teacher with a tokenizer of its own reads with: an encoder of prompts, and how it reads a completion's ids."""

    encoder: Encoder
    reading: Callable[[list[int]], list[int]]


@dataclass(frozen=True)
class TeacherReads:
    """What a teacher reads that the student does not: ``prompt`` in place of the last user turn (with the fields {prompt} and
    {completion}), a ``system`` prompt in place of the row's own, and, by the names of teachers, the ``templates`` and tokenizers
    (``others``) of those that have their own."""

    prompt: str = ""
    system: str = ""
    templates: Mapping[str, Template] = field(default_factory=dict)
    others: Mapping[str, OtherTokenizer] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.prompt or self.system or self.templates or self.others)

    def of(self, example: Example) -> Example:
        """The example as its teacher reads it; an ``input`` stays beside it.

        Raises DataError if ``prompt`` has no turn to replace.
        """
        turns = list(example.messages)
        if self.prompt:
            users = [place for place, turn in enumerate(turns) if turn.role == "user"]
            if not users:
                roles = ", ".join(turn.role for turn in turns)
                raise DataError(f"no user turn that teacher_prompt could replace (roles: {roles})")
            turn = turns[users[-1]]
            content = self.prompt.format(prompt=turn.content, completion=example.completion)
            turns[users[-1]] = replace(turn, content=content)
        if self.system:
            turns = [Message("system", self.system), *(turn for turn in turns if turn.role != "system")]
        return replace(example, messages=tuple(turns))


@dataclass(frozen=True)
class Encoder:
    """Turns examples into (prompt_ids, completion_ids); a completion ends with the end-of-turn token, and a prompt alone has none.

    ``chat`` is the tokenizer's own chat template, ``alpaca`` the Alpaca prompt, ``none`` the prompt text as it is, ``auto`` the
    first of these that the tokenizer has; a `Template` also says what a chat template is told.
    ``eos_token_ids`` stop generation (default: the tokenizer's eos token): of several closing tokens that a chat template
    writes, the first of these ends the completion, and what stands before it is part of the text.
    Raises ConfigError if the template is unknown or the tokenizer lacks what it needs.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str | Template
    eos_token_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self._is_chat and not (self._told.jinja or self.tokenizer.chat_template):
            raise ConfigError("template 'chat' needs a tokenizer with a chat template; use 'alpaca' or 'none'")
        if not self._is_chat and self._eos is None:
            raise ConfigError(
                f"template {self._told.name!r} needs a tokenizer with an eos token to end completions with"
            )

    @cached_property
    def _told(self) -> Template:
        return Template.of(self.template).resolved(self.tokenizer)

    @property
    def _is_chat(self) -> bool:
        return self._told.name == "chat"

    @cached_property
    def _chat(self) -> Conversations:
        return Conversations(self.tokenizer, self._told, self._spelled)

    def __call__(self, examples: Sequence[Example]) -> Iterator[tuple[list[int], list[int]]]:
        """Ids of prompt and completion, one pair for each example in order.

        Raises DataError for an example that the template cannot express.
        """
        for example, ids in zip(examples, self.each(examples), strict=True):
            if isinstance(ids, DataError):
                raise DataError(f"{example.source}: {ids}") from ids
            yield ids

    @property
    def left_out(self) -> Counter[str]:
        """Fields of the prompts' turns that a chat template did not write, with the number of examples."""
        return self._chat.left_out

    def each(
        self, examples: Sequence[Example], change: Callable[[Example], Example] = lambda example: example
    ) -> Iterator[tuple[list[int], list[int]] | DataError]:
        """The same for each example, which ``change`` may change before, or what is wrong with it."""
        chunk: list[_Written | DataError] = []
        length = 0
        for example in examples:
            try:
                prompt, completion = self._texts(_with_some_answer(change(example)))
                chunk.append((prompt, completion if example.references else None))
                length += len(prompt) + len(completion)
            except DataError as error:
                chunk.append(error)
            except RecursionError:
                chunk.append(DataError("nested too deeply"))
            if len(chunk) == _CHUNK or length > _CHUNK_TEXT:
                yield from self._encode_chunk(chunk)
                chunk, length = [], 0
        yield from self._encode_chunk(chunk)

    def _encode_chunk(self, chunk: Sequence[_Written | DataError]) -> Iterator[tuple[list[int], list[int]] | DataError]:
        texts = [text for text in chunk if not isinstance(text, DataError)]
        prompts = iter(self._encode([prompt for prompt, _ in texts]))
        wholes = iter(self._encode([prompt + (completion or "") for prompt, completion in texts]))
        for text in chunk:
            yield text if isinstance(text, DataError) else self._ids(*text, next(prompts), next(wholes))

    def _ids(
        self, prompt: str, completion: str | None, prompt_ids: list[int], whole: list[int]
    ) -> tuple[list[int], list[int]] | DataError:
        if not prompt_ids:
            return DataError("the prompt has no tokens")
        try:
            if completion is None:
                return self._spelt(prompt, prompt_ids), []
            prompt_ids, whole = self._spelt(prompt, prompt_ids), self._spelt(prompt + completion, whole)
            return prompt_ids, self._ended(self._continuation(prompt_ids, whole, completion))
        except DataError as error:
            return error

    def _texts(self, example: Example) -> tuple[str, str]:
        return self._chat_texts(example) if self._is_chat else self._plain_texts(example)

    def _plain_texts(self, example: Example) -> tuple[str, str]:
        if [message.role for message in example.messages] != ["user"]:
            roles = ", ".join(message.role for message in example.messages)
            raise DataError(f"template {self._told.name!r} takes one user turn, not {roles}; use 'chat'")
        more = [*example.messages[0].more, *(example.answer.more if example.answer else ())]
        if more := [*more, "tools"] if example.tools else more:
            raise DataError(f"template {self._told.name!r} has no place for {', '.join(more)}; use 'chat'")
        if self._told.name == "none":
            return _plain_prompt(example.messages[0].content, example.input), example.completion
        instruction, context = self._as_text("user", [example.messages[0].content, example.input])
        return alpaca_prompt(instruction, context), self._as_text("assistant", example.completion)

    def _chat_texts(self, example: Example) -> tuple[str, str]:
        *before, last = example.messages
        turns = [*before, replace(last, content=_plain_prompt(last.content, example.input))]
        turns = [self._with_text(turn) for turn in turns]
        answer = self._with_text(example.answer or Message("assistant", example.completion))
        tools = self._as_text("tool", list(example.tools))
        prompt, completion = self._chat.write(turns, answer, tools)
        return prompt, completion.rstrip().removesuffix(self.plain_close)

    @cached_property
    def _spelled(self) -> Marks:
        return Marks(self.tokenizer)

    @cached_property
    def _of_the_template(self) -> frozenset[str]:
        """The tokens that turns are made of, in a chat template, and those that end a text."""
        added = self.tokenizer.added_tokens_decoder
        ends = self.eos_token_ids or {self._eos}
        written = set(ends)
        for text in self._chat.trials(again=True) if self._is_chat else ():
            written.update(self._alone(text))
        marks = {str(added[index]) for index in written if index in added}
        return frozenset(mark for mark in marks if "think" not in mark.lower())  # an answer writes its thoughts itself

    @cached_property
    def _patterns(self) -> dict[bool, re.Pattern[str]]:
        """The marks that are text in an answer (True), and in what others say."""
        special = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        return {True: one_of(self._of_the_template), False: one_of(self._of_the_template | special)}

    def _as_text(self, role: str, value: Any) -> Any:
        """``value`` with what it spells out of special tokens as text. (An answer may use those of which no turn is made.)"""
        return self._spelled.hide(value, self._patterns[role == "assistant"])

    def _with_text(self, turn: Message) -> Message:
        role, content, more = self._as_text(turn.role, [turn.role, turn.content, turn.more])
        return Message(role, content, more)

    def _spelt(self, text: str, ids: list[int]) -> list[int]:
        """The ids of ``text``, which are ``ids`` unless it has marks that are to be text."""
        if not self._spelled.hides(text):
            return ids
        ids = self._spelled.encode(text, add_special_tokens=not self._is_chat)
        return ids[:-1] if self._writes_end else ids

    def _encode(self, texts: list[str]) -> list[list[int]]:
        # A chat template writes its own special tokens; else the tokenizer's beginning token is wanted, not its end.
        if not texts:
            return []
        batch = self.tokenizer(texts, add_special_tokens=not self._is_chat)["input_ids"]
        return [ids[:-1] for ids in batch] if self._writes_end else batch

    @cached_property
    def _writes_end(self) -> bool:
        """Whether the tokenizer puts an end token behind every text. (One that the text itself ends with is the text's.)"""
        texts = [self.tokenizer("x", add_special_tokens=special)["input_ids"] for special in (True, False)]
        ends = [ids[-1:] == [self.tokenizer.eos_token_id] for ids in texts]
        return not self._is_chat and ends == [True, False]

    def _continuation(self, prompt_ids: list[int], whole: list[int], completion: str) -> list[int]:
        """The completion's ids as they follow ``prompt_ids``: in context, or alone if they would merge into the prompt.

        Alone is wrong for SentencePiece vocabularies, which put a space before any text that stands alone.
        """
        if whole[: len(prompt_ids)] == prompt_ids:
            return whole[len(prompt_ids) :]
        return self._alone(completion)

    @property
    def end(self) -> int | None:
        """The id that completions end with; None if the chat template does not show it before the first example."""
        if not self._is_chat:
            return self._eos
        if self._closing is None:
            return None
        return self._ended(self._alone("" if self.plain_close else self._closing))[-1]

    @cached_property
    def plain_close(self) -> str:
        """What a chat template writes behind an answer in ordinary text, if it has no token of its own for that, else "".

        No text could stop there, and every answer would end in these words; so they are left out.
        """
        closing = self._closing or ""
        return "" if self._marks.intersection(self._alone(closing)) else closing

    @cached_property
    def _closing(self) -> str | None:
        """What the chat template writes behind an answer, without white space at the end; None if it takes no probe."""
        for text in self._chat.trials():
            _, found, closing = text.rpartition(PROBE)
            if found:
                return closing.rstrip()
        return None

    @cached_property
    def _marks(self) -> frozenset[int]:
        """The tokens that may close an answer: the template's own after it, or, where that is not known, all special ones."""
        added = self.tokenizer.added_tokens_decoder
        if self._closing is None:
            known = {index for index, token in added.items() if token.special}
        else:
            known = {index for index in self._alone(self._closing) if index in added or index in self.eos_token_ids}
        # What the vocabulary does not have closes nothing.
        return frozenset(known - {self.tokenizer.unk_token_id})

    def _alone(self, text: str) -> list[int]:
        if self._spelled.hides(text):
            return self._spelled.encode(text, add_special_tokens=False)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _ended(self, completion_ids: list[int]) -> list[int]:
        """Up to the token that ends the turn: the first after the answer that stops generation, else the first of the template.

        Some templates write more after it, a newline or a second end token, where generation has long stopped. Without any,
        the eos token is added.
        """
        for ends in (self.eos_token_ids or {self._eos}, self._marks):
            for place in self._close_of(completion_ids):
                if completion_ids[place] in ends:
                    return completion_ids[: place + 1]
        if self._eos is None:
            raise ConfigError("neither the chat template nor the tokenizer has a token that ends a turn")
        return [*completion_ids, self._eos]

    @property
    def _eos(self) -> int | None:
        """What is added where a template writes no end: the tokenizer's eos token, or, if it has none, one that stops."""
        own = self.tokenizer.eos_token_id
        return min(self.eos_token_ids, default=None) if own is None else own

    def _close_of(self, completion_ids: list[int]) -> range:
        """The places of the template's own tokens after the answer, and of white space between them."""
        start = len(completion_ids)
        while (
            self._is_chat
            and start
            and (
                completion_ids[start - 1] in self._marks
                or not self.tokenizer.decode(completion_ids[start - 1 : start]).strip()
            )
        ):
            start -= 1
        return range(start, len(completion_ids))


def named(ids: Iterable[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Token ids with their tokens."""
    return " and ".join(f"{i} {token!r}" for i, token in ((i, _token(i, tokenizer)) for i in sorted(ids)))


def _token(token_id: int, tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.decode([token_id]) if 0 <= token_id < len(tokenizer) else "(no token)"
