"""One error root. Every message says what is wrong, the values, and the way out.

The members are also the built-in error a caller would expect, so ``except ValueError`` keeps working.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class SwitchKDError(Exception):
    """Root of every error that switchkd raises on purpose; the command line prints it without a traceback."""


class ConfigError(SwitchKDError, ValueError):
    """A setting is unknown, out of range or contradicts another."""


class DataError(SwitchKDError, ValueError):
    """A data file or prompt cannot be used; the message names the file and line."""


class ModelError(SwitchKDError, ValueError):
    """A model folder cannot be loaded, or its architecture cannot be decoded."""


class VocabularyError(ModelError):
    """Teacher and student do not share one tokenizer, id by id."""


class NonFiniteError(SwitchKDError, ArithmeticError):
    """A NaN or infinity where none may be: in logits, loss, or gradients."""


class CheckpointError(SwitchKDError, OSError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class DiskError(SwitchKDError, OSError):
    """A file or folder cannot be written: the disk is full, fails, or does not allow it."""


class HubError(SwitchKDError, ConnectionError):
    """The Hugging Face Hub cannot be reached, or refuses."""


class ServerError(SwitchKDError, ConnectionError):
    """A server does not answer, or not with what it was asked for."""


class InUseError(SwitchKDError, BlockingIOError):
    """Another process works in a folder."""


class NoMemoryError(SwitchKDError, MemoryError):
    """Memory runs out at the least that can be done at once."""


class SwitchKDWarning(RuntimeWarning):
    """A run goes on otherwise than it was told to, with what it is worth; the command line prints it in one line."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown ``name``: the closest known one, or all of them if none is close."""
    known = sorted(known)
    close = get_close_matches(name[:100], known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
