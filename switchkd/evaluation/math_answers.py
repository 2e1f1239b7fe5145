"""math-verify in a process of its own, so that no expression can hang an evaluation.

math-verify's own time limits are signals: they work in the main thread alone, and cannot stop one long operation such as
``9**9**9``. The process ends itself when an answer takes too long. It is started at the first question and stays for the next.

It is no pool of multiprocessing's: a child that is spawned there runs the user's script again, which need not have a
``__name__`` guard, and imports from the working directory.
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import logging
import os
import re
import subprocess
import sys
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from threading import Lock
from typing import Any

from switchkd.base.errors import ConfigError, DataError
from switchkd.base.limits import command, environment

logger = logging.getLogger(__name__)

TIME_LIMIT = 10.0  # seconds for one answer; usual ones take milliseconds


def check_installed() -> None:
    """Raise ConfigError if math-verify is missing."""
    if find_spec("math_verify") is None:
        raise ConfigError("answers are compared with the package math-verify: pip install 'switchkd[math]'")


def checker() -> Checker:
    """This process's checker: a forked child has another one than its parent."""
    return _checker(os.getpid())


@cache
def _checker(_: int) -> Checker:
    check_installed()
    return Checker()


class Checker:
    """Answers one question after another, whichever thread asks."""

    def __init__(self, time_limit: float = TIME_LIMIT) -> None:
        self.time_limit = time_limit
        self._process: subprocess.Popen[str] | None = None
        self._lock = Lock()
        atexit.register(self.close)

    def equal(self, text: str, reference: str) -> bool:
        """Whether ``text`` gives the reference's answer; one that takes longer than the time limit is wrong, with a warning.

        Raises DataError for a reference without an answer.
        """
        with self._lock:
            verdict = self._ask(text, reference)
        if verdict == "no answer":
            raise DataError(f"math-verify finds no answer in the reference {reference[-80:]!r}")
        if verdict == "stopped":
            logger.warning(
                "math-verify took more than %g s and was stopped: counted as wrong: %r", self.time_limit, text[-80:]
            )
        return verdict == "equal"

    def close(self) -> None:
        """End the process; in a forked child, whose parent's it is, only forget it."""
        if self._process:
            with suppress(BrokenPipeError), self._process as process:
                process.kill()
            self._process = None

    def _ask(self, text: str, reference: str) -> str:
        process = self._process or self._start()
        assert process.stdin and process.stdout
        verdict = ""
        with suppress(BrokenPipeError):
            print(json.dumps([text, reference]), file=process.stdin, flush=True)
            verdict = process.stdout.readline().strip()
        if not verdict:
            self.close()
        return verdict or "stopped"

    def _start(self) -> subprocess.Popen[str]:
        self._process = subprocess.Popen(
            command("switchkd.evaluation.math_answers", str(self.time_limit)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=environment(),
        )
        assert self._process.stdout
        if not self._process.stdout.readline():  # imports take seconds, which are not an answer's
            self.close()
            raise ConfigError("math-verify cannot be started (its own message is above): pip install 'switchkd[math]'")
        return self._process


# --- in the process -----------------------------------------------------------------------------------------------


def _verdict(text: str, reference: str) -> str:
    from math_verify import parse, verify

    gold = _parsed_reference(reference)
    if not gold:
        return "no answer"
    answer = parse(text.rpartition("####")[2], parsing_timeout=None)
    return "equal" if verify(gold, answer, timeout_seconds=None) else "other"


def _parsed_reference(reference: str) -> Any:
    from math_verify import parse

    answer = reference.rpartition("####")[2].strip()
    marked = "$" in answer or "\\boxed" in answer
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", re.sub(r"\\(?:text|mathrm|textbf)\{[^}]*\}", "", answer))
    if not marked and not words:  # one expression: math-verify reads LaTeX only where it is marked
        return parse(f"${answer}$", parsing_timeout=None)
    return parse(answer, parsing_timeout=None)


def _serve(time_limit: float) -> None:
    """Read ``[text, reference]`` from standard input, one JSON line each, and write a verdict line for each.

    The process ends in an answer that takes longer than so many seconds, be it in one long operation.
    """
    import math_verify  # noqa: F401

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off
    verdicts, sys.stdout = sys.stdout, sys.stderr  # nothing that a library prints may pass for a verdict
    print("ready", file=verdicts, flush=True)
    with open(os.devnull, "w") as nowhere:
        for line in sys.stdin:
            faulthandler.dump_traceback_later(time_limit, exit=True, file=nowhere)
            verdict = _verdict(*json.loads(line))
            faulthandler.cancel_dump_traceback_later()  # first: a process that has answered is there for the next question
            print(verdict, file=verdicts, flush=True)


if __name__ == "__main__":
    _serve(float(sys.argv[1]))
