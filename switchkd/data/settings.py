"""The settings of data: which text, and how it becomes token ids.

Some chat templates write today's date (Llama 3.2's, SmolLM3's, GPT-OSS's), so that a prompt would be another one after midnight.
Here the day is a setting like any other: it is chosen once, stands in the run's config.yaml, and is what the template's clock says.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from string import Formatter
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from switchkd.base.errors import ConfigError, nearest
from switchkd.base.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


TEACHER_FIELDS = ("prompt", "completion")
AUTO = "auto"
TEMPLATES = (AUTO, "chat", "alpaca", "none")
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
    """How text becomes a prompt: ``chat`` (the tokenizer's own template), ``alpaca`` or ``none``; ``auto`` is ``chat`` for a
    tokenizer that has a chat template, else ``alpaca``.

    A chat template is told the ``date``, as 2026-11-29 or 2026-11-29T09:30 ("": it reads the clock), and the ``variables`` that
    it has, such as ``{"enable_thinking": False}``. ``jinja`` is a chat template to use in place of the tokenizer's.
    Raises ConfigError for what no template can be told.
    """

    name: str
    date: str = ""
    variables: Mapping[str, Value] = field(default_factory=dict)
    jinja: str = ""

    @staticmethod
    def of(template: str | Template) -> Template:
        """The template of that name, which is told nothing; or the template itself."""
        return template if isinstance(template, Template) else Template(template)

    def __post_init__(self) -> None:
        if self.name not in TEMPLATES:
            raise ConfigError(f"unknown template {self.name!r}{nearest(self.name, TEMPLATES)}")
        _moment(self.date or SOME_DAY)
        if self.variables and self.name not in ("chat", AUTO):
            raise ConfigError(
                f"chat_template_kwargs are for the template 'chat', and the template is {self.name!r}; leave them out"
            )
        for name, value in self.variables.items():
            _check_variable(name, value)

    def resolved(self, tokenizer: PreTrainedTokenizerBase) -> Template:
        """This template, or the one that ``auto`` means for a tokenizer."""
        if self.name != AUTO:
            return self
        return replace(self, name="chat" if self.jinja or tokenizer.chat_template else "alpaca")

    def reads_date(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether prompts depend on the day."""
        text = self._own_text(tokenizer)
        return _mentions(text, CLOCK) or (bool(self.date) and _mentions(text, DAY) and DAY not in self.variables)

    def knows(self, variable: str, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether the chat template reads this variable."""
        return _mentions(self._own_text(tokenizer), variable)

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
        own = self.jinja or tokenizer.chat_template
        if self.resolved(tokenizer).name != "chat" or not own:
            return ""
        if self.jinja:
            return self.jinja
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


# --- the settings -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataConfig(Settings):
    """Which text, and how it becomes token ids."""

    train_file: tuple[str, ...] = ("gsm8k-sample:train",)
    """Data to train on, one file or several: JSON lines, a JSON list, CSV, Parquet, Arrow, a folder of save_to_disk, or
    hub:OWNER/NAME:SPLIT. What rows may look like stands in docs/data.md."""
    train_samples: int = -1
    """Rows of train_file to use, the first of it; -1 takes all."""
    eval_file: tuple[str, ...] = ()
    """Data to score on, of the same kinds. Without it a part of train_file is held out for that (eval_split)."""
    eval_split: float = 0.05
    """Share of train_file that is held out, and not trained on, where there is no eval_file; 0 holds nothing out."""
    assistant_turns: Literal["last", "all"] = "last"
    """Of a conversation with several answers: the last one is the completion, or each is one, with all before it as its prompt."""
    streaming: bool = False
    """Read data of the hub over the network, row by row and as far as train_samples goes, and keep none of it on the disk."""
    template: Literal["auto", "chat", "alpaca", "none"] = "auto"
    """How a row becomes a prompt: by the tokenizer's chat template, by the Alpaca template, or as it is (none). The default, auto,
    is the chat template where the tokenizer has one, else the Alpaca template."""
    template_date: str = ""
    """The day that a chat template writes as today's date, such as 2026-11-29; by default the day on which the run starts. It is
    recorded where prompts depend on it."""
    chat_template_kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Variables of the chat template, by name, such as enable_thinking False."""
    max_prompt_length: int = 256
    """Longer prompts are dropped and counted, never cut."""
    max_completion_length: int = 256
    """Longer reference completions are cut, without a false end token."""
    skip_bad: int = 0
    """Unusable rows tolerated in a data file before the run stops."""
    teacher_template: Literal["shared", "own"] = "shared"
    """The chat template under which the teacher reads prompts: one for both models, or that of its own folder, while the student
    reads under the student's."""
    teacher_system_prompt: str = ""
    """A system prompt that the teacher reads in place of the row's own, or before it; the student never sees it."""
    teacher_prompt: str = ""
    """What the teacher reads in place of a training row's last user turn; fields {prompt} and {completion}. Not in evaluation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_samples == 0 or self.train_samples < -1:
            raise ConfigError(f"train_samples must be at least 1, or -1 for all, got {self.train_samples}")
        if not self.train_file:
            raise ConfigError("train_file names no file; give at least one")
        if not 0 <= self.eval_split <= 0.5:
            raise ConfigError(f"eval_split is a share of the rows, from 0 to 0.5, got {self.eval_split}")
        if self.teacher_prompt:
            check_teacher_prompt(self.teacher_prompt)
        _ = self.prompts  # which raises

    @property
    def prompts(self) -> Template:
        """How text becomes prompts; raises ConfigError for what no template can be told."""
        return Template(self.template, self.template_date, self.chat_template_kwargs)


AnyData = TypeVar("AnyData", bound="DataConfig")


def with_template(
    config: AnyData,
    tokenizer: PreTrainedTokenizerBase,
    day: str | None = None,
    others: Sequence[PreTrainedTokenizerBase] = (),
) -> AnyData:
    """``config`` with the template that ``auto`` means for this tokenizer, and the day that its prompts are of (default: today), if
    they depend on one and it names none.

    ``others`` are those of teachers with a tokenizer of their own. Where ``auto`` means another template for one of them it stays,
    since each model reads under its own.
    """
    readers = (tokenizer, *others)
    names = {config.prompts.resolved(reader).name for reader in readers}
    if len(names) == 1:
        config = replace(config, template=names.pop())  # type: ignore[arg-type] # one of TEMPLATES
    if config.template_date or not any(config.prompts.reads_date(reader) for reader in readers):
        return config
    return replace(config, template_date=day or today())


def template_settings(template: Template, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What the template is told, by the names of the settings, as far as prompts depend on it."""
    date = {DATE: template.date} if template.reads_date(tokenizer) else {}
    return date | ({"chat_template_kwargs": dict(template.variables)} if template.variables else {})
