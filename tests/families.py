"""Every causal language model of the installed transformers, as small as it goes, and what becomes of it here.

``python tests/families.py`` prints what each one does now; ``python tests/families.py docs`` writes docs/families.md.
"""

import re
import sys
import textwrap
from pathlib import Path

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel

from switchkd.base.errors import ModelError
from switchkd.forward.proof import prove
from switchkd.forward.twin import twin
from switchkd.models.loading import _attention
from switchkd.runner.architecture import check_layers, exact_lengths
from switchkd.runner.runner import ONE_BY_ONE

# What a default config leaves open, or what makes a decoder of it.
_DECODER = {"is_decoder": True}
_LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 48, "long_factor": [4.0] * 48}
SETTINGS = {
    **dict.fromkeys(
        (
            "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
            "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl",
        ),
        _DECODER,
    ),
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 8, "clip_qkv": 8.0}},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [24, 20, 20]}}
    },
}  # fmt: skip
# Settings that change how a family is read: "type, what is set".
VARIANTS = {
    "phi3, longrope": {"rope_parameters": _LONG, "original_max_position_embeddings": 4096},
    "llama, dynamic rope": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    "llama, yarn": {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 2048,
        }
    },
    "qwen2, sliding window": {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 1},
    "lfm2, conv layers": {"full_attn_idxs": [1, 3]},
    "falcon, ALiBi": {"alibi": True},
    "falcon, new decoder": {
        "new_decoder_architecture": True, "num_kv_heads": 8, "num_attention_heads": 64, "hidden_size": 4096,
    },
    "gpt_bigcode, many keys": {"multi_query": False},
    "bert, not a decoder": {},
    "doge, experts": {"is_moe": True},
}  # fmt: skip


def config_of(name: str) -> PretrainedConfig:
    """The config of a family or variant, as its class has it by default."""
    kind = name.partition(",")[0]
    config = CONFIG_MAPPING[kind](**(VARIANTS[name] if name in VARIANTS else SETTINGS.get(kind, {})))
    config._attn_implementation = _attention(config)
    return config


