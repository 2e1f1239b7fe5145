"""The command line. Each command is a settings dataclass and a function; heavy imports wait until the function runs."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro

from switchkd.config import NOUNS, DataConfig, DecodeConfig, EvalConfig, ModelConfig, TrainConfig, load_recipe, rule
from switchkd.errors import ConfigError, SwitchKDError, nearest

Config = TypeVar("Config")


@dataclass(frozen=True)
class GenerateConfig(ModelConfig, DataConfig, DecodeConfig):
    """Complete prompts under a policy and say who wrote what."""

    prompt: tuple[str, ...] = ()
    """Prompts as text, sent through the template; without any, those of eval_file are completed."""
    limit: int = 16
    """Rows of eval_file to complete."""
    output_file: str | None = None
    """Write rollouts here as JSONL: token ids, text, speakers, divergences."""
    seed: int = 0
    """Key of the noise, with each prompt's index and each position."""


@dataclass(frozen=True)
class EvaluateConfig(ModelConfig, DataConfig, EvalConfig):
    """Score teacher and student on held-out examples."""

    output_file: str | None = None
    """Write the scores and every setting here as JSON."""


@dataclass(frozen=True)
class DemoConfig:
    """Distil a real 81M student from a real 135M teacher on this machine, no hub needed."""

    method: str = "switch"
    """A name that `switchkd methods` lists."""
    max_steps: int = 24
    """Optimizer steps."""
    output_dir: str | None = None
    """The run directory; default runs/demo-METHOD, numbered if there is one already."""
    seed: int = 0
    """Key of all randomness."""


@dataclass(frozen=True)
class PruneConfig:
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
class MakePairConfig:
    """Make the small pair for studies on two CPU cores, with its data, from generated text."""

    output_dir: str | None = None
    """Where the pair goes; default in the user's cache, where the model name `small` finds it."""
    seed: int = 0
    """Key of all randomness."""
    scale: Literal["full", "tiny"] = "full"
    """`tiny` makes untrained models in seconds, to try the command."""


@dataclass(frozen=True)
class MethodsConfig:
    """List the recipes that ship with the package."""


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


def demo_settings(config: DemoConfig) -> TrainConfig:
    """The method's recipe with the sizes of a demonstration on two cores."""
    recipe: TrainConfig = load_recipe(config.method)
    return dataclasses.replace(
        recipe,
        template="chat",
        max_prompt_length=160,
        max_completion_length=128,
        max_new_tokens=min(64, recipe.max_new_tokens),
        per_device_train_batch_size=8,
        learning_rate=5e-4,
        warmup_steps=4,
        max_steps=config.max_steps,
        eval_samples=32,
        eval_max_new_tokens=64,
        save_steps=12,
        save_total_limit=1,
        seed=config.seed,
        output_dir=config.output_dir or _unused(f"runs/demo-{config.method}"),
    )


def _unused(folder: str) -> str:
    """``folder``, or the first of folder-2, folder-3, … that is not there yet."""
    names = itertools.chain([folder], (f"{folder}-{number}" for number in itertools.count(2)))
    return next(name for name in names if not Path(name).exists())


def generate(config: GenerateConfig) -> None:
    from switchkd.decoding import decode_examples
    from switchkd.report import bar, console, cost_line, print_rollout
    from switchkd.runs import load_task, open_pair, prompt_examples

    pair = open_pair(config)
    if config.prompt:
        examples = prompt_examples(config.prompt, config.template, pair)
    else:
        own = config.teacher_prompt, config.teacher_field
        examples = load_task(config, pair, config.eval_file, config.limit, False, *own)
    settings = config.decode_arguments() | {
        "policy": config.policy.bind(pair.tokenizer, config.max_new_tokens),
        "seed": config.seed,
    }
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
        from switchkd.checkpoint import write_file

        records = [{**r.to_json(), "text": pair.tokenizer.decode(r.completion_ids)} for r in rollouts]
        write_file(Path(config.output_file), "".join(json.dumps(record) + "\n" for record in records))


def evaluate(config: EvaluateConfig) -> None:
    from switchkd.report import console, score_table
    from switchkd.runs import load_task, open_pair, score, write_scores

    # The default teacher alone is compared with.
    pair = open_pair(dataclasses.replace(config, teachers={}, teacher_field=""))
    examples = load_task(config, pair, config.eval_file, config.eval_samples)
    models = {"teacher": pair.teacher, "student": pair.student}
    scores = {name: score(pair, model, examples, config, name) for name, model in models.items()}
    console.print(score_table(scores))
    if config.output_file:
        write_scores(Path(config.output_file), config, scores)


def check(config: TrainConfig) -> None:
    from switchkd.report import console
    from switchkd.runs import check_run

    for line in check_run(config):
        console.print(line, soft_wrap=True)


def prune(config: PruneConfig) -> None:
    from switchkd.pruning import prune as prune_model

    prune_model(config.model_name_or_path, Path(config.output_dir), config.layers, seed=config.seed)


def make_pair(config: MakePairConfig) -> None:
    from switchkd.small_pair import make_pair as make_small_pair

    make_small_pair(Path(config.output_dir) if config.output_dir else None, config.seed, config.scale)


def methods(config: MethodsConfig) -> None:
    from switchkd.config import recipes
    from switchkd.report import console, method_table

    console.print(method_table({name: load_recipe(str(file)) for name, file in recipes().items()}))


