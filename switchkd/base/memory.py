"""Work that is split when memory runs out: again with half the rows, down to one."""

import errno
import gc
import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import TypeVar, cast

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from switchkd.base.errors import NoMemoryError, SwitchKDWarning

Result = TypeVar("Result")

# How libraries say it that have no exception of its own for it. oneDNN, which multiplies on CPUs, names no reason: where it has
# described a product and cannot make it, it found no memory for it.
_WORDS = re.compile(
    r"\bout of memory\b|\bnot enough memory\b|cannot allocate memory|could not (create|execute) a primitive(?! descriptor)"
    r"|could not create a memory|_STATUS_ALLOC_FAILED|std::bad_alloc",
    re.IGNORECASE,
)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of a device or of the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and (should_reduce_batch_size(error) or bool(_WORDS.search(str(error))))


def fits(work: Callable[[], Result], rows: int, what: str, alone: bool = True) -> tuple[bool, Result | None]:
    """Whether ``work`` on so many rows came to its end, and its result; False where memory ran out, which is then cleared.

    Where other processes do the same work in step with this one, which is not ``alone``, memory's own error ends it.

    Raises:
        NoMemoryError: one row is too many.
    """
    try:
        return True, work()
    except Exception as error:
        if not out_of_memory(error) or not alone:
            raise
        if rows == 1:
            raise NoMemoryError(
                f"memory runs out while {what} with a single row ({error}); shorten the text (max_new_tokens, "
                "max_prompt_length, max_completion_length), set gradient_checkpointing, or take smaller models"
            ) from error
    # Not in the except clause: the error holds what the failed call had made.
    gc.collect()
    clear_device_cache()
    return False, None


def tell_fewer(what: str, setting: str, at_first: int, rows: int) -> None:
    """One warning, where memory held fewer rows than it was asked to; ``setting`` would have it begin with these."""
    if rows < at_first:
        warnings.warn(
            f"memory ran out while {what} with {at_first} rows at once: from here on {rows}; the result is the same but for "
            f"rounding. {setting} {rows} would begin with that",
            SwitchKDWarning,
            stacklevel=3,
        )


def halving(
    work: Callable[[int], Result], rows: int, what: str, setting: str, alone: bool = True
) -> tuple[Result, int]:
    """``work(rows)`` and the number of rows that it was done with: where memory runs out, it is called again with half of them.

    A call that failed must leave nothing behind that the next one would count twice. One warning says how it went: ``what`` was
    done, and ``setting`` would have it begin with fewer rows. ``alone`` is as in ``fits``.

    Raises:
        NoMemoryError: one row is too many.
    """
    at_first = rows
    while True:
        done, result = fits(partial(work, rows), rows, what, alone)
        if done:
            tell_fewer(what, setting, at_first, rows)
            return cast(Result, result), rows
        rows //= 2
