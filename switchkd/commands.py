"""The commands: each is a settings dataclass and a function; heavy imports wait until the function runs."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from switchkd.config import (
    DataConfig,
    DecodeConfig,
    EvalConfig,
    ModelConfig,
    Settings,
    TrainConfig,
    load_recipe,
    shipped,
)
from switchkd.demo import DemoConfig, demo_settings
from switchkd.errors import ConfigError, DataError, SwitchKDError, nearest
from switchkd.policies import Policy, StudentOnly
from switchkd.storage import write_file, write_output
from switchkd.template_inputs import template_settings, with_date

if TYPE_CHECKING:
    from switchkd.data import TokenizedExample
    from switchkd.models import Pair


@dataclass(frozen=True)
class GenerateConfig(ModelConfig, DataConfig, DecodeConfig):
    """Complete prompts under a policy and say who wrote what; of a run, its student writes alone unless a policy is named."""

    prompt: tuple[str, ...] = ()
    """Prompts as text, sent through the template; without any, those of eval_file are completed."""
    limit: int = 16
    """Rows of eval_file to complete."""
    output_file: str | None = None
    """Write rollouts here as JSONL: token ids, text, speakers, divergences."""
    seed: int = 0
    """Key of the noise, with each prompt's index and each position."""


@dataclass(frozen=True)
class PlayConfig(ModelConfig, DataConfig, DecodeConfig):
    """Watch one completion being written, and the divergence that decides who writes it."""

    prompt: str = ""
    """A prompt as text, sent through the template; without one a terminal asks, and elsewhere it is the first of eval_file."""
    seed: int = 0
    """Key of the noise, with the number of the prompt and each position."""


@dataclass(frozen=True)
class EvaluateConfig(ModelConfig, DataConfig, EvalConfig):
    """Score teacher and student on held-out examples."""

    eval_samples: int = -1
    """Held-out examples to evaluate on, the first of the file; -1 takes all."""
    policy: Policy = field(default_factory=StudentOnly)
    """Who writes the completions that are scored as the student's; the teacher always writes its own alone."""
    only: Literal["", "teacher", "student"] = ""
    """Evaluate this one alone."""
    output_file: str = ""
    """Write scores and settings here as JSON, the text beside it; default evaluation-TASK.json in the run given."""


@dataclass(frozen=True)
class StudyConfig(Settings):
    """Run a grid of methods, seeds, pairs and budgets, and compare them. Goes on where it was stopped."""

    plan: tyro.conf.Positional[str] = "list"
    """A plan's YAML file, or the name of one that ships with the package; `list` lists them."""
    size: str = "small"
    """Which of the plan's sizes."""
    output_dir: str = ""
    """Folder of runs and results; default studies/PLAN-SIZE."""
    jobs: int = 1
    """Runs at a time, each with its share of the cores."""
    set: tuple[str, ...] = ()
    """Settings of every run over the plan's, as NAME=VALUE, such as max_train_tokens=20000; VALUE is read as YAML."""
    dry_run: bool = False
    """List the runs and stop."""


@dataclass(frozen=True)
class CompareConfig(Settings):
    """Compare evaluated runs, example by example, and say what can be told apart."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Run directories, or files that `switchkd evaluate` wrote. Runs that differ in their training seed alone are one method."""
    task: str = ""
    """Compare evaluation-TASK.json; without it, evaluation.json."""
    score: tuple[str, ...] = ()
    """Scores to compare, the first also pair by pair and as a plot; default the task's primary score and all others in common."""
    baseline: str = ""
    """The method, teacher or `student before` that differences are taken to; default the first method."""
    output_dir: str | None = None
    """Write compare.md, compare.json, compare.svg and compare.png here."""


@dataclass(frozen=True)
class ReportConfig(Settings):
    """Write runs as one HTML page that needs no network: summary, who wrote what, scores, curves."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Run directories, whatever their state."""
    output_file: str = ""
    """The page; default report.html in the run, or here for several runs."""