# name: (settings, function, whether a recipe may come first, what it does)
COMMANDS: dict[str, tuple[type, Callable[[Any], None], bool, str]] = {
    "train": (TrainConfig, train, True, "distil a student as a recipe says"),
    "generate": (GenerateConfig, generate, True, "complete prompts under a policy and show who wrote what"),
    "evaluate": (EvaluateConfig, evaluate, True, "score teacher and student on held-out examples"),
    "check": (TrainConfig, check, True, "check pair, vocabulary, data, memory and settings; train nothing"),
    "methods": (MethodsConfig, methods, False, "list the recipes: who writes, what is trained, on which text, source"),
    "demo": (DemoConfig, demo, False, "distil a real student on this machine, no hub needed"),
    "prune": (PruneConfig, prune, False, "make a student by dropping a model's least influential layers"),
    "make-pair": (MakePairConfig, make_pair, False, "make the small pair `small` and its data, for studies on a CPU"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 for an error that is explained, 2 for wrong usage, 130 for Ctrl-C."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        if not args or args[0] in ("-h", "--help"):
            print(_usage())
            return 0 if args else 2
        if args[0] not in COMMANDS:
            raise ConfigError(f"unknown command {args[0]!r}{nearest(args[0], COMMANDS)}")
        settings, function, _, _ = COMMANDS[args[0]]
        config: Any = parse(settings, args)
        _quiet_libraries()
        function(config)
    except SwitchKDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def parse(cls: type[Config], args: Sequence[str]) -> Config:
    """Settings of a command line: a recipe or run directory gives the defaults, flags win.

    Raises ConfigError for the recipe; exits with code 2 and the nearest name for a wrong flag.
    """
    command, rest = args[0], list(args[1:])
    _, _, takes_recipe, summary = COMMANDS[command]
    default = None
    if takes_recipe and rest and not rest[0].startswith("-"):
        default = _defaults(cls, rest.pop(0))
    usage = f"switchkd {command} [RECIPE.yaml | RUN]" if takes_recipe else f"switchkd {command}"
    typed = _with_rules(cls() if default is None else default, rest)
    parsed = tyro.cli(type(typed), default=typed, args=rest, prog=usage, description=summary, use_underscores=False)
    return cls(**{f.name: getattr(parsed, f.name) for f in dataclasses.fields(cls)})  # type: ignore[arg-type]


def _with_rules(config: Any, args: list[str]) -> Any:
    """``config`` with the rules that ``--policy``, ``--objective`` and ``--mix`` in ``args`` name; takes these out of ``args``.

    Its class names the rules' own classes, so that each rule's settings, and no others, become flags.
    """
    named = {}
    for noun in [noun for noun in NOUNS if hasattr(config, noun)]:
        for place, argument in enumerate(args):
            flag, equals, name = argument.partition("=")
            if flag == f"--{noun}":
                if not equals and place + 1 == len(args):
                    raise ConfigError(f"{flag} needs a name: {', '.join(NOUNS[noun][1])}, or my_module:MyClass")
                named[noun] = rule(noun, name if equals else args[place + 1], flag)
                del args[place : place + (1 if equals else 2)]
                break
    # One step for all: a policy and an objective may only be right together.
    config = dataclasses.replace(config, **named)
    fields = [(noun, type(getattr(config, noun)), dataclasses.field()) for noun in NOUNS if hasattr(config, noun)]
    typed = dataclasses.make_dataclass(type(config).__name__, fields, bases=(type(config),), frozen=True, kw_only=True)
    return typed(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)})


def _defaults(cls: type[Config], path: str) -> Config:
    """What a command takes from a recipe, or from a run directory, whose trained student it then uses."""
    folder = Path(path)
    recipe: TrainConfig = load_recipe(str(folder / "config.yaml") if folder.is_dir() else path)
    if cls is not TrainConfig and (folder / "student").is_dir():
        recipe = _with_student(recipe, str(folder / "student"))
    return cls(**{f.name: getattr(recipe, f.name) for f in dataclasses.fields(cls) if hasattr(recipe, f.name)})  # type: ignore[arg-type]


def _with_student(recipe: TrainConfig, student: str) -> TrainConfig:
    """The recipe with the student that it trained. A merged one has no adapter, and its base is the teacher of that name."""
    from switchkd.models import BASE, student_base

    changes: dict[str, Any] = {"student_model_name_or_path": student}
    if recipe.merge:
        changes |= {"use_peft": False, "merge": False}
        named = {"": recipe.teacher_model_name_or_path, **recipe.teachers}
        if BASE in named.values():
            base = student_base(recipe.student_model_name_or_path)
            named = {name: base if source == BASE else source for name, source in named.items()}
            changes |= {"teacher_model_name_or_path": named.pop(""), "teachers": named}
    return dataclasses.replace(recipe, **changes)


def _usage() -> str:
    lines = ["usage: switchkd COMMAND [RECIPE.yaml | RUN] [--setting value …]", "", "commands:"]
    lines += [f"  {name:<10}{summary}" for name, (_, _, _, summary) in COMMANDS.items()]
    return "\n".join([*lines, "", "switchkd COMMAND --help lists a command's settings."])


def _quiet_libraries() -> None:
    import os

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
