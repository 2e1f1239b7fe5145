"""What a run works on: the pair, and every text that it reads."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from switchkd.base import signals
from switchkd.base.errors import ConfigError, DataError
from switchkd.base.manifest import json_sha256
from switchkd.base.plain import check_text
from switchkd.base.settings import to_dict
from switchkd.base.storage import cache_folder
from switchkd.base.terminal import bar, console
from switchkd.crossing.bridge import Bridge
from switchkd.crossing.opening import of_its_own
from switchkd.data.examples import Example, load_examples, split
from switchkd.data.fields import Message
from switchkd.data.files import SAMPLE, BadRows
from switchkd.data.formats import Wanted
from switchkd.data.settings import DataConfig, template_settings
from switchkd.data.templates import Encoder, OtherTokenizer, TeacherReads
from switchkd.data.texts import TokenizedExample, by_teacher, load_text, teacher_ids, teacher_prompt_limit, tokenize
from switchkd.decoding.served import check_served
from switchkd.decoding.settings import DecodeSettings
from switchkd.evaluation.tasks import AUTO, TASKS
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
from switchkd.writing.teacher_texts import teacher_texts

# Settings that name the folder of the teacher's stored work.
STORE_SETTINGS = {
    "teacher_model_name_or_path", "teacher_dtype", "train_samples", "template", "max_prompt_length",
    "max_completion_length", "skip_bad", "teacher_prompt", "teachers", "teacher_field", "mix", "max_new_tokens", "temperature",
    "seed", "teacher_cache", "teacher_cache_top_k",
}  # fmt: skip


def open_pair(
    config: ModelConfig, quiet: bool = False, seed: int = 0, train: bool = False, loaded: Pair | None = None
) -> Pair:
    """Load the pair, say what is odd about it, and prove that all of its models are read and decoded exactly.

    ``seed`` is the key of a new adapter's weights. To ``train`` a student as a whole, its weights are loaded in float32 or wider,
    which the trainer keeps; else the student is loaded in the dtype that it computes in. A ``loaded`` pair is taken as it is.
    """
    silent = quiet or (isinstance(config, TrainConfig) and config.quiet)
    if not (loaded or silent):
        names = f"{config.teacher_model_name_or_path} and {config.student_model_name_or_path}"
        console.print(f"load the teacher and the student ({names}) …", soft_wrap=True)
    pair = loaded or _loaded(config, seed, train)
    if train:
        check_trainable(pair.student, isinstance(config, TrainConfig) and config.merge)
    if not quiet:
        for warning in pair.warnings:
            console.print(f"warning: {warning}", style="yellow", soft_wrap=True)
    models = list(dict.fromkeys([*pair.named_teachers.values(), pair.student]))
    models = [model for model in models if not isinstance(model, ServedModel)]
    # Seconds for small models, minutes for large ones on a CPU.
    with bar("prove that the models are decoded exactly", len(models), silent) as shown:
        for model in models:
            signals.check()
            prove(model)
            shown.advance()
    return pair


def _loaded(config: ModelConfig, seed: int, train: bool) -> Pair:
    """The pair that the settings name."""
    _check_served(config)
    names = config.teacher_model_name_or_path, config.student_model_name_or_path
    lora = config if config.use_peft else None
    template = config.prompts if isinstance(config, DataConfig) else AUTO
    dtype = "float32" if train and lora is None and config.dtype != "float64" else config.dtype
    return load_pair(
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
        own_templates=isinstance(config, DataConfig) and config.teacher_template == "own",
        marks=config.shared_marks,
    )


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


def teacher_reads(config: DataConfig, pair: Pair, training: bool) -> TeacherReads:
    """What the teacher reads that the student does not. Its ``teacher_prompt`` is for training alone: it may tell the answer."""
    asked = config.prompts.resolved(pair.tokenizer)
    templates = {}
    for name, jinja in pair.teacher_templates.items() if asked.name == "chat" else ():
        own = replace(asked, jinja=jinja, variables={})
        # Of the variables, which the student's template has, those that this one has too.
        templates[name] = replace(
            own, variables={k: v for k, v in asked.variables.items() if own.knows(k, pair.tokenizer)}
        )
    others = {name: _other_tokenizer(config, bridge) for name, bridge in pair.bridges.items()}
    return TeacherReads(config.teacher_prompt if training else "", config.teacher_system_prompt, templates, others)


def _other_tokenizer(config: DataConfig, bridge: Bridge) -> OtherTokenizer:
    """How a teacher with a tokenizer of its own reads: prompts under its own chat template, if it has one."""
    side, template = bridge.teacher, of_its_own(config.prompts).resolved(bridge.teacher.tokenizer)
    if template.name == "chat":
        asked = config.prompts.variables.items()
        template = replace(template, variables={k: v for k, v in asked if template.knows(k, side.tokenizer)})
    return OtherTokenizer(Encoder(side.tokenizer, template, frozenset(side.ends.ids)), bridge.teacher_reading)


def prepared(
    config: DataConfig,
    pair: Pair,
    examples: Sequence[Example],
    bad: BadRows,
    quiet: bool = False,
    training: bool = False,
    teacher_field: str = "",
    which: str = "",
) -> list[TokenizedExample]:
    """Tokenise examples; prints how many are used, and what was left out and why. ``bad`` knows their files, and
    which rows of these are bad; ``which`` says which rows they are, if not all.

    For ``training`` a teacher may read a prompt of its own, and rows may name theirs in ``teacher_field``. Evaluation compares
    models on one question with the default teacher.
    """
    signals.check()
    tokenized, drops = tokenize(
        examples,
        pair.tokenizer,
        template=config.prompts,
        max_prompt_length=config.max_prompt_length,
        max_completion_length=config.max_completion_length,
        teacher=teacher_reads(config, pair, training),
        eos_token_ids=pair.eos_token_ids,
        bad=bad,
    )
    file, kept = bad.path, within(tokenized, pair)
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
        console.print(f"{file}{which}: {len(kept)} examples{notes}", soft_wrap=True)
    return kept


def load_task(
    config: DataConfig,
    pair: Pair,
    sources: str | Sequence[str],
    limit: int | None = None,
    quiet: bool = False,
    answers: bool = True,
) -> list[TokenizedExample]:
    """Read and tokenise data files, as ``prepared`` says, each row with its answer unless prompts are enough."""
    sources = [sources] if isinstance(sources, str) else sources
    bad = BadRows(sources, config.skip_bad)
    examples = read_examples(config, sources, limit, bad, answers)
    tokenized = prepared(config, pair, examples, bad, quiet)
    bad.tell()
    return tokenized


def read_examples(
    config: DataConfig, sources: Sequence[str], limit: int | None, bad: BadRows, answers: bool, **teachers: Any
) -> list[Example]:
    """The examples of data files, as the settings want them; ``teachers`` are the settings of rows that name theirs."""
    wanted = Wanted(answers, config.assistant_turns == "all")
    return load_examples(sources, limit, bad, wanted=wanted, streaming=config.streaming, **teachers)


def needs_answers(config: TrainConfig) -> bool:
    """Whether training reads the completions of its rows, or their prompts are enough."""
    return config.mix.reads_completions or "{completion}" in config.teacher_prompt


def splits(config: Any) -> bool:
    """Whether a part of train_file is held out: the user's own, where nothing else is named to score on."""
    task = getattr(config, "task", AUTO)
    named = config.eval_file or (task in TASKS and TASKS[task].hub)
    return bool(config.eval_split and getattr(config, "eval_samples", -1) and not named and not reads_sample(config))