@dataclass(frozen=True)
class PlotConfig(Settings):
    """Draw the papers' figures of trained runs, each as SVG and PNG."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Run directories. Runs that differ in their training seed alone are one method."""
    figure: str = "all"
    """lambda, divergence, switch_rate, length, progress or cost; `all` draws those that the runs allow."""
    output_dir: str = "figures"
    """Folder of the figures."""


@dataclass(frozen=True)
class PruneConfig(Settings):
    """Make a student by dropping the layers of least influence from a model."""

    model_name_or_path: str = "demo"
    """Hub name or local folder of the model."""
    output_dir: str = "pruned"
    """Where the smaller model goes; must be empty or absent."""
    layers: int = 15
    """Layers to keep."""
    seed: int = 0
    """Key of the choice of texts that influence is measured on."""


@dataclass(frozen=True)
class LmEvalConfig(Settings):
    """Score a student, or any model, on the benchmarks of lm-eval; needs the extra `lm-eval`."""

    model_name_or_path: tyro.conf.Positional[str] = "demo"
    """A run directory (its student), a local folder, a hub name, or `demo` (the demo student)."""
    tasks: tuple[str, ...] = ()
    """lm-eval's tasks, groups or tags, such as arc_easy hellaswag."""
    num_fewshot: int | None = None
    """Examples before each question; default each task's own number. A task that fixes 0 keeps it."""
    limit: int | None = None
    """Only the first so many examples of each task: a trial, not a score."""
    batch_size: int = 8
    """Rows of a forward; with padding, rounding differs with it."""
    apply_chat_template: bool = False
    """Ask through the model's chat template."""
    include_path: str | None = None
    """A folder of your own tasks' YAML files."""
    dtype: Literal["float32", "bfloat16", "float64"] | None = None
    """Dtype of the weights; default that of the run, else float32."""
    output_file: str | None = None
    """Write numbers, settings, seeds, versions and task definitions here as JSON."""


@dataclass(frozen=True)
class MakePairConfig(Settings):
    """Make the small pair for studies on two CPU cores, with its data, from generated text."""

    output_dir: str | None = None
    """Where the pair goes; default in the user's cache, where the model name `small` finds it."""
    seed: int = 0
    """Key of all randomness."""
    scale: Literal["full", "tiny"] = "full"
    """`tiny` makes untrained models in seconds, to try the command."""


@dataclass(frozen=True)
class MethodsConfig(Settings):
    """List the recipes that ship with the package."""


@dataclass(frozen=True)
class TasksConfig(Settings):
    """List the tasks that completions can be scored on."""


# Settings that a command has of its own, and does not take from a recipe or run.
NOT_FROM_RECIPE: dict[type, tuple[str, ...]] = {EvaluateConfig: ("policy", "eval_samples")}
# What a command means by a run, whose training had another policy: its student, which writes alone.
OF_A_RUN: dict[type, dict[str, Any]] = {GenerateConfig: {"policy": StudentOnly()}}


def train(config: TrainConfig) -> None:
    from switchkd.runs import distil

    distil(config)


def demo(config: DemoConfig) -> None:
    from switchkd.report import console
    from switchkd.runs import distil

    settings = demo_settings(config)
    console.print(
        f"{config.method}: SmolLM2-135M to 81M on GSM8K, {settings.max_steps} steps, into {settings.output_dir}"
    )
    distil(settings)


def generate(config: GenerateConfig) -> None:
    from switchkd.decoding import decode_examples
    from switchkd.report import bar, console, cost_line, print_rollout
    from switchkd.runs import open_pair

    pair = open_pair(config)
    config = with_date(config, pair.tokenizer)
    examples, settings = _examples(config, pair, config.prompt, config.limit), _decoding(config, pair)
    with bar("generate", len(examples) * config.max_new_tokens) as progress:
        shown = 0

        def on_round(cost: Any) -> None:
            nonlocal shown
            progress.advance(cost.kept_tokens - shown, f"{cost.kept_tokens / cost.seconds:.0f} tok/s")
            shown = cost.kept_tokens

        rollouts = decode_examples(pair, examples, settings, range(len(examples)), on_round)
    for rollout in rollouts:
        print_rollout(rollout, pair.tokenizer)
    console.print(cost_line(rollouts.cost), soft_wrap=True)
    if config.output_file:
        records = [{**r.to_json(), "text": pair.tokenizer.decode(r.completion_ids)} for r in rollouts]
        write_output(Path(config.output_file), "".join(json.dumps(record) + "\n" for record in records))


