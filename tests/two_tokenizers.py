"""Small tokenizers of several kinds over one text, models that speak them, and bridges between them."""

import copy
from functools import cache

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


def sentencepiece(size: int = 420, lines=LINES, fallback: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer in the manner of Llama 2: a space before every text, ▁ for spaces, a token for every byte."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=fallback, fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(pattern="▁", behavior="merged_with_next")
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256) if fallback)]
    backend.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=size, special_tokens=specials, show_progress=False)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    parts = [decoders.Replace("▁", " "), *([decoders.ByteFallback()] if fallback else []), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_with_specials(backend, ("<unk>", "<s>", "</s>")),
        eos_token="</s>",
        unk_token="<unk>",
        bos_token="<s>",
    )
    return tokenizer


def _with_specials(backend: Tokenizer, marks: tuple[str, ...]) -> Tokenizer:
    """Of the trainer's special tokens the bytes become ordinary ones, as in files of real models."""
    import json

    settings = json.loads(backend.to_str())
    settings["added_tokens"] = [each for each in settings["added_tokens"] if each["content"] in marks]
    return Tokenizer.from_str(json.dumps(settings))


TOKENIZERS = {
    "coarse": lambda: byte_level(460),
    "fine": lambda: byte_level(300, LINES[:2] * 4, digits=True),
    "sentencepiece": sentencepiece,
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
