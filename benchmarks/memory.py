"""Peak memory and time of the distillation loss: hidden states to loss, and back to their and the output layer's gradients.

Counted: what forward and backward add to the memory that holds the inputs (hidden states and output layers of teacher and
student, fp32, hidden size 576). The gradients of the student's hidden states and output layer are part of it for everyone;
"gradients MB" says how much that is at least. Every cell runs in a process of its own, after the same code has run once on a few
tokens, the contenders in turn. On a CPU the peak is the kernel's high-water mark of resident memory (Linux); on a GPU it is
PyTorch's. The time is that of the same single run, so memory fresh from the system is paid for, as it is in training.

All compute the same number, the mean JSD over the tokens, and the run stops if they do not. Liger's loss runs uncompiled.
Losses on full logits are skipped where they would need more than 12 GB.
"""

import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.harness import NOT_INSTALLED, Options, Row, installed, parse, print_table, publish, synchronize
from switchkd.base.terminal import bar
from switchkd.forward.head import Head
from switchkd.methods.objective import Tokens
from switchkd.methods.objectives import JSD
from switchkd.teachers.said import TeacherStates
from switchkd.training import loss as chunked

HIDDEN = 576
LIMIT = 12e9


@dataclass
class Inputs:
    """Hidden states ``[N, H]`` and output layers of a step; p is the teacher's."""

    hidden_p: Tensor
    head_p: nn.Linear
    hidden_q: Tensor
    head_q: nn.Linear

    @staticmethod
    def random(vocab: int, tokens: int, device: str) -> "Inputs":
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        def head() -> nn.Linear:
            layer = nn.Linear(HIDDEN, vocab, bias=False, device="meta")
            layer.weight = nn.Parameter(normal(vocab, HIDDEN).mul_(2 * HIDDEN**-0.5))
            return layer

        teacher = head().requires_grad_(False)
        return Inputs(normal(tokens, HIDDEN), teacher, normal(tokens, HIDDEN).requires_grad_(), head())


def ours(x: Inputs) -> Tensor:
    """switchkd's objective, which never holds the logits of all tokens."""
    vocab = x.head_q.out_features
    none = torch.zeros(len(x.hidden_q), dtype=torch.long, device=x.hidden_q.device)  # the JSD looks at no token
    teacher = TeacherStates(Head(x.head_p, vocab), x.hidden_p)
    return chunked.total(JSD(), teacher, Head(x.head_q, vocab), x.hidden_q, Tokens(none, none, none))


def dense(x: Inputs) -> Tensor:
    """The formula on full log-probabilities."""
    with torch.no_grad():
        logp = x.head_p(x.hidden_p).log_softmax(-1)
    logq = x.head_q(x.hidden_q).log_softmax(-1)
    log_m = torch.logaddexp(logp, logq) - math.log(2)
    return (logp.exp() * (logp - log_m) + logq.exp() * (logq - log_m)).sum() / 2


def trl_gkd(x: Inputs) -> Tensor:
    """TRL's GKD loss on full logits."""
    from trl.experimental.gkd import GKDTrainer

    with torch.no_grad():
        teacher = x.head_p(x.hidden_p)
    return GKDTrainer.generalized_jsd_loss(x.head_q(x.hidden_q), teacher, beta=0.5, reduction="sum")


def trl_chunked(x: Inputs) -> Tensor:
    """The chunked loss of TRL's DistillationTrainer."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    mask = torch.ones(1, len(x.hidden_q), device=x.hidden_q.device)
    weights = x.head_q.weight, x.head_p.weight
    loss, _, _ = _chunked_divergence_loss(x.hidden_q[None], x.hidden_p[None], *weights, mask, 0.5, num_items_in_batch=1)
    return loss


def liger(x: Inputs) -> Tensor:
    """Liger's fused linear JSD, soft loss only; it returns the mean."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=False)
    labels = torch.zeros(len(x.hidden_q), dtype=torch.long, device=x.hidden_q.device)
    return loss(x.hidden_q, x.head_q.weight, x.hidden_p, x.head_p.weight, labels) * len(labels)


@dataclass(frozen=True)
class Loss:
    """A contender: its sum over tokens, the package it comes from, and how many ``[N, V]`` tensors it holds at its peak."""

    total: Callable[[Inputs], Tensor]
    package: str = "torch"
    dense_copies: int = 0