def _examples(config: Any, pair: Pair, prompts: Sequence[str], limit: int) -> list[TokenizedExample]:
    """The prompts, or where there are none the first of eval_file."""
    from switchkd.runs import DEFAULT_HELDOUT, load_task, prompt_examples

    if prompts:
        return prompt_examples(prompts, config.prompts, pair)
    own = config.teacher_prompt, config.teacher_field
    return load_task(config, pair, config.eval_file or DEFAULT_HELDOUT, limit, False, *own)


def _decoding(config: Any, pair: Pair) -> dict[str, Any]:
    """What settings say to ``decode_examples``."""
    policy = config.policy.bind(pair.tokenizer, config.max_new_tokens)
    return config.decode_arguments() | {"policy": policy, "seed": config.seed}


def play(config: PlayConfig) -> None:
    from switchkd.live import play as play_rollout
    from switchkd.runs import open_pair

    pair = open_pair(config)
    config = with_date(config, pair.tokenizer)
    settings = _decoding(config, pair)
    prompts = _asked() if sys.stdin.isatty() and not config.prompt else [config.prompt]
    for number, prompt in enumerate(prompts):
        [example] = _examples(config, pair, [prompt] if prompt else [], limit=1)
        play_rollout(pair, example, settings, number)


def _asked() -> Iterator[str]:
    """Prompts that are typed, until an empty one or the end of the input."""
    try:
        while prompt := input("prompt (empty to end): ").strip():
            yield prompt
    except EOFError:
        return


def evaluate(config: EvaluateConfig) -> None:
    from switchkd.models import default_device
    from switchkd.precision import with_dtypes
    from switchkd.report import console, print_results
    from switchkd.runs import all_settings, eval_settings, load_heldout, open_pair, run_of, score, write_scores
    from switchkd.saved_student import SavedStudent

    # The default teacher alone is compared with.
    config = with_dtypes(dataclasses.replace(config, teachers={}, teacher_field=""), default_device())
    run = run_of(config.student_model_name_or_path)
    saved = SavedStudent.of(run) if run else None
    pair = open_pair(config)
    config = with_date(config, pair.tokenizer)
    heldout = load_heldout(config, pair)
    models = {"teacher": (pair.teacher, StudentOnly(), None), "student": (pair.student, config.policy, saved)}
    results = {
        name: score(pair, model, heldout, eval_settings(config, policy), name, saved=of)
        for name, (model, policy, of) in models.items()
        if config.only in ("", name)
    }
    settings = all_settings(config, pair, heldout, eval_settings(config, config.policy))
    print_results(results, heldout.shown() | settings)
    file = Path(config.output_file) if config.output_file else run and run / f"evaluation-{heldout.task.name}.json"
    if file:
        write_scores(file, heldout, settings, results, write_output if config.output_file else write_file)
        console.print(f"scores in {file}", soft_wrap=True)


def lm_eval(config: LmEvalConfig) -> None:
    from switchkd.harness_eval import SEEDS, chat_template_of, find_tasks, metrics, open_model, record, run_tasks
    from switchkd.report import benchmark_table, console

    console.print("reading lm-eval's list of tasks …")
    manager = find_tasks(config.tasks, config.include_path)
    model, tokenizer = open_model(config.model_name_or_path, config.dtype)
    told: dict[str, Any] = {}
    if config.apply_chat_template and tokenizer.chat_template:
        template = chat_template_of(config.model_name_or_path, tokenizer)
        told, tokenizer.chat_template = template_settings(template, tokenizer), template.text(tokenizer)
    answer = run_tasks(
        model,
        tokenizer,
        manager,
        config.tasks,
        num_fewshot=config.num_fewshot,
        limit=config.limit,
        batch_size=config.batch_size,
        apply_chat_template=config.apply_chat_template,
    )
    console.print(benchmark_table(metrics(answer)))
    console.print(f"{model.dtype}; " + ", ".join(f"{name} {seed}" for name, seed in SEEDS.items()), soft_wrap=True)
    if config.output_file:
        # A task's definition may hold functions.
        kept = json.dumps(record(answer, dataclasses.asdict(config) | told, model), indent=1, default=str)
        write_output(Path(config.output_file), kept)


