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
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from transformers import PreTrainedModel

from switchkd.base import signals
from switchkd.base.errors import (
    DataError,
    DiskError,
    NoMemoryError,
    NonFiniteError,
    ServerError,
    SwitchKDWarning,
)
from switchkd.base.lock import Check, locked
from switchkd.base.manifest import CARD, json_sha256
from switchkd.base.settings import to_dict
from switchkd.base.storage import tidy, write_file
from switchkd.base.terminal import console, number
from switchkd.data.settings import today, with_template
from switchkd.decoding.rollouts import Metrics, Rollouts
from switchkd.evaluation.evaluate import evaluate
from switchkd.evaluation.results import EVALUATION, Evaluation, read_results
from switchkd.evaluation.samples import samples
from switchkd.evaluation.settings import EvalSettings
from switchkd.forward.parallel import Together
from switchkd.forward.served import NO_TEXT, ServedModel
from switchkd.forward.sharding import whole
from switchkd.methods.policy import Policy, StudentOnly
from switchkd.models.pair import Pair
from switchkd.models.saved_student import SCORED, STUDENT, SavedStudent
from switchkd.models.settings import with_dtypes
from switchkd.reports import live
from switchkd.reports.tables import print_results
from switchkd.runs.continuation import as_recorded, begun, check_origin, check_run, conditions, own_code
from switchkd.runs.finishing import check_push, push, rehearse, save_student, scored_student
from switchkd.runs.heldout import Heldout, all_settings, check_metric, eval_settings, load_heldout, score, write_scores
from switchkd.runs.model_card import model_card
from switchkd.runs.opening import check_context, load_corpus, load_training_text, load_validation, open_pair
from switchkd.runs.tracking import Trackers, check_trackers
from switchkd.teachers.store import weights_sha256
from switchkd.training.checkpoint import Weights, checkpoints
from switchkd.training.processes import (
    first_group_first,
    from_main,
    in_first_group,
    new_accelerator,
    with_launchers_settings,
)
from switchkd.training.reading import OnRound
from switchkd.training.records import CONFIG
from switchkd.training.settings import TrainConfig
from switchkd.training.trainer import OnStep, Trainer


def distil(config: TrainConfig, loaded: Pair | None = None, on_step: OnStep = lambda *_: None) -> dict[str, Evaluation]:
    """Train as ``config`` says and write the run directory; returns the scores of before and after.

    ``loaded`` is a pair to take in place of the one that the settings name. ``on_step`` is told of every step's metrics and the
    texts generated in it.

    SIGTERM and Ctrl-C end it at the next whole point, with a checkpoint of the last finished step; a second one, a second later or
    more, ends it at once. Called outside the main thread, it is ended as any other code.

    Raises:
        ConfigError: the directory is in use, or a resumed run would differ from the one it continues.
        InUseError: another process works in the directory.
        HubError: the run is done, and its student, which lies in the directory, could not be pushed.
        NonFiniteError, NoMemoryError, ServerError, DiskError, Stopped: it had to end before its time. A note says which checkpoint
            stands.
    """
    accelerator, run = new_accelerator(), Path(config.output_dir)
    mine = locked(run) if accelerator.is_main_process else nullcontext(lambda: None)
    with signals.deferred(polled=accelerator.num_processes == 1):
        try:
            with mine as check_place:
                return _distil(config, accelerator, check_place, loaded, on_step)
        except (signals.Stopped, NonFiniteError, NoMemoryError, ServerError, DiskError) as error:
            error.add_note(standing(run))
            raise


def standing(run: Path) -> str:
    """What there is of a run that ended early, and the command that goes on."""
    if saved := checkpoints(run):
        return f"{saved[-1]} stands; go on with: switchkd train {shlex.quote(str(run))} --resume"
    return f"no step is saved; to start anew, delete {run}" if begun(run) else "the same command starts anew"


