"""A real pair of two sizes: a few training steps, of all weights by SWITCH and by AdaSwitch, and of an adapter by SWITCH.

The pair is `qwen-coder` (which the first run downloads), the student in fp32 and the teacher in bfloat16, the prompts are of GSM8K.
One process loads and proves the models once; each contender begins with the student as it was. Noted of every step are seconds by
part and the process's seconds of work, which tell what a busy machine has added; of every contender the kernel's high-water mark
of resident memory (Linux), and the divergence KL(p‖q) to the teacher on the same few held-out answers before and after. So few
steps and rows show that it works and what it takes, not how well a method does.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.harness import Options, Row, accelerator, parse, print_table, publish, random_examples, random_pair
from benchmarks.memory import peak_bytes, reset_peak
from switchkd.base.terminal import console
from switchkd.data.settings import DataConfig
from switchkd.data.texts import TokenizedExample
from switchkd.evaluation.evaluate import evaluate
from switchkd.evaluation.settings import EvalSettings
from switchkd.evaluation.tasks import TASKS
from switchkd.forward.proof import prove
from switchkd.methods.mixes import Generated
from switchkd.models.adapters import add_adapter
from switchkd.models.pair import Pair, load_pair
from switchkd.models.settings import ModelConfig
from switchkd.runner.architecture import num_parameters
from switchkd.runs.opening import load_task
from switchkd.training.settings import TrainConfig, load_recipe
from switchkd.training.trainer import Trainer


@dataclass(frozen=True)
class Recipe:
    """A contender: whose recipe, on which weights, at which learning rate."""

    name: str
    learning_rate: float
    adapter: bool = False


# The adapter comes last, as it stays on the student.
CONTENDERS = {
    "SWITCH": Recipe("switch", 1e-5),
    "AdaSwitch": Recipe("adaswitch", 1e-5),
    "SWITCH, LoRA": Recipe("switch", 1e-4, True),
}


@dataclass(frozen=True)
class TwoSizes(Options):
    """What can be told besides; ``repeats`` are the steps, all of which are measured."""

    rows: int = 4
    """Rows of a step."""
    new_tokens: int = 32
    """Tokens that are written to each."""
    heldout: int = 4
    """Held-out answers that the divergence is measured on."""
    only: tuple[str, ...] = tuple(CONTENDERS)
    """The contenders to run."""
    costs: tuple[float, ...] = ()
    """What rounds are planned by, as in a run's `costs`; measured if none are given."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run every contender, print the table, write two_sizes.json and two_sizes.png."""
    options = parse(argv, "two_sizes", __doc__, TwoSizes)
    start, work = time.perf_counter(), time.process_time()
    pair, train, heldout = opened(options)
    opening = {"seconds": time.perf_counter() - start, "CPU s": time.process_time() - work}
    console.print(f"loaded and proved: {opening['seconds']:.0f} s, of work {opening['CPU s']:.0f} s", soft_wrap=True)
    first = {name: weight.detach().to(torch.bfloat16) for name, weight in pair.student.named_parameters()}
    rows = []
    for name in options.only:
        restore(pair, first)
        rows.append(measure(pair, train, heldout, name, options))
    sizes = {"teacher_parameters": num_parameters(pair.teacher), "student_parameters": num_parameters(pair.student)}
    settings = {"rows": options.rows, "new_tokens": options.new_tokens, "opening": opening, **sizes}
    print_table(f"{options.rows} rows, {options.new_tokens} new tokens", rows)
    publish("two_sizes", options, settings, rows, plot(rows))
    return 0


def opened(options: TwoSizes) -> tuple[Pair, list[TokenizedExample], list[TokenizedExample]]:
    """The pair, proved, what to train on and what to measure on; tiny and random in a quick run."""
    if options.quick:
        pair = random_pair(options.device, quick=True)
        return pair, random_examples(pair, options.rows), random_examples(pair, options.heldout)
    pair = load_pair("qwen-coder", teacher_dtype="bfloat16", device=options.device, template="chat")
    for model in (pair.teacher, pair.student):
        prove(model)
    data = DataConfig(template="chat", max_prompt_length=96, max_completion_length=48)
    train, heldout = (load_task(data, pair, f"gsm8k-sample:{part}", quiet=True) for part in ("train", "heldout"))
    return pair, train, heldout[: options.heldout]


def restore(pair: Pair, first: dict[str, torch.Tensor]) -> None:
    """Give the student its first weights, which are numbers of bfloat16, and take its gradients away."""
    with torch.no_grad():
        for name, weight in pair.student.named_parameters():
            weight.copy_(first[name])
            weight.grad = None


def measure(
    pair: Pair, train: list[TokenizedExample], heldout: list[TokenizedExample], name: str, options: TwoSizes
) -> Row:
    """The steps of one contender, and the divergence before and after them."""
    recipe = CONTENDERS[name]
    if recipe.adapter:
        add_adapter(pair.student, ModelConfig(use_peft=True), seed=0)
    config: TrainConfig = replace(
        load_recipe(recipe.name), mix=Generated(1.0), max_new_tokens=options.new_tokens, max_steps=options.repeats,
        per_device_train_batch_size=options.rows, learning_rate=recipe.learning_rate, use_peft=recipe.adapter,
        costs=options.costs,
    )  # fmt: skip
    before = divergence(pair, heldout)
    reset_peak(options.device)
    trainer = Trainer(pair, train, config, accelerator(options.device))
    steps: list[dict[str, Any]] = []
    for _ in range(options.repeats):
        work = time.process_time()
        metrics, _ = trainer.train_step()
        steps.append({**metrics, "CPU s": time.process_time() - work})
        console.print(f"{name}, step {trainer.step}: {metrics['seconds']:.0f} s", soft_wrap=True)
    numbers = {
        "generate s": [step["seconds/generate"] for step in steps],
        "teacher s": [step["seconds/teacher"] for step in steps],
        "update s": [step["seconds/update"] for step in steps],
        "CPU s": [step["CPU s"] for step in steps],
        "loss": [step["loss"] for step in steps],
        "teacher_share": [step["switch/teacher_share"] for step in steps],
        "peak GiB": peak_bytes(options.device) / 2**30,
        "KL before": before,
        "KL after": divergence(pair, heldout),
        "costs": list(trainer.config.costs),
    }
    return Row({}, name, [step["seconds"] for step in steps], numbers)


def divergence(pair: Pair, heldout: list[TokenizedExample]) -> float:
    """KL(p‖q) on the held-out answers, nats a token."""
    result = evaluate(pair, pair.student, heldout, TASKS["references"], EvalSettings(max_new_tokens=1))
    return result.means()["forward_kl"]


def plot(rows: list[Row]) -> Figure:
    """Seconds a step by part, and the divergence before and after."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    names, bottom = [row.contender for row in rows], [0.0] * len(rows)
    for part in ("generate s", "teacher s", "update s"):
        heights = [row.number(part) for row in rows]
        left.bar(names, heights, bottom=bottom, label=part)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    left.set(ylabel="seconds a step (medians)")
    left.legend(fontsize=7)
    for when, place in (("KL before", -0.2), ("KL after", 0.2)):
        heights = [row.number(when) for row in rows]
        right.bar([at + place for at in range(len(rows))], heights, 0.4, label=when)
    right.set(ylabel="nats a token", xticks=range(len(rows)), xticklabels=names)
    right.legend(fontsize=7)
    return figure


if __name__ == "__main__":
    sys.exit(main())
