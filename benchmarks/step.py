"""Seconds of one training step: generation, loss, gradient, clipping and AdamW, here and in TRL.

Counted: everything from the prompts of the step to the updated weights. For switchkd that is ``Trainer.train_step``; for TRL's
two trainers the span from ``on_step_begin`` to ``on_step_end`` of their own loop, one ``train()`` of one step at a time, with
the optimizer kept in between. Not counted: loading, data loaders, logging, checkpoints (all off).

Equal for all: a copy of the student and the same teacher in fp32, the same prompts in every step, rows, new tokens, sampling at
temperature 1 from the full distribution, fused AdamW, clipping at 1, no gradient checkpointing. Every row writes its whole
budget: here end ids are not given, in TRL ``min_new_tokens`` forbids them. The learning rate is 0, which costs what any other
costs and keeps the work of every repeat the same.

On-policy here and both of TRL's trainers lower the JSD (beta 0.5); SWITCH and AdaSwitch are their recipes with lmbda 1, so
each of their steps writes text with both models. "generate" is the time inside decoding, "update" is the rest.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback

from benchmarks.harness import (
    DISTILLED_STEPS,
    NOT_INSTALLED,
    Row,
    accelerator,
    describe,
    installed,
    parse,
    print_table,
    publish,
    side_by_side,
    synchronize,
    timed,
    workload,
)
from switchkd.data.texts import TokenizedExample
from switchkd.methods.mixes import Generated
from switchkd.methods.objectives import JSD
from switchkd.models.pair import Pair
from switchkd.training.settings import TrainConfig, load_recipe
from switchkd.training.trainer import Trainer

BETA = 0.5
# Which recipe, and what is changed in it.
OURS: dict[str, dict[str, Any]] = {
    "switchkd on-policy": {"recipe": "on_policy", "objective": JSD(BETA)},
    "switchkd SWITCH": {"recipe": "switch", "mix": Generated(1.0)},
    "switchkd AdaSwitch": {"recipe": "adaswitch"},
}
PEERS = ("TRL GKDTrainer", "TRL DistillationTrainer")
# One training step: returns its seconds, and the seconds of generation in it.
Step = Callable[[], tuple[float, float]]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all contenders, print the table, write step.json and step.png."""
    options = parse(argv, "step", __doc__)
    rows, new_tokens = (2, 4) if options.quick else (8, 64)
    pair, examples = workload(options, rows)
    pair = replace(pair, eos_token_ids=())  # every row writes its whole budget
    settings = {
        "rows": rows,
        "new_tokens": new_tokens,
        "distilled_steps": DISTILLED_STEPS,
        "pair": describe(pair, examples),
    }
    with tempfile.TemporaryDirectory() as folder:
        table = measure(contenders(pair, examples, new_tokens, options.device, folder), options.repeats)
    print_table(f"one training step of {rows} rows, {new_tokens} new tokens each", table)
    publish("step", options, settings, table, plot(table))
    return 0


def contenders(
    pair: Pair, examples: list[TokenizedExample], new_tokens: int, device: str, folder: str
) -> dict[str, Step]:
    """A step of each contender that is installed; TRL's trainers, the first of them the baseline, first."""
    steps = {}
    for name, make in zip(PEERS, (trl_gkd, trl_distillation), strict=True):
        if installed("trl"):
            settings = trl_settings(len(examples), device, folder)
            steps[name] = trl_step(make(deepcopy(pair.student), pair, examples, new_tokens, settings), new_tokens)
    return steps | {name: our_step(pair, examples, new_tokens, device, **changes) for name, changes in OURS.items()}


def measure(steps: dict[str, Step], repeats: int) -> list[Row]:
    """Rows in the order of the contenders; a peer that is not installed says so."""
    spans: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}

    def run(name: str) -> None:
        spans[name].append(steps[name]())

    side_by_side({name: partial(run, name) for name in steps}, repeats, "training steps")
    rows = [Row({}, name, [], note=NOT_INSTALLED) for name in PEERS if name not in steps]
    for name, all_spans in spans.items():
        measured = all_spans[1:]  # the first is the warm-up
        row = Row({}, name, [seconds for seconds, _ in measured])
        row.numbers["generate s"] = [generating for _, generating in measured]
        row.numbers["update s"] = [seconds - generating for seconds, generating in measured]
        rows.append(row)
    return rows


def our_step(
    pair: Pair, examples: list[TokenizedExample], new_tokens: int, device: str, recipe: str, **changes: Any
) -> Step:
    """A step of switchkd's trainer with a recipe's policy and loss."""
    config: TrainConfig = replace(
        load_recipe(recipe),
        max_new_tokens=new_tokens,
        per_device_train_batch_size=len(examples),
        learning_rate=0.0,
        max_steps=1,
        **changes,
    )
    trainer = Trainer(replace(pair, student=deepcopy(pair.student)), examples, config, accelerator(device))
    metrics: dict[str, Any] = {}

    def step() -> tuple[float, float]:
        seconds = timed(lambda: metrics.update(trainer.train_step()[0]))
        return seconds, metrics["seconds/generate"]

    return step


class StepClock(TrainerCallback):
    """Seconds between the beginning and the end of the last step of a transformers trainer."""

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        synchronize()
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        synchronize()
        self.seconds = time.perf_counter() - self.start


def trl_step(trainer: Any, new_tokens: int) -> Step:
    """A step of a TRL trainer; generation is what its model's ``generate`` takes."""
    clock, generating, generate = StepClock(), [0.0], trainer.model.generate
    trainer.add_callback(clock)
    trainer.remove_callback(PrinterCallback)

    def timed_generate(input_ids: Tensor, **settings: Any) -> Any:
        texts: list[Any] = []
        generating[0] = timed(lambda: texts.append(generate(input_ids=input_ids, **settings)))
        width = getattr(texts[0], "sequences", texts[0]).shape[1]
        assert width == input_ids.shape[1] + new_tokens, "a contender that writes less is not comparable"
        return texts[0]

    trainer.model.generate = timed_generate

    def step() -> tuple[float, float]:
        trainer.train()
        return clock.seconds, generating[0]

    return step


def trl_settings(rows: int, device: str, folder: str) -> dict[str, Any]:
    """Settings of both of TRL's trainers."""
    return {
        "output_dir": folder,
        "max_steps": 1,
        "per_device_train_batch_size": rows,
        "learning_rate": 0.0,
        "optim": "adamw_torch_fused",
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "beta": BETA,
        "temperature": 1.0,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": device == "cpu",
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def trl_gkd(
    student: PreTrainedModel, pair: Pair, examples: list[TokenizedExample], new_tokens: int, settings: dict[str, Any]
) -> Any:
    """GKDTrainer on the very token ids, always on-policy."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    rows = [
        {
            "prompt": "",  # not read where token ids are given
            "input_ids": row.prompt_ids + row.completion_ids,
            "completion_mask": [0] * len(row.prompt_ids) + [1] * len(row.completion_ids),
        }
        for row in examples
    ]
    config = GKDConfig(lmbda=1.0, seq_kd=False, max_new_tokens=new_tokens, **settings)
    data = Dataset.from_list(rows)
    trainer = GKDTrainer(student, pair.teacher, config, train_dataset=data, processing_class=pair.tokenizer)
    trainer.generation_config.min_new_tokens = new_tokens
    return trainer


def trl_distillation(
    student: PreTrainedModel, pair: Pair, examples: list[TokenizedExample], new_tokens: int, settings: dict[str, Any]
) -> Any:
    """DistillationTrainer on text whose token ids are the prompts'; it tokenizes within its step."""
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    texts = [pair.tokenizer.decode(row.prompt_ids) for row in examples]
    assert pair.tokenizer(texts)["input_ids"] == [row.prompt_ids for row in examples], (
        "the prompts do not survive as text"
    )
    config = DistillationConfig(
        max_completion_length=new_tokens, generation_kwargs={"min_new_tokens": new_tokens}, **settings
    )
    data = Dataset.from_list([{"prompt": text} for text in texts])
    return DistillationTrainer(student, pair.teacher, config, train_dataset=data, processing_class=pair.tokenizer)


def plot(rows: list[Row]) -> Figure:
    """Seconds of a step, split into generation and update."""
    shown = [row for row in rows if row.seconds][::-1]
    names, parts = [row.contender for row in shown], ("generate s", "update s")
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axis = figure.subplots()
    left = [0.0] * len(shown)
    for part in parts:
        widths = [row.number(part) for row in shown]
        axis.barh(names, widths, left=left, label=part.removesuffix(" s"))
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.set(xlabel="seconds a step")
    axis.legend()
    return figure


if __name__ == "__main__":
    sys.exit(main())
