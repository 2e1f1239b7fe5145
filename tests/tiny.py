"""Tiny random models and tabular toys that the tests share."""

import copy
import dataclasses
import json
import math
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from switchkd.base.errors import ModelError
from switchkd.data.texts import TokenizedExample
from switchkd.decoding.rollouts import Rollout
from switchkd.forward import proof
from switchkd.methods import divergences
from switchkd.methods.policies import CAOPD, SKD, SSD, TRB, AdaSwitch, Hysteresis, MixIn, Switch
from switchkd.methods.policy import REFERENCE, Decision, Policy, State, StudentOnly, TeacherOnly
from switchkd.methods.relay import Relay
from switchkd.models.pair import Pair

VOCAB = 23
_ROPE = dict(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=1,
)


def _gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=4, n_positions=64, bos_token_id=None, eos_token_id=1)
    )


def _opt() -> PreTrainedModel:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=16,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    )


FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_ROPE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_ROPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_ROPE, head_dim=4)),
    "gpt2": _gpt2,
    "opt": _opt,
    "mistral-sliding": lambda: MistralForCausalLM(MistralConfig(**_ROPE, sliding_window=4)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**_ROPE, head_dim=4)),
    "gemma3-hybrid": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**_ROPE, head_dim=4, sliding_window=4, layer_types=["sliding_attention", "full_attention"])
    ),
}


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level_tokenizer(
    eos: str | None = "<|im_end|>",
    template: str | None = CHATML,
    specials: tuple[str, ...] = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>"),
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges; pad is eos, as in many real ones."""
    tokenizer = copy.deepcopy(_original_tokenizer(eos, specials))
    tokenizer.chat_template = template
    return tokenizer


@cache
def _original_tokenizer(eos: str | None, specials: tuple[str, ...]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    lines = ["What is two and two?", "It is four.", "user assistant\n", "\n\n"] * 3
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(lines, trainer)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token=eos)


def save_llama(folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int, layers: int = 2, **changes) -> str:
    """A random Llama with its tokenizer in ``folder``, as a hub would hold it."""
    eos = tokenizer.eos_token_id
    settings = {**_ROPE, "vocab_size": len(tokenizer), "max_position_embeddings": 512, "pad_token_id": eos}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(**settings | {"eos_token_id": eos, "num_hidden_layers": layers} | changes)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def pair_on_disk(folder: Path, prompt: str = "What is {0} and {0}?", completion: str = "It is {1}.") -> dict[str, str]:
    """A tiny teacher, a smaller student, and a file of twelve rows in ``folder``, as the settings that name them."""
    tokenizer, data = byte_level_tokenizer(), folder / "data.jsonl"
    rows = [{"prompt": prompt.format(i, 2 * i), "completion": completion.format(i, 2 * i)} for i in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "teacher_model_name_or_path": save_llama(folder / "teacher", tokenizer, 1),
        "student_model_name_or_path": save_llama(folder / "student", tokenizer, 2, layers=1),
        "train_file": str(data),
        "eval_file": str(data),
    }


def toy_pair(
    family: str = "llama", dtype: torch.dtype = torch.float64, seeds: tuple[int, int] = (1, 2), make: Any = None
) -> Pair:
    """A pair of tiny random models with a tokenizer to save beside them."""
    teacher, student = ((make or tiny_model)(family, seed, dtype) for seed in (seeds[1], seeds[0]))
    teacher.requires_grad_(False)
    return Pair(teacher, student, byte_level_tokenizer(), VOCAB, (1,), ())


def retold(example: TokenizedExample, **changes: Any) -> TokenizedExample:
    """An example with another completion, of the data."""
    return dataclasses.replace(example, speakers=[REFERENCE] * len(changes["completion_ids"]), **changes)


def toy_examples(count: int = 12) -> list[TokenizedExample]:
    """Ragged examples over the tiny vocabulary that end with the EOS id 1."""
    rows = []
    for i in range(count):
        prompt = [2 + (i * 5 + j) % 20 for j in range(1 + i % 4)]
        completion = [2 + (i * 3 + j * 7) % 20 for j in range(1 + (i * 5) % 6)] + [1]
        rows.append(
            TokenizedExample(i, prompt, completion, [REFERENCE] * len(completion), ("text",), False, f"toy:{i + 1}")
        )
    return rows


def tiny_model(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 12.0):
    """A random model whose next-token distributions are peaked enough (``scale``) to differ visibly by context.

    Equal calls give copies of one model, which is made and proved once.
    """
    original = _original(family, seed, dtype, scale)
    model = copy.deepcopy(original)
    if original in proof._proved:
        proof._proved[model] = proof._proved[original]
    return model


@cache
def _original(family: str, seed: int, dtype: torch.dtype, scale: float):
    model = new_model(family, seed, dtype, scale)
    with suppress(ModelError):
        proof.prove(model)
    return model


def new_model(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 12.0):
    """The same, made anew and not proved yet: for tests of the proof."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = FAMILIES[family]().to(dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.35)
            model.get_output_embeddings().weight.mul_(scale / 12.0)
    return model


class TabularModel(nn.Module):
    """Looks the next-token logits up by the last token: the smallest thing that decodes like a causal model."""

    dtype = torch.float64
    generation_config = None
    _is_stateful = False

    def __init__(self, probabilities: list[list[float]]):
        super().__init__()
        self.table = nn.Parameter(torch.tensor(probabilities, dtype=torch.float64).log())
        self.config = LlamaConfig(**_ROPE | {"vocab_size": len(probabilities[0]), "num_hidden_layers": 1})

    def forward(self, input_ids: torch.Tensor, logits_to_keep: int = 0, **_) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids][:, -logits_to_keep:])


