"""A run from settings to a distilled student: the run directory and everything in it.

config.yaml       the settings, every one, usable as a recipe
origin.json       checksums of the text and models that the run is on; the machine and versions that it ran under
lock.json         the process that works here, while it does
metrics.jsonl     a line for every optimizer step
rollouts.jsonl    the generated text: token ids, speakers, divergences, thresholds
samples.jsonl     the same few prompts completed every ``sample_steps``, with what both models say of each token
checkpoint-N/     whole checkpoints, the newest ones; 0 is of the untrained student
evaluation.json   scores of teacher, student before and student after, of every example (and the text that was scored)
best-N/           the best student so far, where the run looks for one
trackers/         what trackers write, where a run reports to any
student/          the result, for ``from_pretrained``: a model, or the adapter alone; with a model card
"""

import shlex
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from transformers import PreTrainedModel

from switchkd import live, report, signals
from switchkd.adapters import check_trainable
from switchkd.checkpoint import Weights, checkpoints
from switchkd.conditions import conditions, own_code
from switchkd.config import (
    DataConfig,
    EvalConfig,
    ModelConfig,
    TrainConfig,
    to_dict,
)
from switchkd.continuation import begun, check_origin, check_run, on_recorded_day
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
from switchkd.errors import (
    ConfigError,
    DataError,
    DiskError,
    NoMemoryError,
    NonFiniteError,
    SwitchKDWarning,
    nearest,
)
from switchkd.evaluation import EvalSettings, evaluate, score_names, work
from switchkd.lines import SAMPLE, BadRows
from switchkd.lock import Check, locked
from switchkd.manifest import CARD
from switchkd.model_card import model_card
from switchkd.models import (
    Pair,
    context_length,
    context_note,
    load_pair,
)
from switchkd.plain import check_text
from switchkd.policies import Policy, StudentOnly
from switchkd.precision import with_dtypes
from switchkd.processes import from_main, new_accelerator, with_launchers_settings
from switchkd.proof import prove
from switchkd.published import public_name
from switchkd.rehearsal import rehearse, save_student
from switchkd.results import EVALUATION, Evaluation, read_results, write_results
from switchkd.rollouts import Rollouts
from switchkd.run_record import CONFIG
from switchkd.samples import sample_policy, samples
from switchkd.sampling import Sampling
from switchkd.saved_student import SCORED, STUDENT, SavedStudent
from switchkd.sharding import whole
from switchkd.storage import tidy, write_file
from switchkd.tasks import AUTO, TASKS, Task, eval_source, scorable, task_named
from switchkd.teacher_cache import TeacherCache
from switchkd.teacher_store import json_sha256, teacher_texts, weights_sha256
from switchkd.template_inputs import SOME_DAY, Template, template_settings, today, with_date
from switchkd.templates import Encoder
from switchkd.tracking import Trackers, check_trackers
from switchkd.trainer import Metrics, OnRound, OnStep, Trainer
from switchkd.vocabulary import within

DEFAULT_HELDOUT = f"{SAMPLE}:heldout"

# Settings that name the folder of the teacher's stored work.
STORE_SETTINGS = {
    "teacher_model_name_or_path", "teacher_dtype", "train_file", "train_samples", "template", "max_prompt_length",
    "max_completion_length", "skip_bad", "teacher_prompt", "teachers", "teacher_field", "mix", "max_new_tokens", "temperature",
    "seed", "teacher_cache", "teacher_cache_top_k",
}  # fmt: skip


