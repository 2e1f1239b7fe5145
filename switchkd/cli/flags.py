"""From words to settings: a recipe or a run directory gives the defaults, and tyro reads the flags, which win."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_type_hints

import tyro

from switchkd.base.errors import ConfigError, nearest
from switchkd.base.storage import expanded
from switchkd.base.terminal import complain
from switchkd.cli.commands import COMMANDS, NOT_FROM_RECIPE, OF_A_RUN, TAKE_RECIPE
from switchkd.methods.rules import NOUNS, name_of, rule
from switchkd.training.settings import TrainConfig, load_recipe

Config = TypeVar("Config")
STUDENT_FLAGS = ("--student", "--student-model-name-or-path")
# The settings in groups, as `--help` shows them, by the class that has them. A command's own stand first.
GROUP_OF = {"ModelConfig": "model", "DataConfig": "data", "DecodeConfig": "decoding", "EvalConfig": "evaluation",
          "TrainConfig": "training"}  # fmt: skip
RECIPE = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[RECIPE|RUN]", help_behavior_hint="(optional)", help=(
    "A YAML file, a name that `switchkd methods` lists, or a run directory: its settings are the defaults."
))]  # fmt: skip
SHELLS = ("bash", "fish", "zsh")


def parse(cls: type[Config], args: Sequence[str]) -> Config:
    """Settings of a command line, ``cls`` being those of the command that is its first word.

    Raises ConfigError for the recipe and for the name of a rule; exits with code 2 and the nearest name for a wrong flag.
    """
    command, *rest = args
    recipe = rest[0] if command in TAKE_RECIPE and rest and not rest[0].startswith("-") else ""
    named = {word.partition("=")[0].replace("_", "-") for word in rest}
    default = _defaults(cls, command, recipe, not named.isdisjoint(STUDENT_FLAGS)) if recipe else cls()
    rules = _rules(default, rest)
    parsed = vars(_tyro({command: _arguments(default, rules, command)}, args))
    if (late := parsed.pop("recipe", "")) != recipe:
        raise ConfigError(f"{late!r} is a recipe or a run if it comes first: switchkd {command} {late} …")
    grouped = [vars(parsed[group]) for group in GROUP_OF.values() if group in parsed]
    given = parsed | {name: value for group in grouped for name, value in group.items()}
    values = {setting.name: given[setting.name] for setting in dataclasses.fields(cls)}  # type: ignore[arg-type]
    try:
        return cls(**values | {noun: given[f"{noun}_settings"] for noun in rules})
    except ConfigError as error:
        complain(f"error: {error}")
        raise SystemExit(2) from error


def complete(args: Sequence[str]) -> None:
    """Print or write the script that completes all commands and their flags in a shell, as ``args`` say."""
    if len(args) > 1 and args[1] not in SHELLS:
        raise ConfigError(f"{args[0]}: no script for the shell {args[1]!r}{nearest(args[1], SHELLS)}")
    defaults = {name: command.settings() for name, command in COMMANDS.items()}
    _tyro({name: _arguments(default, _rules(default, []), name) for name, default in defaults.items()}, args)


def _tyro(arguments: dict[str, type], args: Sequence[str]) -> Any:
    """What tyro makes of ``args``. It knows the names of all commands, and what those in ``arguments`` take."""
    nothing = dataclasses.make_dataclass("Nothing", [])
    commands = [
        Annotated[Any, tyro.conf.subcommand(name, constructor=arguments.get(name, nothing), description=command.summary)]
        for name, command in COMMANDS.items()
    ]  # fmt: skip
    union, upper = Union[tuple(commands)], tyro.conf.PositionalMetavarFromFieldName  # noqa: UP007
    return tyro.cli(union, args=args, prog="switchkd", use_underscores=False, config=(upper,))


def _arguments(default: Any, rules: dict[str, Any], command: str) -> type:
    """A dataclass of which tyro makes the arguments of a command: its own settings, a field for each group of others, and one
    for the settings of each rule."""
    groups: dict[str, list[tuple[str, Any, Any]]] = {group: [] for group in ("", *GROUP_OF.values())}
    described, hints = _groups_and_texts(type(default)), get_type_hints(type(default), include_extras=True)
    for name in [setting.name for setting in dataclasses.fields(default)]:
        (group, text), kind, value = described[name], hints[name], getattr(default, name)
        if name in rules:  # the flag takes a name; the settings of that rule have flags of their own
            value = name_of(rules[name])
            kind = Literal[tuple(dict.fromkeys((*NOUNS[name][1], value)))]
        groups[group].append(_field(name, Annotated[kind, tyro.conf.arg(prefix_name=False, help=text)], value))
    own = groups.pop("")
    for group, settings in groups.items():
        made = dataclasses.make_dataclass(group, settings)
        own += [_field(group, Annotated[made, tyro.conf.arg(help="")], made())] if settings else []
    for noun, value in rules.items():
        own.append(_field(f"{noun}_settings", Annotated[type(value), tyro.conf.arg(name=noun)], value))
    return dataclasses.make_dataclass(command, [_field("recipe", RECIPE, ""), *own] if command in TAKE_RECIPE else own)


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
                found[name] = found.get(name, (GROUP_OF.get(owner.__name__, ""),))[0], words
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
