"""``switchkd check``: what a run would do and need, before it does anything, and with ``--estimate`` before anything is loaded."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from switchkd.base.errors import ConfigError, nearest
from switchkd.base.settings import to_dict
from switchkd.crossing.laws import SharedLaw
from switchkd.data.settings import with_template
from switchkd.data.templates import Encoder, named
from switchkd.data.texts import TokenizedExample
from switchkd.forward.base_model import BaseModel
from switchkd.forward.served import ServedModel
from switchkd.forward.text_path import beside_text, freeze_beside_text
from switchkd.methods.rules import name_of
from switchkd.models.adapters import add_adapter
from switchkd.models.loading import load_shapes, made
from switchkd.models.pair import Pair
from switchkd.models.settings import AUTO, BASE, cast_weights, dtype_name, quantised
from switchkd.runner.architecture import num_parameters
from switchkd.runs.estimate import GPUS, OF_MEMORY, Models, Spread, held, labelled, on_one_gpu, seconds, splits
from switchkd.runs.heldout import load_heldout
from switchkd.runs.opening import (
    check_context,
    load_corpus,
    load_train,
    load_validation,
    longest_teacher_prompt,
    role_of,
)
from switchkd.runs.tracking import check_trackers
from switchkd.teachers.across import compared, joined
from switchkd.teachers.asked import side_reader
from switchkd.training.optimizer import Masters
from switchkd.training.settings import TrainConfig
from switchkd.training.trainer import Trainer

# Answers that are matched, and tokens that are read of them, to say what two tokenizers share.
_ROWS_OF_BRIDGE, _PLACES_OF_BRIDGE = 8, 256


def check_run(config: TrainConfig, pair: Pair) -> list[str]:
    """Load data as a run would and say what it would do and need, in lines; trains nothing."""
    check_trackers(config.report_to)
    config = with_template(config, pair.tokenizer, others=pair.other_tokenizers)
    train = load_train(config, pair)
    heldout = load_heldout(config, pair)
    check_context(config, pair)
    trainer = Trainer(
        pair,
        train,
        config,
        validation=load_validation(config, pair, heldout.examples),
        corpus=load_corpus(config, pair),
    )
    config = replace(config, learning_rate=trainer.config.learning_rate)
    sources = {"": config.teacher_model_name_or_path, **config.teachers}
    models = {role_of(name): (sources[name], model) for name, model in pair.named_teachers.items()}
    models["student"] = config.student_model_name_or_path, pair.student
    lines = [
        f"{role}: {name}, {model.config.model_type}, {num_parameters(model) / 1e6:.1f}M parameters"
        f"{' (of its output layer)' if isinstance(model, ServedModel) else ''}, multiplied in "
        f"{dtype_name(model.dtype)}, {model.get_output_embeddings().weight.shape[0]} logits rows"
        for role, (name, model) in models.items()
    ]
    if pair.named_teachers.keys() - pair.bridges.keys():
        lines.append(f"vocabulary: {pair.vocab_size} ids, equal in both")
    for name in pair.bridges:
        lines += [f"two tokenizers, of the student and the {role_of(name)}:", *_of_bridge(pair, name, train)]
    close = Encoder(pair.tokenizer, config.prompts, frozenset(pair.eos_token_ids)).end
    written = "" if close is None else f"; training text closes with {named([close], pair.tokenizer)}"
    lines.append(f"ends: {pair.ends.words(pair.tokenizer)}{written}")
    budgets = {"tokens": config.max_train_tokens, "seconds": config.max_train_seconds}
    until = "".join(f", or {most:g} {unit}" for unit, most in budgets.items() if most)
    lines.append(
        f"steps: {trainer.total_steps} of {trainer.reading.rows_per_step} rows{until}; text: {name_of(config.mix)}"
    )
    need = memory_estimate(config, pair, trainer.learner.masters)
    parts = "".join(f"\n  {part}: {size / 2**30:.2f}" for part, size in need.items() if size)
    lines.append(f"memory without activations: {sum(need.values()) / 2**30:.2f} GiB{parts}")
    return [*lines, "", "settings:", yaml.safe_dump(to_dict(config), sort_keys=False).rstrip()]


def _of_bridge(pair: Pair, name: str, examples: Sequence[TokenizedExample]) -> list[str]:
    """What a pair with two tokenizers shares: on a probe, on the first rows, and how much of both models' probability."""
    bridge, rows = pair.bridges[name], [e for e in examples if e.teacher == name and e.completion_ids][:_ROWS_OF_BRIDGE]
    lines = bridge.describe()
    if not rows:
        return [f"  {line}" for line in lines]
    law = SharedLaw.of(bridge, pair.student.device)
    found = [compared(law, row) for row in rows]
    tokens, matched = sum(len(row.completion_ids) for row in rows), sum(map(len, found))
    lines.append(
        f"of the first {len(rows)} answers of the data, {matched / tokens:.1%} of {tokens} student tokens match"
    )
    places = joined(found, [(len(row.completion_ids), len(row.teacher_completion)) for row in rows])
    read = (pair.student, pair.side, [(r.prompt_ids, r.completion_ids) for r in rows], places.student), (
        pair.teacher_named(name), bridge.teacher, [(r.teacher_reads, r.teacher_completion) for r in rows], places.teacher,
    )  # fmt: skip
    for who, (model, side, texts, at) in enumerate(read):
        reader = side_reader(model, side)
        logs = reader.log_probs(reader.hidden(texts)[at[:_PLACES_OF_BRIDGE]]).to(pair.student.device)
        mass = law.mass(logs, who).mean().item()
        lines.append(f"there the shared tokens hold {mass:.2%} of the {side.role}'s probability")
    return [f"  {line}" for line in lines]