LOSSES = {
    "dense": Loss(dense, dense_copies=9),
    "TRL GKD": Loss(trl_gkd, "trl", dense_copies=16),
    "TRL chunked": Loss(trl_chunked, "trl"),
    "Liger chunked": Loss(liger, "liger-kernel"),
    "switchkd": Loss(ours),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every cell, print the table, write memory.json and memory.png."""
    options = parse(argv, "memory", __doc__)
    vocabs, tokens = ((300,), (16,)) if options.quick else ((32_000, 49_152, 152_000), (256, 1024))
    rows: list[Row] = []
    runs = len(vocabs) * len(tokens) * len(LOSSES) * options.repeats
    with bar("memory of the loss", runs) as progress:
        for vocab, count in product(vocabs, tokens):
            rows += measure(vocab, count, options, progress.advance)
    print_table("loss and gradients, fp32, hidden size 576", rows)
    publish("memory", options, {"hidden_size": HIDDEN, "limit_bytes": LIMIT}, rows, plot(rows))
    return 0


def measure(vocab: int, tokens: int, options: Options, advance: Callable[[int, str], None]) -> list[Row]:
    """Rows of one cell: the contenders in turn, each time in a fresh process."""
    gradients = 4 * HIDDEN * (vocab + tokens) / 1e6
    rows = {}
    for name, loss in LOSSES.items():
        too_large = 4.0 * loss.dense_copies * tokens * vocab > LIMIT
        note = NOT_INSTALLED if not installed(loss.package) else "over 12 GB" if too_large else ""
        rows[name] = Row({"vocabulary": vocab, "tokens": tokens}, name, [], note=note)
    values = set()
    for _, (name, row) in product(range(options.repeats), rows.items()):
        advance(1, f"{vocab} × {tokens}: {name}")
        if not row.note:
            peak, seconds, value = in_own_process(name, vocab, tokens, options.device)
            row.seconds.append(seconds)
            row.numbers.setdefault("peak MB", []).append(peak / 1e6)
            row.numbers.update({"gradients MB": gradients, "JSD nats": value})
            values.add(value)
    assert max(values) - min(values) < 1e-4 * max(values), f"the contenders compute different losses: {values}"
    return list(rows.values())


def in_own_process(name: str, vocab: int, tokens: int, device: str) -> tuple[float, float, float]:
    """``peak`` of a contender, in a process that has done nothing else."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak, name, vocab, tokens, device, torch.get_num_threads()).result()


def peak(name: str, vocab: int, tokens: int, device: str, threads: int) -> tuple[float, float, float]:
    """(bytes that forward and backward add at their peak, seconds, loss in nats a token)."""
    torch.set_num_threads(threads)
    total = LOSSES[name].total
    total(Inputs.random(64, 4, device)).backward()  # imports, thread pools, workspaces
    inputs = Inputs.random(vocab, tokens, device)
    before = reset_peak(device)
    start = time.perf_counter()
    loss = total(inputs)
    loss.backward()
    synchronize()
    return peak_bytes(device) - before, time.perf_counter() - start, loss.item() / tokens


def reset_peak(device: str) -> float:
    """Forget the peak so far; returns the bytes in use now."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_bytes(device: str) -> float:
    """Most bytes in use since ``reset_peak``."""
    return _status("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated()


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def plot(rows: list[Row]) -> Figure:
    """Peak memory and time against tokens, a column for each vocabulary."""
    vocabs = list(dict.fromkeys(row.cell["vocabulary"] for row in rows))
    figure = Figure(figsize=(3.6 * len(vocabs), 6), layout="constrained")
    panels = figure.subplots(2, len(vocabs), squeeze=False)
    for column, vocab in enumerate(vocabs):
        for name in LOSSES:
            shown = [r for r in rows if r.contender == name and r.cell["vocabulary"] == vocab and r.seconds]
            x = [row.cell["tokens"] for row in shown]
            panels[0, column].plot(x, [max(row.number("peak MB"), 0.01) for row in shown], marker="o", label=name)
            panels[1, column].plot(x, [row.median for row in shown], marker="o", label=name)
        panels[0, column].set(title=f"vocabulary {vocab:,}", ylabel="peak MB")
        panels[1, column].set(xlabel="tokens", ylabel="seconds")
        for axis in panels[:, column]:
            axis.set(xscale="log", yscale="log")
    panels[0, 0].legend(fontsize=7)
    return figure


if __name__ == "__main__":
    sys.exit(main())
