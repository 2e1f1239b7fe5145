"""``switchkd check``: what a run would do and need, before it does anything."""

import yaml

from switchkd.base_model import BaseModel
from switchkd.config import TrainConfig, name_of, to_dict
from switchkd.loss import CHUNK_BYTES
from switchkd.models import Pair, cache_bytes_per_token, num_parameters, parameter_bytes
from switchkd.runs import (
    check_context,
    load_corpus,
    load_heldout,
    load_train,
    load_validation,
    longest_teacher_prompt,
    role_of,
)
from switchkd.tracking import check_trackers
from switchkd.trainer import Trainer


def check_run(config: TrainConfig, pair: Pair) -> list[str]:
    """Load data as a run would and say what it would do and need, in lines; trains nothing."""
    check_trackers(config.report_to)
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
        f"{role}: {name}, {model.config.model_type}, {num_parameters(model) / 1e6:.1f}M parameters, {config.dtype}, "
        f"{model.get_output_embeddings().weight.shape[0]} logits rows"
        for role, (name, model) in models.items()
    ]
    lines.append(f"vocabulary: {pair.vocab_size} ids, equal in both; end ids {list(pair.eos_token_ids)}")
    budgets = {"tokens": config.max_train_tokens, "seconds": config.max_train_seconds}
    until = "".join(f", or {most:g} {unit}" for unit, most in budgets.items() if most)
    lines.append(f"steps: {trainer.total_steps} of {trainer.rows_per_step} rows{until}; text: {name_of(config.mix)}")
    need = memory_estimate(config, pair)
    parts = ", ".join(f"{part} {size / 2**30:.2f}" for part, size in need.items())
    lines.append(f"memory without activations: {sum(need.values()) / 2**30:.2f} GiB ({parts})")
    return [*lines, "", "settings:", yaml.safe_dump(to_dict(config), sort_keys=False).rstrip()]


def memory_estimate(config: TrainConfig, pair: Pair) -> dict[str, float]:
    """Bytes of what a training step holds, without activations, which depend on the architecture."""
    trained = sum(p.numel() * p.element_size() for p in pair.student.parameters() if p.requires_grad)
    rows = min(config.generation_batch_size, config.per_device_train_batch_size * config.gradient_accumulation_steps)
    teachers = list(dict.fromkeys(pair.named_teachers.values()))
    # One teacher writes at a time.
    cache = (longest_teacher_prompt(config, pair) + config.max_new_tokens) * max(map(cache_bytes_per_token, teachers))
    cache += (config.max_prompt_length + config.max_new_tokens) * cache_bytes_per_token(pair.student)
    return {
        "teacher": float(sum(parameter_bytes(model) for model in teachers if not isinstance(model, BaseModel))),
        "student": parameter_bytes(pair.student),
        "gradients": trained,
        "optimizer": 2 * trained,
        "loss": 5 * CHUNK_BYTES + 1.0 * parameter_bytes(pair.student.get_output_embeddings()),
        "key/value caches": rows * cache if config.mix.generates else 0.0,
    }
