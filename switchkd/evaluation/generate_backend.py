"""Completions by transformers' own ``generate``: a second opinion on the decoding engine.

``generate`` fills every setting that its caller leaves at None from ``model.generation_config``, and after that from defaults with
top_k 50. A hub's top_p, top_k or repetition_penalty (1.1 in Qwen2.5-0.5B-Instruct) would so change what a score is made of. The
model's generation config is therefore put aside for the call.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from switchkd.base import signals
from switchkd.base.errors import ConfigError, DataError
from switchkd.decoding.decode import DEFAULT_BATCH
from switchkd.decoding.settings import DecodeSettings
from switchkd.forward.ends import Ends
from switchkd.methods.policy import StudentOnly
from switchkd.methods.sampling import Use, noise_key
from switchkd.runner.architecture import beyond_context
from switchkd.runner.modes import evaluating

Completion = tuple[list[int], Literal["eos", "length"]]


def complete_by_generate(
    model: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    settings: DecodeSettings,
    eos_token_ids: Sequence[int] | Ends = (),
    vocab_size: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Completion]:
    """For each prompt the completion's token ids, with the EOS that ended it, and why it ended.

    Greedy (temperature 0) tokens are those of ``decode`` under `StudentOnly`. Sampled ones have the same law but are other tokens,
    and depend on the batch size: ``generate`` draws for a whole batch from one generator, seeded here by the seed and the batch's
    first prompt. Ids from ``vocab_size`` on are never drawn. Mode, generation config and the process's random
    state are as before afterwards. ``progress`` is told of every prompt that is done.

    Raises:
        ConfigError: a policy that asks a teacher. DataError: a prompt that is empty, or too long for the model's context.
    """
    if settings.policy != StudentOnly():
        raise ConfigError(f"the backend 'generate' knows no policies; {settings.policy} needs 'engine'")
    batch_size = settings.batch_size or DEFAULT_BATCH
    _check_prompts(prompt_ids, settings.max_new_tokens, model)
    rows = model.get_output_embeddings().weight.shape[0]
    ends = Ends.asked(eos_token_ids, rows if vocab_size is None else vocab_size, model)
    how = _generation_config(model, settings, list(ends.ids), vocab_size)
    completions: list[Completion] = []
    with evaluating(model), _own_config_aside(model):
        for start in range(0, len(prompt_ids), batch_size):
            signals.check()
            part = prompt_ids[start : start + batch_size]
            with _seeded(model.device, noise_key(settings.seed, start, 0, Use.GENERATE)):
                texts = _generate(model, part, how, ends)
            completions += [_cut(text, ends.ids) for text in texts]
            progress(len(part))
    return completions


def _generation_config(
    model: PreTrainedModel, settings: DecodeSettings, eos: list[int], vocab_size: int | None
) -> GenerationConfig:
    rows = model.get_output_embeddings().weight.shape[0]
    padding_rows = list(range(rows if vocab_size is None else vocab_size, rows))
    drawn = {"do_sample": True, **asdict(settings.sampling), "temperature": float(settings.temperature)}
    return GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=eos or None,
        pad_token_id=eos[0] if eos else 0,  # what follows a row's end is cut off
        suppress_tokens=padding_rows or None,
        use_cache=True,
        **(drawn if settings.temperature else {}),
    )


def _generate(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], how: GenerationConfig, ends: Ends
) -> list[list[int]]:
    """What ``generate`` writes after each prompt: prompts end together (padding is on the left), so answers start together."""
    longest = max(map(len, prompts))
    padded = [[how.pad_token_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    ids, attention_mask = (torch.tensor(rows, device=model.device) for rows in (padded, mask))

    def law(_: Tensor, logits: Tensor) -> Tensor:
        """The model's law with its ends merged; generate's temperature comes after it."""
        return ends.log_probs(logits)

    merge = LogitsProcessorList([] if ends.merged_into is None else [law])
    written = model.generate(ids, attention_mask=attention_mask, generation_config=how, logits_processor=merge)
    return written[:, longest:].tolist()


def _cut(row: list[int], eos_token_ids: Sequence[int]) -> Completion:
    """The row up to its first EOS; the shorter ones of a batch have padding after it."""
    end = next((place for place, token in enumerate(row) if token in eos_token_ids), None)
    return (row, "length") if end is None else (row[: end + 1], "eos")


def _check_prompts(prompt_ids: Sequence[Sequence[int]], max_new_tokens: int, model: PreTrainedModel) -> None:
    for number, prompt in enumerate(prompt_ids):
        if not prompt:
            raise DataError(f"prompt {number} is empty; give it at least one token")
        if words := beyond_context(len(prompt) + max_new_tokens, "model's", model):
            raise DataError(
                f"prompt {number}: {len(prompt)} tokens + max_new_tokens {max_new_tokens} {words}; shorten the prompt or lower "
                "max_new_tokens"
            )


@contextmanager
def _own_config_aside(model: PreTrainedModel) -> Iterator[None]:
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def _seeded(device: torch.device, key: int) -> Iterator[None]:
    """``generate`` takes no generator of its own: the device's is seeded, and put back as it was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        generator = torch.default_generator
        if device.type == "cuda":
            generator = torch.cuda.default_generators[device.index]
        generator.manual_seed(key % 2**63)
        yield
