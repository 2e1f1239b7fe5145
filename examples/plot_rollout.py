"""Draw who wrote what in one rollout of a run, and how the run went.

    python examples/plot_rollout.py runs/demo-switch rollout.png

Above: the divergence the policy saw at every token against its threshold, coloured by who wrote the token.
Below: loss and the teacher's share over the steps.
"""

import json
import sys
from itertools import pairwise
from pathlib import Path

import matplotlib
import torch

from switchkd import Switch
from switchkd.runs import read_config

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STUDENT, TEACHER = "#0072b2", "#d55e00"  # a pair that colour-blind readers can tell apart


def records(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def plot(run: Path, picture: Path) -> None:
    rollouts, metrics = records(run / "rollouts.jsonl"), records(run / "metrics.jsonl")
    # The text in which the word went back and forth most often shows most.
    rollout = max(rollouts, key=lambda r: sum(a != b for a, b in pairwise(r["speakers"])))
    policy = read_config(run).policy
    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 5.2), height_ratios=(3, 2), layout="constrained")

    heights = [d if d is not None else 0.0 for d in rollout["divergences"]]
    above.bar(range(len(heights)), heights, color=[TEACHER if s else STUDENT for s in rollout["speakers"]])
    if isinstance(policy, Switch):
        above.plot(policy.threshold(torch.arange(len(heights))), color="black", linewidth=1.2, label="threshold tau(t)")
    for colour, name in ((STUDENT, "student wrote"), (TEACHER, "teacher wrote")):
        above.bar([0], [0], color=colour, label=name)
    above.legend(ncols=3, loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    unit = "JSD (bits)" if isinstance(policy, Switch) else "divergence"
    above.set(xlabel="response token", ylabel=unit)
    above.set_title(f"step {rollout['step']}, sample {rollout['sample_id']}", loc="left")

    generated = [m for m in metrics if "switch/teacher_share" in m]
    below.plot([m["step"] for m in metrics], [m["loss"] for m in metrics], color="black", label="loss (nats/token)")
    shares = [m["switch/teacher_share"] for m in generated]
    below.plot([m["step"] for m in generated], shares, "o-", color=TEACHER, label="teacher's share of the tokens")
    below.set(xlabel="step", ylim=(0, None))
    below.legend(frameon=False)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    plot(Path(sys.argv[1]), Path(sys.argv[2]))
