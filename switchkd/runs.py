"""A run from settings to a distilled student: the run directory and everything in it.

config.yaml       the settings, every one, usable as a recipe
metrics.jsonl     a line for every optimizer step
rollouts.jsonl    the generated text: token ids, speakers, divergences
checkpoint-N/     whole checkpoints, the newest ones
evaluation.json   teacher, student before, student after
student/          the result, for ``from_pretrained``: a model, or the adapter alone
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import yaml
from accelerate import Accelerator
from transformers import PreTrainedModel

from switchkd import report
from switchkd.adapters import merged
from switchkd.base_model import BaseModel
from switchkd.cache import verify_cache
from switchkd.checkpoint import save_model, write_file
from switchkd.config import (
    FREE_ON_RESUME,
    DataConfig,
    EvalConfig,
    ModelConfig,
    TrainConfig,
    from_dict,
    name_of,
    to_dict,
)
from switchkd.data import (
    Example,
    Message,
    TokenizedExample,
    by_teacher,
    load_examples,
    load_text,
    teacher_prompt_limit,
    tokenize,
)
from switchkd.demo_pair import cache_folder
from switchkd.errors import ConfigError, DataError
from switchkd.evaluation import EvalSettings, Scores, evaluate
from switchkd.loss import CHUNK_BYTES
from switchkd.models import (
    Pair,
    cache_bytes_per_token,
    context_length,
    load_pair,
    num_parameters,
    parameter_bytes,
)
from switchkd.rollouts import DecodeCost
from switchkd.teacher_cache import TeacherCache
from switchkd.teacher_store import json_sha256, teacher_texts
from switchkd.templates import Encoder
from switchkd.trainer import Metrics, Trainer

CONFIG, EVALUATION = "config.yaml", "evaluation.json"

# Settings that name the folder of the teacher's stored work.
STORE_SETTINGS = {
    "teacher_model_name_or_path", "dtype", "train_file", "template", "max_prompt_length", "max_completion_length", "skip_bad",
    "teacher_prompt", "teachers", "teacher_field", "mix", "max_new_tokens", "temperature", "seed", "teacher_cache",
    "teacher_cache_top_k",
}  # fmt: skip


def distil(config: TrainConfig) -> dict[str, Scores]:
    """Train as ``config`` says and write the run directory; returns the scores of before and after.

    Raises:
        ConfigError: the directory is in use, or a resumed run would differ from the one it continues.
    """
    accelerator = Accelerator()
    main, run = accelerator.is_main_process, Path(config.output_dir)
    _check_run(run, config)
    pair = open_pair(config, quiet=not main, seed=config.seed)
    check_context(config, pair)
    with accelerator.main_process_first():  # the others then find it done
        train, teacher_cache = load_training_text(config, pair, quiet=not main)
    heldout = load_heldout(config, pair, quiet=not main)
    trainer = Trainer(
        pair,
        train,
        config,
        accelerator,
        teacher_cache=teacher_cache,
        validation=load_validation(config, pair, heldout, quiet=not main),
        corpus=load_corpus(config, pair, quiet=not main),
    )
    accelerator.wait_for_everyone()  # every rank has found the run directory free
    scores: dict[str, Scores] = {}
    if main:
        run.mkdir(parents=True, exist_ok=True)
        write_file(run / CONFIG, yaml.safe_dump(to_dict(config), sort_keys=False))
        scores = _before(run, config, pair, heldout)
    if config.resume:
        trainer.resume()
    _train(trainer, quiet=not main)
    if main:
        student = accelerator.unwrap_model(trainer.student)
        save_model(run / "student", merged(student) if config.merge else student, pair.tokenizer)
        if heldout:
            scores["student after"] = score(pair, student, heldout, config, "student after")
            write_scores(run / EVALUATION, config, scores)
            report.console.print(report.score_table(scores))
        report.console.print(f"student saved in {run / 'student'}", soft_wrap=True)
    accelerator.wait_for_everyone()
    return scores


def open_pair(config: ModelConfig, quiet: bool = False, seed: int = 0) -> Pair:
    """Load the pair, say what is odd about it, and prove that the ragged cache is exact on both models.

    ``seed`` is the key of a new adapter's weights.
    """
    names = config.teacher_model_name_or_path, config.student_model_name_or_path
    lora = config if config.use_peft else None
    pair = load_pair(*names, dtype=config.dtype, lora=lora, seed=seed, teachers=config.teachers)
    if not quiet:
        for warning in pair.warnings:
            report.console.print(f"warning: {warning}", style="yellow", soft_wrap=True)
    for model in dict.fromkeys([*pair.named_teachers.values(), pair.student]):
        verify_cache(model)
    return pair


def load_task(
    config: DataConfig,
    pair: Pair,
    file: str,
    limit: int | None = None,
    quiet: bool = False,
    teacher_prompt: str = "",
    teacher_field: str = "",
) -> list[TokenizedExample]:
    """Read and tokenise a data file; prints how many examples are used, and what was left out and why.

    ``teacher_prompt`` and ``teacher_field`` are given where a teacher is to judge or write: not in evaluation, which compares
    models on one prompt with the default teacher.
    """
    examples = load_examples(file, limit, config.skip_bad, teacher_field=teacher_field, teachers=pair.teachers)
    tokenized, drops = tokenize(
        examples,
        pair.tokenizer,
        template=config.template,
        max_prompt_length=config.max_prompt_length,
        max_completion_length=config.max_completion_length,
        teacher_prompt=teacher_prompt,
    )
    left_out = {
        f"prompts over {config.max_prompt_length} tokens left out": drops.long_prompts,
        "prompts of the teacher over their limit left out": drops.long_teacher_prompts,
        "completions that spell out the end token left out": drops.end_tokens_in_text,
        f"completions cut at {config.max_completion_length} tokens": drops.truncated,
    }
    notes = "".join(f"; {count} {what}" for what, count in left_out.items() if count)
    if teacher_field:
        shares = (f"{name or 'the default'} {len(places)}" for name, places in by_teacher(tokenized).items())
        notes += f"; teachers: {', '.join(shares)}"
    if not quiet:
        report.console.print(f"{file}: {len(tokenized)} examples{notes}", soft_wrap=True)
    return tokenized


def load_train(config: TrainConfig, pair: Pair, quiet: bool = False) -> list[TokenizedExample]:
    """The examples of train_file, each with its teacher and what that one reads."""
    own = config.teacher_prompt, config.teacher_field
    return load_task(config, pair, config.train_file, None, quiet, *own)


def load_training_text(
    config: TrainConfig, pair: Pair, quiet: bool = False
) -> tuple[list[TokenizedExample], TeacherCache | None]:
    """The examples that a run trains on, and what the teacher says of them where it keeps that; both made where missing."""
    examples = load_train(config, pair, quiet)
    if config.mix.wants_teacher_text:
        decoding = {k: v for k, v in config.decode_arguments().items() if k != "policy"}
        with _stored(config, "teacher text", len(examples), quiet) as (folder, advance):
            examples = teacher_texts(pair, examples, folder, **decoding, seed=config.seed, progress=advance)
    if config.teacher_cache == "none":
        return examples, None
    with _stored(config, f"teacher {config.teacher_cache}", len(examples), quiet) as (folder, advance):
        cache = TeacherCache.build(
            pair, examples, folder, config.teacher_cache, top_k=config.teacher_cache_top_k, progress=advance
        )
    return examples, cache


@contextmanager
def _stored(config: TrainConfig, what: str, examples: int, quiet: bool) -> Iterator[tuple[Path, Callable[[int], None]]]:
    """The folder of work that the teacher does once, and a progress bar; by default a folder in the cache.

    Its name comes from settings alone, so that equal runs share it; what lies in it is checked against the models and data.
    """
    named = {k: v for k, v in to_dict(config).items() if k in STORE_SETTINGS}
    name = f"{what.replace(' ', '-')}-{json_sha256(named)[:12]}"
    root = Path(config.teacher_store_dir) if config.teacher_store_dir else cache_folder()
    if not quiet:
        report.console.print(f"{what}: {root / name}", soft_wrap=True)
    with report.bar(what, examples) if not quiet else nullcontext() as bar:
        yield root / name, bar.advance if bar is not None else lambda _: None


def load_heldout(config: TrainConfig, pair: Pair, quiet: bool = False) -> list[TokenizedExample]:
    """The held-out examples of a run; none if it asks for none."""
    return load_task(config, pair, config.eval_file, config.eval_samples, quiet) if config.eval_samples else []


def load_validation(
    config: TrainConfig, pair: Pair, heldout: list[TokenizedExample], quiet: bool = False
) -> list[TokenizedExample]:
    """The examples of the validation loss, if the mix looks at one: those of validation_file, else the held-out ones."""
    if not config.mix.validation_steps:
        return []
    return load_task(config, pair, config.validation_file, quiet=quiet) if config.validation_file else heldout


def load_corpus(config: TrainConfig, pair: Pair, quiet: bool = False) -> list[TokenizedExample]:
    """The texts of the language-modelling loss, if a run has one."""
    if not config.lm_file:
        return []
    texts = load_text(config.lm_file, pair.tokenizer, config.max_prompt_length + config.max_completion_length)
    if not quiet:
        report.console.print(f"{config.lm_file}: {len(texts)} texts", soft_wrap=True)
    return texts


def prompt_examples(texts: Sequence[str], template: str, pair: Pair) -> list[TokenizedExample]:
    """User prompts under a template, without a completion."""
    if empty := [i for i, text in enumerate(texts) if not text.strip()]:
        raise DataError(f"prompt {empty[0]} is empty; give it at least one word")
    # The template writes whole conversations; the answer is a placeholder that is not used.
    examples = [Example(i, (Message("user", text),), "-", ("-",), f"--prompt {i}") for i, text in enumerate(texts)]
    encoded = zip(examples, Encoder(pair.tokenizer, template)(examples), strict=True)
    return [TokenizedExample(example.id, ids, [], (), False, example.source) for example, (ids, _) in encoded]


def check_context(config: TrainConfig, pair: Pair) -> None:
    """Raise ConfigError if a prompt and its completion may not fit into the models' context."""
    completion = max(config.max_new_tokens, config.max_completion_length)
    longest = longest_teacher_prompt(config, pair)
    reads = [(_role(name), longest, model) for name, model in pair.named_teachers.items()]
    for name, prompt, model in [*reads, ("student", config.max_prompt_length, pair.student)]:
        context = context_length(model)
        if prompt + completion > context:
            what = (
                "max_prompt_length" if prompt == config.max_prompt_length else "a prompt under teacher_prompt of up to"
            )
            raise ConfigError(
                f"{what} {prompt} + completion {completion} tokens exceed the {name}'s context of {context:g}; lower "
                "max_prompt_length, max_new_tokens or max_completion_length"
            )


