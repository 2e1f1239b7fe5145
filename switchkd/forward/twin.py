"""A twin of a model: its class and architecture with small random weights, on which what holds for every size can be proved.

Sizes are made small, and so is every number of the config that acts by position (windows, chunks, the original length of a rotary
embedding), so that a few dozen tokens reach beyond all of them. A twin has as many layers as it takes to have one of each kind.
"""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from switchkd.runner.architecture import layer_kinds, ropes

LAYERS, HIDDEN, HEADS, HEAD, INNER, VOCAB, CONTEXT = 2, 32, 4, 8, 48, 61, 512
WINDOW = 8  # tokens that a layer of a twin sees, where it does not see all
SWITCH = 20  # position at which a twin's rotary embedding or attention scale changes

# Numbers that act by position, by a pattern on their name. A new one that no pattern knows is found by its size: ``positions``.
_WINDOWS = r".*window.*|.*chunk_(size|length)|local_attention|rel_extent|index_topk|(index_)?block_size|.*max_distance"
_SWITCHES = r"original_max_position_embeddings|floor_scale|log_scaling_n_floor"
# The others, the first that fits; a number that is smaller stays.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"max_window_layers", LAYERS),
    (r"n_(input|output)_layers", 1),
    (_SWITCHES, SWITCH),
    (_WINDOWS, WINDOW),
    (r"(.*_)?vocab_size(_per_layer_input|_base)?", VOCAB),
    (r"(max_|n_)?(position_embeddings|positions|target_positions|source_positions|seq_len)|n_ctx|model_max_length", CONTEXT),
    (r"((swa|qk|v|index|attention|global|vision|mamba)_)?head_dim|dim_head|kv_channels|attention_head_size|d_head", HEAD),
    (r"(mamba_)?expand", 1),  # so that the heads of a recurrence fill its width
    (r"mamba_(d_head|headdim)|(\w+_)?(d_state|state_size)", HEAD),
    (r"mamba_d_ssm|lru_width", HEADS * HEAD),
    (r"qk_(rope|nope)_head_dim|rotary_dim", HEAD // 2),
    (r"(kv|q|o)_lora_rank|laurel_rank|adapter_rank|gated_norm_rank", HEAD),
    (r"(\w+_)?(num|n)_(\w+_)?heads?|(decoder_|encoder_)?attention_heads|kv_n_heads|num_query_groups", HEADS),
    (r"hidden_size_per_layer_input|dim_model_base|router_hidden_size", HIDDEN // 2),
    (r"(\w+_)?(embedding_size|embed_proj_dim|embedding_dim|embed_dim)|hidden_size|d_model|n_embd|emb_dim|dim_model", HIDDEN),
    (r"(\w+_)?(intermediate_size|ffn_dim|dim_ff|ffn_hidden_size|feed_forward_size)(_mlp)?|d_inner|dff|n_inner", INNER),
    (r"(moe_)?(num|n)_(local_|routed_)?experts|moe_num_experts|zero_expert_num", 4),
    (r"(moe_)?(num_experts_per_tok(en)?|top_?k|top_k_experts|k)", 2),
    (r"n_groups?|num_expert_group|topk_group|(moe_)?(num|n)_shared_experts", 1),
    (r"image_size|crop_size", 16),
    (r"patch_size", 8),
    (r"mm_tokens_per_image", 4),
    (r"cross_attention_layers", LAYERS),
)  # fmt: skip
# Numbers that are no sizes and do not act by position.
_OTHER = re.compile(
    r".*(token_id|token_index|_ids?|factor|scalar|interval|pattern|_period|_offset|_step|layer_(start|end)_index|layers?)"
    r"|seed|block_multiple_of"
)


def twin(model_class: type[PreTrainedModel], config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A small random float64 model of that class and architecture on the CPU, in eval mode. Random states are left alone.

    Raises whatever the class raises where it cannot be built so small.
    """
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.default_generator.manual_seed(seed)
        small = small_config(config)
        small._experts_implementation = "eager"  # others have no float64
        model = model_class._from_config(small, attn_implementation=config._attn_implementation, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.35)  # differs visibly by context
    return model.double().eval()


def small_config(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of ``config`` with small sizes and few layers."""
    small = copy.deepcopy(config)
    _shrink(small, _layers(small.get_text_config(decoder=True)))
    return small


def positions(config: PretrainedConfig) -> dict[str, int]:
    """The numbers of a text config that act by position, or that may, since nothing else is known of them; by name."""
    found = {}
    for name, value in _numbers(config):
        sizes = next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), None)
        acts = re.fullmatch(f"{_WINDOWS}|{_SWITCHES}", name) and name != "max_window_layers"
        if value > 0 and (acts or (sizes is None and value > SWITCH and not _OTHER.fullmatch(name))):
            found[name] = value
    return found