def distil(config: TrainConfig) -> dict[str, Evaluation]:
    """Train as ``config`` says and write the run directory; returns the scores of before and after.

    SIGTERM and Ctrl-C end it at the next whole point, with a checkpoint of the last finished step; a second one, a second later or
    more, ends it at once. Called outside the main thread, it is ended as any other code.

    Raises:
        ConfigError: the directory is in use, or a resumed run would differ from the one it continues.
        InUseError: another process works in the directory.
        NonFiniteError, NoMemoryError, DiskError, Stopped: it had to end before its time. A note says which checkpoint stands.
    """
    accelerator, run = new_accelerator(), Path(config.output_dir)
    mine = locked(run) if accelerator.is_main_process else nullcontext(lambda: None)
    with signals.deferred(polled=accelerator.num_processes == 1):
        try:
            with mine as check_place:
                return _distil(config, accelerator, check_place)
        except (signals.Stopped, NonFiniteError, NoMemoryError, DiskError) as error:
            error.add_note(standing(run))
            raise


def standing(run: Path) -> str:
    """What there is of a run that ended early, and the command that goes on."""
    if saved := checkpoints(run):
        return f"{saved[-1]} stands; go on with: switchkd train {shlex.quote(str(run))} --resume"
    return f"no step is saved; to start anew, delete {run}" if begun(run) else "the same command starts anew"


def _distil(config: TrainConfig, accelerator: Accelerator, check_place: Check) -> dict[str, Evaluation]:
    main, run = accelerator.is_main_process, Path(config.output_dir)
    quiet = config.quiet or not main
    config = with_dtypes(with_launchers_settings(accelerator, config), accelerator.device)
    config = on_recorded_day(run, config)
    check_run(run, config)
    check_trackers(config.report_to)
    pair = open_pair(config, quiet=not main, seed=config.seed, train=True)
    config = with_date(config, pair.tokenizer, from_main(accelerator, today))
    check_context(config, pair)
    with accelerator.main_process_first():  # the others then find it done
        train, teacher_cache = load_training_text(config, pair, quiet=quiet)
    heldout = load_heldout(config, pair, quiet=quiet)
    validation = load_validation(config, pair, heldout.examples, quiet=quiet)
    corpus = load_corpus(config, pair, quiet=quiet)
    checksums = _model_checksums(pair, heldout) | own_code(config) if main else {}
    trainer = Trainer(
        pair, train, config, accelerator, teacher_cache=teacher_cache, validation=validation, corpus=corpus,
        check_place=check_place, scored_on=json_sha256([heldout.sha256, checksums.get("teacher_model_name_or_path")]),
    )  # fmt: skip
    _check_metric(config, heldout)
    accelerator.wait_for_everyone()  # every rank has found the run directory free
    results, settings = {}, eval_settings(config, StudentOnly())
    texts = {"train_file": train, "eval_file": heldout.on_some_day, "validation_file": validation, "lm_file": corpus}
    weights: Weights = trainer.masters.whole() if config.merge else {}  # for the rehearsal: all ranks gather them
    with whole(trainer.student):
        if main:
            check_place()
            tidy(run)
            rehearse(trainer, weights)
            check_origin(run, config, texts, checksums, conditions(accelerator.device, accelerator.num_processes))
            write_file(run / CONFIG, yaml.safe_dump(to_dict(config.anew()), sort_keys=False))
            results = _before(run / EVALUATION, config, pair, heldout, settings)
    del weights  # of a student in shards, a whole copy
    if config.resumes:
        trainer.resume()
    trackers = Trackers(config.report_to if main else (), run, to_dict(config), trainer.step)
    _train(trainer, heldout, settings, trackers, quiet)
    trainer.load_best()
    weights = trainer.final_weights()
    with whole(trainer.student):
        if main:
            _finish(trainer, weights, heldout, settings, trackers, results, quiet)
        accelerator.wait_for_everyone()
    trackers.finish()  # may take as long as a network does
    return results


