"""Text of one model alone, tokens a second: switchkd's ``decode``, transformers' ``generate`` and continuous batching, and vLLM.

The student of the demo pair in fp32 on a CPU writes 64 tokens a row, sampled at temperature 1 from the whole distribution; end
tokens do not end a row. Equal for all: the model, the prompts as token ids, new tokens, threads and the cores that they may use. A
contender is timed from token ids to token ids, reading the prompts included; each runs once on few tokens before. What is kept
between two calls of it is only the model and its buffers: prefixes are not cached. ``decode`` is timed as training calls it, so
it packs the weights anew in each call. Continuous batching is asked of a manager that has answered a request before.

vLLM runs in its own environment and process (``--vllm-python``; its CPU build pins other versions), in fp32 without compilation,
its engine in the process that asks. It answers over a pipe and looks at its own clock, so that the pipe is not timed. Its
documentation recommends to preload an allocator and an OpenMP library: LD_PRELOAD is handed on if it is set.

``--threads`` pins all contenders to so many cores. With ``--busy`` another process spins on one of these cores meanwhile, as on a
machine that is shared.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from logging import ERROR, getLogger
from typing import Any

import torch
from matplotlib.figure import Figure
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from benchmarks import vllm_child
from benchmarks.decode import hf_generate
from benchmarks.harness import (
    NOT_INSTALLED,
    Options,
    Row,
    decode_cost,
    parse,
    print_table,
    publish,
    question_examples,
    random_examples,
    random_pair,
    side_by_side,
    timed,
)
from switchkd.methods.policy import StudentOnly
from switchkd.models.pair import Pair, load_pair

OURS, GENERATE, CONTINUOUS, VLLM = (
    "switchkd decode",
    "transformers generate",
    "transformers continuous batching",
    "vLLM",
)
PAGE = 256  # tokens of a page of continuous batching's cache, its default
# Writes so many tokens for each prompt, and returns the seconds.
Writes = Callable[[list[list[int]], int], float]


@dataclass(frozen=True)
class EngineOptions(Options):
    """What this benchmark can be told."""

    max_batch: int = 64
    """More rows are left out."""
    device: str = "cpu"
    """All contenders run on the CPU."""
    threads: int = 1
    """Threads of each contender, and cores that it may use."""
    busy: bool = False
    """Let another process spin on one of these cores."""
    vllm_python: str = ""
    """Python of an environment in which vLLM's CPU build is installed; empty leaves vLLM out."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every cell, print the table, write engines.json and engines.png (with the mode in the name, if it is another)."""
    options = parse(argv, "engines", __doc__, EngineOptions)
    getLogger("ContinuousBatchingLogger").setLevel(ERROR)
    mode = f"{options.threads} thread{'s' * (options.threads > 1)}{', one core busy' * options.busy}"
    name = "engines" + f"_{options.threads}" * (options.threads > 1) + "_busy" * options.busy
    with pinned(options.threads) as cores, spinning(cores[:1] if options.busy else ()):
        pair, prompts, batches, new_tokens = workload(options)
        with contenders(pair, prompts, new_tokens, options) as (writers, notes, versions):
            rows = [
                row
                for batch in batches
                for row in measure(batch, prompts[:batch], new_tokens, writers, notes, options.repeats)
            ]
        print_table(f"{new_tokens} new tokens a row, {mode}", rows)
        settings = {"new_tokens": new_tokens, "mode": mode, **versions}
        publish(name, options, settings, rows, plot(rows, mode))
    return 0


def workload(options: EngineOptions) -> tuple[Pair, list[list[int]], list[int], int]:
    """Pair, prompts, numbers of rows, and new tokens."""
    if options.quick:
        pair, batches, new_tokens = random_pair("cpu", quick=True), [1, 2], 4
        examples = random_examples(pair, max(batches))
    else:
        pair, new_tokens = load_pair("demo", device="cpu"), 64
        batches = [batch for batch in (1, 8, 32, 64) if batch <= options.max_batch]
        examples = question_examples(pair, max(batches))
    return pair, [example.prompt_ids for example in examples], batches, new_tokens