def small_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A small random float64 model of a family; raises ModelError for one that is refused by its config."""
    config = config_of(name)
    check_layers(config)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if kind.config_class is type(text := config.get_text_config(decoder=True)):
        text._attn_implementation = config._attn_implementation
        config = text  # as transformers do for the language model of a larger one
    return twin(kind, config, seed)


def names() -> list[str]:
    """All families of the installed transformers, and the variants."""
    return sorted({config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING} | set(VARIANTS))


# Why a family is refused: what the docs say, and what the error says.
REASONS = {
    "state": ("keeps of a text what cannot be taken back when a draft is rejected", r"does not know how to take back"),
    "chunks": ("attends in chunks", r"attends in chunks"),
    "encoder": ("is half of an encoder-decoder", r"encoder-decoder"),
    "mask": ("does not take explicit masks and positions", r"cannot be called with the ragged cache"),
    "places": ("counts positions or windows otherwise than by the tokens of a row", r"cannot be decoded exactly"),
    "ahead": ("looks at the text that is still to come", r"when more text follows"),
    "ids": ("cannot be called with token ids alone", r"cannot be called by itself"),
    "class": ("cannot be made from its config alone", r"cannot load"),
}
# What becomes of each family: "exact", "one by one" (exact too, but it reads drafts one token after the other, and gains nothing
# by them), or the reason why it is refused.
VERSION = "5.24.0"  # of transformers
TABLE = {
    **dict.fromkeys(
        (
            "afmoe", "apertus", "apertus1p5_text", "arcee", "aria_text", "axk1", "bailing_hybrid", "bamba", "beam", "bert",
            "bert-generation", "big_bird", "biogpt", "bitnet", "codegen", "cohere", "cohere2", "cohere2_moe",
            "cohere_compass_text", "ctrl", "cwm", "dbrx", "deepseek_v2", "deepseek_v3", "diffllama", "doge", "dots1",
            "electra", "emu3", "ernie", "ernie4_5", "ernie4_5_moe", "exaone", "exaone4", "exaone_moe", "falcon",
            "falcon, new decoder", "falcon_h1", "flex_olmo", "flint", "fuyu", "gemma", "gemma2", "gemma3", "gemma3_text",
            "gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text", "git", "glm", "glm4",
            "glm4_moe", "glm4_moe_lite", "got_ocr2", "gpt2", "gpt_bigcode", "gpt_bigcode, many keys", "gpt_neox",
            "gpt_neox_japanese", "gpt_oss", "gptj", "granite", "granite_swa", "granitemoe", "granitemoe_swa",
            "granitemoehybrid", "granitemoeshared", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hyperclovax",
            "internlm3", "iquestcoder", "jais2", "jetmoe", "kimi_linear", "kolibri1", "laguna", "lara_mini", "lfm2",
            "lfm2, conv layers", "lfm2_moe", "lfm3", "llama", "llama, dynamic rope", "llama, yarn", "longcat_flash",
            "mamba2", "megatron-bert", "mellum", "mimo_v2_flash", "minicpm3", "minimax_m2", "minimax_m3_vl_text",
            "ministral", "ministral3", "mistral", "mixtral", "mllama", "modernbert-decoder", "moss_transcribe_diarize",
            "mpt", "nanochat", "nemotron", "nemotron_h", "olmo", "olmo2", "olmo3", "olmo_hybrid", "olmoe", "opt",
            "persimmon", "phi", "phi3", "phi3, longrope", "phi4_multimodal", "phimoe", "qwen2", "qwen2, sliding window",
            "qwen2_moe", "qwen3", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "qwen3_next",
            "rembert", "roc_bert", "sarvam_mla", "sarvam_moe", "seed_oss", "smollm3", "solar_open", "stablelm",
            "starcoder2", "vaultgemma", "xglm", "youtu", "zaya",
        ),
        "exact",
    ),
    **dict.fromkeys(
        (
            "falcon_mamba", "jamba", "mamba", "zamba",
        ),
        "one by one",
    ),
    **dict.fromkeys(
        (
            "axk2", "deepseek_v32", "deepseek_v4", "dots3_note", "dots3_note_text", "glm_moe_dsa", "hy_v4", "qwen4_exp",
            "qwen4_exp_text", "rwkv", "xlstm",
        ),
        "state",
    ),
    **dict.fromkeys(
        (
            "llama4", "llama4_text",
        ),
        "chunks",
    ),
    **dict.fromkeys(
        (
            "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "musicgen", "musicgen_melody",
            "mvp", "pegasus", "plbart", "prophetnet", "whisper",
        ),
        "encoder",
    ),
    **dict.fromkeys(
        (
            "bloom", "dory", "falcon, ALiBi", "minimax", "openai-gpt",
        ),
        "mask",
    ),
    **dict.fromkeys(
        (
            "camembert", "data2vec-text", "gpt_neo", "inkling2_text", "inkling_text", "moshi", "recurrent_gemma", "roberta",
            "roberta-prelayernorm", "roformer", "trocr", "xlm-roberta", "xlm-roberta-xl", "xmod", "zamba2",
        ),
        "places",
    ),
    **dict.fromkeys(
        (
            "bert, not a decoder", "cpmant", "doge, experts", "reformer", "xlm", "xlnet",
        ),
        "ahead",
    ),
    **dict.fromkeys(
        (
            "blt", "gemma4_unified_assistant", "hrm_text", "inkling2_loop_text",
        ),
        "ids",
    ),
    **dict.fromkeys(
        (
            "gemma3n", "gemma4_assistant",
        ),
        "class",
    ),
}  # fmt: skip
# Of float32: in float64 their own forward or mask fails.
FLOAT32 = ("xglm",)
DOCS = Path(__file__).parents[1] / "docs" / "families.md"


def docs() -> str:
    """The table as a page."""
    exact = [_limited(name) for name, outcome in TABLE.items() if outcome == "exact"]
    one_by_one = [f"`{name}`" for name, outcome in TABLE.items() if outcome == "one by one"]
    lines = [
        "# Model families",
        "",
        "Does my model work? Look for its `model_type`, which stands in its `config.json`. Every causal language model of",
        f"transformers {VERSION} is either **exact** here or **refused** with its reason.",
        "",
        "*Exact* means: `decode` writes the tokens of the slow loop of two models, and in a padded batch each row has the hidden",
        "states that it has alone. This is tested with rows that are longer and shorter than every window of the config",
        "(`tests/forward/test_families.py`; the long tail with `pytest -m slow`). A model that is not in this list is tried in the",
        "same way when it is first used (`switchkd/forward/proof.py`), and refused if it fails.",
        "",
        "This page is written by `python tests/families.py docs`.",
        "",
        f"## Exact: {len(exact)}",
        "",
        *_wrapped(exact),
        "",
        f"## Exact, one token at a time: {len(one_by_one)}",
        "",
        "The layers of these models keep a state, and can go on from it by one token at a time alone. They are decoded exactly,",
        "and everything works with them, but guessing several tokens ahead saves no time.",
        "",
        *_wrapped(one_by_one),
    ]
    for reason, (words, _) in REASONS.items():
        if names_ := [f"`{name}`" for name, outcome in TABLE.items() if outcome == reason]:
            lines += ["", f"## Refused, because it {words}: {len(names_)}", "", *_wrapped(names_)]
    return "\n".join(lines) + "\n"


def _limited(name: str) -> str:
    limits = exact_lengths(config_of(name).get_text_config(decoder=True))
    return f"`{name}`" + "".join(f" (up to {length} tokens by default: {why})" for why, length in limits.items())


def _wrapped(items: list[str]) -> list[str]:
    return textwrap.wrap(", ".join(items), 128, break_long_words=False, break_on_hyphens=False)


def outcome(name: str) -> str:
    """What becomes of a family now, with the error."""
    try:
        model = small_model(name)
        prove(model.float() if name in FLOAT32 else model)
    except ModelError as error:
        return next(why for why, (_, pattern) in REASONS.items() if re.search(pattern, str(error))) + f": {error}"
    except Exception as error:  # as any class raises
        return f"class: {error!r}"
    return "one by one" if model in ONE_BY_ONE else "exact"


if __name__ == "__main__":
    if sys.argv[1:] == ["docs"]:
        DOCS.write_text(docs(), encoding="utf-8")
    else:
        for each in names():
            print(each, outcome(each))
