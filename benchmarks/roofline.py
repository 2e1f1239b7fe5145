"""What distilling a model of 7B into one of 0.5B would take on one H200 GPU: calculated, not measured.

``python -m benchmarks.roofline`` prints the tables of ``docs/gpu.md``, which says what they mean. A *limit* is the larger of two
times: that of the arithmetic at the published rate, and that of reading and writing each number once at the published bandwidth.
What the engine would take beside is reckoned from counts: operators and kernels of a round, counted on a CPU with models of the
true number of layers and a small width (neither depends on the width), times what one launch takes.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from benchmarks.counts import LOSS_TOKENS, counted_loss
from switchkd.decoding.decode import decode
from switchkd.decoding.pace import NO_COSTS
from switchkd.forward.head import DEVICE_SIZES
from switchkd.methods.policies import Switch
from switchkd.methods.policy import Policy, StudentOnly
from switchkd.runs.estimate import AGREEMENT, BLOCK, IN_GRAPH, LAUNCH

ROWS, PROMPT, NEW_TOKENS = 64, 256, 1024
# What decoding has behind it half way, which is the mean.
CONTEXT = PROMPT + NEW_TOKENS // 2
UPDATE_ROWS = 8
VOCABULARY = 152_064
# NVIDIA's published figures of an H200 (SXM): memory, bandwidth, dense bf16 products, fp32 products without tensor cores.
MEMORY, BANDWIDTH, BF16, FP32 = 141e9, 4.8e12, 989e12, 67e12


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen2 from its config."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head: int
    tied: bool

    @property
    def body(self) -> int:
        """Weights that every token is multiplied by, but those of the output layer."""
        attention = self.hidden * self.head * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def output(self) -> int:
        """Weights of the output layer."""
        return VOCABULARY * self.hidden

    @property
    def parameters(self) -> int:
        """All weights but biases and norms, which are less than a thousandth."""
        return self.body + self.output * (1 if self.tied else 2)

    @property
    def cache(self) -> int:
        """Bytes of keys and values of a token in bf16."""
        return self.layers * 2 * self.kv_heads * self.head * 2


TEACHER = Shape("teacher, 7B", 28, 3584, 18944, 28, 4, 128, tied=False)
STUDENT = Shape("student, 0.5B", 24, 896, 4864, 14, 2, 64, tied=True)
MODELS = {"student": STUDENT, "teacher": TEACHER}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables, in Markdown."""
    print(limits(), memory(), training(), engine(), sep="\n\n")
    return 0


# --- limits -------------------------------------------------------------------------------------------------------


def seconds(products: float = 0.0, moved: float = 0.0, rate: float = BF16) -> float:
    """The limit of so many floating-point operations and bytes."""
    return max(products / rate, moved / BANDWIDTH)


def forward(model: Shape, positions: int) -> dict[str, float]:
    """The limit of each part of a forward over so many new positions of every row."""
    tokens = ROWS * positions
    return {
        "layers": seconds(2 * model.body * tokens, 2 * model.body),
        "attention": seconds(
            4 * model.layers * model.heads * model.head * CONTEXT * tokens, ROWS * CONTEXT * model.cache
        ),
        "output layer": seconds(2 * model.output * tokens, 2 * (model.output + tokens * VOCABULARY)),
    }


def decision(positions: int) -> float:
    """The limit of noise, policy and draw, fused: both models' logits in fp32 are read once."""
    return seconds(moved=2 * 4 * ROWS * positions * VOCABULARY)