def reads_sample(config: DataConfig) -> bool:
    """Whether training is on the packaged sample, which has a held-out part of its own."""
    return any(source.partition(":")[0] == SAMPLE for source in config.train_file)


def load_train(config: TrainConfig, pair: Pair, quiet: bool = False) -> list[TokenizedExample]:
    """The examples of train_file, each with its teacher and what that one reads; without those that are held out of it."""
    bad = BadRows(config.train_file, config.skip_bad)
    named = {"teacher_field": config.teacher_field, "teachers": pair.teachers}
    examples = read_examples(config, config.train_file, train_limit(config), bad, needs_answers(config), **named)
    which = ""
    if splits(config):
        (examples, _), which = split(examples, config.eval_split), ", to train on"
    tokenized = prepared(config, pair, examples, bad, quiet, True, config.teacher_field, which)
    bad.tell()
    return tokenized


def train_limit(config: DataConfig) -> int | None:
    """Examples of train_file that are read; None for all."""
    return None if config.train_samples < 0 else config.train_samples


def load_training_text(
    config: TrainConfig, pair: Pair, quiet: bool = False
) -> tuple[list[TokenizedExample], TeacherCache | None]:
    """The examples that a run trains on, and what the teacher says of them where it keeps that; both made where missing."""
    examples = load_train(config, pair, quiet)
    if config.mix.wants_teacher_text:
        with _stored(config, "teacher text", _of_training(config, pair), len(examples), quiet) as (folder, advance):
            examples = teacher_texts(pair, examples, folder, config.decoding(seed=config.seed), advance)
    if config.teacher_cache == "none":
        return examples, None
    what = f"teacher {config.teacher_cache}"
    with _stored(config, what, _of_training(config, pair), len(examples), quiet) as (folder, advance):
        cache = TeacherCache.build(
            pair, examples, folder, config.teacher_cache, top_k=config.teacher_cache_top_k, progress=advance
        )
    return examples, cache