def measure(
    batch: int,
    prompts: list[list[int]],
    new_tokens: int,
    writers: dict[str, Writes],
    notes: dict[str, str],
    repeats: int,
) -> list[Row]:
    """A row of each contender, in turns; one that cannot be measured, or fails, says why, and the others go on."""
    seconds: dict[str, list[float]] = {name: [] for name in writers}

    def run(name: str, tokens: int) -> None:
        if not notes.get(name):
            try:
                seconds[name].append(writers[name](prompts, tokens))
            except Exception as error:
                notes[name] = f"{type(error).__name__}: {error}"

    runs, warm_up = (
        {name: partial(run, name, tokens) for name in writers} for tokens in (new_tokens, min(new_tokens, 8))
    )
    side_by_side(runs, repeats, f"{batch} rows", warm_up)
    rows = []
    for name in (GENERATE, CONTINUOUS, VLLM, OURS):
        note = notes.get(name, "")
        row = Row({"rows": batch}, name, [] if note else seconds[name][1:], note=note)  # the first is the warm-up
        if row.seconds:
            row.numbers["tokens/s"] = batch * new_tokens / row.median
        rows.append(row)
    return rows


# --- contenders ---------------------------------------------------------------------------------------------------


@contextmanager
def contenders(
    pair: Pair, prompts: list[list[int]], new_tokens: int, options: EngineOptions
) -> Iterator[tuple[dict[str, Writes], dict[str, str], dict[str, str]]]:
    """What writes, by name; why others do not; and versions. All have the same weights."""
    writers = {GENERATE: by_generate(pair.student), OURS: by_decode(pair)}
    notes, versions = {VLLM: NOT_INSTALLED}, {}
    with ExitStack() as stack:
        writers[CONTINUOUS] = by_continuous_batching(deepcopy(pair.student))
        if options.vllm_python:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            pair.student.save_pretrained(folder)
            pair.tokenizer.save_pretrained(folder)
            longest = max(map(len, prompts)) + new_tokens
            vllm = stack.enter_context(Vllm(options.vllm_python, folder, longest, len(prompts), options.threads))
            notes[VLLM] = vllm.failure
            if not vllm.failure:
                versions["vllm"], writers[VLLM] = vllm.version, vllm.write
        yield writers, notes, versions


def by_decode(pair: Pair) -> Writes:
    """This project's engine, the policy being the student alone."""

    def write(prompts: list[list[int]], new_tokens: int) -> float:
        kept: list[int] = []
        seconds = timed(lambda: kept.append(decode_cost(pair, prompts, new_tokens, StudentOnly()).kept_tokens))
        check(kept, [len(prompts) * new_tokens])
        return seconds

    return write


def by_generate(model: PreTrainedModel) -> Writes:
    """``generate`` of a batch that is padded on the left."""

    def write(prompts: list[list[int]], new_tokens: int) -> float:
        widths: list[int] = []
        seconds = timed(lambda: widths.append(hf_generate(model, prompts, new_tokens).shape[1]))
        check(widths, [max(map(len, prompts)) + new_tokens])
        return seconds

    return write


def by_continuous_batching(model: PreTrainedModel) -> Writes:
    """transformers' continuous batching, with room for all prompts in its cache.

    Its manager lives for one call: as long as it lives, torch has more threads in this process than there are cores, and all wait.
    """

    def write(prompts: list[list[int]], new_tokens: int) -> float:
        pages = -(-(max(map(len, prompts)) + new_tokens) // PAGE)
        config = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=pages * (len(prompts) + 2),
            max_batch_tokens=2048,
            allow_block_sharing=False,
            seed=0,
        )
        sampling = GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=-1, pad_token_id=0
        )
        with model.continuous_batching_context_manager(
            sampling, continuous_batching_config=config, timeout=5, warmup=False
        ) as manager:
            answered(manager, prompts[:1], 1)  # the first is slower
            texts: dict[str, int] = {}
            seconds = timed(lambda: texts.update(answered(manager, prompts, new_tokens)))
        check([*texts.values()], [new_tokens] * len(prompts))
        return seconds

    return write