def _numbers(config: Any) -> Iterator[tuple[str, int]]:
    for name, value in (config if isinstance(config, dict) else vars(config)).items():
        if isinstance(value, dict):
            yield from _numbers(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            yield name, value


def _layers(config: PretrainedConfig) -> int:
    """Layers, from the first on, until there is one of each kind that any list with an entry a layer names."""
    layers, most = getattr(config, "num_hidden_layers", LAYERS), LAYERS
    kinds = layer_kinds(config) if hasattr(config, "num_hidden_layers") else []
    if kinds.count("hybrid") > 1:  # these may share their weights
        most = 1 + kinds.index("hybrid", kinds.index("hybrid") + 1)
    most = max([most, *(1 + kinds.index(kind) for kind in kinds)])
    for value in vars(config).values():
        if isinstance(value, list) and len(value) == layers and all(isinstance(kind, int | str) for kind in value):
            firsts = [value.index(kind) for kind in value]
            most = max(most, 1 + max(firsts) if len(set(firsts)) < layers else 0)  # else it numbers the layers
    if getattr(config, "num_kv_shared_layers", 0):  # the last ones read what the others keep
        most *= 2
    return min(most, layers)


def _shrink(config: Any, layers: int) -> None:
    """Make the numbers of a config, and of the configs and dicts in it, small."""
    values = config if isinstance(config, dict) else vars(config)
    count = getattr(config, "num_hidden_layers", None)
    own = values.pop("_heterogeneity_spec", None)  # settings of single layers
    heads, shared = (values.get(name) for name in ("num_attention_heads", "num_key_value_heads"))
    for name, value in list(values.items()):
        if isinstance(value, PretrainedConfig):
            _shrink(value, min(layers, getattr(value, "num_hidden_layers", layers)))
        elif isinstance(value, dict):
            _shrink(value, layers)
        elif isinstance(value, list) and count and len(value) == count:
            _set(config, name, [_small(name, each) for each in value[:layers]])
        else:
            _set(config, name, _small(name, value))
    if isinstance(count, int):
        config.num_hidden_layers = min(layers, count)
    if isinstance(config, PretrainedConfig):
        _fit(config)
    if isinstance(heads, int) and isinstance(shared, int) and shared < heads:
        _set(config, "num_key_value_heads", min(shared, HEADS // 2))
    if own is not None:
        config.per_layer_config = {
            layer: {name: _small(name, value, times=2) for name, value in settings.items()}
            for layer, settings in own.per_layer_overrides.items()
            if layer < config.num_hidden_layers
        }


def _set(config: Any, name: str, value: Any) -> None:
    if isinstance(config, dict):
        config[name] = value
    elif vars(config).get(name) != value:
        setattr(config, name, value)


def _small(name: str, value: Any, times: int = 1) -> Any:
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if name.endswith("token_id"):
        return min(value, VOCAB - 1)
    return next((min(value, times * size) for pattern, size in _SIZES if re.fullmatch(pattern, name)), value)


def _fit(config: PretrainedConfig) -> None:
    """Settings that must agree with others."""
    values = vars(config)
    if values.get("n_recurrent_layers"):
        config.n_recurrent_layers = config.num_hidden_layers - 2
    if values.get("attention_hidden_size"):  # Zamba's attention reads two texts side by side
        config.attention_hidden_size = 2 * config.hidden_size
        config.attention_head_dim = config.attention_hidden_size // config.num_attention_heads
    if values.get("num_kv_shared_layers"):
        config.num_kv_shared_layers = config.num_hidden_layers // 2
    if values.get("qk_rope_head_dim"):  # MLA: a query has a part with and one without positions
        both = values["qk_rope_head_dim"] + values["qk_nope_head_dim"]
        _set(config, "qk_head_dim", both) if "qk_head_dim" in values else None
        _set(config, "head_dim", values["qk_rope_head_dim"]) if values.get("head_dim") else None
    for rope in ropes(config):
        if {"short_factor", "long_factor", "mrope_section"} & rope.keys():
            head = values.get("head_dim") or config.hidden_size // config.num_attention_heads
            _fit_rope(rope, int(head * rope.get("partial_rotary_factor", 1.0)) // 2)


def _fit_rope(rope: dict[str, Any], half: int) -> None:
    """Lists with an entry, or a part, of the half of a head that is turned."""
    for name in ("short_factor", "long_factor"):
        if name in rope:
            rope[name] = rope[name][:half]
    if parts := len(rope.get("mrope_section") or ()):
        rope["mrope_section"] = [half - (parts - 1) * (half // parts), *[half // parts] * (parts - 1)]


@contextmanager
def _quiet() -> Iterator[None]:
    """What transformers has to say of such a config is of no use to anybody."""
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
