"""A small pair for studies on two CPU cores, made by one command from generated text: ``switchkd make-pair``.

A teacher is trained until it is good at the tasks of `small_data`, and students of two sizes from less to more: each is kept
when it is hardly trained (``cold``), when it knows the tasks (``warm``) and when it is near its teacher (``near``). A folder holds
them all, their data, and in ``pair.json`` how they were made and what they can do.
"""

import json
import multiprocessing
import os
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal

from switchkd.base.errors import ConfigError, nearest
from switchkd.base.storage import staged_folder
from switchkd.data.small_data import (
    PARTS,
    SIZES,
    SMALL,
    STARTS,
    TASKS,
    Row,
    as_instruction,
    small_pair_folder,
    student_folder,
)
from switchkd.models.vocabulary import save_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from switchkd.data.texts import TokenizedExample
    from switchkd.training.settings import TrainConfig


VOCAB_SIZE = 1024  # at most; the words of the two tasks need fewer
MAX_PROMPT, MAX_COMPLETION = 128, 160  # tokens; every row is shorter
CONTEXT = 1024
WARM_UP = 100  # steps
PAD, END = "<|pad|>", "<|end|>"
MODELS = ("teacher", *SIZES)
SPECIAL_TOKENS = (PAD, END, "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama, and how fast it is trained.

    A student's learning rate stays: one whose rate had fallen to 0 would first lose in a short run what that had gained it.
    """

    hidden: int
    feed_forward: int
    layers: int
    heads: int
    learning_rate: float
    schedule: Literal["cosine", "constant"] = "constant"


@dataclass(frozen=True)
class Scale:
    """Rows of each task to train on and to hold out, rows of a training step, and the models with their steps."""

    rows: int
    heldout: int
    batch_size: int
    teacher: Shape
    teacher_steps: int
    students: dict[str, Shape]
    """By size."""
    starts: dict[str, int]
    """Steps after which a student is kept, by the name of the start, from less to more."""

    def stops(self, name: str) -> dict[str, int]:
        """The folders that the model ``name``, one of `MODELS`, is kept in, and after how many steps."""
        if name == "teacher":
            return {name: self.teacher_steps}
        return {student_folder(f"{name}-{start}"): steps for start, steps in self.starts.items()}


SCALES = {
    "full": Scale(
        16_000,
        256,
        16,
        Shape(192, 512, 4, 6, 2e-3, "cosine"),
        2500,
        {"little": Shape(80, 216, 4, 4, 3e-3), "big": Shape(128, 344, 4, 4, 2e-3)},
        dict(zip(STARTS, (800, 2500, 4000), strict=True)),
    ),
    "tiny": Scale(  # seconds, for tests
        48,
        4,
        4,
        Shape(32, 64, 2, 2, 2e-3, "cosine"),
        3,
        {"little": Shape(16, 32, 1, 2, 4e-3), "big": Shape(24, 48, 1, 2, 4e-3)},
        dict(zip(STARTS, (1, 2, 3), strict=True)),
    ),
}


def make_pair(folder: Path | None = None, seed: int = 0, scale: str = "full", jobs: int = 0) -> dict[str, Any]:
    """Make the pair in ``folder`` (default: where ``small`` is looked for), whole or not at all; returns ``pair.json``.

    Every choice is keyed by ``seed``. Each model is trained on one thread, ``jobs`` of them at a time (0: as many as there are
    cores), so that neither the cores nor ``jobs`` change a weight. Raises ConfigError for an unknown ``scale``, or a folder
    that is taken.
    """
    from switchkd.base.terminal import console

    folder = folder or small_pair_folder()
    if scale not in SCALES:
        raise ConfigError(f"unknown scale {scale!r}{nearest(scale, SCALES)}")
    if jobs < 0:
        raise ConfigError(f"jobs must be at least 0, got {jobs}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} already exists; remove it, or choose another --output-dir")
    with staged_folder(folder) as staging:
        record = _make(staging, seed, scale, min(jobs or os.cpu_count() or 1, len(MODELS)))
        (staging / "pair.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    console.print(f"pair saved in {folder}", soft_wrap=True)
    return record


def _make(folder: Path, seed: int, scale: str, jobs: int) -> dict[str, Any]:
    from switchkd.base.terminal import bar, console

    sizes = SCALES[scale]
    _write_data(folder, seed, sizes)
    tokenizer = train_tokenizer(_texts(folder / "train.jsonl"))
    steps = sum(max(sizes.stops(name).values()) for name in MODELS)
    with bar("train the models", steps) as progress, _workers(jobs) as (submit, heard):
        work = [submit(_train_model, folder, seed, scale, name, tokenizer) for name in MODELS]
        while not all(each.done() for each in work):
            if step := heard():
                progress.advance(1, step)
        models = {name: found for each in work for name, found in each.result().items()}
    for name, found in models.items():
        right = ", ".join(f"{task} {value:.1f} %" for task, value in found["right_by_task"].items())
        console.print(f"{name}: right answers {right}", soft_wrap=True)
    return {"scale": scale, "seed": seed, **asdict(sizes), "vocab_size": len(tokenizer), "models": models}


def _write_data(folder: Path, seed: int, sizes: Scale) -> None:
    """A file for each task and part, and one for each part with all tasks in turn."""
    counts = {"train": sizes.rows, "heldout": sizes.heldout}
    for part in PARTS:
        rows = {task: [TASKS[task](seed, i, part) for i in range(counts[part])] for task in TASKS}
        for task, own in rows.items():
            _write_rows(folder / f"{task}-{part}.jsonl", own)
        turns = zip(*([as_instruction(task, row) for row in own] for task, own in rows.items()), strict=True)
        _write_rows(folder / f"{part}.jsonl", [row for turn in turns for row in turn])


def _write_rows(file: Path, rows: Sequence[Row]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _texts(file: Path) -> Iterator[str]:
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield from (row["instruction"], row["output"])


def train_tokenizer(texts: Iterator[str]) -> "PreTrainedTokenizerBase":
    """Byte-level BPE of at most `VOCAB_SIZE` ids, digits one by one, with a chat template of three short tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def new_model(shape: Shape, tokenizer: "PreTrainedTokenizerBase", seed: int, name: str) -> "PreTrainedModel":
    """An untrained Llama; its weights are keyed by ``seed`` and ``name``, one of `MODELS`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from switchkd.methods.sampling import Use, noise_key

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=tokenizer.model_max_length,
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(noise_key(seed, 0, MODELS.index(name), Use.WEIGHTS) % 2**63)
        return LlamaForCausalLM(config).eval()


def _examples(file: Path, tokenizer: "PreTrainedTokenizerBase") -> "list[TokenizedExample]":
    from switchkd.data.examples import load_examples
    from switchkd.data.texts import tokenize

    found, _ = tokenize(
        load_examples(str(file)),
        tokenizer,
        template="chat",
        max_prompt_length=MAX_PROMPT,
        max_completion_length=MAX_COMPLETION,
    )
    return found


def _settings(shape: Shape, steps: int, batch_size: int, seed: int) -> "TrainConfig":
    from switchkd.methods.mixes import GroundTruth
    from switchkd.methods.objective import CrossEntropy
    from switchkd.training.settings import TrainConfig

    return TrainConfig(
        objective=CrossEntropy(),
        mix=GroundTruth(),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=shape.learning_rate,
        lr_scheduler_type=shape.schedule,
        warmup_steps=min(WARM_UP, steps // 2),
        weight_decay=0.05,
        adam_beta2=0.98,
        seed=seed,
    )


# Called behind each step with what to show of it.
_Told = Callable[[str], None]


@contextmanager
def _workers(jobs: int) -> Iterator[tuple[Callable[..., "Future[Any]"], Callable[[], str]]]:
    """What submits a function, which is given a `_Told` behind its arguments, to one of ``jobs`` processes, and what hears the
    next step of any, "" if none came within a moment."""
    # Not forked: a fork that torch's threads have run in before may wait for them for ever.
    context = multiprocessing.get_context("spawn")
    # Where all ends early the manager goes first: nobody can then be told of a step, which ends what is still trained.
    with ProcessPoolExecutor(jobs, context) as pool, context.Manager() as manager:
        steps = manager.Queue()

        def heard() -> str:
            try:
                return str(steps.get(timeout=0.5))
            except queue.Empty:
                return ""

        def submit(function: Callable[..., Any], *arguments: Any) -> "Future[Any]":
            return pool.submit(function, *arguments, steps.put)

        yield submit, heard


def _train_model(
    folder: Path, seed: int, scale: str, name: str, tokenizer: "PreTrainedTokenizerBase", told: _Told
) -> dict[str, Any]:
    """Train the model ``name`` with cross-entropy on the data and save it at each of its stops: what is known of each."""
    import torch

    from switchkd.reports.tables import step_line
    from switchkd.training.trainer import Trainer

    torch.set_num_threads(1)
    sizes, seconds, found = SCALES[scale], 0.0, {}
    shape = sizes.teacher if name == "teacher" else sizes.students[name]
    stops = {steps: kept_as for kept_as, steps in sizes.stops(name).items()}
    model = new_model(shape, tokenizer, seed, name)
    settings = _settings(shape, max(stops), sizes.batch_size, seed)
    trainer = Trainer(_alone(model, tokenizer), _examples(folder / "train.jsonl", tokenizer), settings)
    while trainer.step < settings.max_steps:
        start = monotonic()
        metrics, _ = trainer.train_step()
        seconds += monotonic() - start
        told(f"{name} {step_line(metrics)}")
        if kept_as := stops.get(trainer.step):
            model.save_pretrained(folder / kept_as)
            save_tokenizer(tokenizer, folder / kept_as)
            scores = _measure(folder / "heldout.jsonl", model, tokenizer)
            found[kept_as] = {"training_seconds": round(seconds, 1)} | scores
    return found


def _alone(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> Any:
    """A model as its own teacher, whom nobody asks."""
    from switchkd.models.pair import Pair

    return Pair(model, model, tokenizer, len(tokenizer), (tokenizer.eos_token_id,), ())


def _measure(file: Path, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Parameters, and scores of greedy answers to the held-out rows, in all and of each task."""
    from switchkd.evaluation.evaluate import evaluate
    from switchkd.evaluation.settings import EvalSettings
    from switchkd.evaluation.tasks import TASKS as EVALUATED
    from switchkd.runner.architecture import num_parameters

    settings, examples = EvalSettings(MAX_COMPLETION, batch_size=128), _examples(file, tokenizer)
    result = evaluate(_alone(model, tokenizer), model, examples, EVALUATED[SMALL], settings)
    found = result.means()
    scores = {score: found[score] for score in ("right", "until_mistake", "rouge_l", "length", "perplexity")}
    right = {task: estimate.mean for task, estimate in result.by_group.items()}
    return {"parameters": num_parameters(model), "right_by_task": right, **scores}