def memory_estimate(config: TrainConfig, pair: Pair, masters: Masters) -> dict[str, float]:
    """Bytes of what a training step holds, without activations, which depend on the architecture."""
    largest = max([pair.vocab_size, *(bridge.teacher.vocab_size for bridge in pair.bridges.values())])
    models = Models(pair.student, pair.named_teachers, largest, longest_teacher_prompt(config, pair))
    return labelled(held(config, models, masters), models, masters)


# --- before anything is loaded ------------------------------------------------------------------------------------


def estimate_run(config: TrainConfig, spread: Spread, gpu: str = "") -> list[str]:
    """What a run would take on each GPU of the table, or on the one that is named, from configs alone, in lines.

    Raises:
        ConfigError: there is no such GPU in the table, or the models cannot be spread so.
        ModelError: a config describes no causal language model that can be distilled here.
    """
    if gpu and gpu not in GPUS:
        raise ConfigError(f"gpu {gpu!r} is not in the table{nearest(gpu, GPUS)}; leave it out to see all of them")
    config = replace(config, **_on_a_gpu(config))
    models, masters = shapes(config)
    need = on_one_gpu(config, models, masters, spread)
    total, cards = sum(need.values()), [gpu] if gpu else list(GPUS)
    fitting = [card for card in cards if _holds(card, total)]
    lines = [
        "Calculated from the models' configs and the published figures of GPUs; none of this was measured on a GPU.",
        *_about(config, models, masters, spread),
        "",
        f"GB on each of {spread.processes} GPUs" if spread.processes > 1 else "GB on the GPU",
        *(f"  {part:<66}{size / 1e9:>8.2f}" for part, size in need.items() if size),
        f"  {'in all':<66}{total / 1e9:>8.2f}",
        "",
        *_times(config, models, masters, spread, {card: card in fitting for card in cards}),
        "",
        f"It is said to fit where it takes at most {OF_MEMORY:.0%} of the memory: {', '.join(fitting) or 'none of these'}.",
    ]
    return lines if len(fitting) == len(cards) else [*lines, *_ways_out(config, models, masters, spread, total)]


def shapes(config: TrainConfig) -> tuple[Models, Masters]:
    """The models of a run without their weights, the student as it would be trained, and its masters."""
    student = load_shapes(made(config.student_model_name_or_path, "student"))
    beside, unreached = _frozen_beside_text(student)
    compute = getattr(torch, config.dtype)
    if config.use_peft:
        cast_weights(student, compute)
        with torch.device("meta"):
            add_adapter(student, config, config.seed, beside)
    masters = Masters(student, compute)
    known: dict[str, PreTrainedModel] = {}
    teachers: dict[str, PreTrainedModel] = {}
    for name, source in {"": config.teacher_model_name_or_path, **config.teachers}.items():
        if source not in known:
            known[source] = BaseModel(student) if source == BASE else load_shapes(made(source, "teacher"))
            if source != BASE:
                unreached |= _frozen_beside_text(known[source])[1]
                cast_weights(known[source].requires_grad_(False), getattr(torch, config.teacher_dtype))
        teachers[name] = known[source]
    vocabularies = [model.config.get_text_config().vocab_size for model in (student, *teachers.values())]
    prompt = config.max_prompt_length
    if config.teacher_prompt:  # its words are at most as many tokens as bytes
        prompt += config.max_completion_length + len(config.teacher_prompt.encode())
    return Models(student, teachers, min(vocabularies), prompt, frozenset(unreached)), masters


def _frozen_beside_text(model: PreTrainedModel) -> tuple[tuple[str, ...], set[int]]:
    """Freeze what text does not reach, such as a vision tower; returns its modules, and the ids of its parameters."""
    if model.config.get_text_config() is model.config:
        return (), set()
    # Tensors without values, in whose place a forward may still ask for a number.
    with FakeTensorMode(allow_non_fake_inputs=True):
        unreached = {id(parameter) for parameter in beside_text(model).values()}
        return freeze_beside_text(model), unreached


