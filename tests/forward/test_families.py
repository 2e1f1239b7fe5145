"""Every family of the installed transformers is exact or refused, none in between."""

import pytest
import torch
import transformers
from families import DOCS, FLOAT32, REASONS, TABLE, VERSION, docs, names, outcome, small_model
from tiny import assert_same

from switchkd import Switch, decode, decode_reference
from switchkd.data.texts import collate
from switchkd.forward.head import Head, response_hidden
from switchkd.runner.architecture import cache_bytes_per_token, context_length, keeps_state
from switchkd.runner.runner import ONE_BY_ONE

# Read at every test run; the others under `-m slow`.
QUICK = (
    "bloom", "cohere2", "cpmant", "deepseek_v3", "doge", "falcon", "gemma2", "gemma3", "gemma3_text", "gpt2", "gpt_bigcode",
    "gpt_neo", "gpt_neox", "gpt_oss", "granite", "llama", "llama, dynamic rope", "llama4_text", "minicpm3", "mistral", "mixtral",
    "mpt", "olmo2", "openai-gpt", "opt", "phi3", "phi3, longrope", "qwen2", "qwen2, sliding window", "qwen3", "qwen3_moe",
    "qwen3_next", "qwen3_5_text", "granitemoehybrid", "falcon_h1", "nemotron_h", "mamba2", "jamba", "mamba",
    "recurrent_gemma", "zamba2", "rwkv", "deepseek_v32", "smollm3", "stablelm", "starcoder2", "xlm", "xlnet", "bart",
    "bert, not a decoder", "lfm2, conv layers",
)  # fmt: skip
NEW = 8
DECODED = ("exact", "one by one")


def test_every_family_of_transformers_is_in_the_table():
    assert set(TABLE.values()) <= {*DECODED, *REASONS} and set(QUICK) <= set(TABLE)
    if transformers.__version__ == VERSION:
        assert sorted(TABLE) == names()


def test_the_docs_are_the_table():
    assert DOCS.read_text(encoding="utf-8") == docs(), "run: python tests/families.py docs"


@pytest.mark.parametrize("name", [name for name in QUICK if TABLE[name] in DECODED])
def test_exact(name):
    check_exact(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TABLE if TABLE[name] in DECODED and name not in QUICK])
def test_exact_in_the_long_tail(name):
    check_exact(name)


@pytest.mark.parametrize("name", [name for name in QUICK if TABLE[name] not in DECODED])
def test_refused(name):
    assert outcome(name).partition(":")[0] == TABLE[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TABLE if TABLE[name] not in DECODED and name not in QUICK])
def test_refused_in_the_long_tail(name):
    assert outcome(name).partition(":")[0] == TABLE[name]


def check_exact(name):
    """Decoding is the reference loop's and a batch's loss that of its rows, with rows on both sides of windows and switches."""
    student, teacher = (small_model(name, seed) for seed in (1, 2))
    if name in FLOAT32:
        student, teacher = student.float(), teacher.float()
    new = int(min(NEW, context_length(student) - 2))
    longest = int(min(20, context_length(student) - new))
    prompts = [
        [(5 * i + i * i + 3 * row) % 61 for i in range(n)] for row, n in enumerate((longest, min(6, longest), 2))
    ]
    policy = Switch(schedule="constant", tau_0=0.85)
    reference = decode_reference(student, teacher, prompts, policy, new, eos_token_ids=[])
    for settings in ({}, {"drafter": "teacher", "block_size": 4}, {"graphs": True, "drafter": "student"}):
        decoded = decode(student, teacher, prompts, policy, new, batch_size=3, eos_token_ids=[], **settings)
        assert_same(
            decoded, reference, 2e-3 if keeps_state(student.config) else 1e-6
        )  # states may be in fp32 in any case
    assert (student in ONE_BY_ONE) == (TABLE[name] == "one by one")
    Head.of(student, 61)
    rows = [(prompt, rollout.completion_ids) for prompt, rollout in zip(prompts, reference, strict=True)]
    alone = torch.cat([response_hidden(student, collate([row])) for row in rows])
    tight = (
        1e-4 if name in FLOAT32 or keeps_state(student.config) else 1e-5
    )  # some families compute a part in fp32 in any case
    torch.testing.assert_close(response_hidden(student, collate(rows)), alone, atol=tight, rtol=tight)


def test_the_cache_of_layers_that_differ_in_their_heads_is_counted():
    """Gemma 4's full layers have wider heads than its sliding ones, and no one width to ask for."""
    model = small_model("gemma4_text")
    widths = [layer.head_dim for layer in model.config.per_layer_config]
    assert len(set(widths)) == 2
    assert cache_bytes_per_token(model) == 2 * sum(widths) * model.config.num_key_value_heads * 8
    assert decode(model, model, [[3, 4]], Switch(), 2, memory_gib=1.0)[0].error is None
