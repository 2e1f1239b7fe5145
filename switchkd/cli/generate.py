"""The commands that write text: `generate` completes prompts, `play` shows how one completion comes about."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switchkd.base.storage import write_output
from switchkd.base.terminal import bar, console
from switchkd.data.settings import DataConfig, with_template
from switchkd.decoding.settings import DecodeConfig, DecodeSettings
from switchkd.models.settings import ModelConfig

if TYPE_CHECKING:
    from switchkd.data.texts import TokenizedExample
    from switchkd.models.pair import Pair


@dataclass(frozen=True)
class GenerateConfig(ModelConfig, DataConfig, DecodeConfig):
    """Complete prompts under a policy and say who wrote what; of a run, its student writes alone unless a policy is named."""

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


def generate(config: GenerateConfig) -> None:
    from switchkd.decoding.decode import decode_examples
    from switchkd.reports.live import cost_line, print_rollout
    from switchkd.runs.opening import open_pair

    pair = open_pair(config)
    config = with_template(config, pair.tokenizer)
    examples, settings = _examples(config, pair, config.prompt, config.limit), _decoding(config, pair)
    with bar("generate", len(examples) * config.max_new_tokens) as progress:
        shown = 0

        def on_round(cost: Any) -> None:
            nonlocal shown
            progress.advance(cost.kept_tokens - shown, f"{cost.kept_tokens / cost.seconds:.0f} tok/s")
            shown = cost.kept_tokens

        rollouts = decode_examples(pair, examples, settings, range(len(examples)), on_round)
    for rollout in rollouts:
        print_rollout(rollout, pair.tokenizer)
    console.print(cost_line(rollouts.cost), soft_wrap=True)
    if config.output_file:
        records = [{**r.to_json(), "text": pair.tokenizer.decode(r.completion_ids)} for r in rollouts]
        write_output(Path(config.output_file), "".join(json.dumps(record) + "\n" for record in records))


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
    config = with_template(config, pair.tokenizer)
    settings = _decoding(config, pair)
    prompts = _asked() if sys.stdin.isatty() and not config.prompt else [config.prompt]
    for number, prompt in enumerate(prompts):
        [example] = _examples(config, pair, [prompt] if prompt else [], limit=1)
        play_rollout(pair, example, settings, number)


def _asked() -> Iterator[str]:
    """Prompts that are typed, until an empty one or the end of the input."""
    with suppress(EOFError):
        while prompt := input("prompt (empty to end): ").strip():
            yield prompt
