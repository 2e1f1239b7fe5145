"""The command line: finds the command, runs it, and turns errors into exit codes."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from switchkd.base import __version__, signals
from switchkd.base.errors import ConfigError, SwitchKDError, SwitchKDWarning, nearest
from switchkd.base.terminal import complain, console, leave, open_standard_streams, visible
from switchkd.cli.commands import COMMANDS, LASTING, QUICK, overview


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
        console.print(overview(), soft_wrap=True)
        return 0 if args else 2
    if args == ["--version"]:
        console.print(f"switchkd {__version__}")
        return 0
    if args[0] not in COMMANDS:
        raise ConfigError(f"unknown command {args[0]!r}{nearest(args[0], COMMANDS)}")
    from switchkd.cli.flags import parse  # which loads tyro and the settings; the overview is there without

    command = COMMANDS[args[0]]
    config: Any = parse(command.settings, args)
    if args[0] not in QUICK:
        _quiet_libraries()
    warnings.formatwarning = _warning
    command.function(config)
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


def _quiet_libraries() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