def study(config: StudyConfig) -> None:
    from switchkd.report import bar, console
    from switchkd.study_plan import cells, load_plan, with_settings

    if config.plan == "list":
        for name in shipped("plans"):
            plan = load_plan(name)
            console.print(f"{name}: {plan.title} ({', '.join(plan.methods)})", soft_wrap=True)
        return
    plan = load_plan(config.plan)
    size = with_settings(plan.sized(config.size), config.set)
    output_dir = Path(config.output_dir or f"studies/{Path(config.plan).stem}-{config.size}")
    grid = cells(plan, size, output_dir)
    console.print(f"{plan.title}: {len(grid)} runs in {output_dir}", soft_wrap=True)
    if config.dry_run:
        for cell in grid:
            console.print(f"  {cell.name}: {cell.config.method}", soft_wrap=True)
        return
    from switchkd.study import run_cells
    from switchkd.study_check import check_study

    check_study(plan, size, grid, output_dir)
    with bar("study", len(grid)) as progress:

        def done(line: str, seconds: float) -> None:
            progress.advance(1)
            console.print(f"{line} ({seconds:.0f} s)", soft_wrap=True)

        left = run_cells(grid, size, output_dir, config.jobs, done)
    if left:
        states = ", ".join(f"{name} {state}" for name, state in left.items())
        raise SwitchKDError(
            f"{len(left)} of {len(grid)} runs are not done ({states}): see {output_dir}/logs; the same command goes on"
        )
    from switchkd.study_report import conclude

    conclude(plan, size, grid, output_dir)


def compare(config: CompareConfig) -> None:
    from switchkd.compare import compare as compare_runs
    from switchkd.compare_report import show, write
    from switchkd.report import bar, console

    with bar("resample", None) as progress:
        comparison = compare_runs(
            config.runs, config.task, config.score, config.baseline, lambda score: progress.advance(1, score)
        )
    show(comparison)
    if config.output_dir:
        written = write(comparison, Path(config.output_dir))
        console.print(f"written: {', '.join(map(str, written))}", soft_wrap=True)


def report(config: ReportConfig) -> None:
    from switchkd.html_report import page
    from switchkd.report import bar, console

    if not config.runs:
        raise ConfigError("no run to report on; give run directories: switchkd report runs/demo-switch")
    only = Path(config.runs[0]) if len(config.runs) == 1 else Path()
    file = Path(config.output_file) if config.output_file else only / "report.html"
    with bar("report", None) as progress:
        html = page([Path(run) for run in config.runs], lambda part: progress.advance(1, part))
    (write_output if config.output_file else write_file)(file, html)
    console.print(f"report in {file}", soft_wrap=True)


def plot(config: PlotConfig) -> None:
    from switchkd.compare_report import save_figure
    from switchkd.figures import FIGURES, load_methods
    from switchkd.report import console

    if config.figure not in ("all", *FIGURES):
        raise ConfigError(f"no figure {config.figure!r}{nearest(config.figure, ('all', *FIGURES))}")
    methods = load_methods(config.runs)
    written: list[Path] = []
    for name in FIGURES if config.figure == "all" else (config.figure,):
        try:
            figure, notes = FIGURES[name](methods)
        except DataError as error:
            if config.figure != "all":
                raise
            console.print(f"{name}: not drawn: {error}", soft_wrap=True)
            continue
        written += save_figure(figure, Path(config.output_dir) / name)
        console.print(f"{name}: {written[-1]} and .svg. {notes}", soft_wrap=True)
    if not written:
        raise DataError("no figure could be drawn of these runs")


