"""The command line: finds the command, reads recipe and flags into its settings, and turns errors into exit codes."""

from __future__ import annotations

import dataclasses
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from switchkd.base import signals
from switchkd.base.errors import ConfigError, SwitchKDError, SwitchKDWarning, nearest
from switchkd.base.storage import expanded
from switchkd.base.terminal import complain, console, leave, open_standard_streams, visible
from switchkd.cli.commands import COMMANDS, LASTING, NOT_FROM_RECIPE, OF_A_RUN
from switchkd.methods.rules import NOUNS, rule
from switchkd.training.settings import TrainConfig, load_recipe

Config = TypeVar("Config")
STUDENT_FLAGS = ("--student", "--student-model-name-or-path")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 for an explained error, 2 for wrong usage, and 128 more than the signal that
    ended it: 130 for Ctrl-C, 143 for SIGTERM, 129 for a terminal that was closed, 141 for output that nobody reads."""
    args = list(sys.argv[1:] if argv is None else argv)
    open_standard_streams()
    # What a command that trains leaves are files, and that nobody looks on is worth a word; of others it is the end.
    console.lost, console.announce = None, bool(args) and args[0] in LASTING
    try:
        code = _run(args)
    finally:
        leave()
    return code or _unseen()


def _run(args: list[str]) -> int:
    try:
        with signals.terminable():
            return _command(args)
    except BrokenPipeError as error:  # from what prints by itself, such as --help
        console.lost = error
        return 0
    except (SwitchKDError, OSError) as error:  # an OSError names the file and what the system says of it
        _say(error, "error: ")
        return 1
    except KeyboardInterrupt as interrupt:
        _say(interrupt)
        return 128 + getattr(interrupt, "signal", signal.SIGINT)


def _unseen() -> int:
    """The exit code of a command that did all it had to, if what it printed could not be written and that was its purpose."""
    if console.lost is None or console.announce:
        return 0
    if isinstance(console.lost, BrokenPipeError):  # as other programs end in `| head`, without a word
        return 128 + signal.SIGPIPE
    complain(f"error: stdout cannot be written: {console.lost}")
    return 1


def _command(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        console.print(_usage(), soft_wrap=True)
        return 0 if args else 2
    if args[0] not in COMMANDS:
        raise ConfigError(f"unknown command {args[0]!r}{nearest(args[0], COMMANDS)}")
    settings, function, _, _ = COMMANDS[args[0]]
    config: Any = parse(settings, args)
    _quiet_libraries()
    warnings.formatwarning = _warning
    function(config)
    return 0


def _say(error: BaseException, prefix: str = "") -> None:
    """An error with its notes, on stderr."""
    lines = [f"{prefix}{str(error) or 'interrupted'}", *getattr(error, "__notes__", [])]
    complain("\n".join(lines))


_plainly = warnings.formatwarning


def _warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Our own warnings in one line; others as Python shows them."""
    own = issubclass(category, SwitchKDWarning)
    return visible(f"warning: {message}\n" if own else _plainly(message, category, filename, lineno, line))


def parse(cls: type[Config], args: Sequence[str]) -> Config:
    """Settings of a command line: a recipe or run directory gives the defaults, flags win.

    Raises ConfigError for the recipe; exits with code 2 and the nearest name for a wrong flag.
    """
    command, rest = args[0], list(args[1:])
    _, _, takes_recipe, summary = COMMANDS[command]
    default = None
    if takes_recipe and rest and not rest[0].startswith("-"):
        default = _defaults(cls, rest.pop(0), any(_flag(word) in STUDENT_FLAGS for word in rest))
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


def _flag(word: str) -> str:
    return word.partition("=")[0].replace("_", "-")


def _defaults(cls: type[Config], path: str, names_student: bool) -> Config:
    """What a command takes from a recipe, or from a run directory, whose trained student it then uses unless it names another."""
    path = expanded(path)
    folder = Path(path)
    own: dict[str, Any] = {}
    if not folder.is_dir():
        recipe: TrainConfig = load_recipe(path)
    else:
        from switchkd.reports.record import read_config, trained_student

        recipe = dataclasses.replace(read_config(folder).anew(), output_dir=path)  # the run may have been moved
        own = OF_A_RUN.get(cls, {})
        if cls is not TrainConfig and not names_student:
            recipe = _with_student(recipe, trained_student(folder))
    left = NOT_FROM_RECIPE.get(cls, ())
    names = [f.name for f in dataclasses.fields(cls) if hasattr(recipe, f.name) and f.name not in left]  # type: ignore[arg-type]
    return cls(**{name: getattr(recipe, name) for name in names} | own)


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