def _distil(
    config: TrainConfig, accelerator: Accelerator, check_place: Check, loaded: Pair | None, on_step: OnStep
) -> dict[str, Evaluation]:
    main, run = accelerator.is_main_process, Path(config.output_dir)
    quiet = config.quiet or not main
    config = with_dtypes(with_launchers_settings(accelerator, config), accelerator.device)
    config = as_recorded(run, config)
    check_run(run, config)
    check_trackers(config.report_to)
    if main and config.push_to_hub:
        check_push(config.push_to_hub, config)
    pair = open_pair(config, quiet=not main, seed=config.seed, train=True, loaded=loaded)
    config = with_template(config, pair.tokenizer, from_main(accelerator, today), pair.other_tokenizers)
    check_context(config, pair)
    together = Together.of(pair.teacher)
    asks = in_first_group(accelerator, together)
    with first_group_first(accelerator, together):  # the others then find it done
        train, teacher_cache = load_training_text(config, pair, quiet=quiet)
        heldout = load_heldout(config, pair, quiet=quiet)
    validation = load_validation(config, pair, heldout.examples, quiet=quiet)
    corpus = load_corpus(config, pair, quiet=quiet)
    checksums = _model_checksums(pair, heldout) | own_code(config) if asks else {}
    trainer = Trainer(
        pair, train, config, accelerator, teacher_cache=teacher_cache, validation=validation, corpus=corpus,
        check_place=check_place, scored_on=json_sha256([heldout.sha256, checksums.get("teacher_model_name_or_path")]),
    )  # fmt: skip
    config = trainer.config  # with what rounds cost here
    check_metric(config, heldout)
    accelerator.wait_for_everyone()  # every rank has found the run directory free
    results, settings = {}, eval_settings(config, StudentOnly())
    texts = {"train_file": train, "eval_file": heldout.on_some_day, "validation_file": validation, "lm_file": corpus}
    # For the rehearsal; all ranks gather them.
    weights: Weights = trainer.learner.masters.whole() if config.merge else {}
    with whole(trainer.student):
        if main:
            check_place()
            tidy(run)
            rehearse(trainer, weights)
            check_origin(run, config, texts, checksums, conditions(accelerator.device, accelerator.num_processes))
            write_file(run / CONFIG, yaml.safe_dump(to_dict(config.anew()), sort_keys=False))
        if asks:
            results = _before(run / EVALUATION, config, pair, heldout, settings, quiet)
    del weights  # of a student in shards, a whole copy
    if config.resumes:
        trainer.resume()
    trackers = Trackers(config.report_to if main else (), run, to_dict(config), trainer.step)
    _train(trainer, heldout, settings, trackers, on_step, quiet)
    trainer.load_best()
    weights = trainer.final_weights()
    with whole(trainer.student):
        if main:
            _finish(trainer, weights, heldout, settings, trackers, results, quiet)
        elif asks and heldout.examples:
            score(pair, scored_student(trainer, weights), heldout, settings, "student after", quiet)
        accelerator.wait_for_everyone()
    trackers.finish()  # may take as long as a network does
    if main and config.push_to_hub:
        address = push(run, config.push_to_hub, config.hub_private_repo)
        console.print(f"student put on the hub: {address}", soft_wrap=True)
    return results


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


def _before(
    file: Path, config: TrainConfig, pair: Pair, heldout: Heldout, settings: EvalSettings, quiet: bool
) -> dict[str, Evaluation]:
    """Teacher's and untrained student's scores, read back where a resumed run has them and nothing about it may differ."""
    if not (heldout.examples and config.eval_on_start):
        return {}
    together = Together.of(pair.teacher)
    if (known := together.first(lambda: _known_before(file, config))) is not None:
        return known
    models = {"teacher": pair.teacher, "student before": pair.student}
    if isinstance(pair.teacher, ServedModel):
        del models["teacher"]
        if not quiet:
            console.print(NO_TEXT, soft_wrap=True)
    results = {name: score(pair, model, heldout, settings, name, quiet) for name, model in models.items()}
    if together.rank == 0:
        write_scores(file, heldout, all_settings(config, pair, heldout, settings), results)
    return results


def _known_before(file: Path, config: TrainConfig) -> dict[str, Evaluation] | None:
    if config.resumes and file.is_file() and not config.allow_change:
        try:
            return {name: result for name, result in read_results(file).items() if name not in SCORED}
        except DataError as error:
            warnings.warn(f"{error}. The run does that now", SwitchKDWarning, stacklevel=2)
    return None


def _train(
    trainer: Trainer, heldout: Heldout, settings: EvalSettings, trackers: Trackers, on_step: OnStep, quiet: bool
) -> None:
    watched = (heldout.examples or trainer.examples)[: trainer.config.sample_prompts]

    def scores(student: PreTrainedModel) -> dict[str, float]:
        return evaluate(trainer.pair, student, heldout.examples, heldout.task, settings).means()

    def sample(progress: float) -> list[dict[str, Any]]:
        policy = sample_policy(trainer.config, trainer.reading.policy, progress, trainer.step)
        how = trainer.config.decoding(policy=policy, seed=trainer.config.seed)
        return samples(trainer.pair, watched, how, heldout.task if heldout.examples else None)

    def run(show: OnStep = lambda *_: None, on_round: OnRound | None = None) -> None:
        def tell(metrics: Metrics, rollouts: Rollouts) -> None:
            trackers.log(metrics, metrics["step"])
            show(metrics, rollouts)
            on_step(metrics, rollouts)

        trainer.train(tell, on_round, scores if heldout.examples else None, sample)

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
        console.print(
            f"the best student is that of step {trainer.best['step']}: {config.metric_for_best_model} "
            f"{number(trainer.best['score'])}",
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
            print_results(results, heldout.shown() | known)
    write_file(
        run / STUDENT / CARD, model_card(trainer, results, heldout.shown() | known, saved.sha256 if saved else "")
    )
    console.print(f"student saved in {run / STUDENT}", soft_wrap=True)
    if not quiet:
        console.print(f"look at the run: switchkd report {run}", soft_wrap=True)


def sample_policy(config: TrainConfig, bound: Policy, progress: float, step: int = 0) -> Policy:
    """The rule that a run's samples are written under: its own, or, where it generates no text, the student alone."""
    return bound.at(progress, step) if config.mix.generates else StudentOnly()
