"""What a model's config says of it: its context, its experts, its positions, its size, and whether it can be rolled back."""

import inspect
from typing import TYPE_CHECKING, Any

from switchkd.base.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    from switchkd.data.texts import Batch


# Kinds of layers, in transformers' words, by what a cache keeps of a text for them: keys and values of its tokens, a state, both,
# or nothing.
ATTENDING = ("full_attention", "sliding_attention", "hybrid", "hybrid_sliding")
KEEPS_STATE = ("linear_attention", "conv", "hybrid", "hybrid_sliding")
KEEPS_NOTHING = ("mlp", "moe")


def context_length(model: "PreTrainedModel") -> float:
    """Tokens that fit into the model's context and are read exactly; infinite where its config sets no limit."""
    config = model.config.get_text_config()
    own = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None) or 0
    return min([own if own > 0 else float("inf"), *exact_lengths(config).values()])


def _why_shorter(*models: "PreTrainedModel") -> str:
    """Why a context of these models is shorter than their config says, to stand behind its number; "" if it is not."""
    found = dict.fromkeys(why for model in models for why in exact_lengths(model.config.get_text_config()))
    return f" ({'; '.join(found)})" if found else ""


def beyond_context(tokens: float, whose: str, *models: "PreTrainedModel") -> str:
    """Why a text of so many tokens does not fit, such as "exceed the student's context of 64", for a message; "" if it does."""
    context = min(map(context_length, models))
    return "" if tokens <= context else f"exceed the {whose} context of {context:g}{_why_shorter(*models)}"


def exact_lengths(config: "PretrainedConfig") -> dict[str, int]:
    """Lengths of text up to which a row's logits depend on the row alone, by the reason; none for most models."""
    found = {}
    for rope in ropes(config):
        if rope.get("rope_type") == "longrope" and (length := rope.get("original_max_position_embeddings")):
            # One set of rotations serves a whole batch, and a text that grows beyond changes what was cached of it.
            found["beyond original_max_position_embeddings longrope turns the positions of all rows otherwise"] = length
    if length := getattr(config, "keep_window_size", None):  # Doge
        found["beyond keep_window_size it leaves out tokens, and looks ahead to choose them"] = length
    return found


def batch_inputs(model: "PreTrainedModel", batch: "Batch") -> dict[str, Any]:
    """What a model is called with to read a padded batch.

    Padding stands at the right, where no row looks, so that it needs no mask. Under one, places that see nothing at all may
    become NaN, and 0 · NaN then spoils the row. Balancing losses count the tokens by it.
    """
    mask = batch.attention_mask if has_router_logits(model) else None
    return {
        "input_ids": batch.input_ids,
        "attention_mask": mask,
        "position_ids": batch.position_ids,
        "use_cache": False,
    }


def has_router_logits(model: "PreTrainedModel") -> bool:
    """Whether the model is a mixture of experts whose forward may be asked for the logits of its routers."""
    parameters = inspect.signature(model.forward).parameters.values()
    takes = any(p.name == "output_router_logits" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    return takes and hasattr(model.config.get_text_config(), "output_router_logits")


def ropes(config: "PretrainedConfig") -> "list[dict[str, Any]]":
    """The settings of a config's rotary embeddings: one set, or one for each kind of layer."""
    own = getattr(config, "rope_parameters", None) or {}
    return [own] if "rope_type" in own else [part for part in own.values() if isinstance(part, dict)]


def layer_kinds(config: "PretrainedConfig") -> list[str]:
    """The kind of each layer, in transformers' words."""
    config = config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        window = getattr(config, "sliding_window", None)
        kinds = ["sliding_attention" if window else "full_attention"] * getattr(config, "num_hidden_layers", 0)
    return list(kinds)


def keeps_state(config: "PretrainedConfig") -> bool:
    """Whether some layers keep a state of the text that they have read, in place of its tokens' keys and values."""
    return any(kind in KEEPS_STATE for kind in layer_kinds(config))


def number_of_states(config: "PretrainedConfig") -> int:
    """States of each layer that keeps one, of each sort."""
    return getattr(config.get_text_config(decoder=True), "number_of_conv_states", 1)


def check_layers(model_or_config: "PreTrainedModel | PretrainedConfig") -> None:
    """Raise ModelError for a model that cannot be decoded here, by what its config says: what it keeps of a text can neither be
    shortened to fewer tokens nor copied and put back, or it is an encoder-decoder.
    """
    from transformers import PretrainedConfig

    given_config = isinstance(model_or_config, PretrainedConfig)
    config = model_or_config if given_config else model_or_config.config
    name = config.model_type
    if config.is_encoder_decoder:
        raise ModelError(f"{name} is an encoder-decoder model; switchkd decodes decoder-only models: choose one")
    kind = model_class(config) if given_config else type(model_or_config)
    kinds = set(layer_kinds(config)) - {*ATTENDING, *KEEPS_STATE, *KEEPS_NOTHING}
    if kinds == {"chunked_attention"}:
        raise ModelError(
            f"{name} attends in chunks (chunked_attention), so a row's cache slots do not follow its token positions; "
            "choose a model with full or sliding-window attention"
        )
    if kinds or (kind._is_stateful and not keeps_state(config)):
        found = f"layers of kind {', '.join(sorted(kinds))}" if kinds else "a recurrent state in a form of its own"
        raise ModelError(
            f"{name} has {found}, which switchkd does not know how to take back when a draft is rejected; choose a model whose "
            f"layers are of the kinds {', '.join(dict.fromkeys((*ATTENDING, *KEEPS_STATE)))}"
        )


def num_parameters(model: "torch.nn.Module") -> int:
    """Parameters of ``model``; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def parameter_bytes(model: "torch.nn.Module") -> int:
    """Bytes that the parameters of ``model`` take; tied ones count once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def cache_bytes_per_token(model: "PreTrainedModel") -> int:
    """Bytes that the keys and values of one token take."""
    text, kinds = model.config.get_text_config(), layer_kinds(model.config)
    # Of some models (Gemma 4) layers differ in their heads.
    layers = text.per_layer_config if getattr(text, "is_heterogeneous", False) else [text] * len(kinds)
    attending = [layer for layer, kind in zip(layers, kinds, strict=True) if kind in ATTENDING]
    return sum(2 * _kv_numbers(layer) for layer in attending) * model.dtype.itemsize


def _kv_numbers(layer: "PretrainedConfig") -> int:
    head = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
    return (getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads) * head


def model_class(config: "PretrainedConfig") -> "type[PreTrainedModel]":
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"{config.model_type} is not a causal language model; choose one that generates text")
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
