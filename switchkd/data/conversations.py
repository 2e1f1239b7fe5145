"""What a chat template writes of a conversation: the prompt, and the answer after it, each of them whole.

A template is a program that others wrote, and may do anything with what it is told; so what it wrote is looked at.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from switchkd.base.errors import ConfigError, DataError
from switchkd.base.plain import shown
from switchkd.data.fields import THOUGHTS, Message
from switchkd.data.settings import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


PROBE = "It is forty-two."
_TURNS = tuple(Message(role, PROBE) for role in ("system", "user", "assistant"))
_PROBES = (_TURNS[1:], _TURNS)  # conversations to try a template with: some want a system turn
_OTHER = "4"  # an answer that begins with another letter
Tools = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Conversations:
    """A chat template at work. ``marks`` are those that texts hide, so that messages show them as they were typed.

    ``left_out`` counts the conversations in which it did not write a field of the prompt's turns, as a template may: names, ids of
    calls, earlier thoughts.
    """

    tokenizer: PreTrainedTokenizerBase
    template: Template
    marks: Marks
    left_out: Counter[str] = field(default_factory=Counter)

    def write(self, turns: Sequence[Message], answer: Message, tools: Tools) -> tuple[str, str]:
        """The prompt, up to where the answer begins, and what follows.

        Raises DataError where a part of them is missing or the template refuses them, ConfigError for a template that no answer
        can follow.
        """
        prompt = self._render(turns, tools, add_generation_prompt=True)
        prompt += self._header(turns, tools, prompt)
        conversation = self._render([*turns, answer], tools)
        if not conversation.startswith(prompt):
            # Either for every answer, or for what this one says beside its content.
            plain = self._render([*turns, Message("assistant", PROBE)], tools)
            raise (DataError if plain.startswith(prompt) else ConfigError)(
                f"the chat template's generation prompt {self._said(prompt[-40:])} is not how it begins an assistant turn, so no "
                "completion can follow it; use template 'alpaca' or 'none'"
            )
        completion = conversation[len(prompt) :]
        self._check_answer(answer, completion)
        self._check_prompt(turns, tools, prompt)
        return prompt, completion

    def trials(self, again: bool = False) -> Iterator[str]:
        """What it writes of conversations of `PROBE` alone, as far as it takes them; with the user asking ``again`` at the end."""
        for trial in _PROBES:
            try:
                yield self._render([*trial, trial[-2]] if again else trial)
            except DataError:
                continue

    def _render(self, turns: Sequence[Message], tools: Tools = (), *, add_generation_prompt: bool = False) -> str:
        return self._apply([turn.to_dict(self._in_parts) for turn in turns], tools, add_generation_prompt)

    def _apply(self, turns: list[dict[str, Any]], tools: Tools, add_generation_prompt: bool) -> str:
        offered = list(tools) or None
        template = self.template.text(self.tokenizer, offered) if offered else self._text
        try:
            return self.tokenizer.apply_chat_template(
                turns,
                tools=offered,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except (
            Exception
        ) as error:  # a template is a program, which transformers runs in a sandbox: it may fail in any way
            roles = ", ".join(turn["role"] for turn in turns)
            raise DataError(self.marks.spelled(f"the chat template refuses the turns {roles}: {error}")) from error

    @cached_property
    def _text(self) -> str:
        return self.template.text(self.tokenizer)

    @cached_property
    def _in_parts(self) -> bool:
        """Whether the template wants content as a list of parts, as models that see do; of plain text it then writes nothing."""
        for parts in (False, True):
            for trial in _PROBES:
                try:
                    text = self._apply([turn.to_dict(parts) for turn in trial], (), False)
                except DataError:
                    continue
                if text.count(PROBE) >= len(trial):
                    return parts
        return False

    @cached_property
    def _writes_generation_prompt(self) -> bool:
        for *turns, _ in _PROBES:
            try:
                return self._render(turns, add_generation_prompt=True) != self._render(turns)
            except DataError:
                continue
        return True

    def _header(self, turns: Sequence[Message], tools: Tools, prompt: str) -> str:
        """How an answer begins, whatever it says, where the template has no generation prompt that would say so.

        A space before the answer belongs to the answer: its first word is one token with it.
        """
        if self._writes_generation_prompt:
            return ""
        answers = [Message("assistant", PROBE), Message("assistant", _OTHER)]
        answers.append(Message("assistant", _OTHER, {THOUGHTS[0]: _OTHER}))
        written = [self._render([*turns, answer], tools).removeprefix(prompt) for answer in answers]
        same = takewhile(lambda letters: len(set(letters)) == 1, zip(*written, strict=False))
        return "".join(letters[0] for letters in same).rstrip(" ")

    def _check_answer(self, answer: Message, completion: str) -> None:
        """Raise DataError for an answer of which the template leaves out a part: it would be trained without."""
        for what, text in (("content", answer.content), ("thoughts", answer.thoughts)):
            if not _stands(text, completion):
                raise DataError(
                    f"the chat template leaves out the answer's {what} ({self._said(text)}) or a part of it; write it as the "
                    "template wants it, or use another template"
                )
        if lost := [call["name"] for call in answer.calls if call["name"] not in completion]:
            raise DataError(
                f"the chat template leaves out the answer's call of {self._said(lost[0])}; use another template"
            )

    def _check_prompt(self, turns: Sequence[Message], tools: Tools, prompt: str) -> None:
        """Raise DataError for a turn or a tool of which the template writes nothing; thoughts of earlier turns it may leave out."""
        for place, turn in enumerate(turns):
            if _stands(turn.content.rpartition("</think>")[2], prompt):
                continue
            trial = [*turns[:place], replace(turn, content=PROBE), *turns[place + 1 :]]
            if PROBE not in self._render(trial, tools, add_generation_prompt=True):
                raise DataError(
                    f"the chat template leaves out the {turn.role} turn {self._said(turn.content)}; take it out, or use another "
                    "template"
                )
        names = [tool.get("function", tool)["name"] for tool in tools]
        names += [call["name"] for turn in turns for call in turn.calls]
        if lost := [name for name in names if name not in prompt]:
            raise DataError(
                f"the chat template leaves out the tool {self._said(lost[0])}, or a call of it; use a model whose template takes "
                "tools"
            )
        unwritten = {
            f"messages[].{name}"
            for turn in turns
            for name, text in turn.more.items()
            if isinstance(text, str) and not _stands(text, prompt)
        }
        self.left_out.update(sorted(unwritten))

    def _said(self, text: str) -> str:
        return shown(self.marks.spelled(text))


def _stands(text: str, written: str) -> bool:
    """Whether a template wrote a text, whatever it did to white space."""
    return text.strip() in written or "".join(text.split()) in "".join(written.split())


_FIRST, _LAST = 0xF0000, 0xFFFFD  # private characters of Unicode's plane 15


# --- special tokens that a text spells out ------------------------------------------------------------------------

_PRIVATE = re.compile(f"[{chr(_FIRST)}-{chr(_LAST)}]")


class Marks:
    """The tokens of a tokenizer that texts can spell out, each with the private character that stands for it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = {str(token): index for index, token in tokenizer.added_tokens_decoder.items() if str(token)}
        self._ids = added
        self._hidden = {mark: chr(_FIRST + place) for place, mark in enumerate(added)}
        self._shown = {character: mark for mark, character in self._hidden.items()}
        special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special and str(token)]
        self._special = one_of(special)

    def hide(self, value: Any, marks: re.Pattern[str]) -> Any:
        """A text, or all texts inside a JSON value, with the marks in them hidden. Raises DataError for private characters."""
        if isinstance(value, dict):
            return {name: self.hide(one, marks) for name, one in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self.hide(one, marks) for one in value)
        if not isinstance(value, str):
            return value
        if found := _PRIVATE.search(value):
            raise DataError(
                f"it holds the private character {shown(found[0])}, which has no meaning in text; take it out"
            )
        return marks.sub(lambda found: self._hidden[found[0]], value)

    def spelled(self, text: str) -> str:
        """``text`` with the hidden marks as they were."""
        return _PRIVATE.sub(lambda found: self._shown.get(found[0], found[0]), text)

    def hides(self, text: str) -> bool:
        """Whether a mark is hidden in ``text``."""
        return bool(_PRIVATE.search(text))

    def encode(self, text: str, **settings: bool) -> list[int]:
        """The ids of a text with hidden marks, which are encoded as ordinary text.

        Raises DataError if the tokenizer cannot do that: it has them as tokens that are always found, or what stands between two
        tokens has other ids when it is encoded alone.
        """
        harmless = _PRIVATE.sub("x", text)
        ids = self._apart(text, **settings)
        hidden = {self._shown[character] for character in _PRIVATE.findall(text)}
        stuck = [mark for mark in hidden if ids.count(self._ids[mark]) != text.count(mark)]
        if stuck or self._apart(harmless, **settings) != self._tokenizer(harmless, **settings)["input_ids"]:
            marks = ", ".join(sorted(stuck or hidden))
            raise DataError(f"it spells out {marks}, which this tokenizer can only read as tokens; take that out")
        return ids

    def _apart(self, text: str, add_special_tokens: bool) -> list[int]:
        """What stands between the text's own special tokens, piece by piece."""
        ids: list[int] = []
        place = 0
        for found in [*self._special.finditer(text), None]:
            piece = self.spelled(text[place : found.start() if found else len(text)])
            if piece or not ids:
                first = add_special_tokens and not ids
                ids += self._tokenizer(piece, add_special_tokens=first, split_special_tokens=True)["input_ids"]
            if found:
                ids.append(self._ids[found[0]])
                place = found.end()
        return ids


def one_of(marks: Collection[str]) -> re.Pattern[str]:
    """A pattern that finds any of ``marks``, the longest first; without any it finds nothing."""
    return re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True))) or r"(?!)")
