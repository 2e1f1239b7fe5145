"""The commands that write text: `generate` completes prompts, `chat` talks with a student, `play` shows how a text comes about.

Where a student writes alone, no teacher is loaded, or asked for.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from switchkd.base.settings import Settings
from switchkd.base.storage import write_output
from switchkd.base.terminal import bar, complain, console
from switchkd.data.settings import DataConfig, with_template
from switchkd.decoding.settings import DecodeConfig, DecodeSettings
from switchkd.methods.policy import StudentOnly
from switchkd.models.settings import ModelConfig

if TYPE_CHECKING:
    from switchkd.data.fields import Message
    from switchkd.data.settings import Template
    from switchkd.data.texts import TokenizedExample
    from switchkd.decoding.rollouts import Rollout, Rollouts
    from switchkd.models.pair import Pair


@dataclass(frozen=True)
class GenerateConfig(ModelConfig, DataConfig, DecodeConfig):
    """Complete prompts and say who wrote what; a run's student, or a model, writes alone unless a policy is named."""

    prompt: tuple[str, ...] = ()
    """Prompts as text, sent through the template; without any, those of eval_file are completed."""
    limit: int = 16
    """Rows of eval_file to complete."""
    output_file: str | None = None
    """Write rollouts here as JSONL: token ids, text, speakers, divergences."""
    seed: int = 0
    """Key of the noise, with each prompt's index and each position."""


@dataclass(frozen=True)
class PlayConfig(ModelConfig, DataConfig, DecodeConfig):
    """Watch one completion being written, and the divergence that decides who writes it."""

    prompt: str = ""
    """A prompt as text, sent through the template; without one a terminal asks, and elsewhere it is the first of eval_file."""
    seed: int = 0
    """Key of the noise, with the number of the prompt and each position."""


@dataclass(frozen=True)
class ChatConfig(Settings):
    """Talk to a run's student, or to any model: a line is a turn, /clear forgets what was said, /quit ends."""

    student_model_name_or_path: Annotated[str, tyro.conf.arg(aliases=["--student"])] = "demo"
    """Hub name or local folder of the model, where no run or model stands first; `demo`, `qwen-coder` and `small` are students."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """What the model multiplies in; auto is bfloat16 on a GPU that is good at it, else float32."""
    load_in_4bit: bool = False
    """The model's weights in 4 bits (NF4); needs the extra `qlora`."""
    template: str = DataConfig.template
    """The template that turns are written with, as in training; one that is no chat template knows no earlier turns."""
    template_date: str = ""
    """The day that a chat template writes as today's date; default that of the run, else today."""
    chat_template_kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Variables of the chat template, by name, such as enable_thinking False."""
    max_new_tokens: int = 256
    """Token budget of an answer."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: float = 1.0
    """Draw from the fewest tokens whose probability reaches this; 1 keeps all."""
    top_k: int = 0
    """Draw from this many most probable tokens; 0 keeps all."""
    min_p: float = 0.0
    """Draw from tokens with at least this share of the best one's probability; 0 keeps all."""
    seed: int = 0
    """Key of the noise, with the number of the turn and each position."""


def generate(config: GenerateConfig) -> None:
    from switchkd.reports.live import cost_line, print_rollout
    from switchkd.runs.opening import open_pair
    from switchkd.writing.examples import decode_examples

    if isinstance(config.policy, StudentOnly):
        pair = _open_alone(config.student_model_name_or_path, config.dtype, config.prompts, config.load_in_4bit)
        config = dataclasses.replace(config, teacher_prompt="", teacher_system_prompt="", teacher_field="", teachers={})
    else:
        pair = open_pair(config)
    config = with_template(config, pair.tokenizer, others=pair.other_tokenizers)
    examples, settings = _examples(config, pair, config.prompt, config.limit), _decoding(config, pair)
    with bar("generate", len(examples) * config.max_new_tokens) as progress:
        shown = 0

        def on_round(cost: Any) -> None:
            nonlocal shown
            progress.advance(cost.kept_tokens - shown, f"{cost.kept_tokens / cost.seconds:.0f} tokens/s")
            shown = cost.kept_tokens

        rollouts = decode_examples(pair, examples, settings, range(len(examples)), on_round)
    for rollout in rollouts:
        print_rollout(rollout, pair.tokenizer)
    console.print(cost_line(rollouts.cost), soft_wrap=True)
    if config.output_file:
        records = [
            {**r.to_json(), "text": pair.tokenizer.decode(r.completion_ids), **_words(r, pair)} for r in rollouts
        ]
        write_output(Path(config.output_file), "".join(json.dumps(record) + "\n" for record in records))


def _words(rollout: Rollout, pair: Pair) -> dict[str, Any]:
    """Who wrote each word, where teacher and student have different tokenizers."""
    from switchkd.reports.viewer import drawn

    if rollout.teacher_completion_ids is None:
        return {}
    found = drawn(rollout, pair.tokenizer, pair.bridges[rollout.teacher].sides)
    names = ("student", "teacher")
    return {"words": [{"text": w.text, "speaker": names[rollout.speakers[w.places.start]]} for w in found]}


