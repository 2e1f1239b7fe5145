"""Folders of studies that no study wrote, in any state, for what reads them."""

import json
import os
from pathlib import Path

import numpy as np

from switchkd.evaluation.results import Evaluation, write_results
from switchkd.evaluation.statistics import Values
from switchkd.studies.plan import Plan, Size, cells


def grid_of(output_dir, methods=("kd", "switch"), seeds=(0, 1), tokens=1000, evaluations=(), **more):
    """A plan of methods that are called like their recipes, its size, and its grid of runs."""
    size = Size(
        {"max_train_tokens": tokens, "task": "gsm8k"}, seeds, evaluations={each: {} for each in evaluations}, **more
    )
    plan = Plan("A <plan>", {method: method for method in methods}, {"small": size}, methods[0])
    for folder in ("cells", "logs"):
        (output_dir / folder).mkdir(parents=True, exist_ok=True)
    return plan, size, cells(plan, size, output_dir)


def step(number, share, seconds=1.0, tokens=100, **more):
    return {"step": number, "num_tokens": tokens * number, "progress": share, "seconds": seconds, **more}


def begin(run, *steps, log="$ switchkd train cells/x.yaml\n", ends=""):
    """A run that has come so far; ``ends`` follows its last whole line."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps) + ends)
    say(run, log)


def say(run, log):
    (run.parent / "logs" / f"{run.name}.log").write_text(log)


def finish(run, values=(50.0, 60.0, 70.0), at=None, took=0.0, tasks=()):
    """The evaluations of a run, ``took`` seconds after its last step at the time ``at``."""
    evaluation = Evaluation({"strict": Values(np.array([values]))}, "strict", model={"sha256": run.name})
    data = {"file": "sums.jsonl", "sha256": "d", "ids": list(range(len(values))), "groups": []}
    for name in ("evaluation", *(f"evaluation-{task}" for task in tasks)):
        file = run / f"{name}.json"
        write_results(
            file, {"name": "gsm8k", "version": 1, "primary": "strict"}, data, {}, {"student after": evaluation}
        )
        if at is not None:
            os.utime(file, (at + took, at + took))
    if at is not None:
        os.utime(run / "metrics.jsonl", (at, at))


def dated(file: Path, at: float):
    os.utime(file, (at, at))
