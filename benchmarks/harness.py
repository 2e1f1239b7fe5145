"""What the benchmarks share: options, pairs and prompts, alternating measurement, tables, JSON and plots.

A contender is a function without arguments. Contenders that are compared run in one process, A B C A B C, so that a machine
whose speed drifts slows all of them alike; each runs once unmeasured first.
"""

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
import tyro
from accelerate import Accelerator
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from switchkd.base.storage import cache_folder, write_file
from switchkd.base.terminal import bar, console, number
from switchkd.cli.train import DemoConfig, demo_settings
from switchkd.data.settings import DataConfig
from switchkd.data.texts import TokenizedExample
from switchkd.decoding.decode import decode
from switchkd.decoding.rollouts import DecodeCost
from switchkd.methods.divergences import log_probs
from switchkd.methods.policy import Policy
from switchkd.methods.sampling import draw, gumbel_noise, keys_tensor, noise_key
from switchkd.models.pair import Pair, load_pair
from switchkd.runner.architecture import num_parameters
from switchkd.runs.opening import load_task
from switchkd.training.checkpoint import save_model
from switchkd.training.trainer import Trainer

Contender = Callable[[], object]
Workload = tuple[Pair, list[TokenizedExample]]

PACKAGES = ("torch", "transformers", "trl", "liger-kernel")
NOT_INSTALLED = "not installed"
# Steps of supervised distillation after which the demo student is worth decoding with.
DISTILLED_STEPS = 60
# With a vocabulary of 49,152 the output layer would be most of a 20M student and hide the ratio of the two bodies.
RANDOM_VOCAB = 8192
# Standard deviation of the context-dependent part of the random pair's logits; gives keyed draws that agree 9 times in 10.
RANDOM_SPREAD = 0.13
LARGE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 15, "num_attention_heads": 16}
SMALL = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6}
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


@dataclass(frozen=True)
class Options:
    """What every benchmark can be told."""

    output: Path = Path("benchmarks/results")
    """Folder for NAME.json and NAME.png."""
    repeats: int = 3
    """Measured runs of each contender."""
    max_batch: int = 32
    """Wider batches are left out."""
    quick: bool = False
    """Tiny random models and sizes: shows that the program works, measures nothing worth knowing."""
    data: str = "gsm8k-sample:heldout"
    """File of instructions, where a benchmark reads one."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where all contenders run."""


Told = TypeVar("Told", bound=Options)


@dataclass(frozen=True)
class Row:
    """One contender in one cell of a benchmark: every raw time, and beside it numbers or lists of raw values."""

    cell: dict[str, Any]
    contender: str
    seconds: list[float]
    numbers: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def median(self) -> float:
        return median(self.seconds)

    def number(self, name: str) -> float:
        """A number, or the median of its raw values."""
        value = self.numbers[name]
        return median(value) if isinstance(value, list) else value


def parse(argv: Sequence[str] | None, name: str, doc: str | None, options: type[Told] = Options) -> Told:
    """Options of a command line; also keeps the libraries from talking into the tables."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return tyro.cli(options, args=argv, prog=f"python -m benchmarks.{name}", description=doc, use_underscores=False)


def installed(package: str) -> bool:
    """Whether a peer can be measured."""
    return package_version(package) != NOT_INSTALLED


def package_version(package: str) -> str:
    """Version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return NOT_INSTALLED


