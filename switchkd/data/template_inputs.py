"""What a chat template is told besides the conversation: which day it is, and variables of its own.

Some templates write today's date (Llama 3.2's, SmolLM3's, GPT-OSS's), so that a prompt would be another one after midnight. Here
the day is a setting like any other: it is chosen once, stands in the run's config.yaml, and is what the template's clock says.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from switchkd.base.errors import ConfigError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


TEMPLATES = ("chat", "alpaca", "none")
CLOCK = "strftime_now"  # what a template calls to ask for the day, with a format for `strftime`
DAY = "date_string"  # what older ones take it from, where somebody gives it: Llama 3.1's
DAY_FORMAT = "%d %b %Y"
SOME_DAY = "2000-01-01"
DATE = "template_date"  # the setting
_DIRECTIVES = "aAbBcCdDeFGgHhIjklmMnpPrRSTtuUVwWxXyYzZ"
_FROM_CONVERSATION = {"messages", "tools", "documents", "add_generation_prompt"}
Value = bool | int | float | str


@dataclass(frozen=True)
class Template:
    """How text becomes a prompt: ``chat`` (the tokenizer's own template), ``alpaca`` or ``none``.

    A chat template is told the ``date``, as 2026-11-29 or 2026-11-29T09:30 ("": it reads the clock), and the ``variables`` that
    it has, such as ``{"enable_thinking": False}``. Raises ConfigError for what no template can be told.
    """

    name: str
    date: str = ""
    variables: Mapping[str, Value] = field(default_factory=dict)

    @staticmethod
    def of(template: str | Template) -> Template:
        """The template of that name, which is told nothing; or the template itself."""
        return template if isinstance(template, Template) else Template(template)

    def __post_init__(self) -> None:
        if self.name not in TEMPLATES:
            raise ConfigError(f"unknown template {self.name!r}{nearest(self.name, TEMPLATES)}")
        _moment(self.date or SOME_DAY)
        if self.variables and self.name != "chat":
            raise ConfigError(
                f"chat_template_kwargs are for the template 'chat', and the template is {self.name!r}; leave them out"
            )
        for name, value in self.variables.items():
            _check_variable(name, value)

    def reads_date(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether prompts depend on the day."""
        text = self._own_text(tokenizer)
        return _mentions(text, CLOCK) or (bool(self.date) and _mentions(text, DAY) and DAY not in self.variables)

    def text(self, tokenizer: PreTrainedTokenizerBase, tools: list[Any] | None = None) -> str:
        """The tokenizer's chat template behind lines that tell it the day and the variables.

        Raises ConfigError if it reads a variable nowhere.
        """
        own = self._own_text(tokenizer, tools)
        for name in self.variables:
            if not _mentions(own, name):
                raise ConfigError(
                    f"chat_template_kwargs: the chat template reads no variable {name!r}, so it would change nothing"
                    f"{nearest(name, set(re.findall(r'[A-Za-z_]+', own)))}"
                )
        told = dict(self.variables)
        if self.date and _mentions(own, DAY) and not _mentions(own, CLOCK):
            told.setdefault(DAY, _moment(self.date).strftime(DAY_FORMAT))
        lines = [f"{{%- set {name} = {json.dumps(value, ensure_ascii=False)} %}}" for name, value in told.items()]
        if self.date and _mentions(own, CLOCK):
            lines.append(_stopped_clock(_moment(self.date)))
        # The line break behind a block is not written, and white space before the template's first block stands at a line's start.
        return "".join(f"{line}\n" for line in lines) + own

    def _own_text(self, tokenizer: PreTrainedTokenizerBase, tools: list[Any] | None = None) -> str:
        if self.name != "chat" or not tokenizer.chat_template:
            return ""
        try:
            return tokenizer.get_chat_template(tools=tools)
        except ValueError as error:  # several templates by name, and none of them the default
            raise ConfigError(f"template 'chat' cannot be used: {error}") from error


def today() -> str:
    """The day here and now, as a setting says it."""
    return datetime.now().date().isoformat()


def _moment(date: str) -> datetime:
    try:
        return datetime.fromisoformat(date)
    except ValueError as error:
        raise ConfigError(f"template_date must be a day such as 2026-11-29, got {date!r}: {error}") from error


def _check_variable(name: str, value: Any) -> None:
    if not re.fullmatch(r"[A-Za-z_]\w*", name) or name in _FROM_CONVERSATION:
        raise ConfigError(
            f"chat_template_kwargs: a template has no variable {name!r} that a setting could give; a name is letters, digits and "
            f"_, and none of {', '.join(sorted(_FROM_CONVERSATION))}, which come with each conversation"
        )
    if name == CLOCK:
        raise ConfigError(
            f"chat_template_kwargs: {CLOCK} is the template's clock; set template_date, such as 2026-11-29"
        )
    if isinstance(value, str) and value.lower() in ("true", "false"):
        raise ConfigError(
            f"chat_template_kwargs: {name} is the word {value!r}, which a template takes for true; on a command line write "
            f"{value.title()}, in a recipe {value.lower()} without quotes"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"chat_template_kwargs: {name} must be a finite number, got {value}")


def _mentions(text: str, name: str) -> bool:
    return re.search(rf"\b{name}\b", text) is not None


def _stopped_clock(moment: datetime) -> str:
    """A macro that takes the place of a template's clock: the same formats, of one moment.

    Text in the template's own language, because transformers hand no function to it.
    """
    words = {f"%{directive}": moment.strftime(f"%{directive}") for directive in _DIRECTIVES}
    # Without padding, as Linux and macOS have it: 3 for 03.
    words |= {f"%-{directive}": words[f"%{directive}"].lstrip("0 ") or "0" for directive in "dHIjmMSeklyUW"}
    table = json.dumps(list(words.items()), ensure_ascii=False)
    return (
        f"{{%- macro {CLOCK}(format) %}}{{%- set said = namespace(text=format.replace('%%', '\\x00')) %}}"
        f"{{%- for name, word in {table} %}}{{%- set said.text = said.text.replace(name, word) %}}{{%- endfor %}}"
        "{{- said.text.replace('\\x00', '%') }}{%- endmacro %}"
    )