@dataclass(frozen=True)
class Spell(Policy):
    """A stateful rule that can switch back: above ``limit`` bits of JSD the teacher writes ``length`` tokens in a row.

    State: tokens of the spell that are left ``[B]``. Inside a spell the student is not read.
    """

    limit: float = 0.3
    length: int = 2

    def init(self, batch: int, device: torch.device | str = "cpu") -> State:
        return (torch.zeros(batch, dtype=torch.int64, device=device),)

    def reads(self, state: State) -> tuple[torch.Tensor, bool]:
        return state[0] == 0, True

    def step(self, state: State, logp_student, logp_teacher, position) -> Decision:
        (left,) = state
        bits = divergences.jsd(logp_teacher, logp_student) / divergences.LN2
        bits = torch.where(left > 0, math.nan, bits)
        left = torch.where(bits > self.limit, self.length, left)
        teacher = left > 0
        target = torch.where(teacher.unsqueeze(1), logp_teacher, logp_student)
        return Decision(target, teacher.long(), bits, (torch.clamp(left - 1, min=0),))


@dataclass(frozen=True)
class Parity(Policy):
    """A rule that hears the text: the teacher writes after an even token. State: whether the last one was ``[B]``."""

    def init(self, batch: int, device: torch.device | str = "cpu") -> State:
        return (torch.zeros(batch, dtype=torch.bool, device=device),)

    def step(self, state: State, logp_student, logp_teacher, position) -> Decision:
        (even,) = state
        target = torch.where(even.unsqueeze(1), logp_teacher, logp_student)
        return Decision(target, even.long(), torch.full_like(target[:, 0], math.nan), state)

    def observe(self, state: State, token: torch.Tensor) -> State:
        return (token % 2 == 0,)


@dataclass(frozen=True)
class Forced(Policy):
    """A rule that at times writes words it knows and asks nobody: the first two tokens, and two after each multiple of 5.

    Between them it asks the teacher alone after an odd token, else both, and the student writes. State: forced tokens that are
    left ``[B]``, whether the last token was odd ``[B]``.
    """

    words: tuple[int, ...] = (6, 11)

    def init(self, batch: int, device: torch.device | str = "cpu") -> State:
        left = torch.full((batch,), len(self.words), dtype=torch.int64, device=device)
        return left, torch.zeros(batch, dtype=torch.bool, device=device)

    def reads(self, state: State) -> tuple[torch.Tensor, torch.Tensor]:
        left, odd = state
        return (left == 0) & ~odd, left == 0

    def step(self, state: State, logp_student, logp_teacher, position) -> Decision:
        left, odd = state
        word = torch.tensor(self.words[::-1])[(left - 1).clamp(min=0)].unsqueeze(1)
        known = torch.full_like(logp_student, -math.inf).scatter(1, word, 0.0)
        target = torch.where(odd.unsqueeze(1), logp_teacher, logp_student)
        target = torch.where((left > 0).unsqueeze(1), known, target)
        return Decision(target, (odd | (left > 0)).long(), torch.full_like(target[:, 0], math.nan), state)

    def observe(self, state: State, token: torch.Tensor) -> State:
        left, _ = state
        begins = (left == 0) & (token % 5 == 0)
        return torch.where(begins, len(self.words), (left - 1).clamp(min=0)), token % 2 == 1