def _role(teacher: str) -> str:
    return f"teacher {teacher!r}" if teacher else "teacher"


def longest_teacher_prompt(config: DataConfig, pair: Pair) -> int:
    """Tokens of the longest prompt that the teacher may have to read."""
    lengths = config.max_prompt_length, config.max_completion_length
    return teacher_prompt_limit(pair.tokenizer, config.teacher_prompt, *lengths)


def read_config(run: Path) -> TrainConfig:
    """The settings of a run directory."""
    file = run / CONFIG
    if not file.is_file():
        raise ConfigError(f"{run} is not a run directory: it has no {CONFIG}")
    return from_dict(TrainConfig, yaml.safe_load(file.read_text(encoding="utf-8")), str(file))


def score(
    pair: Pair, model: PreTrainedModel, examples: Sequence[TokenizedExample], config: EvalConfig, name: str
) -> Scores:
    """Evaluate one model of the pair, with a progress bar."""
    with report.bar(f"evaluate {name}", 2 * len(examples)) as bar:
        return evaluate(pair, model, examples, _eval_settings(config), bar.advance)


def write_scores(file: Path, config: EvalConfig, scores: dict[str, Scores]) -> None:
    """Scores with every setting they depend on, as JSON."""
    settings = _eval_settings(config).to_json()
    record = {"settings": settings, "scores": {name: asdict(s) for name, s in scores.items()}}
    write_file(file, json.dumps(record, indent=1))