def _open_alone(name: str, dtype: str, template: Template, load_in_4bit: bool) -> Pair:
    """A student without a teacher, with what is odd about it said, and the proof that it is decoded exactly."""
    from switchkd.forward.proof import prove
    from switchkd.models.pair import load_alone

    pair = load_alone(name, dtype, template, load_in_4bit)
    for warning in pair.warnings:
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True)
    with bar("prove that the model is decoded exactly", 1) as shown:
        prove(pair.student)
        shown.advance()
    return pair


def _examples(config: Any, pair: Pair, prompts: Sequence[str], limit: int) -> list[TokenizedExample]:
    """The prompts, or where there are none the first that are held out."""
    from switchkd.runs.heldout import prompts_to_complete
    from switchkd.runs.opening import prompt_examples

    if prompts:
        return prompt_examples(prompts, config, pair)
    return prompts_to_complete(config, pair, limit)


def _decoding(config: Any, pair: Pair) -> DecodeSettings:
    return config.decoding(policy=config.policy.bind(pair.tokenizer, config.max_new_tokens), seed=config.seed)


def play(config: PlayConfig) -> None:
    from switchkd.reports.live import play as play_rollout
    from switchkd.runs.opening import open_pair

    pair = open_pair(config)
    config = with_template(config, pair.tokenizer, others=pair.other_tokenizers)
    settings = _decoding(config, pair)
    asks = sys.stdin.isatty() and not config.prompt
    prompts = takewhile(bool, _typed("prompt (empty to end): ")) if asks else iter([config.prompt])
    for number, prompt in enumerate(prompts):
        [example] = _examples(config, pair, [prompt] if prompt else [], 1)
        play_rollout(pair, example, settings, number)


def _typed(asking: str) -> Iterator[str]:
    """Lines that are typed, or come from elsewhere, until the end of the input."""
    while True:
        try:
            yield input(asking if sys.stdin.isatty() else "").strip()
        except EOFError:
            return


def chat(config: ChatConfig) -> None:
    from switchkd.data.fields import Message

    data = DataConfig(
        template=config.template,  # type: ignore[arg-type]  # which it checks
        template_date=config.template_date,
        chat_template_kwargs=config.chat_template_kwargs,
    )
    name = config.student_model_name_or_path
    pair = _open_alone(name, config.dtype, data.prompts, config.load_in_4bit)
    data = with_template(data, pair.tokenizer)
    same = ("max_new_tokens", "temperature", "seed", "top_p", "top_k", "min_p")
    settings = DecodeSettings(StudentOnly(), **{each: getattr(config, each) for each in same})
    if sys.stdin.isatty():
        console.print(f"{name}: a line is a turn; /clear forgets what was said, /quit ends", soft_wrap=True)
    turns: list[Message] = []
    for number, text in enumerate(_typed("> ")):
        if text == "/quit":
            break
        if text == "/clear" or data.template != "chat":
            turns = []
        if text and text != "/clear":
            asked = [*turns, Message("user", text)]
            answer = _answer(pair, asked, data.prompts, settings, number)
            turns = turns if answer is None else [*asked, Message("assistant", answer)]


def _answer(
    pair: Pair, turns: Sequence[Message], template: Template, settings: DecodeSettings, number: int
) -> str | None:
    """The model's next turn, printed as it is written; None, and why, where there is none."""
    from switchkd.data.examples import Example
    from switchkd.data.templates import Encoder
    from switchkd.data.texts import TokenizedExample
    from switchkd.writing.examples import decode_examples

    example = Example(number, tuple(turns), "", (), f"turn {number}")
    [(prompt_ids, _)] = Encoder(pair.tokenizer, template)([example])
    asked = TokenizedExample(number, prompt_ids, [], [], (), False, example.source)
    stream = _Stream(lambda ids: pair.tokenizer.decode(ids, skip_special_tokens=True))
    [rollout] = decode_examples(pair, [asked], settings, [number], watch=stream.watch if console.is_terminal else None)
    if rollout.error:
        complain(f"error: {rollout.error}; /clear forgets what was said before")
        return None
    stream.end(rollout.completion_ids)
    if rollout.stop_reason == "length":
        complain(f"note: the answer was cut at max_new_tokens {settings.max_new_tokens}")
    return stream.text


class _Stream:
    """Text that grows, of which what is new is printed."""

    def __init__(self, text_of: Callable[[list[int]], str]):
        self.text, self._text_of = "", text_of

    def watch(self, rows: Rollouts) -> None:
        # The last token may hold the first bytes of a character alone.
        self._print(self._text_of(rows[0].completion_ids).rstrip("\ufffd"))

    def end(self, completion_ids: list[int]) -> None:
        self._print(self._text_of(completion_ids))
        console.print()

    def _print(self, text: str) -> None:
        console.print(text[len(self.text) :], end="", soft_wrap=True)
        self.text = text
