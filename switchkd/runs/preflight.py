"""``switchkd check``: what a run would do and need, before it does anything."""

import yaml

from switchkd.base.settings import to_dict
from switchkd.data.settings import with_date
from switchkd.data.templates import Encoder, named
from switchkd.decoding.rows import row_bytes
from switchkd.forward.base_model import BaseModel
from switchkd.forward.head import sizes_on
from switchkd.forward.served import ServedModel
from switchkd.methods.rules import name_of
from switchkd.models.pair import Pair
from switchkd.models.settings import dtype_name
from switchkd.runner.architecture import num_parameters, parameter_bytes
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
from switchkd.training.optimizer import Masters
from switchkd.training.settings import TrainConfig
from switchkd.training.trainer import Trainer


def check_run(config: TrainConfig, pair: Pair) -> list[str]:
    """Load data as a run would and say what it would do and need, in lines; trains nothing."""
    check_trackers(config.report_to)
    config = with_date(config, pair.tokenizer)
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
    sources = {"": config.teacher_model_name_or_path, **config.teachers}
    models = {role_of(name): (sources[name], model) for name, model in pair.named_teachers.items()}
    models["student"] = config.student_model_name_or_path, pair.student
    lines = [
        f"{role}: {name}, {model.config.model_type}, {num_parameters(model) / 1e6:.1f}M parameters"
        f"{' (of its output layer)' if isinstance(model, ServedModel) else ''}, multiplied in "
        f"{dtype_name(model.dtype)}, {model.get_output_embeddings().weight.shape[0]} logits rows"
        for role, (name, model) in models.items()
    ]
    lines.append(f"vocabulary: {pair.vocab_size} ids, equal in both")
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


def memory_estimate(config: TrainConfig, pair: Pair, masters: Masters) -> dict[str, float]:
    """Bytes of what a training step holds, without activations, which depend on the architecture."""
    weights = list(masters.named.values())
    trained = sum(weight.numel() * weight.element_size() for weight in weights)
    own = {id(weight) for weight in weights}
    held = sum(p.numel() * p.element_size() for p in pair.student.parameters() if id(p) not in own)
    rows = min(config.generation_batch_size, config.per_device_train_batch_size * config.gradient_accumulation_steps)
    teachers = [model for model in dict.fromkeys(pair.named_teachers.values()) if not isinstance(model, BaseModel)]
    tokens = [n + config.max_new_tokens for n in (config.max_prompt_length, longest_teacher_prompt(config, pair))]
    # One teacher writes at a time.
    decoding = [pair.student if isinstance(each, ServedModel) else each for each in pair.named_teachers.values()]
    row = max(row_bytes((pair.student, each), tokens, pair.vocab_size) for each in decoding)
    wide, sizes, head = (
        dtype_name(masters.dtype),
        sizes_on(weights[0].device),
        pair.student.get_output_embeddings().weight,
    )
    # A chunk's logits of both models, in the dtype that each multiplies in, and what autograd holds of a piece of them.
    logits = sum(sizes.chunk / 4 * model.dtype.itemsize for model in (pair.student, pair.teacher))
    return {
        f"teacher, in {dtype_name(pair.teacher.dtype)}": float(sum(map(parameter_bytes, teachers))),
        f"the student's trained weights, as they are updated, in {wide}": trained,
        f"the student as it multiplies, in {dtype_name(pair.student.dtype)}": held,
        f"gradients, in {wide}": trained,
        f"the optimizer's moments, in {wide}": 2 * trained,
        "loss": logits + 16.0 * sizes.piece + head.numel() * max(4, head.element_size()),
        "decoding": rows * row if config.mix.generates else 0.0,
    }
