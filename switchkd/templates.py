"""Prompt templates: how an example's text becomes prompt and completion token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from string import Formatter
from typing import TYPE_CHECKING

from switchkd.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from switchkd.data import Example

TEMPLATES = ("chat", "alpaca", "none")
TEACHER_FIELDS = ("prompt", "completion")
_CHUNK = 256


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


def check_teacher_prompt(text: str) -> None:
    """Raise ConfigError unless ``text`` has at least one of the fields {prompt} and {completion}, and no other."""
    try:
        parts = [part for part in Formatter().parse(text) if part[1] is not None]
    except ValueError as error:
        raise ConfigError(f"teacher_prompt {text!r}: {error}; write {{{{ and }}}} for braces") from error
    for _, name, layout, conversion in parts:
        if name not in TEACHER_FIELDS or layout or conversion:
            written = f"{{{name}{f'!{conversion}' if conversion else ''}{f':{layout}' if layout else ''}}}"
            raise ConfigError(
                f"teacher_prompt {text!r} has the unknown field {written}; known are {{prompt}} and {{completion}}; write {{{{ and "
                "}} for braces"
            )
    if not parts:
        raise ConfigError(
            f"teacher_prompt {text!r} has none of the fields {{prompt}} and {{completion}}, so it would be the same for every row"
        )


def for_teacher(example: Example, teacher_prompt: str) -> Example:
    """The example with its last user turn replaced by ``teacher_prompt``, filled in; an ``input`` stays beside it.

    Raises DataError if it has no user turn.
    """
    turns = list(example.messages)
    users = [place for place, turn in enumerate(turns) if turn.role == "user"]
    if not users:
        roles = ", ".join(turn.role for turn in turns)
        raise DataError(f"{example.source}: no user turn that teacher_prompt could replace (roles: {roles})")
    turn = turns[users[-1]]
    content = teacher_prompt.format(prompt=turn.content, completion=example.completion)
    turns[users[-1]] = replace(turn, content=content)
    return replace(example, messages=tuple(turns))


@dataclass(frozen=True)
class Encoder:
    """Turns examples into (prompt_ids, completion_ids); a completion ends with the end-of-turn token.

    ``chat`` is the tokenizer's own chat template, ``alpaca`` the Alpaca prompt, ``none`` the prompt text as it is.
    Raises ConfigError if the template is unknown or the tokenizer lacks what it needs.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str

    def __post_init__(self) -> None:
        if self.template not in TEMPLATES:
            raise ConfigError(f"unknown template {self.template!r}{nearest(self.template, TEMPLATES)}")
        if self.template == "chat" and not self.tokenizer.chat_template:
            raise ConfigError("template 'chat' needs a tokenizer with a chat template; use 'alpaca' or 'none'")
        if self.template != "chat" and self.tokenizer.eos_token_id is None:
            raise ConfigError(f"template {self.template!r} needs a tokenizer with an eos token to end completions with")

    def __call__(self, examples: Sequence[Example]) -> Iterator[tuple[list[int], list[int]]]:
        """Ids of prompt and completion, one pair for each example in order.

        Raises DataError for an example that the template cannot express.
        """
        for start in range(0, len(examples), _CHUNK):
            yield from self._encode_chunk(examples[start : start + _CHUNK])

    def _encode_chunk(self, examples: Sequence[Example]) -> Iterator[tuple[list[int], list[int]]]:
        write = self._chat_texts if self.template == "chat" else self._plain_texts
        texts = [write(example) for example in examples]
        prompts = self._encode([prompt for prompt, _ in texts])
        wholes = self._encode([prompt + completion for prompt, completion in texts])
        for example, (_, completion), prompt_ids, whole in zip(examples, texts, prompts, wholes, strict=True):
            if not prompt_ids:
                raise DataError(f"{example.source}: the prompt has no tokens")
            yield prompt_ids, self._ended(self._continuation(prompt_ids, whole, completion))

    def _plain_texts(self, example: Example) -> tuple[str, str]:
        if [message.role for message in example.messages] != ["user"]:
            roles = ", ".join(message.role for message in example.messages)
            raise DataError(
                f"{example.source}: template {self.template!r} takes one user turn, not {roles}; use 'chat'"
            )
        write = alpaca_prompt if self.template == "alpaca" else _plain_prompt
        return write(example.messages[0].content, example.input), example.completion

    def _chat_texts(self, example: Example) -> tuple[str, str]:
        turns = [{"role": message.role, "content": message.content} for message in example.messages]
        turns[-1]["content"] = _plain_prompt(turns[-1]["content"], example.input)
        prompt = self._render(turns, example.source, add_generation_prompt=True)
        answer = {"role": "assistant", "content": example.completion}
        conversation = self._render([*turns, answer], example.source, add_generation_prompt=False)
        if not conversation.startswith(prompt):
            raise ConfigError(
                f"{example.source}: the chat template's generation prompt {prompt[-40:]!r} is not how it begins an "
                "assistant turn, so no completion can follow it; use template 'alpaca' or 'none'"
            )
        return prompt, conversation[len(prompt) :].rstrip()

    def _render(self, turns: list[dict[str, str]], source: str, *, add_generation_prompt: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (
            Exception
        ) as error:  # a template is a program, which transformers runs in a sandbox: it may fail in any way
            roles = ", ".join(turn["role"] for turn in turns)
            raise DataError(f"{source}: the chat template refuses the turns {roles}: {error}") from error

    def _encode(self, texts: list[str]) -> list[list[int]]:
        # A chat template writes its own special tokens; else the tokenizer's beginning token is wanted, not its end.
        batch = self.tokenizer(texts, add_special_tokens=self.template != "chat")["input_ids"]
        return [ids[:-1] for ids in batch] if self._writes_end else batch

    @cached_property
    def _writes_end(self) -> bool:
        """Whether the tokenizer puts an end token behind every text. (One that the text itself ends with is the text's.)"""
        texts = [self.tokenizer("x", add_special_tokens=special)["input_ids"] for special in (True, False)]
        ends = [ids[-1:] == [self.tokenizer.eos_token_id] for ids in texts]
        return self.template != "chat" and ends == [True, False]

    def _continuation(self, prompt_ids: list[int], whole: list[int], completion: str) -> list[int]:
        """The completion's ids as they follow ``prompt_ids``: in context, or alone if they would merge into the prompt.

        Alone is wrong for SentencePiece vocabularies, which put a space before any text that stands alone.
        """
        if whole[: len(prompt_ids)] == prompt_ids:
            return whole[len(prompt_ids) :]
        return self.tokenizer(completion, add_special_tokens=False)["input_ids"]

    def _ended(self, completion_ids: list[int]) -> list[int]:
        """Up to the token that ends the turn: the first special one after the answer, else the eos token is added."""
        end = 0
        if self.template == "chat":
            # Some templates write more after it, a newline or a second end token, where generation has long stopped.
            for position in reversed(range(len(completion_ids))):
                if completion_ids[position] in self._special_ids:
                    end = position + 1
                elif self.tokenizer.decode(completion_ids[position : position + 1]).strip():
                    break
        if end:
            return completion_ids[:end]
        if self.tokenizer.eos_token_id is None:
            raise ConfigError("neither the chat template nor the tokenizer has a token that ends a turn")
        return [*completion_ids, self.tokenizer.eos_token_id]

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special)