def _eval_settings(config: EvalConfig) -> EvalSettings:
    return EvalSettings(config.eval_max_new_tokens, config.eval_temperature, config.seed)


def _check_run(run: Path, config: TrainConfig) -> None:
    """Refuse a directory in use, or one to resume that was started with other settings."""
    if config.resume:
        before, now = to_dict(read_config(run)), to_dict(config)
        changed = [f"{k}: {before[k]!r} -> {now[k]!r}" for k in now if before[k] != now[k] and k not in FREE_ON_RESUME]
        if changed:
            raise ConfigError(
                f"{run} was started with other settings ({'; '.join(changed)}); resume with the same, or start anew"
            )
    elif run.exists() and any(run.iterdir()):
        raise ConfigError(f"{run} already exists and is not empty; choose another --output-dir, or go on with --resume")


def _before(run: Path, config: TrainConfig, pair: Pair, heldout: Sequence[TokenizedExample]) -> dict[str, Scores]:
    """Teacher's and untrained student's scores, read back where a resumed run has them."""
    file = run / EVALUATION
    if not heldout:
        return {}
    if config.resume and file.is_file():
        return {name: Scores(**s) for name, s in json.loads(file.read_text(encoding="utf-8"))["scores"].items()}
    models = {"teacher": pair.teacher, "student before": pair.student}
    scores = {name: score(pair, model, heldout, config, name) for name, model in models.items()}
    write_scores(file, config, scores)
    return scores


