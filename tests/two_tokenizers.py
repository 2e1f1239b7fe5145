"""Small tokenizers of several kinds over one text, models that speak them, and bridges between them."""

import copy
import json
from functools import cache
from pathlib import Path

import torch
from tiny import FAMILIES
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from switchkd.crossing.bridge import Bridge, Side
from switchkd.forward.ends import Ends

LINES = [
    "What is two and two? It is four, and that is all.",
    "the cat sat on the mat; the cats sat on their mats.",
    "I don't know: 12 and 345 are numbers, naïve café 東京。",
    "def add(x, y):\n    return x + y\n\n",
    "Wait, the answer is 42!\n\tNo, it isn't.",
] * 4


def byte_level(size: int, lines=LINES, eos: str = "<|end|>", digits: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with merges, up to ``size`` ids and its end; one may cut numbers into single digits."""
    backend = Tokenizer(models.BPE())
    cuts = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*([pre_tokenizers.Digits(True)] if digits else []), *cuts])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(lines, trainer)
    backend.add_special_tokens([AddedToken(eos, special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token=eos)


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
MARKS = ("<unk>", "<s>", "</s>")


def sentencepiece(size: int = 420, lines=LINES, fallback: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer in the manner of Llama 2: a space before every text, ▁ for spaces, a token for every byte."""
    backend = _pieces(size, lines, fallback)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([*_back(fallback), decoders.Strip(" ", 1, 0)])
    return _marked(backend)


def gemma(size: int = 420) -> PreTrainedTokenizerFast:
    """In the manner of Gemma: no space before a text, spaces cut as they are, and blank lines among the added tokens."""
    backend = _pieces(size, LINES, True)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(pattern=" ", behavior="merged_with_previous")
    backend.decoder = decoders.Sequence(_back(True))
    backend.add_tokens([AddedToken("\n\n", normalized=False), AddedToken("▁▁", normalized=False)])
    return _marked(backend)


def metaspace(scheme: str, size: int = 420) -> PreTrainedTokenizerFast:
    """Spaces made ▁ by the pre-tokenizer, one before every text ("always") or its first part ("first")."""
    backend = _pieces(size, LINES, True)
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)])
    return _marked(backend)


def unigram(lines=LINES) -> PreTrainedTokenizerFast:
    """The most likely of all ways to cut a text, where </s> and <0x41> are pieces like all others."""
    pieces = sorted({piece for line in lines for piece in _parts(line.replace(" ", "▁"))})
    vocab = [*((mark, 0.0) for mark in (*MARKS, *BYTES)), *((piece, -9.0 + len(piece)) for piece in pieces)]
    backend = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(_back(True))
    return _marked(backend)


def _parts(line: str) -> list[str]:
    found = [line[at : at + length] for length in (1, 2, 4) for at in range(len(line) - length + 1)]
    return [part for part in found if "▁" not in part[1:]]


def _pieces(size: int, lines, fallback: bool) -> Tokenizer:
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=fallback, fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(pattern="▁", behavior="merged_with_next")
    specials = [*MARKS, *(BYTES if fallback else [])]
    backend.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=size, special_tokens=specials, show_progress=False)
    )
    backend.pre_tokenizer = None
    return _with_specials(backend, MARKS)


def _back(fallback: bool) -> list:
    return [decoders.Replace("▁", " "), *([decoders.ByteFallback()] if fallback else []), decoders.Fuse()]


def _marked(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", bos_token="<s>")


def _with_specials(backend: Tokenizer, marks: tuple[str, ...]) -> Tokenizer:
    """Of the trainer's special tokens the bytes become ordinary ones, as in files of real models."""
    settings = json.loads(backend.to_str())
    settings["added_tokens"] = [each for each in settings["added_tokens"] if each["content"] in marks]
    return Tokenizer.from_str(json.dumps(settings))


TOKENIZERS = {
    "coarse": lambda: byte_level(460),
    "fine": lambda: byte_level(300, LINES[:2] * 4, digits=True),
    "sentencepiece": sentencepiece,
    "gemma": gemma,
    "metaspace": lambda: metaspace("always"),
    "metaspace first": lambda: metaspace("first"),
    "unigram": unigram,
}


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    return TOKENIZERS[name]()


def side(name: str, role: str = "student") -> Side:
    tokenizer = copy.deepcopy(tokenizer_of(name))
    return Side(tokenizer, len(tokenizer), Ends((tokenizer.eos_token_id,)), role)


@cache
def bridge_of(student: str, teacher: str) -> Bridge:
    return Bridge(side(student), side(teacher, "teacher"))


@cache
def model_of(name: str, family: str = "llama", seed: int = 1, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A random model of a family with a tokenizer's vocabulary, sharp enough that its words are not all noise."""
    tokenizer = tokenizer_of(name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = FAMILIES[family]()
        config = copy.deepcopy(model.config)
        config.vocab_size, config.max_position_embeddings = len(tokenizer), 512
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.eos_token_id
        if hasattr(config, "n_positions"):
            config.n_positions = 512
        model = type(model)(config)
    return model.to(dtype).eval()


def across_on_disk(folder: Path, student: str = "coarse", teacher: str = "fine", context: int = 512) -> dict[str, str]:
    """A teacher, a student with another tokenizer, and a file of rows in ``folder``, as the settings that name them."""
    for name, role, seed in ((student, "student", 1), (teacher, "teacher", 2)):
        model = copy.deepcopy(model_of(name, "llama", seed))
        model.get_output_embeddings().weight.data.mul_(8)  # peaked laws, which differ
        model.config.max_position_embeddings = context
        model.save_pretrained(folder / role)
        tokenizer_of(name).save_pretrained(folder / role)
    rows = [{"prompt": f"What is {i} and {i}?", "completion": f"It is {2 * i}, and that is all."} for i in range(12)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "teacher_model_name_or_path": str(folder / "teacher"),
        "student_model_name_or_path": str(folder / "student"),
        "train_file": str(folder / "data.jsonl"),
    }
