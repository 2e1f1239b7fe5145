"""Where a text ends: the token ids that stop a pair's rows, and the law of the next token where the models end differently.

One definition for all that asks: training text closes with an id that stops, decoding and scoring stop there, and the saved
student's generation config says the same to everybody else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from switchkd.base.errors import ModelError, SwitchKDError
from switchkd.data.settings import AUTO, Template
from switchkd.data.templates import Encoder, named

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


MERGED = "merged_eos_token_id"  # in a generation config: the id that all of its ends count as


@dataclass(frozen=True)
class Ends:
    """The ids that end a text, sorted. Where ``merged_into`` is one of them, all of them are one event under that id.

    A base model ends with ``<|endoftext|>`` where its instruct model writes ``<|im_end|>``; compared token by token, the two
    would disagree about nothing but a name. Merged, ``p̃(c) = Σ p(u)`` over all ends u at the one id c, and 0 at the others.
    """

    ids: tuple[int, ...]
    merged_into: int | None = None

    @staticmethod
    def asked(eos_token_ids: Sequence[int] | Ends | None, vocab_size: int, *models: PreTrainedModel) -> Ends:
        """What ``decode`` is asked to stop at, for a vocabulary: a pair's ends, ids, or None for what the models declare.

        Ids are one event if a model's generation config says so, as those of a loaded pair do.
        """
        if isinstance(eos_token_ids, Ends):
            return eos_token_ids
        if eos_token_ids is None:
            eos_token_ids = sorted(_generation_ends(models))
        inside = [i for i in eos_token_ids if 0 <= i < vocab_size]
        return Ends(tuple(sorted(set(inside))), next((i for i in map(merged_by, models) if i in inside), None))

    def log_probs(self, logits: Tensor, temperature: float = 1.0) -> Tensor:
        """Log-softmax of ``[..., V]`` logits in fp32 or better, with the ends merged."""
        from switchkd.methods.divergences import log_probs

        return self.merged(log_probs(logits, temperature))

    def merged(self, logs: Tensor) -> Tensor:
        """Log-probabilities ``[..., V]`` with all ends at one id and −inf at the others; gradients reach every end.

        Where nothing is merged this is ``logs`` itself. A row of NaN stays one at every id: that is how it is found.
        """
        if self.merged_into is None:
            return logs
        import torch

        from switchkd.methods.policy import ids_on

        index = ids_on((self.merged_into, *self._others), logs.device)
        own = logs.index_select(-1, index)
        # A model that can write none of them: the gradient of logsumexp would be NaN there.
        none = (own == -math.inf).all(-1, keepdim=True)
        whole = own.masked_fill(none, 0.0).logsumexp(-1, keepdim=True).masked_fill(none, -math.inf)
        rest = own[..., 1:].detach()
        return logs.index_copy(-1, index, torch.cat([whole, rest.masked_fill(~rest.isnan(), -math.inf)], -1))

    def events(self, ids: Tensor) -> Tensor:
        """Token ids as the events that the merged law is over: every end is the one id."""
        if self.merged_into is None:
            return ids
        return ids.masked_fill(self.among(ids), self.merged_into)

    def among(self, ids: Tensor) -> Tensor:
        """Which of the token ids end a text, bool of their shape."""
        import torch

        from switchkd.methods.policy import ids_on

        return torch.isin(ids, ids_on(self.ids, ids.device))

    def answer(self, completion_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """A completion without an end that stands outside the text: one that the tokenizer added, special or not."""
        last = completion_ids[-1:]
        outside = last and last[0] in self.ids and last[0] in tokenizer.added_tokens_decoder
        return completion_ids[:-1] if outside else completion_ids

    @property
    def _others(self) -> list[int]:
        return [i for i in self.ids if i != self.merged_into]

    def declare(self, model: PreTrainedModel) -> None:
        """Say it in the model's generation config, which is saved with it: ``generate`` then stops where training does."""
        config = model.generation_config
        config.eos_token_id = self.ids[0] if len(self.ids) == 1 else list(self.ids)
        config._from_model_config = False  # so that nobody derives it from config.json again
        if self.merged_into is not None:
            setattr(config, MERGED, self.merged_into)

    def words(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The same for a reader."""
        stops = f"a text stops at {named(self.ids, tokenizer)}"
        if self.merged_into is None:
            return stops
        return f"{stops}; all of them count as one event, {named([self.merged_into], tokenizer)}"


NO_ENDS = Ends(())


def declared_ends(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None
) -> tuple[tuple[int, ...], str]:
    """The ids that end a model's own text, sorted, and a sentence about those that were not believed, or "".

    generation_config.json and the tokenizer's eos_token are believed. An eos_token_id that config.json alone names may be no more
    than a default of the architecture (2, 50256), which transformers fill in where the file says nothing, and which is an
    ordinary token here. It is believed if it is a special one, and not the one that begins texts or stands for unknown words.

    Raises ModelError if nothing is left, or a believed id lies outside the vocabulary.
    """
    written, copied = _generation_eos(model)
    own = _ids(tokenizer.eos_token_id) | written
    alone = (_config_eos(model) | copied) - own
    marks = set(tokenizer.all_special_ids) | {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    trusted = alone & (marks - {tokenizer.bos_token_id, tokenizer.unk_token_id})
    believed, name = own | trusted, model.config.model_type
    doubt = f"config.json alone names {named(alone - trusted, tokenizer)}" if alone - trusted else ""
    if not believed:
        raise ModelError(
            f"{name}: no EOS token in generation_config.json or the tokenizer, so no text would ever end"
            f"{f' ({doubt}, which marks no end)' if doubt else ''}; set eos_token_id in generation_config.json"
        )
    if vocab_size is not None and (outside := [i for i in sorted(believed) if not 0 <= i < vocab_size]):
        raise ModelError(
            f"EOS id {outside[-1]} lies outside the shared vocabulary of {vocab_size} ids; "
            "correct eos_token_id in the models' generation_config.json"
        )
    ids = tuple(sorted(believed))
    if doubt:
        return ids, (
            f"note: {name}: {doubt} as an end of texts, and neither generation_config.json nor the tokenizer knows it as one; it "
            f"is not believed, texts end at {named(ids, tokenizer)}"
        )
    if trusted:
        return ids, (
            f"note: {name}: config.json alone names {named(trusted, tokenizer)} as an end of texts; it is a special token, and "
            "believed"
        )
    return ids, ""


def pair_ends(
    declared: Mapping[str, tuple[int, ...]],
    tokenizer: PreTrainedTokenizerBase,
    template: str | Template = AUTO,
    merge: bool = False,
) -> tuple[Ends, tuple[str, ...]]:
    """The ends of models that write together, from those that each declares (by its role), and sentences about them.

    A text stops at all of them, and at the token that ``template`` closes an answer with, or nothing would ever stop there.
    If all models declare the same ends, and the template closes with one of these, each is an event of its own. Else all are
    one event, under the id that the template writes; so they are where ``merge`` says that they were before.
    Raises ConfigError for an unknown template.
    """
    ids = frozenset(i for own in declared.values() for i in own)
    close, told = _closing(tokenizer, Template.of(template), ids)
    stops = ids if close is None else ids | {close}
    if stops > ids:
        told.append(
            f"the chat template closes an answer with {named(stops - ids, tokenizer)}, at which nothing would stop: the models end "
            f"texts at {named(ids, tokenizer)}. It stops texts here too, and in the saved student's generation_config.json"
        )
    differ = len(set(declared.values())) > 1
    if len(stops) == 1 or not (differ or merge or stops > ids):
        return Ends(tuple(sorted(stops))), tuple(told)
    into = next(i for i in (close, tokenizer.eos_token_id, min(stops)) if i in stops)
    if differ:
        each = "; ".join(f"{role} {named(own, tokenizer)}" for role, own in declared.items())
        told.append(
            f"note: the models end texts differently ({each}); all of these count as one event, {named([into], tokenizer)}, to "
            "which each model's probabilities of them add up"
        )
    return Ends(tuple(sorted(stops)), into), tuple(told)


def merged_by(model: PreTrainedModel) -> int | None:
    """The id that a model's generation config says all of its ends count as, if it says so."""
    return getattr(model.generation_config, MERGED, None)


def _closing(
    tokenizer: PreTrainedTokenizerBase, template: Template, stops: frozenset[int]
) -> tuple[int | None, list[str]]:
    """The id that the template closes an answer with, None if that is not known before the first row, and a sentence about it."""
    try:
        encoder = Encoder(tokenizer, template, stops)
        close, left_out = encoder.end, encoder.plain_close
    except SwitchKDError:
        return None, []  # a template that cannot be used: said when text is to be written with it
    if not left_out or close is None:
        return close, []
    return close, [
        f"the chat template closes an answer with {left_out!r}, which is not one token of this tokenizer, so that no text could "
        f"stop there; answers end with {named([close], tokenizer)} in its place"
    ]


def _ids(value: Any) -> set[int]:
    """``eos_token_id`` of a config or tokenizer: one id, several or none."""
    if isinstance(value, str):
        raise ModelError(
            f"eos_token_id is the text {value[:100]!r}; correct it in the model's config files: a number, or a list of numbers"
        )
    return set() if value is None else {value} if isinstance(value, int) else set(value)


def _generation_eos(model: PreTrainedModel) -> tuple[set[int], set[int]]:
    """The ends that a generation config names itself, and those that transformers took over from config.json."""
    config = model.generation_config
    ids = _ids(getattr(config, "eos_token_id", None))
    copied = getattr(config, "_from_model_config", False) and ids <= _config_eos(model)
    return (set(), ids) if copied else (ids, set())


def _config_eos(model: PreTrainedModel) -> set[int]:
    configs = (model.config, model.config.get_text_config(decoder=True))
    return set().union(*(_ids(getattr(config, "eos_token_id", None)) for config in configs))


def _generation_ends(models: Sequence[PreTrainedModel]) -> set[int]:
    """The ends that generation configs name; only where none does, those of config.json."""
    found = [_generation_eos(model) for model in models]
    return set().union(*(own for own, _ in found)) or set().union(*(derived for _, derived in found))