def open_pair(config: ModelConfig, quiet: bool = False, seed: int = 0, train: bool = False) -> Pair:
    """Load the pair, say what is odd about it, and prove that all of its models are read and decoded exactly.

    ``seed`` is the key of a new adapter's weights. To ``train`` a student as a whole, its weights are loaded in float32 or wider,
    which the trainer keeps; else the student is loaded in the dtype that it computes in.
    """
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
    )
    if train:
        check_trainable(pair.student, isinstance(config, TrainConfig) and config.merge)
    if not quiet:
        for warning in pair.warnings:
            report.console.print(f"warning: {warning}", style="yellow", soft_wrap=True)
    for model in dict.fromkeys([*pair.named_teachers.values(), pair.student]):
        signals.check()
        prove(model)
    return pair


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
        report.console.print(f"{file}: {len(kept)} examples{notes}", soft_wrap=True)
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
        decoding = {k: v for k, v in config.decode_arguments().items() if k != "policy"}
        with _stored(config, pair, "teacher text", len(examples), quiet) as (folder, advance):
            examples = teacher_texts(pair, examples, folder, **decoding, seed=config.seed, progress=advance)
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
    named |= template_settings(config.prompts, pair.tokenizer)
    name = f"{what.replace(' ', '-')}-{json_sha256(named)[:12]}"
    root = Path(config.teacher_store_dir) if config.teacher_store_dir else cache_folder()
    if not quiet:
        report.console.print(f"{what}: {root / name}", soft_wrap=True)
    with report.bar(what, examples, quiet) as bar:
        yield root / name, bar.advance


@dataclass(frozen=True)
class Heldout:
    """Held-out examples, the task that they are of, and the teacher that they are judged by."""

    task: Task
    file: str
    examples: list[TokenizedExample]
    teacher: PreTrainedModel
    on_some_day: list[TokenizedExample]
    """The same examples with the prompts of one fixed day. Their checksum is the same on every day; `examples` are what is read."""

    @cached_property
    def teacher_sha256(self) -> str:
        """Checksum of the teacher's weights, taken when it is asked for: of a large model that takes a while."""
        return weights_sha256(self.teacher)

    def shown(self) -> dict[str, Any]:
        """Task and data in words, to stand before the settings."""
        return {
            "task": f"{self.task.name} version {self.task.version}",
            "data": f"{public_name(self.file)}, sha256 {self.sha256[:12]}…",
        }

    @cached_property
    def sha256(self) -> str:
        """One checksum of prompts, references and ids."""
        return json_sha256([[e.id, e.prompt_ids, e.completion_ids, e.references] for e in self.on_some_day])

    def to_json(self) -> dict[str, Any]:
        """Which examples."""
        ids, groups = [e.id for e in self.examples], [e.group for e in self.examples]
        return {"file": self.file, "sha256": self.sha256, "ids": ids, "groups": groups}


def _model_checksums(pair: Pair, heldout: Heldout) -> dict[str, str]:
    """Checksums of the models as they were loaded, by the settings that name them."""
    tokenizer = json_sha256(pair.tokenizer.get_vocab())
    found = {
        "teacher_model_name_or_path": heldout.teacher_sha256,
        "student_model_name_or_path": json_sha256([weights_sha256(pair.student), tokenizer]),
    }
    if pair.teachers:
        found["teachers"] = json_sha256({name: weights_sha256(model) for name, model in pair.teachers.items()})
    return found


def heldout_file(config: Any) -> str:
    """Where held-out examples come from; raises ConfigError for an unknown task, or one without data of its own."""
    return eval_source(config.eval_file or (DEFAULT_HELDOUT if config.task == AUTO else ""), config.task)


def load_heldout(config: Any, pair: Pair, quiet: bool = False) -> Heldout:
    """The held-out examples that a run or an evaluation asks for, perhaps none, and their task."""
    if not config.eval_samples:
        return Heldout(TASKS["references"], "", [], pair.teacher, [])
    file = heldout_file(config)
    bad = BadRows(file, config.skip_bad)
    examples = load_examples(file, config.eval_samples if config.eval_samples > 0 else None, bad)
    task = task_named(config.task, examples[0].format)
    examples = scorable(task, examples, bad) if bad.tolerated else examples
    now = some_day = prepared(config, pair, file, examples, bad, quiet)
    if config.prompts.reads_date(pair.tokenizer):
        some_day = prepared(replace(config, template_date=SOME_DAY), pair, file, examples, bad, quiet=True)
    bad.tell()
    return Heldout(task, file, now, pair.teacher, some_day)


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
        report.console.print(f"{config.lm_file}: {len(texts)} texts", soft_wrap=True)
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
    return [TokenizedExample(example.id, ids, [], (), False, example.source) for example, (ids, _) in encoded]