def with_teachers_answers(
    config: TrainConfig | Any, pair: Pair, examples: list[TokenizedExample], quiet: bool = False
) -> list[TokenizedExample]:
    """Held-out examples, those without an answer with the teacher's own, written greedily once and stored; all as they were, if
    every one has its answer.

    Raises ConfigError where the teacher is behind a server that does not write.
    """
    missing = [example for example in examples if not example.references]
    if not missing:
        return examples
    if isinstance(pair.teacher, ServedModel):
        check_served(TeacherOnly(), config.teacher_model_name_or_path, bool(config.teacher_writer))
    budget, rows = config.eval_max_new_tokens, config.per_device_eval_batch_size
    settings = DecodeSettings(TeacherOnly(), max_new_tokens=budget, temperature=0.0, batch_size=rows)
    named = _of_teacher(config, pair) | {"max_new_tokens": budget}
    named["prompts"] = json_sha256([[example.id, example.teacher_reads] for example in missing])
    with _stored(config, "teacher answers", named, len(missing), quiet) as (folder, advance):
        written = teacher_texts(pair, missing, folder, settings, advance)
    said = pair.tokenizer.batch_decode([e.completion_ids for e in written], skip_special_tokens=True)
    answers = {e.id: replace(e, references=(text,)) for e, text in zip(written, said, strict=True)}
    return [answers.get(example.id, example) for example in examples]


def _of_training(config: TrainConfig, pair: Pair) -> dict[str, Any]:
    """The settings on which the teacher's work on the text of training depends."""
    named = {k: v for k, v in to_dict(config).items() if k in STORE_SETTINGS}
    named |= {"train_file": ", ".join(config.train_file)}
    # What came later is named where it is not as it was before: the folders of then are found again.
    named |= Sampling(config.temperature, config.top_p, config.top_k, config.min_p).cuts
    named |= {"eval_split": config.eval_split} if splits(config) else {}
    plain = DataConfig()
    for name in ("assistant_turns", "teacher_system_prompt", "teacher_template"):
        if (value := getattr(config, name)) != getattr(plain, name):
            named[name] = value
    return named | _of_teacher(config, pair) | template_settings(config.prompts, pair.tokenizer)


