"""Memory of decoding a row: what `check`, `generation_memory_gib` and the engine reckon with, beside what is really taken.

A row is reckoned at its keys and values in both models, as long as its text may become, and what a block of it is decided from
(`decoding.rows.row_bytes`). Measured is the peak with many rows less the peak with few, for each row more: what does not depend on
the rows, such as weights packed for a CPU, is in neither. Every cell is measured in a process of its own. The models are random;
what they write does not matter.
"""

import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import torch
from matplotlib.figure import Figure

from benchmarks.harness import Options, Row, parse, print_table, publish, random_pair, synchronize
from benchmarks.memory import peak_bytes, reset_peak
from switchkd.decoding.decode import decode_job
from switchkd.decoding.rows import Job
from switchkd.decoding.settings import DecodeSettings
from switchkd.methods.policies import Switch

NEW_TOKENS = 16


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every cell, print the table, write decode_memory.json and decode_memory.png."""
    options = parse(argv, "decode_memory", __doc__)
    prompts, batches = ((16,), (1, 3)) if options.quick else ((32, 128), (2, 8))
    rows = [measure(prompt, batches, options) for prompt in prompts]
    print_table(f"a row of a prompt and {NEW_TOKENS} tokens", rows)
    publish("decode_memory", options, {"new_tokens": NEW_TOKENS, "batches": batches}, rows, plot(rows))
    return 0


def measure(prompt: int, batches: tuple[int, int], options: Options) -> Row:
    """A cell: MB a row as reckoned, and as the peaks of the two batches differ."""
    row = Row({"prompt tokens": prompt}, "block engine", [])
    for _ in range(options.repeats):
        found = [in_own_process(prompt, rows, options.device, options.quick) for rows in batches]
        taken = (found[1][0] - found[0][0]) / (batches[1] - batches[0])
        row.seconds.append(found[1][2])
        row.numbers.update({"reckoned MB": found[1][1] / 1e6})
        row.numbers.setdefault("taken MB", []).append(taken / 1e6)
    return row


def in_own_process(prompt: int, rows: int, device: str, quick: bool) -> tuple[float, float, float]:
    """``peak``, in a process that has done nothing else."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak, prompt, rows, device, quick, torch.get_num_threads()).result()


def peak(prompt: int, rows: int, device: str, quick: bool, threads: int) -> tuple[float, float, float]:
    """(bytes in use at the peak over what the models take, bytes that a row is reckoned at, seconds)."""
    torch.set_num_threads(threads)
    pair = random_pair(device, quick)
    settings = DecodeSettings(Switch(), NEW_TOKENS, batch_size=rows)
    jobs = [
        Job.of(pair.student, pair.teacher, [[2] * length] * count, settings, vocab_size=pair.vocab_size)
        for length, count in ((4, 1), (prompt, rows))
    ]
    decode_job(jobs[0])  # imports, the proof of the models, workspaces
    reckoned = float(jobs[1].row_bytes())
    before, start = reset_peak(device), time.perf_counter()
    decode_job(jobs[1])
    synchronize()
    return peak_bytes(device) - before, reckoned, time.perf_counter() - start


def plot(rows: list[Row]) -> Figure:
    """Reckoned and taken, against the length of the prompt."""
    figure = Figure(figsize=(4.2, 3.2), layout="constrained")
    axes = figure.subplots()
    for name in ("reckoned MB", "taken MB"):
        axes.plot(
            [row.cell["prompt tokens"] for row in rows], [row.number(name) for row in rows], marker="o", label=name
        )
    axes.set(xlabel="tokens of the prompt", ylabel="MB a row")
    axes.legend()
    return figure


if __name__ == "__main__":
    sys.exit(main())