def check(config: TrainConfig) -> None:
    from switchkd.models import default_device
    from switchkd.precision import with_dtypes
    from switchkd.preflight import check_run
    from switchkd.report import console
    from switchkd.runs import open_pair

    config = with_dtypes(config, default_device())
    pair = open_pair(config, seed=config.seed, train=True)
    for line in check_run(config, pair):
        console.print(line, soft_wrap=True)
    if (Path(config.output_dir) / "metrics.jsonl").is_file():
        _check_records(Path(config.output_dir), pair)


def _check_records(path: Path, pair: Pair) -> None:
    from switchkd.replay import Texts, check_records
    from switchkd.report import bar, console
    from switchkd.run_record import RunRecord
    from switchkd.runs import load_heldout, load_train

    run = RunRecord.read(path)
    train, heldout = load_train(run.config, pair, quiet=True), load_heldout(run.config, pair, quiet=True)
    texts = Texts(train, heldout.examples or train, heldout.task if heldout.examples else None)
    with bar("read again", None) as progress:
        findings = list(check_records(run, pair, progress=lambda what: progress.advance(1, what), texts=texts))
    for finding in findings:
        console.print(f"{path}, {finding}", soft_wrap=True)
    dtypes = run.settings["dtype"], run.settings["teacher_dtype"]
    if wrong := [finding.what for finding in findings if not finding.holds(*dtypes)]:
        raise DataError(
            f"{path}: the records of {', '.join(wrong)} are not what these models and settings give; models, settings or "
            "files were changed since"
        )


def prune(config: PruneConfig) -> None:
    from switchkd.pruning import prune as prune_model

    prune_model(config.model_name_or_path, Path(config.output_dir), config.layers, seed=config.seed)


def make_pair(config: MakePairConfig) -> None:
    from switchkd.small_pair import make_pair as make_small_pair

    make_small_pair(Path(config.output_dir) if config.output_dir else None, config.seed, config.scale)


def methods(config: MethodsConfig) -> None:
    from switchkd.report import console, method_table

    console.print(method_table({name: load_recipe(str(file)) for name, file in shipped("recipes").items()}))


def tasks(config: TasksConfig) -> None:
    from switchkd.report import console, task_table
    from switchkd.tasks import TASKS

    console.print(task_table(TASKS.values()))


# What these leave are files; what they print is to look on while they work.
LASTING = ("train", "demo", "study", "prune", "make-pair")

# name: (settings, function, whether a recipe may come first, what it does)
COMMANDS: dict[str, tuple[type, Callable[[Any], None], bool, str]] = {
    "train": (TrainConfig, train, True, "distil a student as a recipe says"),
    "generate": (GenerateConfig, generate, True, "complete prompts under a policy and show who wrote what"),
    "play": (PlayConfig, play, True, "watch one completion being written, with the divergence under it"),
    "evaluate": (EvaluateConfig, evaluate, True, "score teacher and student on held-out examples"),
    "lm-eval": (LmEvalConfig, lm_eval, False, "score a student on lm-eval's benchmarks"),
    "study": (StudyConfig, study, False, "run a grid of methods and compare them; can be stopped and goes on"),
    "compare": (CompareConfig, compare, False, "compare evaluated runs, and say which differences are beyond chance"),
    "report": (ReportConfig, report, False, "write runs as one HTML page: who wrote what and why, scores, curves"),
    "plot": (PlotConfig, plot, False, "draw the papers' figures of trained runs: lambda, divergence, length, cost, …"),
    "check": (
        TrainConfig,
        check,
        True,
        "check pair, data, memory and settings, and of a run its records; train nothing",
    ),
    "methods": (MethodsConfig, methods, False, "list the recipes: who writes, what is trained, on which text, source"),
    "tasks": (TasksConfig, tasks, False, "list the tasks: what is scored, the main score, data by default, source"),
    "demo": (DemoConfig, demo, False, "distil a real student on this machine, no hub needed"),
    "prune": (PruneConfig, prune, False, "make a student by dropping a model's least influential layers"),
    "make-pair": (MakePairConfig, make_pair, False, "make the small pair `small` and its data, for studies on a CPU"),
}
