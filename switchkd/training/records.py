"""The names of the files of a run, and the records among them that it appends to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, TypedDict

from switchkd.base.plain import (
    check_type,
    damaged_at,
    json_object,
)
from switchkd.base.storage import sync, written

CONFIG, ORIGIN = "config.yaml", "origin.json"
METRICS, ROLLOUTS, SAMPLES = RECORDS = ("metrics.jsonl", "rollouts.jsonl", "samples.jsonl")


class StepRecord(TypedDict):
    """What every line of every record has."""

    step: Count


Count = Annotated[int, range(2**63)]


def keep_until(file: Path, step: int) -> None:
    """Cut off the lines of steps after ``step``, and a last line that was cut short; raises DataError for one that is damaged."""
    if not file.is_file():
        return
    end = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                break
            with damaged_at(file, number):
                record = json_object(line)
                check_type(record, StepRecord)
            if record["step"] > step:
                break
            end += len(line)
    with written(file):
        os.truncate(file, end)


def sync_records(run: Path) -> None:
    """Push the records to the disk, before a checkpoint says that they reach so far."""
    for name in RECORDS:
        if (run / name).is_file():
            with written(run / name):
                sync(run / name)
