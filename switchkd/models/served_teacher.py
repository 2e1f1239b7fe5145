"""A teacher behind a server, put together: what is asked there, and the few of its files that are read here."""

from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from switchkd.base.errors import ModelError
from switchkd.base.manifest import json_sha256
from switchkd.base.plain import json_object
from switchkd.forward.served import OutputLayer, ServedModel, output_law
from switchkd.forward.server import Server
from switchkd.models.loading import as_model_error, device_named, dtype_named, is_adapter, load_config, located

# Seconds for which a server is asked again where nothing comes back: before anything has begun, and in mid-run, where it may have
# to be started again.
OPENING, PATIENCE = 10.0, 300.0
WRITING_TIMEOUT = 600.0  # seconds that the writing of one text may take


def load_served(
    address: str,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str,
    device: str | None = None,
    files: str = "",
    writer: str = "",
) -> ServedModel:
    """The teacher behind the server at ``address``; of its weights only the output layer is read, from ``files``.

    ``writer`` is the address of one that writes as it. ``files`` is what `served_files` says, of which ``tokenizer`` is too. Raises
    ServerError for one that does not answer with hidden states, ModelError where these do not fit the files.
    """
    torch_device, server = device_named(device), Server(address, patience=OPENING)
    source, is_local = located(files)
    if is_adapter(source):
        raise ModelError(f"{source} is an adapter; merge it into its base, and serve that")
    serves, config = server.serves(), load_config(source, is_local)
    names, scale, softcap = output_law(config)
    with as_model_error(source, is_local):
        weight, bias = _output_layer(source, is_local, names)
        try:
            generation_config = GenerationConfig.from_pretrained(source, local_files_only=is_local)
        except OSError:
            generation_config = GenerationConfig.from_model_config(config)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.to(torch_device, dtype_named(dtype, torch_device)), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(linear.weight), requires_grad=False)
    own = config.get_text_config()
    if getattr(own, "max_position_embeddings", None):
        own.max_position_embeddings = min(own.max_position_embeddings, serves.max_model_len)
    return ServedModel(
        Server(address, patience=PATIENCE),
        serves,
        source,
        config,
        generation_config,
        OutputLayer(linear, scale, softcap),
        json_sha256(tokenizer.get_vocab()),
        Server(writer, patience=PATIENCE, timeout=WRITING_TIMEOUT) if writer else None,
    )


def served_files(address: str, files: str = "") -> str:
    """Where the config, tokenizer and output layer of a served teacher lie: ``files``, else what the server names.

    Raises ModelError where that is a folder of another machine.
    """
    if files:
        return files
    root = Server(address, patience=OPENING).serves().root
    if root.startswith("/") and not Path(root).is_dir():
        raise ModelError(
            f"{address} serves {root}, a folder that is not on this machine; copy its config.json, tokenizer and *.safetensors "
            "here, or take a hub name, and give it as --teacher-files"
        )
    return root


def _output_layer(source: str, is_local: bool, names: list[str]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the layer that is called one of ``names``, the first that is there; of many files only its own is read."""

    def file(name: str) -> Path:
        return Path(source) / name if is_local else Path(hf_hub_download(source, name))

    whole, index = "model.safetensors", "model.safetensors.index.json"
    try:
        places = json_object(file(index).read_bytes())["weight_map"]
    except (OSError, EntryNotFoundError):
        with safe_open(file(whole), "pt") as weights:
            places = dict.fromkeys(weights.keys(), whole)
    # Behind a name of its own: "lm_head" may be "language_model.lm_head" in the file.
    for name in names:
        key = next((key for key in places if f".{key}".endswith(f".{name}.weight")), None)
        if key is not None:
            with safe_open(file(places[key]), "pt") as weights:
                bias = key.removesuffix("weight") + "bias"
                return weights.get_tensor(key), weights.get_tensor(bias) if bias in places else None
    raise ModelError(
        f"{source} holds no weight of the output layer {' or '.join(names)}; copy or download the model again"
    )