def machine(device: str) -> dict[str, Any]:
    """The machine and the versions that the numbers depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "python": platform.python_version(),
        **{package: package_version(package) for package in PACKAGES},
        "revision": revision(),
    }


def revision() -> str:
    """The commit that is measured, with ``-dirty`` behind it where files differ from it; "unknown" without git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def side_by_side(
    contenders: dict[str, Contender],
    repeats: int,
    title: str = "measure",
    warm_up: dict[str, Contender] | None = None,
) -> dict[str, list[float]]:
    """Seconds of ``repeats`` runs of each contender in turn, after one unmeasured run of each (or of a shorter one)."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    with bar(title, (repeats + 1) * len(contenders)) as progress:
        for repeat in range(repeats + 1):
            for name, run in (contenders if repeat else warm_up or contenders).items():
                progress.advance(0, name)
                taken = timed(run)
                if repeat:
                    seconds[name].append(taken)
                progress.advance()
    return seconds


def timed(run: Contender) -> float:
    """Seconds of one run, until the device is done."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    """Wait for what a GPU still has to do, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def publish(name: str, options: Options, settings: dict[str, Any], rows: Sequence[Row], figure: Figure) -> None:
    """Write NAME.json and NAME.png."""
    record: dict[str, Any] = {
        "machine": machine(options.device),
        "options": {**asdict(options), "output": str(options.output)},
        "settings": settings,
        "rows": [asdict(row) for row in rows],
    }
    options.output.mkdir(parents=True, exist_ok=True)
    write_file(options.output / f"{name}.json", json.dumps(record, indent=1) + "\n")
    figure.savefig(options.output / f"{name}.png", dpi=150)
    console.print(" · ".join(f"{key} {value}" for key, value in record["machine"].items()), soft_wrap=True)
    console.print(f"written: {options.output / name}.json and .png", soft_wrap=True)


def print_table(title: str, rows: Sequence[Row]) -> None:
    """Medians, their ratio to the first contender of the cell, and the spread, where something was timed; then the numbers."""
    table = Table(title=title, title_justify="left")
    keys, numbers = list(_ordered(row.cell for row in rows)), list(_ordered(row.numbers for row in rows))
    timed = any(row.seconds or row.note for row in rows)
    for column in [*keys, "contender"]:
        table.add_column(column)
    for column in [*(["median s", "speed-up", "min–max s"] if timed else []), *numbers]:
        table.add_column(column, justify="right")
    for row in rows:
        base = next(other for other in rows if other.cell == row.cell)
        times = ["", "", row.note]
        if row.seconds:
            ratio = f"{base.median / row.median:.2f}×" if base.seconds else ""
            times = [number(row.median), ratio, f"{number(min(row.seconds))}–{number(max(row.seconds))}"]
        cells = [*(str(row.cell[key]) for key in keys), row.contender, *(times if timed else [])]
        table.add_row(*cells, *(number(row.number(key)) if key in row.numbers else "" for key in numbers))
    Console(width=None if console.is_terminal else 200).print(table)  # a log file is as wide as it needs to be


def _ordered(mappings: Iterable[dict[str, Any]]) -> dict[str, None]:
    return {key: None for mapping in mappings for key in mapping}


def distilled_pair(steps: int, device: str) -> Pair:
    """The demo pair whose student was distilled for ``steps`` steps with the supervised recipe; made once, then cached."""
    folder = cache_folder() / f"benchmark-student-{steps}"
    if steps and not folder.is_dir():
        pair = load_pair("demo", device=device)
        config = demo_settings(DemoConfig(method="kd", max_steps=steps, output_dir="unused"))
        trainer = Trainer(pair, load_task(config, pair, config.train_file), config, accelerator(device))
        with bar(f"distil {steps} steps", steps) as progress:
            while trainer.step < trainer.total_steps:
                trainer.train_step()
                progress.advance()
        save_model(folder, pair.student, pair.tokenizer)
    return load_pair("demo", str(folder) if steps else None, device=device)


def workload(options: Options, rows: int) -> Workload:
    """The demo pair after some distillation with ``rows`` questions; tiny random models in a quick run."""
    if options.quick:
        pair = random_pair(options.device, quick=True)
        return pair, random_examples(pair, rows)
    pair = distilled_pair(DISTILLED_STEPS, options.device)
    return pair, question_examples(pair, rows)


def random_pair(device: str, quick: bool = False) -> Pair:
    """Random Llamas, the teacher ten times the student, whose keyed draws agree about nine times in ten.

    Both output layers have one bias, the log-probabilities of a Zipf law over ``RANDOM_VOCAB`` ids, and weights of a scale
    that moves the logits by ``RANDOM_SPREAD`` from context to context. ``agreement`` measures what comes of it.
    """
    return pair_of("llama", (TINY, TINY) if quick else (LARGE, SMALL), 64 if quick else RANDOM_VOCAB, device)


