"""From words to settings: a recipe or a run directory gives the defaults, and tyro reads the flags, which win."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_type_hints

import tyro

from switchkd.base.errors import ConfigError
from switchkd.base.storage import expanded
from switchkd.base.terminal import complain
from switchkd.cli.commands import COMMANDS, MANY, NOT_FROM_RECIPE, OF_A_RUN, TAKE_RECIPE
from switchkd.cli.other_names import in_our_words, note_on_lengths
from switchkd.methods.rules import NOUNS, name_of, rule
from switchkd.training.records import CONFIG
from switchkd.training.settings import TrainConfig, load_recipe

Config = TypeVar("Config")
STUDENT_FLAGS = ("--student", "--student-model-name-or-path")
# The settings in groups, as help shows them, in this order; a command's own stand first.
GROUPS = ("model", "data", "method", "writing", "training", "evaluation", "output")
# A setting is in the group of the class that has it, but for some, which are in these.
GROUP_OF = {"ModelConfig": "model", "DataConfig": "data", "DecodeConfig": "writing", "EvalConfig": "evaluation",
            "TrainConfig": "training"}  # fmt: skip
ELSEWHERE = {
    "data": ("validation_file", "lm_file"),
    "method": ("policy", "objective", "mix", "method", "loss_over", "lm_weight", "teacher_cache", "teacher_cache_top_k",
               "teacher_store_dir"),
    "writing": ("max_new_tokens_start",),
    "evaluation": ("eval_on_start", "eval_steps", "metric_for_best_model"),
    "output": ("output_dir", "save_steps", "save_total_limit", "sample_steps", "sample_prompts", "report_to", "save_dtype", "merge",
               "push_to_hub", "hub_private_repo", "resume", "resume_from", "allow_change", "quiet"),
}  # fmt: skip
# What `--help` shows of a command with more settings than a screen holds; `--help-all` shows all.
FIRST = (
    "teacher_model_name_or_path", "student_model_name_or_path", "dtype", "use_peft", "train_file", "eval_file", "template",
    "policy", "objective", "mix", "max_new_tokens", "max_steps", "num_train_epochs", "per_device_train_batch_size", "learning_rate",
    "output_dir", "resume", "report_to", "push_to_hub",
)  # fmt: skip
ALSO_FIRST = {"evaluate": ("task", "eval_samples", "eval_max_new_tokens", "eval_temperature"), "generate": ("temperature",),
              "play": ("temperature",), "chat": ("temperature",)}  # fmt: skip
FEW = 20
MODEL_FILES = ("config.json", "adapter_config.json")
HELP, HELP_ALL = ("-h", "--help"), ("--help-all", "--help_all")
OF_THE_RULES = (
    "Who writes each token, what is lowered, and on which text. With a name after one of these, or a recipe, help lists its "
    "settings too: --policy adaswitch --help."
)
# What may stand before the flags: of most commands a recipe, of those that are of a student one of these.
RECIPE = (
    "[RECIPE|RUN]",
    "A YAML file, a name that `switchkd methods` lists, or a run directory: its settings are the defaults.",
)
STUDENT = (
    "[RUN|MODEL|RECIPE]",
    "A run directory, a model's folder or its name on the hub: its student writes alone. Or a recipe.",
)


def parse(cls: type[Config], args: Sequence[str]) -> Config:
    """Settings of a command line, ``cls`` being those of the command that is its first word.

    Raises ConfigError for the recipe and for the name of a rule; exits with code 2 and the nearest name for a wrong flag.
    """
    command, *rest = args
    recipe = rest[0] if command in TAKE_RECIPE and rest and not rest[0].startswith("-") else ""
    rest = in_our_words(cls, rest)
    named = {word.partition("=")[0].replace("_", "-") for word in rest}
    default = _defaults(cls, command, recipe, not named.isdisjoint(STUDENT_FLAGS)) if recipe else cls()
    rules = _rules(default, rest)
    if asked := [word for word in rest if word in (*HELP, *HELP_ALL)]:
        own = [noun for noun in rules if recipe or f"--{noun}" in named]
        shown = None if asked[0] in HELP_ALL else _first(cls, command, own)
        _tyro({command: _arguments(default, rules, command, shown)}, [command, "--help"])
    parsed = vars(_tyro({command: _arguments(default, rules, command)}, [command, *rest]))
    if (late := parsed.pop("recipe", "")) != recipe:
        raise ConfigError(f"{late!r} is a recipe or a run if it comes first: switchkd {command} {late} …")
    grouped = [vars(parsed[f"{group}_group"]) for group in GROUPS if f"{group}_group" in parsed]
    given = parsed | {name: value for group in grouped for name, value in group.items()}
    values = {setting.name: given[setting.name] for setting in dataclasses.fields(cls)}  # type: ignore[arg-type]
    try:
        config = cls(**values | {noun: given[f"{noun}_settings"] for noun in rules})
    except ConfigError as error:
        complain(f"error: {error}")
        raise SystemExit(2) from error
    if isinstance(config, TrainConfig):
        note_on_lengths(rest, config)
    return config


def _first(cls: type, command: str, rules: Sequence[str]) -> set[str] | None:
    """What ``--help`` shows of a command, with the settings of these ``rules``; None if that is all."""
    names = [setting.name for setting in dataclasses.fields(cls)]
    if len(names) <= FEW:
        return None
    own = {name for name, (group, _) in _groups_and_texts(cls).items() if not group}
    return own | {*FIRST, *ALSO_FIRST.get(command, ())} | {f"{noun}_settings" for noun in rules}


def print_completion(shell: str) -> None:
    """Print the script that completes all commands and their flags in a shell."""
    defaults = {name: command.settings() for name, command in COMMANDS.items()}
    arguments = {name: _arguments(default, _rules(default, []), name) for name, default in defaults.items()}
    with suppress(SystemExit):  # by which tyro says that it has printed it
        _tyro(arguments, ["--tyro-print-completion", shell])


def _tyro(arguments: dict[str, type], args: Sequence[str]) -> Any:
    """What tyro makes of ``args``. It knows the names of all commands, and what those in ``arguments`` take."""
    nothing = dataclasses.make_dataclass("Nothing", [])
    commands = [
        Annotated[Any, tyro.conf.subcommand(name, constructor=arguments.get(name, nothing), description=_about(name))]
        for name in COMMANDS
    ]  # fmt: skip
    union, upper = Union[tuple(commands)], tyro.conf.PositionalMetavarFromFieldName  # noqa: UP007
    return tyro.cli(union, args=args, prog="switchkd", use_underscores=False, config=(upper,))


def _about(command: str) -> str:
    """What a command does, and how to see all of its settings if help shows the first ones."""
    own = COMMANDS[command]
    more = f" (`switchkd {command} --help-all` lists all settings)" if command in MANY else ""
    return f"{own.summary}{more}"


def _arguments(default: Any, rules: dict[str, Any], command: str, shown: set[str] | None = None) -> type:
    """A dataclass of which tyro makes the arguments of a command: its own settings, a field for each group of others, and one
    for the settings of each rule. All others than those ``shown``, if there are such, are left out."""
    groups: dict[str, list[tuple[str, Any, Any]]] = {group: [] for group in ("", *GROUPS)}
    described, hints = _groups_and_texts(type(default)), get_type_hints(type(default), include_extras=True)
    for name in [setting.name for setting in dataclasses.fields(default) if shown is None or setting.name in shown]:
        (group, text), kind, value = described[name], hints[name], getattr(default, name)
        if name in rules:  # the flag takes a name; the settings of that rule have flags of their own
            value = name_of(rules[name])
            kind = Literal[tuple(dict.fromkeys((*NOUNS[name][1], value)))]
        groups[group].append(_field(name, Annotated[kind, tyro.conf.arg(prefix_name=False, help=text)], value))
    own = groups.pop("")
    for group, settings in groups.items():
        made = dataclasses.make_dataclass(group, settings)
        about = OF_THE_RULES if group == "method" else ""
        said = tyro.conf.arg(name=group, help=about)
        own += [_field(f"{group}_group", Annotated[made, said], made())] if settings else []
    for noun, value in rules.items():
        if shown is not None and f"{noun}_settings" not in shown:
            continue
        own.append(_field(f"{noun}_settings", Annotated[type(value), tyro.conf.arg(name=noun)], value))
    if command in TAKE_RECIPE:
        metavar, about = STUDENT if command in OF_A_RUN else RECIPE
        said = tyro.conf.arg(metavar=metavar, help_behavior_hint="(optional)", help=about)
        own.insert(0, _field("recipe", Annotated[tyro.conf.Positional[str], said], ""))
    return dataclasses.make_dataclass(command, own)


def _field(name: str, kind: Any, value: Any) -> tuple[str, Any, Any]:
    return name, kind, dataclasses.field(default_factory=lambda: value)


def _groups_and_texts(cls: type) -> dict[str, tuple[str, str]]:
    """For each setting of a dataclass, the group of the class that had it first, and the text under its newest definition."""
    found: dict[str, tuple[str, str]] = {}
    for owner in filter(dataclasses.is_dataclass, reversed(cls.__mro__)):
        [tree] = ast.parse(inspect.getsource(owner)).body
        for line, text in itertools.pairwise(tree.body):  # type: ignore[attr-defined]
            if isinstance(line, ast.AnnAssign) and isinstance(text, ast.Expr):
                name, words = ast.unparse(line.target), " ".join(ast.literal_eval(text.value).split())
                group = GROUP_OF.get(owner.__name__, "")
                group = next((other for other, names in ELSEWHERE.items() if name in names), group) if group else ""
                found[name] = found.get(name, (group,))[0], words
    return found


def _rules(default: Any, args: Sequence[str]) -> dict[str, Any]:
    """The policy, objective and mix of a command that has them: those that ``args`` name, else the defaults.

    They are looked for before tyro reads the flags, because the settings of the rule that was chosen become flags too.
    """
    rules = {noun: getattr(default, noun) for noun in NOUNS if hasattr(default, noun)}
    for argument, following in itertools.zip_longest(args, args[1:]):
        flag, equals, name = argument.partition("=")
        if (noun := flag.removeprefix("--")) in rules and noun != flag:
            if not equals and following is None:
                raise ConfigError(f"{flag} needs a name: {', '.join(NOUNS[noun][1])}, or my_module:MyClass")
            rules[noun] = rule(noun, name if equals else following, flag)
    return rules


def _defaults(cls: type[Config], command: str, path: str, names_student: bool) -> Config:
    """What a command takes from a recipe, or from a run directory, whose trained student it then uses unless it names another."""
    path = expanded(path)
    folder = Path(path)
    own: dict[str, Any] = {}
    if command in OF_A_RUN and _is_model(path):
        rules = {noun: rule(noun, name, noun) for noun, name in OF_A_RUN[command].items()}
        return cls(**{"student_model_name_or_path": path}, **rules)
    if not folder.is_dir():
        recipe: TrainConfig = load_recipe(path)
    else:
        from switchkd.reports.record import read_config, trained_student

        recipe = dataclasses.replace(read_config(folder).anew(), output_dir=path)  # the run may have been moved
        own = {noun: rule(noun, name, noun) for noun, name in OF_A_RUN.get(command, {}).items()}
        if not issubclass(cls, TrainConfig) and not names_student:
            recipe = _with_student(recipe, trained_student(folder))
    settings = [setting.name for setting in dataclasses.fields(cls)]  # type: ignore[arg-type]
    taken = [name for name in settings if hasattr(recipe, name) and name not in NOT_FROM_RECIPE.get(command, ())]
    return cls(**{name: getattr(recipe, name) for name in taken} | own)


def _is_model(name: str) -> bool:
    """Whether a word names a model, and no run, recipe or file: a folder that holds one, or a name on the hub or of a pair."""
    from switchkd.models.loading import HUB_NAME, MADE

    folder = Path(name)
    if folder.is_dir():
        return not (folder / CONFIG).is_file() and any((folder / file).is_file() for file in MODEL_FILES)
    return not folder.exists() and (name in MADE or ("/" in name and bool(HUB_NAME.fullmatch(name))))


def _with_student(recipe: TrainConfig, student: str) -> TrainConfig:
    """The recipe with the student that it trained. A merged one has no adapter, and its base is the teacher of that name."""
    from switchkd.models.pair import student_base
    from switchkd.models.settings import BASE

    changes: dict[str, Any] = {"student_model_name_or_path": student}
    if recipe.merge:
        changes |= {"use_peft": False, "merge": False}
        named = {"": recipe.teacher_model_name_or_path, **recipe.teachers}
        if BASE in named.values():
            base = student_base(recipe.student_model_name_or_path)
            named = {name: base if source == BASE else source for name, source in named.items()}
            changes |= {"teacher_model_name_or_path": named.pop(""), "teachers": named}
    return dataclasses.replace(recipe, **changes)