def check_context(config: TrainConfig, pair: Pair) -> None:
    """Raise ConfigError if a prompt and its completion may not fit into the models' context."""
    scored = config.eval_max_new_tokens if config.eval_samples else 0
    completion = max(config.max_new_tokens, config.max_completion_length, scored)
    longest = longest_teacher_prompt(config, pair)
    reads = [(role_of(name), longest, model) for name, model in pair.named_teachers.items()]
    for name, prompt, model in [*reads, ("student", config.max_prompt_length, pair.student)]:
        context = context_length(model)
        if prompt + completion > context:
            what = (
                "max_prompt_length" if prompt == config.max_prompt_length else "a prompt under teacher_prompt of up to"
            )
            raise ConfigError(
                f"{what} {prompt} + completion {completion} tokens exceed the {name}'s context of {context:g}"
                f"{context_note(model)}; lower max_prompt_length, max_new_tokens, max_completion_length or eval_max_new_tokens"
            )


def role_of(teacher: str) -> str:
    return f"teacher {teacher!r}" if teacher else "teacher"


def longest_teacher_prompt(config: DataConfig, pair: Pair) -> int:
    """Tokens of the longest prompt that the teacher may have to read."""
    lengths = config.max_prompt_length, config.max_completion_length
    return teacher_prompt_limit(pair.tokenizer, config.teacher_prompt, *lengths)


def score(
    pair: Pair,
    model: PreTrainedModel,
    heldout: Heldout,
    settings: EvalSettings,
    name: str,
    quiet: bool = False,
    saved: SavedStudent | None = None,
) -> Evaluation:
    """Evaluate one model of the pair, with a progress bar; the result says which weights it is of, and how they are ``saved``."""
    with report.bar(f"evaluate {name}", work(heldout.examples, settings), quiet) as bar:
        result = evaluate(pair, model, heldout.examples, heldout.task, settings, bar.advance)
    sha256 = heldout.teacher_sha256 if model is heldout.teacher else weights_sha256(model)
    return replace(result, model={"sha256": sha256} | (saved.mark() if saved else {}))


def write_scores(
    file: Path,
    heldout: Heldout,
    settings: dict[str, Any],
    results: dict[str, Evaluation],
    write: Callable[[Path, str], None] = write_file,
) -> None:
    """Evaluations with everything they depend on, as JSON."""
    task = {"name": heldout.task.name, "version": heldout.task.version, "primary": heldout.task.primary}
    write_results(file, task, heldout.to_json(), settings, results, write)


def eval_settings(config: EvalConfig, policy: Policy) -> EvalSettings:
    """How completions are made, as ``evaluate`` wants to know it."""
    return EvalSettings(
        config.eval_max_new_tokens, config.eval_temperature, config.eval_seeds, config.eval_own_text, config.eval_backend, policy,
        config.per_device_eval_batch_size, top_p=config.eval_top_p, top_k=config.eval_top_k, min_p=config.eval_min_p,
    )  # fmt: skip


def all_settings(config: Any, pair: Pair, heldout: Heldout, settings: EvalSettings) -> dict[str, Any]:
    """Every setting that a score depends on, beside the examples."""
    names = "template", "max_prompt_length", "max_completion_length", "dtype", "teacher_dtype"
    text = {name: getattr(config, name) for name in names}
    text |= template_settings(config.prompts, pair.tokenizer)
    return settings.to_json() | text | {"teacher_sha256": heldout.teacher_sha256}


def run_of(student: str) -> Path | None:
    """The run directory whose student that is, if it is one's; a checkpoint is another student than the run's."""
    folder = Path(student)
    return folder.parent if folder.name == STUDENT and (folder.parent / CONFIG).is_file() else None


