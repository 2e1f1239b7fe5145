"""The settings of data: which text, and how it becomes token ids."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from switchkd.base.errors import ConfigError
from switchkd.base.settings import Settings
from switchkd.data.template_inputs import DATE, Template, today
from switchkd.data.templates import check_teacher_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class DataConfig(Settings):
    """Which text, and how it becomes token ids."""

    train_file: str = "gsm8k-sample:train"
    """JSONL file, plain or gzip: prompt+completion, messages, Alpaca, GSM8K or DialogSum fields."""
    train_samples: int = -1
    """Rows of train_file to use, the first of it; -1 takes all."""
    eval_file: str = ""
    """Held-out JSONL file to score on; default the task's own data on the hub, and for no task `gsm8k-sample:heldout`."""
    template: Literal["chat", "alpaca", "none"] = "chat"
    """The model's chat template, the Alpaca template, or the prompt as it is."""
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
    teacher_prompt: str = ""
    """What the teacher reads in place of a training row's last user turn; fields {prompt} and {completion}. Not in evaluation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_samples == 0 or self.train_samples < -1:
            raise ConfigError(f"train_samples must be at least 1, or -1 for all, got {self.train_samples}")
        if self.teacher_prompt:
            check_teacher_prompt(self.teacher_prompt)
        _ = self.prompts  # which raises

    @property
    def prompts(self) -> Template:
        """How text becomes prompts; raises ConfigError for what no template can be told."""
        return Template(self.template, self.template_date, self.chat_template_kwargs)


Dated = TypeVar("Dated", bound="DataConfig")


def with_date(config: Dated, tokenizer: PreTrainedTokenizerBase, day: str | None = None) -> Dated:
    """``config`` with the day that its prompts are of (default: today), if they depend on one and it names none."""
    if config.template_date or not config.prompts.reads_date(tokenizer):
        return config
    return replace(config, template_date=day or today())


def template_settings(template: Template, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What the template is told, by the names of the settings, as far as prompts depend on it."""
    date = {DATE: template.date} if template.reads_date(tokenizer) else {}
    return date | ({"chat_template_kwargs": dict(template.variables)} if template.variables else {})