def answered(manager: Any, prompts: list[list[int]], new_tokens: int) -> dict[str, int]:
    """How many tokens the manager wrote for each request."""
    asked, texts = manager.add_requests(prompts, max_new_tokens=new_tokens), {}
    while len(texts) < len(asked):
        if (text := manager.get_result(timeout=60)) is None:
            raise RuntimeError("continuous batching gave no answer")
        if text.error is not None:
            raise RuntimeError(f"continuous batching: {text.error}")
        if text.is_finished():
            texts[text.request_id] = len(text.generated_tokens)
    return texts


class Vllm:
    """vLLM's engine in a child of another environment, ended with the context; ``failure`` says why it did not come up."""

    def __init__(self, python: str, folder: str, longest: int, rows: int, threads: int):
        own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment = own | {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(threads),
        }
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed with the context
        command = [python, vllm_child.__file__, folder, str(longest), str(rows)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        self.child = subprocess.Popen(command, env=environment, cwd=folder, text=True, **pipes)  # type: ignore[call-overload]
        first = self.child.stdout.readline()
        self.version = json.loads(first)["version"] if first else ""
        self.failure = "" if first else self.last_words()

    def __enter__(self) -> "Vllm":
        return self

    def __exit__(self, *_: object) -> None:
        self.child.stdin.close()
        try:
            self.child.wait(30)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        self.child.stdout.close()
        self.log.close()

    def write(self, prompts: list[list[int]], new_tokens: int) -> float:
        """A contender; the seconds are those that vLLM's own process took."""
        self.child.stdin.write(json.dumps({"prompts": prompts, "new_tokens": new_tokens}) + "\n")
        self.child.stdin.flush()
        line = self.child.stdout.readline()
        if not line:
            raise RuntimeError(f"vLLM ended: {self.last_words()}")
        answer = json.loads(line)
        check(answer["lengths"], [new_tokens] * len(prompts))
        return answer["seconds"]

    def last_words(self) -> str:
        """The last line of its log."""
        self.child.wait()
        self.log.seek(0)
        lines = self.log.read().split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


def check(found: Sequence[int], expected: Sequence[int]) -> None:
    """A contender that writes less is not comparable."""
    if list(found) != list(expected):
        raise RuntimeError(f"wrote {list(found)} tokens, not {list(expected)}")


# --- the machine --------------------------------------------------------------------------------------------------


@contextmanager
def pinned(threads: int) -> Iterator[list[int]]:
    """Let this process and those that it starts use so many threads and cores; yields the cores, none where that is not Linux."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    cores = sorted(allowed)[:threads]
    try:
        if cores:
            os.sched_setaffinity(0, cores)
        yield cores
    finally:
        if cores:
            os.sched_setaffinity(0, allowed)
        torch.set_num_threads(before)


@contextmanager
def spinning(cores: Sequence[int]) -> Iterator[None]:
    """A process that spins on each of these cores, and is ended with the context, or by itself where this process is no more."""
    code = "import os, sys\nos.sched_setaffinity(0, [int(sys.argv[1])])\nwhile os.getppid() == int(sys.argv[2]): pass"
    spinners = [subprocess.Popen([sys.executable, "-c", code, str(core), str(os.getpid())]) for core in cores]
    try:
        yield
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()


def plot(rows: list[Row], mode: str) -> Figure:
    """Tokens a second by rows."""
    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for name in (OURS, VLLM, GENERATE, CONTINUOUS):
        shown = [row for row in rows if row.contender == name and row.seconds]
        if shown:
            axes.plot(
                [row.cell["rows"] for row in shown], [row.number("tokens/s") for row in shown], marker="o", label=name
            )
    axes.set(xlabel="rows", ylabel="tokens/s", title=mode, ylim=(0, None))
    axes.legend(fontsize=7)
    return figure


if __name__ == "__main__":
    sys.exit(main())
