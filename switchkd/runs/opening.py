"""What a run works on: the pair, and every text that it reads."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from switchkd.base import signals
from switchkd.base.errors import ConfigError, DataError
from switchkd.base.manifest import json_sha256
from switchkd.base.plain import check_text
from switchkd.base.settings import to_dict
from switchkd.base.storage import cache_folder
from switchkd.base.terminal import bar, console
from switchkd.data.examples import Example, load_examples
from switchkd.data.formats import Message
from switchkd.data.lines import BadRows
from switchkd.data.settings import DataConfig, template_settings
from switchkd.data.template_inputs import Template
from switchkd.data.templates import Encoder
from switchkd.data.texts import TokenizedExample, by_teacher, load_text, teacher_prompt_limit, tokenize
from switchkd.decoding.served import check_served
from switchkd.decoding.teacher_texts import teacher_texts
from switchkd.forward.proof import prove
from switchkd.forward.served import ServedModel
from switchkd.methods.policy import Policy, StudentOnly, TeacherOnly
from switchkd.methods.sampling import Sampling
from switchkd.models.adapters import check_trainable
from switchkd.models.pair import Pair, load_pair, within
from switchkd.models.settings import ModelConfig, is_address
from switchkd.runner.architecture import beyond_context
from switchkd.teachers.states import TeacherCache
from switchkd.training.settings import TrainConfig

# Settings that name the folder of the teacher's stored work.
STORE_SETTINGS = {
    "teacher_model_name_or_path", "teacher_dtype", "train_file", "train_samples", "template", "max_prompt_length",
    "max_completion_length", "skip_bad", "teacher_prompt", "teachers", "teacher_field", "mix", "max_new_tokens", "temperature",
    "seed", "teacher_cache", "teacher_cache_top_k",
}  # fmt: skip


def open_pair(config: ModelConfig, quiet: bool = False, seed: int = 0, train: bool = False) -> Pair:
    """Load the pair, say what is odd about it, and prove that all of its models are read and decoded exactly.

    ``seed`` is the key of a new adapter's weights. To ``train`` a student as a whole, its weights are loaded in float32 or wider,
    which the trainer keeps; else the student is loaded in the dtype that it computes in.
    """
    _check_served(config)
    names = config.teacher_model_name_or_path, config.student_model_name_or_path
    lora = config if config.use_peft else None
    template = config.prompts if isinstance(config, DataConfig) else None
    dtype = "float32" if train and lora is None and config.dtype != "float64" else config.dtype
    pair = load_pair(
        *names,
        dtype=dtype,
        teacher_dtype=config.teacher_dtype,
        lora=lora,
        seed=seed,
        teachers=config.teachers,
        template=template,
        teacher_place=config.teacher_place,
        teacher_files=config.teacher_files,
        teacher_writer=config.teacher_writer,
    )
    if train:
        check_trainable(pair.student, isinstance(config, TrainConfig) and config.merge)
    if not quiet:
        for warning in pair.warnings:
            console.print(f"warning: {warning}", style="yellow", soft_wrap=True)
    silent = quiet or (isinstance(config, TrainConfig) and config.quiet)
    models = list(dict.fromkeys([*pair.named_teachers.values(), pair.student]))
    models = [model for model in models if not isinstance(model, ServedModel)]
    # Seconds for small models, minutes for large ones on a CPU.
    with bar("prove that the models are decoded exactly", len(models), silent) as shown:
        for model in models:
            signals.check()
            prove(model)
            shown.advance()
    return pair


def _check_served(config: ModelConfig) -> None:
    """Raise ConfigError, before anything is loaded, where a teacher behind a server cannot do what a command needs of it."""
    teachers = config.teacher_model_name_or_path, *config.teachers.values()
    if not (served := [name for name in teachers if is_address(name)]):
        return
    rules: list[Policy] = [getattr(config, "policy", StudentOnly())]
    if isinstance(config, TrainConfig):
        rules = (rules if config.mix.generates else []) + ([TeacherOnly()] if config.mix.wants_teacher_text else [])
    for rule in rules:
        check_served(rule, served[0], bool(config.teacher_writer))


def prepared(
    config: DataConfig,
    pair: Pair,
    file: str,
    examples: Sequence[Example],
    bad: BadRows,
    quiet: bool = False,
    teacher_prompt: str = "",
    teacher_field: str = "",
) -> list[TokenizedExample]:
    """Tokenise the examples of a file; prints how many are used, and what was left out and why. ``bad`` are the file's bad rows.

    ``teacher_prompt`` and ``teacher_field`` are given where a teacher is to judge or write: not in evaluation, which compares
    models on one prompt with the default teacher.
    """
    signals.check()
    tokenized, drops = tokenize(
        examples,
        pair.tokenizer,
        template=config.prompts,
        max_prompt_length=config.max_prompt_length,
        max_completion_length=config.max_completion_length,
        teacher_prompt=teacher_prompt,
        eos_token_ids=pair.eos_token_ids,
        bad=bad,
    )
    kept = within(tokenized, pair)
    if not kept:
        raise DataError(
            f"{file}: each of {len(tokenized)} examples holds a token that not all of the models know; take another file"
        )
    left_out = {
        "that hold a token not all of the models know left out": len(tokenized) - len(kept),
        f"prompts over {config.max_prompt_length} tokens left out": drops.long_prompts,
        "prompts of the teacher over their limit left out": drops.long_teacher_prompts,
        "completions that spell out the end token left out": drops.end_tokens_in_text,
        f"completions cut at {config.max_completion_length} tokens": drops.truncated,
    }
    notes = "".join(f"; {count} {what}" for what, count in left_out.items() if count)
    if teacher_field:
        shares = (f"{name or 'the default'} {len(places)}" for name, places in by_teacher(kept).items())
        notes += f"; teachers: {', '.join(shares)}"
    if not quiet:
        console.print(f"{file}: {len(kept)} examples{notes}", soft_wrap=True)
    return kept


def load_task(
    config: DataConfig,
    pair: Pair,
    file: str,
    limit: int | None = None,
    quiet: bool = False,
    teacher_prompt: str = "",
    teacher_field: str = "",
) -> list[TokenizedExample]:
    """Read and tokenise a data file, as ``prepared`` says."""
    bad = BadRows(file, config.skip_bad)
    examples = load_examples(file, limit, bad, teacher_field=teacher_field, teachers=pair.teachers)
    tokenized = prepared(config, pair, file, examples, bad, quiet, teacher_prompt, teacher_field)
    bad.tell()
    return tokenized


def load_train(config: TrainConfig, pair: Pair, quiet: bool = False) -> list[TokenizedExample]:
    """The examples of train_file, each with its teacher and what that one reads."""
    limit = None if config.train_samples < 0 else config.train_samples
    return load_task(config, pair, config.train_file, limit, quiet, config.teacher_prompt, config.teacher_field)


def load_training_text(
    config: TrainConfig, pair: Pair, quiet: bool = False
) -> tuple[list[TokenizedExample], TeacherCache | None]:
    """The examples that a run trains on, and what the teacher says of them where it keeps that; both made where missing."""
    examples = load_train(config, pair, quiet)
    if config.mix.wants_teacher_text:
        with _stored(config, pair, "teacher text", len(examples), quiet) as (folder, advance):
            examples = teacher_texts(pair, examples, folder, config.decoding(seed=config.seed), advance)
    if config.teacher_cache == "none":
        return examples, None
    with _stored(config, pair, f"teacher {config.teacher_cache}", len(examples), quiet) as (folder, advance):
        cache = TeacherCache.build(
            pair, examples, folder, config.teacher_cache, top_k=config.teacher_cache_top_k, progress=advance
        )
    return examples, cache


@contextmanager
def _stored(
    config: TrainConfig, pair: Pair, what: str, examples: int, quiet: bool
) -> Iterator[tuple[Path, Callable[[int], None]]]:
    """The folder of work that the teacher does once, and a progress bar; by default a folder in the cache.

    Its name comes from settings alone, so that equal runs share it; what lies in it is checked against the models and data.
    """
    sampling = Sampling(config.temperature, config.top_p, config.top_k, config.min_p)
    # Cuts, and what the template is told, name it where there are some: a folder of before they were settings is found again.
    named = {k: v for k, v in to_dict(config).items() if k in STORE_SETTINGS} | sampling.cuts
    named |= {name: bits for name, bits in vars(config.teacher_place).items() if name.startswith("load_in_") and bits}
    named |= template_settings(config.prompts, pair.tokenizer)
    if isinstance(pair.teacher, ServedModel):  # it may move to another address
        named["teacher_model_name_or_path"] = f"served {pair.teacher.files}"
    name = f"{what.replace(' ', '-')}-{json_sha256(named)[:12]}"
    root = Path(config.teacher_store_dir) if config.teacher_store_dir else cache_folder()
    if not quiet:
        console.print(f"{what}: {root / name}", soft_wrap=True)
    with bar(what, examples, quiet) as shown:
        yield root / name, shown.advance


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
    longest = config.max_prompt_length + config.max_completion_length
    texts = within(load_text(config.lm_file, pair.tokenizer, longest, config.skip_bad), pair)
    if not quiet:
        console.print(f"{config.lm_file}: {len(texts)} texts", soft_wrap=True)
    return texts


def prompt_examples(texts: Sequence[str], template: str | Template, pair: Pair) -> list[TokenizedExample]:
    """User prompts under a template, without a completion."""
    if empty := [i for i, text in enumerate(texts) if not text.strip()]:
        raise DataError(f"prompt {empty[0]} is empty; give it at least one word")
    for i, text in enumerate(texts):
        check_text(text, f"prompt {i}")  # a command line may hold bytes that are not UTF-8
    # The template writes whole conversations; the answer is a placeholder that is not used.
    examples = [Example(i, (Message("user", text),), "-", ("-",), f"--prompt {i}") for i, text in enumerate(texts)]
    encoded = zip(examples, Encoder(pair.tokenizer, template)(examples), strict=True)
    return [TokenizedExample(example.id, ids, [], [], (), False, example.source) for example, (ids, _) in encoded]


def check_context(config: TrainConfig, pair: Pair) -> None:
    """Raise ConfigError if a prompt and its completion may not fit into the models' context."""
    scored = config.eval_max_new_tokens if config.eval_samples else 0
    completion = max(config.max_new_tokens, config.max_completion_length, scored)
    longest = longest_teacher_prompt(config, pair)
    reads = [(role_of(name), longest, model) for name, model in pair.named_teachers.items()]
    for name, prompt, model in [*reads, ("student", config.max_prompt_length, pair.student)]:
        if words := beyond_context(prompt + completion, f"{name}'s", model):
            own = prompt == config.max_prompt_length
            what = "max_prompt_length" if own else "a prompt under teacher_prompt of up to"
            raise ConfigError(
                f"{what} {prompt} + completion {completion} tokens {words}; lower max_prompt_length, max_new_tokens, "
                "max_completion_length or eval_max_new_tokens"
            )


def role_of(teacher: str) -> str:
    return f"teacher {teacher!r}" if teacher else "teacher"


def longest_teacher_prompt(config: DataConfig, pair: Pair) -> int:
    """Tokens of the longest prompt that the teacher may have to read."""
    lengths = config.max_prompt_length, config.max_completion_length
    return teacher_prompt_limit(pair.tokenizer, config.teacher_prompt, *lengths)