@dataclass(frozen=True)
class Quota(MixIn):
    """A mix-in whose text ends when the teacher has written ``most`` tokens. State: how many it has written ``[B]``."""

    most: int = 3

    def init(self, batch: int, device: torch.device | str = "cpu") -> State:
        return (torch.zeros(batch, dtype=torch.int64, device=device),)

    def spoke(self, state: State, speaker: torch.Tensor) -> State:
        return (state[0] + speaker,)

    def ends(self, state: State) -> torch.Tensor:
        return state[0] == self.most


# Settings under which both models speak on the tiny pairs; a new policy joins here and is covered by every lossless test.
POLICIES = {
    "student_only": StudentOnly(),
    "teacher_only": TeacherOnly(),
    "switch_exponential": Switch(tau_0=0.6, decay=0.03),
    "switch_linear": Switch(schedule="linear", tau_0=0.8, horizon=12),
    "switch_constant": Switch(schedule="constant", tau_0=0.4),
    "switch_growth": Switch(schedule="growth", tau_0=0.2, decay=0.1),
    "adaswitch": AdaSwitch(window=2, ratio=1.1),
    "adaswitch_student_token": AdaSwitch(
        window=3, ratio=1.2, divergence="tvd", switch_token_by="student", require_full_window=False
    ),
    "spell": Spell(),
    "parity": Parity(),
    "forced": Forced(),
    "quota": Quota(alpha=0.4),
    "mix_in": MixIn(alpha=0.4),
    "skd": SKD(top_k=3),
    "skd_sharpened": SKD(3, student_temperature=0.7, student_top_p=0.9, teacher_temperature=0.5, teacher_top_p=0.8),
    "ssd": SSD(tau=0.3),
    "hysteresis": Hysteresis(take=0.35, give=0.2),
    "ca_opd": CAOPD(alpha=0.2),
    "trb": TRB(budget=0.5),
    "relay": Relay(
        student_top=1,
        paragraphs=1,
        leg_tokens=3,
        trigger_ids=tuple(range(2, 14)),
        blank_ids=(2, 9),
        line_end_ids=(3, 5, 7, 15),
        line_start_ids=(4, 6, 7, 8),
    ),
}


def assert_same(decoded: list[Rollout], reference: list[Rollout], tolerance: float = 1e-6) -> None:
    """Token by token equality of two decodings, and of who spoke and what the policy saw."""
    assert [r.completion_ids for r in decoded] == [r.completion_ids for r in reference]
    assert [r.speakers for r in decoded] == [r.speakers for r in reference]
    assert [r.stop_reason for r in decoded] == [r.stop_reason for r in reference]
    for ours, theirs in zip(decoded, reference, strict=True):
        for name in ("divergences", "thresholds"):
            values = [torch.tensor(getattr(each, name)) for each in (ours, theirs)]
            torch.testing.assert_close(*values, equal_nan=True, atol=tolerance, rtol=tolerance)


TOKENS = ["<pad>", "<eos>", "2", "0", "20", "4", "42", "a", "b", "c", "d", "e", "f", "s", "t", "<unk>"]


def tiny_tokenizer(
    tokens: list[str] = TOKENS, digits: bool = False, chat_template: str | None = None, eos: str = "<eos>"
) -> PreTrainedTokenizerFast:
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [("2", "0"), ("4", "2")] if "20" in vocab and "42" in vocab else []
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Digits(individual_digits=digits)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, pad_token="<pad>", unk_token="<unk>", chat_template=chat_template
    )


def save(folder: Path, family: str = "llama", tokenizer: PreTrainedTokenizerFast | None = None, seed: int = 0) -> Path:
    tiny_model(family, seed, torch.float32).save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder
