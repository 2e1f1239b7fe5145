"""The commands that make models: `train` as a recipe says, `demo` in small, `check`, which looks at what `train` would do, `prune`,
which drops layers, `make-pair`, which makes a small pair from nothing; and `push`, which puts a student on the hub.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from switchkd.base.errors import ConfigError, DataError
from switchkd.base.settings import Settings
from switchkd.base.storage import unused_folder
from switchkd.base.terminal import bar, console
from switchkd.training.settings import TrainConfig, load_recipe

if TYPE_CHECKING:
    from switchkd.models.pair import Pair


@dataclass(frozen=True)
class CheckConfig(TrainConfig):
    """Check what a run would do and need, or, before anything is loaded, estimate what it would take on GPUs."""

    estimate: bool = False
    """Load nothing: calculate memory and seconds of a step on GPUs from the models' configs, all that a hub is asked for."""
    gpu: str = ""
    """With estimate: the GPU that it is calculated for, such as H100 or RTX-4090; without, all that are known."""
    processes: int = 1
    """With estimate: processes that the run goes over, one on each GPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.estimate and (self.gpu or self.processes != 1):
            raise ConfigError("gpu and processes are of an estimate: give --estimate too, or leave them out")


@dataclass(frozen=True)
class DemoConfig(Settings):
    """Distil a real 81M student from a real 135M teacher on this machine, no hub needed."""

    method: str = "switch"
    """A name that `switchkd methods` lists."""
    max_steps: int = 24
    """Optimizer steps."""
    output_dir: str | None = None
    """The run directory; default runs/demo-METHOD, numbered if there is one already."""
    seed: int = 0
    """Key of all randomness."""


@dataclass(frozen=True)
class PruneConfig(Settings):
    """Make a student by dropping the layers of least influence from a model."""

    model_name_or_path: str = "demo"
    """Hub name or local folder of the model."""
    output_dir: str = "pruned"
    """Where the smaller model goes; must be empty or absent."""
    layers: int = 15
    """Layers to keep."""
    seed: int = 0
    """Key of the choice of texts that influence is measured on."""


@dataclass(frozen=True)
class MakePairConfig(Settings):
    """Make the small pair for studies on two CPU cores, with its data, from generated text."""

    output_dir: str | None = None
    """Where the pair goes; default in the user's cache, where the model name `small` finds it."""
    seed: int = 0
    """Key of all randomness."""
    scale: Literal["full", "tiny"] = "full"
    """`tiny` makes untrained models in seconds, to try the command."""
    jobs: int = 0
    """Models trained at a time, each on one thread; 0 takes as many as there are cores. Moves time, never a weight."""


@dataclass(frozen=True)
class PushConfig(Settings):
    """Put the student of a run, and nothing else of it, on the Hugging Face Hub."""

    run: tyro.conf.Positional[str] = ""
    """The run directory, or its student/."""
    name: tyro.conf.Positional[str] = ""
    """The name on the hub, my-name/my-student."""
    private: bool = True
    """What is made there is private; one that is there already stays as it is."""


def train(config: TrainConfig) -> None:
    from switchkd.runs.distil import distil

    distil(config)


def check(config: CheckConfig) -> None:
    # What a run has settings for; those of the estimate are the command's own.
    run = TrainConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(TrainConfig)})
    if config.estimate:
        _estimate(run, config)
    else:
        _check(run)


def _estimate(config: TrainConfig, asked: CheckConfig) -> None:
    from switchkd.runs.estimate import Spread
    from switchkd.runs.preflight import estimate_run

    for line in estimate_run(config, Spread(asked.processes, asked.teacher_tensor_parallel), asked.gpu):
        console.print(line, soft_wrap=True)


def _check(config: TrainConfig) -> None:
    from switchkd.models.loading import default_device
    from switchkd.models.settings import with_dtypes
    from switchkd.runs.opening import open_pair
    from switchkd.runs.preflight import check_run

    config = with_dtypes(config, default_device())
    pair = open_pair(config, seed=config.seed, train=True)
    for line in check_run(config, pair):
        console.print(line, soft_wrap=True)
    if (Path(config.output_dir) / "metrics.jsonl").is_file():
        _check_records(Path(config.output_dir), pair)


def _check_records(path: Path, pair: Pair) -> None:
    from switchkd.reports.record import RunRecord
    from switchkd.runs.heldout import load_heldout
    from switchkd.runs.opening import load_train
    from switchkd.runs.replay import Texts, check_records

    run = RunRecord.read(path)
    train, heldout = load_train(run.config, pair, quiet=True), load_heldout(run.config, pair, quiet=True)
    texts = Texts(train, heldout.examples or train, heldout.task if heldout.examples else None)
    with bar("read again", None) as progress:
        findings = list(check_records(run, pair, progress=lambda what: progress.advance(1, what), texts=texts))
    for finding in findings:
        console.print(f"{path}, {finding}", soft_wrap=True)
    dtypes = run.settings["dtype"], run.settings["teacher_dtype"]
    if wrong := [finding.what for finding in findings if not finding.holds(*dtypes)]:
        raise DataError(
            f"{path}: the records of {', '.join(wrong)} are not what these models and settings give; models, settings or "
            "files were changed since"
        )


def demo(config: DemoConfig) -> None:
    from switchkd.runs.distil import distil

    settings = demo_settings(config)
    steps = f"{settings.max_steps} steps, into {settings.output_dir}"
    console.print(f"{config.method}: SmolLM2-135M to 81M on GSM8K, {steps}")
    distil(settings)


def demo_settings(config: DemoConfig) -> TrainConfig:
    """The method's recipe with the sizes of a demonstration on two cores."""
    recipe: TrainConfig = load_recipe(config.method)
    return dataclasses.replace(
        recipe, template="chat", max_prompt_length=160, max_completion_length=128, seed=config.seed,
        max_new_tokens=min(64, recipe.max_new_tokens), per_device_train_batch_size=8, gradient_accumulation_steps=1,
        learning_rate=5e-4, warmup_steps=4, max_steps=config.max_steps, eval_samples=32, eval_max_new_tokens=64,
        sample_steps=6, save_steps=12, output_dir=config.output_dir or str(unused_folder(f"runs/demo-{config.method}")),
    )  # fmt: skip


def prune(config: PruneConfig) -> None:
    from switchkd.studies.pruning import prune as prune_model

    prune_model(config.model_name_or_path, Path(config.output_dir), config.layers, seed=config.seed)


def make_pair(config: MakePairConfig) -> None:
    from switchkd.studies.small_pair import make_pair as make_small_pair

    make_small_pair(Path(config.output_dir) if config.output_dir else None, config.seed, config.scale, config.jobs)


def push(config: PushConfig) -> None:
    from switchkd.runs.finishing import push as push_student

    if not config.run or not config.name:
        raise ConfigError("a run and a name on the hub are needed: switchkd push runs/mine my-name/my-student")
    console.print(
        f"student put on the hub: {push_student(Path(config.run), config.name, config.private)}", soft_wrap=True
    )