def _train(trainer: Trainer, quiet: bool) -> None:
    cost = DecodeCost()
    with report.bar("train", trainer.total_steps) as bar:
        bar.advance(trainer.step)

        def on_step(metrics: Metrics, step_cost: DecodeCost) -> None:
            nonlocal cost
            cost += step_cost
            bar.advance(1, report.step_line(metrics))
            bar.line(
                f"step {metrics['step']}/{trainer.total_steps}: {report.step_line(metrics)} ({metrics['seconds']:.1f} s)"
            )

        def on_round(now: DecodeCost) -> None:
            bar.advance(0, f"writing: {now.kept_tokens} tokens, {now.kept_tokens / now.seconds:.0f} tok/s")

        trainer.train(on_step, on_round)
    if not quiet and cost.kept_tokens:
        report.console.print(f"generated {report.cost_line(cost)}", soft_wrap=True)


def check_run(config: TrainConfig) -> list[str]:
    """Load pair and data as a run would and say what it would do and need, in lines; trains nothing."""
    pair = open_pair(config, seed=config.seed)
    train = load_train(config, pair)
    heldout = load_heldout(config, pair)
    check_context(config, pair)
    trainer = Trainer(
        pair,
        train,
        config,
        validation=load_validation(config, pair, heldout),
        corpus=load_corpus(config, pair),
    )
    sources = {"": config.teacher_model_name_or_path, **config.teachers}
    models = {_role(name): (sources[name], model) for name, model in pair.named_teachers.items()}
    models["student"] = config.student_model_name_or_path, pair.student
    lines = [
        f"{role}: {name}, {model.config.model_type}, {num_parameters(model) / 1e6:.1f}M parameters, {config.dtype}, "
        f"{model.get_output_embeddings().weight.shape[0]} logits rows"
        for role, (name, model) in models.items()
    ]
    lines.append(f"vocabulary: {pair.vocab_size} ids, equal in both; end ids {list(pair.eos_token_ids)}")
    lines.append(f"steps: {trainer.total_steps} of {trainer.rows_per_step} rows; text: {name_of(config.mix)}")
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
