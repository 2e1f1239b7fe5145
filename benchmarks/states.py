"""Decoding of models whose layers keep a state: the block engine against a plain loop of two models with transformers' own cache.

The pairs are random, of the architectures of Qwen3.5 (gated delta rule and attention) and Granite 4 (Mamba 2 and attention), the
teacher twice as deep as the student. They agree about as often as `harness.random_pair`'s do, since they get the same output layer.
Without the kernels that these models have on GPUs, torch steps through a state in Python; ratios tell more than tokens a second.
"""

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from benchmarks.decode import plot
from benchmarks.harness import (
    Options,
    Row,
    decode_cost,
    describe,
    forwards,
    pair_of,
    parse,
    print_table,
    publish,
    random_examples,
    side_by_side,
)
from benchmarks.naive import naive_decode
from switchkd.methods.policies import AdaSwitch, Switch
from switchkd.methods.policy import Policy, StudentOnly
from switchkd.models.pair import Pair

POLICIES: dict[str, Policy] = {"SWITCH": Switch(), "AdaSwitch": AdaSwitch(), "student alone": StudentOnly()}
WIDTHS = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2}
# Architectures, and what their configs say beside widths and layers.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {
        "head_dim": 64, "full_attention_interval": 2, "linear_num_key_heads": 4, "linear_num_value_heads": 4,
        "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    },
    "granitemoehybrid": {
        "mamba_n_heads": 16, "mamba_d_head": 32, "mamba_d_state": 32, "num_local_experts": 0, "shared_intermediate_size": 768,
    },
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every cell, print the table, write states.json and states.png."""
    options = parse(argv, "states", __doc__)
    new_tokens, rows, pairs = 6 if options.quick else 64, list[Row](), dict[str, Any]()
    for family in FAMILIES:
        pair = hybrid_pair(family, options)
        examples = random_examples(pair, 2 if options.quick else 8)
        pairs[family] = describe(pair, examples)
        rows += measure(family, pair, [example.prompt_ids for example in examples], new_tokens, options.repeats)
    print_table(f"{new_tokens} new tokens a row", rows)
    publish("states", options, {"new_tokens": new_tokens, "pairs": pairs}, rows, plot(rows))
    return 0


def hybrid_pair(family: str, options: Options) -> Pair:
    """A random pair of one architecture, half of whose layers keep a state."""
    kinds = ["linear_attention", "full_attention"]
    sizes = [
        {**FAMILIES[family], **WIDTHS, "num_hidden_layers": layers, "layer_types": kinds * (layers // 2)}
        for layers in ((2, 2) if options.quick else (8, 4))
    ]
    return pair_of(family, sizes, 64 if options.quick else 8192, options.device)


def measure(family: str, pair: Pair, prompts: list[list[int]], new_tokens: int, repeats: int) -> list[Row]:
    """Rows of one pair, all policies and contenders in one alternation."""
    contenders = {}
    for name, policy in POLICIES.items():
        plain = partial(naive_decode, pair.student, pair.teacher, prompts, policy)
        contenders[name, "plain loop"] = partial(plain, new_tokens, pair.vocab_size)
        contenders[name, "block engine"] = partial(decode_cost, pair, prompts, new_tokens, policy)
    del contenders["student alone", "plain loop"]  # which would run the teacher too
    keyed = {f"{name}: {contender}": run for (name, contender), run in contenders.items()}
    seconds = side_by_side(keyed, repeats, family, keyed)
    rows = []
    for name, contender in contenders:
        row = Row({"pair": family, "batch": len(prompts), "policy": name}, contender, seconds[f"{name}: {contender}"])
        row.numbers["tokens/s"] = len(prompts) * new_tokens / row.median
        if contender == "block engine":
            row.numbers.update(forwards(contenders[name, contender]()))
        rows.append(row)
    return rows


if __name__ == "__main__":
    sys.exit(main())