def repeated_attention(model: Shape) -> float:
    """Attention where keys and values are copied for every query head first, as a mask of four dimensions has it done."""
    read = ROWS * CONTEXT * model.cache
    return seconds(moved=read * (1 + 2 * model.heads // model.kv_heads))


def limits() -> str:
    """Milliseconds at the limit of each part of decoding."""
    works = {"student, a step": (STUDENT, 1), "teacher, K = 1": (TEACHER, 1), f"teacher, K = {BLOCK}": (TEACHER, BLOCK)}
    rows = []
    for name, (model, positions) in works.items():
        parts = forward(model, positions)
        rows.append(
            [
                name,
                *(ms(part) for part in parts.values()),
                ms(sum(parts.values())),
                ms(repeated_attention(model)) if positions > 1 else "",
            ]
        )
    rows += [
        [f"decision, K = {k}, both models", "", "", "", ms(decision(k)), ""] for k in (1, BLOCK)
    ]  # fmt: skip
    for model in (STUDENT, TEACHER):
        tokens = ROWS * PROMPT
        attention = 2 * model.layers * model.heads * model.head * PROMPT * tokens  # half of it is masked
        parts = seconds(2 * model.body * tokens, 2 * model.body), seconds(attention)
        rows.append([f"{model.name}: {ROWS} prompts", *map(ms, parts), "", ms(sum(parts)), ""])
    titles = ["ms", "layers", "attention", "output layer", "in all", "attention, keys and values repeated"]
    return table(titles, rows)


def memory() -> str:
    """Gigabytes of what stays in memory."""
    tokens = ROWS * (PROMPT + NEW_TOKENS)
    # Of a layer and token about ten vectors of the hidden size and four of the MLP's, in bf16, without gradient checkpointing.
    activations = STUDENT.layers * 2 * (10 * STUDENT.hidden + 4 * STUDENT.intermediate)
    parts = {
        "teacher's weights, bf16": 2 * TEACHER.parameters,
        "student's weights, bf16": 2 * STUDENT.parameters,
        "student's masters, gradients and two moments, fp32": 16 * STUDENT.parameters,
        "keys and values of both models": tokens * (TEACHER.cache + STUDENT.cache),
        "the teacher's hidden states of all tokens, bf16": 2 * TEACHER.hidden * ROWS * NEW_TOKENS,
        f"logits, log-probabilities and noise of a block of {BLOCK}, fp32": 4 * 4 * ROWS * BLOCK * VOCABULARY,
        f"activations of the student's update, {UPDATE_ROWS} rows at a time": UPDATE_ROWS
        * (PROMPT + NEW_TOKENS)
        * activations,
        "logits of the loss, pieces for a GPU": 2 * DEVICE_SIZES.chunk + 16 * DEVICE_SIZES.piece,
    }
    rows = [[name, f"{size / 1e9:.1f}"] for name, size in parts.items()]
    return table(["GB", ""], [*rows, [f"in all, of {MEMORY / 1e9:.0f}", f"{sum(parts.values()) / 1e9:.1f}"]])


def training() -> str:
    """Milliseconds at the limit of what follows the text."""
    tokens = LOSS_TOKENS
    read = ROWS * (PROMPT + NEW_TOKENS)
    products = 2 * tokens * VOCABULARY * (TEACHER.hidden + 3 * STUDENT.hidden)
    seen = (PROMPT + NEW_TOKENS) / 2
    attention = {m: 4 * m.layers * m.heads * m.head * seen * read for m in (STUDENT, TEACHER)}
    again = 2 * TEACHER.body * read + attention[TEACHER]
    parts = {
        "student, forward and backward": seconds(3 * (2 * STUDENT.body * read + attention[STUDENT])),
        "teacher, one more forward, where its states were not kept": seconds(again),
        "loss: products with both output layers, bf16": seconds(products),
        "the same in fp32 without tensor cores": seconds(products, rate=FP32),
        "loss: logits read and gradients written once, fp32": seconds(moved=3 * 4 * tokens * VOCABULARY),
        "loss: as written, each operator for itself": seconds(moved=loss_bytes()),
        "AdamW, fused: seven fp32 numbers a weight": seconds(moved=7 * 4 * STUDENT.parameters),
    }
    return table(["ms a step", ""], [[name, ms(part)] for name, part in parts.items()])


def loss_bytes() -> float:
    """Bytes that the loss's operators over the vocabulary read and write, those of one chunk of tokens times the chunks."""
    chunk = DEVICE_SIZES.chunk // (4 * VOCABULARY)
    with Kernels() as kernels:
        counted_loss(chunk, DEVICE_SIZES, torch.bfloat16)
    return kernels.moved["rest"] * LOSS_TOKENS / chunk


# --- the engine ---------------------------------------------------------------------------------------------------


class Kernels(TorchDispatchMode):
    """Counts operators, those of them that start a kernel (views do not), and bytes of tensors as wide as the vocabulary.

    Each by what runs just now: a model, or the rest. Of products with the output layer the bytes are those of the logits.
    """

    def __init__(self, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.vocabulary, self.place = vocabulary, "rest"
        self.operators: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.operators[self.place] += 1
        if not func.is_view and func is not torch.ops.aten._unsafe_view.default:
            self.kernels[self.place] += 1
            wide = [x for x in (*args, found) if isinstance(x, torch.Tensor) and x.shape[-1:] == (self.vocabulary,)]
            self.moved[self.place] += sum(x.numel() * x.element_size() for x in wide)
        return found


@contextmanager
def named(models: dict[str, PreTrainedModel], kernels: Kernels) -> Iterator[None]:
    """Within the context, what runs in a model's forward is counted under its name."""

    def enter(name: str) -> Any:
        return lambda *_: setattr(kernels, "place", name)

    handles = [model.register_forward_pre_hook(enter(name)) for name, model in models.items()]
    handles += [model.register_forward_hook(enter("rest")) for model in models.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def counted_round(policy: Policy, block: int) -> dict[str, tuple[float, float]]:
    """Operators and kernels of a round of so many positions, by where they run: medians over the rounds but the first."""
    vocabulary, models = 606, {}
    for name, shape in MODELS.items():
        config = Qwen2Config(
            vocab_size=vocabulary, hidden_size=56, intermediate_size=64, num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=4,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(0)
            models[name] = Qwen2ForCausalLM(config).eval()
    rounds: list[tuple[Counter[str], Counter[str]]] = []
    prompts = [[1 + row] * 5 for row in range(8)]
    # Random models are near to each other, so that blocks are long and all of their positions are decided.
    ask = {
        "max_new_tokens": 6 * block,
        "eos_token_ids": [],
        "block_size": block,
        "drafter": "student",
        "costs": NO_COSTS.plain(),
    }
    decode(models["student"], models["teacher"], prompts, policy, **ask)
    with Kernels(vocabulary) as kernels, named(models, kernels):

        def round_ended(_: object) -> None:
            rounds.append((kernels.operators.copy(), kernels.kernels.copy()))

        decode(models["student"], models["teacher"], prompts, policy, progress=round_ended, **ask)
    found = {}
    for place in ("student", "teacher", "rest"):
        taken = [
            tuple(after[kind][place] - before[kind][place] for kind in (0, 1)) for before, after in pairwise(rounds)
        ]
        found[place] = median(ops for ops, _ in taken), median(kernels for _, kernels in taken)
    return found


def engine() -> str:
    """Milliseconds a round, and seconds of a whole text, of three kinds of rounds."""
    kept = (1 - AGREEMENT**BLOCK) / (1 - AGREEMENT)
    kinds = {
        "student alone": (StudentOnly(), 1, 1.0),
        "SWITCH, K = 1": (Switch(), 1, 1.0),
        f"SWITCH, K = {BLOCK}": (Switch(), BLOCK, kept),
    }
    rows = []
    for name, (policy, block, tokens) in kinds.items():
        counts = counted_round(policy, block)
        operators, kernels = (sum(each[kind] for each in counts.values()) for kind in (0, 1))
        teacher = sum(forward(TEACHER, block).values()) if counts["teacher"][0] else 0.0
        limit = block * sum(forward(STUDENT, 1).values()) + teacher + decision(block)
        ways = limit, max(operators * LAUNCH, limit), max(kernels * IN_GRAPH, limit)
        texts = [f"{NEW_TOKENS / tokens * way:.1f}" for way in ways]
        shares = " / ".join(f"{counts[place][0]:,.0f}" for place in ("student", "teacher", "rest"))
        rows.append(
            [name, shares, f"{operators:,.0f}", f"{kernels:,.0f}", *map(ms, ways), f"{tokens:.2f}", " / ".join(texts)]
        )
    titles = [
        "a round", "operators: student / teacher / rest", "in all", "kernels", "limit, ms", "eager, ms", "graph, ms",
        "tokens a row", f"{NEW_TOKENS:,} tokens, s: limit / eager / graph",
    ]  # fmt: skip
    return table(titles, rows)


def ms(time: float) -> str:
    """Milliseconds with two or three figures."""
    value = time * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