def _of_teacher(config: TrainConfig | Any, pair: Pair) -> dict[str, Any]:
    """The settings that say which teacher it is, and how it is loaded."""
    named = {name: getattr(config, name) for name in ("teacher_model_name_or_path", "teacher_dtype")}
    named |= {name: bits for name, bits in vars(config.teacher_place).items() if name.startswith("load_in_") and bits}
    if isinstance(pair.teacher, ServedModel):  # it may move to another address
        named["teacher_model_name_or_path"] = f"served {pair.teacher.files}"
    return named


@contextmanager
def _stored(
    config: Any, what: str, named: dict[str, Any], examples: int, quiet: bool
) -> Iterator[tuple[Path, Callable[[int], None]]]:
    """The folder of work that the teacher does once, and a progress bar; by default a folder in the cache.

    Its name comes from the settings that it depends on, so that equal runs share it; what lies in it is checked against the models
    and data.
    """
    name = f"{what.replace(' ', '-')}-{json_sha256(named)[:12]}"
    own = getattr(config, "teacher_store_dir", "")
    root = Path(own) if own else cache_folder()
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
    texts = within(load_text(config.lm_file, pair.tokenizer, longest, config.skip_bad, config.streaming), pair)
    if not quiet:
        console.print(f"{', '.join(config.lm_file)}: {len(texts)} texts", soft_wrap=True)
    return texts


def prompt_examples(texts: Sequence[str], config: DataConfig, pair: Pair) -> list[TokenizedExample]:
    """User prompts under the template of ``config``, without a completion; a teacher may read its own in their place."""
    if empty := [i for i, text in enumerate(texts) if not text.strip()]:
        raise DataError(f"prompt {empty[0]} is empty; give it at least one word")
    for i, text in enumerate(texts):
        check_text(text, f"prompt {i}")  # a command line may hold bytes that are not UTF-8
    examples = [Example(i, (Message("user", text),), "", (), f"--prompt {i}") for i, text in enumerate(texts)]
    encode, found = Encoder(pair.tokenizer, config.prompts), []
    of_teachers = teacher_ids(examples, encode, teacher_reads(config, pair, training=False))
    for example, (ids, _), of_teacher in zip(examples, encode(examples), of_teachers, strict=True):
        if isinstance(of_teacher, DataError):
            raise of_teacher
        own = of_teacher and of_teacher[0]
        found.append(TokenizedExample(example.id, ids, [], [], (), False, example.source, teacher_prompt_ids=own))
    return found


def check_context(config: TrainConfig, pair: Pair) -> None:
    """Raise ConfigError if a prompt and its completion may not fit into the models' context."""
    scored = config.eval_max_new_tokens if config.eval_samples else 0
    completion = max(config.max_new_tokens, config.max_completion_length, scored)
    longest = longest_teacher_prompt(config, pair)
    reads = [(role_of(name), longest, model) for name, model in pair.named_teachers.items()]
    for name, prompt, model in [*reads, ("student", config.max_prompt_length, pair.student)]:
        if words := beyond_context(prompt + completion, f"{name}'s", model):
            own = prompt == config.max_prompt_length
            theirs = (
                "a prompt in the teacher's tokens of up to"
                if pair.bridges
                else "a prompt under teacher_prompt of up to"
            )
            what = "max_prompt_length" if own else theirs
            raise ConfigError(
                f"{what} {prompt} + completion {completion} tokens {words}; lower max_prompt_length, max_new_tokens, "
                "max_completion_length or eval_max_new_tokens"
            )


def role_of(teacher: str) -> str:
    return f"teacher {teacher!r}" if teacher else "teacher"


def longest_teacher_prompt(config: DataConfig, pair: Pair) -> int:
    """Tokens of the longest prompt that the teacher may have to read."""
    lengths = config.max_prompt_length, config.max_completion_length
    return teacher_prompt_limit(pair.tokenizer, teacher_reads(config, pair, training=True), *lengths)