def _check_metric(config: TrainConfig, heldout: Heldout) -> None:
    """Raise ConfigError if the best student is to be chosen by a score that there will not be."""
    name = config.metric_for_best_model
    if name and name not in (known := score_names(heldout.task, heldout.examples)):
        raise ConfigError(
            f"metric_for_best_model: no score {name!r} in the task {heldout.task.name}{nearest(name, known)}"
        )


def _before(
    file: Path, config: TrainConfig, pair: Pair, heldout: Heldout, settings: EvalSettings
) -> dict[str, Evaluation]:
    """Teacher's and untrained student's scores, read back where a resumed run has them and nothing about it may differ."""
    if not (heldout.examples and config.eval_on_start):
        return {}
    if config.resumes and file.is_file() and not config.allow_change:
        try:
            return {name: result for name, result in read_results(file).items() if name not in SCORED}
        except DataError as error:
            warnings.warn(f"{error}. The run does that now", SwitchKDWarning, stacklevel=2)
    models = {"teacher": pair.teacher, "student before": pair.student}
    results = {name: score(pair, model, heldout, settings, name, config.quiet) for name, model in models.items()}
    write_scores(file, heldout, all_settings(config, pair, heldout, settings), results)
    return results


def _train(trainer: Trainer, heldout: Heldout, settings: EvalSettings, trackers: Trackers, quiet: bool) -> None:
    watched = (heldout.examples or trainer.examples)[: trainer.config.sample_prompts]

    def scores(student: PreTrainedModel) -> dict[str, float]:
        return evaluate(trainer.pair, student, heldout.examples, heldout.task, settings).means()

    def sample(progress: float) -> list[dict[str, Any]]:
        policy = sample_policy(trainer.config, trainer.policy, progress, trainer.step)
        return samples(trainer.pair, watched, policy, trainer.config, heldout.task if heldout.examples else None)

    def run(show: OnStep = lambda *_: None, on_round: OnRound | None = None) -> None:
        def on_step(metrics: Metrics, rollouts: Rollouts) -> None:
            trackers.log(metrics, metrics["step"])
            show(metrics, rollouts)

        trainer.train(on_step, on_round, scores if heldout.examples else None, sample)

    if quiet:
        run()
    else:
        live.train(trainer, heldout.task.primary, run)


def _finish(
    trainer: Trainer,
    weights: Weights,
    heldout: Heldout,
    settings: EvalSettings,
    trackers: Trackers,
    results: dict[str, Evaluation],
    quiet: bool,
) -> None:
    """Save the student, which has these ``weights``, score it into ``results``, and say where all that lies."""
    config, pair, run = trainer.config, trainer.pair, trainer.run
    if trainer.best and not quiet:
        report.console.print(
            f"the best student is that of step {trainer.best['step']}: {config.metric_for_best_model} "
            f"{report.number(trainer.best['score'])}",
            soft_wrap=True,
        )
    trainer.check_place()
    student = save_student(trainer, STUDENT, weights, trainer.save_dtype)
    saved = SavedStudent.of(run)
    known: dict[str, Any] = {}
    if heldout.examples:
        results["student after"] = after = score(pair, student, heldout, settings, "student after", quiet, saved)
        known = all_settings(config, pair, heldout, settings)
        trainer.check_place()
        trackers.log({f"final/{name}": mean for name, mean in after.means().items()}, trainer.step)
        write_scores(run / EVALUATION, heldout, known, results)
        if not quiet:
            report.print_results(results, heldout.shown() | known)
    write_file(
        run / STUDENT / CARD, model_card(trainer, results, heldout.shown() | known, saved.sha256 if saved else "")
    )
    report.console.print(f"student saved in {run / STUDENT}", soft_wrap=True)
    if not quiet:
        report.console.print(f"look at the run: switchkd report {run}", soft_wrap=True)