def pair_of(family: str, sizes: Sequence[Mapping[str, Any]], vocab_size: int, device: str) -> Pair:
    """A random teacher and student of these sizes, with the output layers of ``random_pair``."""
    teacher, student = (_random_model(family, size, vocab_size, seed).to(device) for seed, size in enumerate(sizes))
    return Pair(teacher.requires_grad_(False), student, _number_tokenizer(vocab_size), vocab_size, (), ())


def _random_model(family: str, size: Mapping[str, Any], vocab_size: int, seed: int) -> PreTrainedModel:
    config = CONFIG_MAPPING[family](vocab_size=vocab_size, bos_token_id=None, eos_token_id=None, pad_token_id=0, **size)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
        head = model.get_output_embeddings()
        # The last norm gives hidden states of unit mean square, so each logit has variance hidden_size · std².
        nn.init.normal_(head.weight, std=RANDOM_SPREAD / size["hidden_size"] ** 0.5)
    head.bias = nn.Parameter(torch.arange(1, vocab_size + 1).float().reciprocal().log().log_softmax(0))
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model


def _number_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Token i is written as the number i, so that a trainer that wants text can be given token ids."""
    words = ["<pad>", "<eos>", *map(str, range(2, vocab_size))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


@torch.no_grad()
def agreement(pair: Pair, examples: Sequence[TokenizedExample], draws: int = 8) -> dict[str, float]:
    """How near the models are at the examples' positions: mean total variation, and how often keyed draws agree."""
    variation, agreed = [], []
    for example in examples:
        ids = torch.tensor([example.prompt_ids + example.completion_ids], device=pair.teacher.device)
        logs = [log_probs(m(ids).logits[0, :, : pair.vocab_size]) for m in (pair.student, pair.teacher)]
        variation.append((logs[0].exp() - logs[1].exp()).abs().sum(-1).div(2))
        for seed in range(draws):
            keys = keys_tensor([noise_key(seed, example.id, t) for t in range(ids.shape[1])], ids.device)
            noise = gumbel_noise(keys, pair.vocab_size)
            agreed.append((draw(logs[0], noise) == draw(logs[1], noise)).float())
    tv = float(torch.cat(variation).mean())
    return {"total_variation": tv, "bound": (1 - tv) / (1 + tv), "agreement": float(torch.cat(agreed).mean())}


def describe(pair: Pair, examples: Sequence[TokenizedExample]) -> dict[str, float]:
    """Sizes of a pair and how near its models are, for the JSON."""
    sizes = {"teacher_parameters": num_parameters(pair.teacher), "student_parameters": num_parameters(pair.student)}
    return {**sizes, **agreement(pair, examples[:4])}


def question_examples(pair: Pair, count: int) -> list[TokenizedExample]:
    """Held-out GSM8K questions and answers in the demo's chat template; the longest prompts are left out."""
    config = DataConfig(max_prompt_length=160, max_completion_length=128)
    return load_task(config, pair, "gsm8k-sample:heldout", quiet=True)[:count]


def random_examples(pair: Pair, count: int) -> list[TokenizedExample]:
    """Prompts of 48 to 111 random ids, about as long as GSM8K questions, and completions of 16."""
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(2, pair.vocab_size, (length,), generator=generator).tolist()

    return [TokenizedExample(i, ids(48 + 29 * i % 64), ids(16), [2] * 16, ("",), False, "random") for i in range(count)]


def decode_cost(
    pair: Pair, prompts: Sequence[list[int]], new_tokens: int, policy: Policy, **settings: Any
) -> DecodeCost:
    """Decode all prompts together with no end ids, so that every row writes its whole budget; returns what it cost."""
    return decode(
        pair.student, pair.teacher, prompts, policy, new_tokens, eos_token_ids=[], batch_size=len(prompts),
        vocab_size=pair.vocab_size, **settings,
    ).cost  # fmt: skip


def forwards(cost: DecodeCost) -> dict[str, float]:
    """Forwards of each model per kept token, as columns of a table."""
    summary = cost.summary()
    return {f"{who} fwd/token": summary[f"{who}_forwards_per_token"] for who in ("student", "teacher")}


def accelerator(device: str) -> Accelerator:
    """Accelerate's state for this device; it would choose a GPU by itself."""
    return Accelerator(cpu=device == "cpu")