def _on_a_gpu(config: TrainConfig) -> dict[str, Any]:
    """The dtypes that ``auto`` means on the GPUs of the table, all of which are good at bfloat16."""
    dtype = "bfloat16" if config.dtype == AUTO else config.dtype
    wide = "float64" if dtype == "float64" else "bfloat16"
    teacher = dtype if config.teacher_is_base else wide if config.teacher_dtype == AUTO else config.teacher_dtype
    return {"dtype": dtype, "teacher_dtype": teacher}


def _holds(card: str, total: float) -> bool:
    return total <= OF_MEMORY * GPUS[card].memory * 1e9


def _about(config: TrainConfig, models: Models, masters: Masters, spread: Spread) -> Iterator[str]:
    """What is reckoned with: the models, and the lengths that stand in for the data's."""
    sources = {"": config.teacher_model_name_or_path, **config.teachers}
    for name, model in models.teachers.items():
        split = f", each over {spread.teacher} GPUs" if spread.teacher > 1 else ""
        yield f"{role_of(name)}: {sources[name]}, {_size(model)}, in {dtype_name(model.dtype)}{split}"
    trained = sum(weight.numel() for weight in masters.named.values())
    yield (
        f"student: {config.student_model_name_or_path}, {_size(models.student)}, {trained:,} of them trained, multiplied in "
        f"{dtype_name(models.student.dtype)}"
    )
    rows, kind = config.per_device_train_batch_size * config.gradient_accumulation_steps, "of the data's text"
    length, setting = config.max_completion_length, "max_completion_length"
    if config.mix.generates:
        length, setting, kind = config.max_new_tokens, "max_new_tokens", "that writes its text"
    yield (
        f"a step {kind}: {rows} rows on each GPU, {config.per_device_train_batch_size} at a time in the update, every row as long "
        f"as it may be, since the data are not looked at: {config.max_prompt_length} tokens of prompt (max_prompt_length) and "
        f"{length} of completion ({setting})"
    )


def _size(model: PreTrainedModel) -> str:
    method = quantised(model.config)
    as_if = f" (counted as if they were not quantised by {method})" if method else ""
    return f"{model.config.model_type}, {num_parameters(model):,} parameters{as_if}"


def _times(
    config: TrainConfig, models: Models, masters: Masters, spread: Spread, cards: dict[str, bool]
) -> Iterator[str]:
    """A table of the seconds of a step, by GPU and part."""
    found = {card: seconds(config, models, masters, spread, GPUS[card]) for card in cards}
    titles = ["GB", "fits", *next(iter(found.values())), "in all"]
    widths = [max(8, len(title) + 3) for title in titles]
    yield f"{'seconds of a step':<18}" + "".join(f"{title:>{w}}" for title, w in zip(titles, widths, strict=True))
    for card, parts in found.items():
        cells = [f"{GPUS[card].memory:g}", "yes" if cards[card] else "no"]
        cells += [f"{value:.2f}" for value in (*parts.values(), sum(parts.values()))]
        yield f"  {card:<16}" + "".join(f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True))


def _ways_out(config: TrainConfig, models: Models, masters: Masters, spread: Spread, total: float) -> Iterator[str]:
    """Changes of the settings that take less memory, each by itself."""
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
    ways: dict[str, tuple[dict[str, Any], Spread]] = {
        "--gradient-checkpointing": ({"gradient_checkpointing": True}, spread),
        f"--per-device-train-batch-size 1 --gradient-accumulation-steps {rows}": (
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": rows}, spread,
        ),
        "--generation-batch-size 8": ({"generation_batch_size": min(8, config.generation_batch_size)}, spread),
    }  # fmt: skip
    if not config.use_peft:
        ways["--use-peft"] = {"use_peft": True, "fsdp": False}, spread
        more = max(2, spread.processes)
        ways[f"--fsdp on {more} GPUs"] = {"fsdp": True, "graphs": False}, replace(spread, processes=more)
    if spread.teacher == 1 and all(splits(model, 2) for model in models.own_weights):
        more = spread.processes * (1 + spread.processes % 2)
        ways[f"--teacher-tensor-parallel 2 on {more} GPUs"] = {}, Spread(more, 2)
    yield "With one of these changes each GPU would hold, in GB:"
    for words, (changes, other) in ways.items():
        changed = replace(config, **changes)
        try:
            own = shapes(changed) if changed.use_peft != config.use_peft else (models, masters)
        except ConfigError:  # of some models peft does not adapt all layers of the body
            continue
        need = sum(on_one_gpu(changed, *own, other).values())
        if need < 0.99 * total:
            yield f"  {need / 1e9:>8.2f}  {words}: fits {', '.join(c for c in GPUS if _holds(c, need)) or 'none of them'}"
