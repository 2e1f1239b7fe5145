"""What a run would take on GPUs, calculated from the configs of its models before any weights are there; nothing here is measured.

Memory of one GPU is the sum of its parts (``held``, ``on_one_gpu``). Activations that the student's forward keeps for its backward
take, of every token and layer, ten vectors of the hidden size and four of the MLP's, in the dtype of its products; with gradient
checkpointing one vector of every layer, and one layer in full. A model that only reads holds four and three of one layer.

A forward of n tokens, with c tokens behind each, takes the longest of three times:

    arithmetic  (2 · weights · n + 4 · layers · heads · head size · c · n) / (0.4 · peak of bf16 products)
    memory      (weights and the cache of all rows, in bytes, once) / (0.7 · bandwidth)
    launches    57 operators a layer, 5 µs each, or 36 kernels of 1.5 µs in recorded graphs

``weights`` are those that a token is multiplied by: of experts those that it is sent to, and the output layer where it is run.
A backward is two forwards, one where the weights are frozen; gradient checkpointing adds one. The loss takes the products with both
output layers, one of the teacher and three of the student, and moves each of its fp32 logits 53 times (`benchmarks.roofline` counts
that). AdamW moves seven fp32 numbers a weight. A rule that reads both models decides four positions a round, of which 2.5 stay.
What GPUs send each other is left out. The shares of the peaks, the launches and the 2.5 are assumptions.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from switchkd.base.errors import ConfigError
from switchkd.decoding.rows import row_bytes
from switchkd.forward.base_model import BaseModel
from switchkd.forward.head import sizes_on
from switchkd.forward.served import ServedModel
from switchkd.methods.policy import StudentOnly
from switchkd.models.settings import dtype_name
from switchkd.runner.architecture import ATTENDING, cache_bytes_per_token, layer_kinds, num_parameters, parameter_bytes
from switchkd.training.optimizer import Masters
from switchkd.training.settings import TrainConfig


class Gpu(NamedTuple):
    """A GPU by its maker's figures: GB of memory (10^9 bytes), TFLOP/s of dense bf16 products, GB/s between memory and chip."""

    memory: float
    tflops: float
    bandwidth: float


GPUS = {
    "B200": Gpu(180, 2250, 8000),
    "H200": Gpu(141, 989, 4800),
    "H100": Gpu(80, 989, 3350),
    "H100-PCIe": Gpu(80, 756, 2000),
    "A100-80GB": Gpu(80, 312, 2039),
    "A100-40GB": Gpu(40, 312, 1555),
    "L40S": Gpu(48, 362, 864),
    "RTX-6000-Ada": Gpu(48, 364, 960),
    "RTX-A6000": Gpu(48, 155, 768),
    "RTX-5090": Gpu(32, 209, 1792),
    "RTX-4090": Gpu(24, 165, 1008),
    "RTX-3090": Gpu(24, 71, 936),
    "A10G": Gpu(24, 70, 600),
    "L4": Gpu(24, 121, 300),
}
# Assumed: what is reached of the peaks, and the memory that is left beside PyTorch itself and what lies between tensors.
OF_PEAK, OF_BANDWIDTH, OF_MEMORY = 0.4, 0.7, 0.9
# Operators and kernels of a layer, and operators of a round beside the models: counted, docs/gpu.md.
OPERATORS, KERNELS, ROUND_OPERATORS = 57, 36, 200
# Assumed: seconds of the host for an operator in eager mode, and of the GPU for the smallest kernel in a recorded graph.
LAUNCH, IN_GRAPH = 5e-6, 1.5e-6
# Positions of a round in which both models speak, and the share of drafts that stay: the engine's own first guess.
BLOCK, AGREEMENT = 4, 0.7
LOSS_PASSES = 53
NF4_BYTES = 0.5 + 4 / 64  # of a weight in 4 bits, and its share of a block's scale


@dataclass(frozen=True)
class Models:
    """The models of a run, loaded or as shapes alone; "" is the default teacher.

    ``teacher_prompt`` is the longest that a teacher has to read, in tokens, and ``beside`` the ids of the parameters that text does
    not reach, such as those of a vision tower.
    """

    student: PreTrainedModel
    teachers: Mapping[str, PreTrainedModel]
    vocab_size: int
    teacher_prompt: int
    beside: frozenset[int] = frozenset()

    @property
    def own_weights(self) -> list[PreTrainedModel]:
        """The teachers that have weights beside the student's, each once."""
        return [model for model in dict.fromkeys(self.teachers.values()) if not isinstance(model, BaseModel)]

    @property
    def that_write(self) -> list[PreTrainedModel]:
        """Of each teacher what decodes beside the student: of one behind a server, the student itself."""
        return [self.student if isinstance(model, ServedModel) else model for model in self.teachers.values()]


@dataclass(frozen=True)
class Spread:
    """Over how many processes, one on each GPU, a run goes, and over how many of them each teacher is split."""

    processes: int = 1
    teacher: int = 1

    def __post_init__(self) -> None:
        if self.processes < 1 or self.teacher < 1 or self.processes % self.teacher:
            raise ConfigError(
                f"a teacher over {self.teacher} of {self.processes} processes: give processes of at least 1, and as "
                "teacher_tensor_parallel a number that divides it"
            )


# --- memory -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """Bytes of what one process holds in a training step, without activations, which depend on the architecture."""

    teacher: float
    masters: float
    copy: float
    gradients: float
    moments: float
    loss: float
    decoding: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(dataclasses.astuple(self))


def held(config: TrainConfig, models: Models, masters: Masters) -> Held:
    """What one process holds whose student and teachers are whole; ``masters`` are the student's."""
    weights = list(masters.named.values())
    trained = sum(weight.numel() * weight.element_size() for weight in weights)
    own = {id(weight) for weight in weights}
    copy = sum(p.numel() * p.element_size() for p in models.student.parameters() if id(p) not in own)
    head, sizes = models.student.get_output_embeddings().weight, sizes_on(weights[0].device)
    # A chunk's logits of both models, in the dtype that each multiplies in, and what autograd holds of a piece of them.
    logits = sum(sizes.chunk / 4 * model.dtype.itemsize for model in (models.student, models.teachers[""]))
    return Held(
        teacher=float(sum(map(parameter_bytes, models.own_weights))),
        masters=trained,
        copy=copy,
        gradients=trained,
        moments=2 * trained,
        loss=logits + 16.0 * sizes.piece + head.numel() * max(4, head.element_size()),
        decoding=_decoding(config, models, 1),
    )


def _decoding(config: TrainConfig, models: Models, split: int) -> float:
    """Bytes of caches and blocks of the rows that are decoded at once; each teacher's cache is split over so many processes."""
    if not config.mix.generates:
        return 0.0
    tokens = [n + config.max_new_tokens for n in (config.max_prompt_length, models.teacher_prompt)]
    # One teacher writes at a time.
    row = max(row_bytes((models.student, each), tokens, models.vocab_size) for each in models.that_write)
    cache = max(tokens[1] * cache_bytes_per_token(each) for each in models.that_write)
    return _at_once(config, split) * (row - cache * (1 - 1 / split))


def _at_once(config: TrainConfig, split: int) -> int:
    """Rows that a process decodes at once: processes that share a teacher decode the rows of all of them."""
    return min(config.generation_batch_size, _rows(config) * split)


def _rows(config: TrainConfig) -> int:
    return config.per_device_train_batch_size * config.gradient_accumulation_steps


def labelled(parts: Held, models: Models, masters: Masters) -> dict[str, float]:
    """The parts by what they are, for a reader."""
    wide = dtype_name(masters.dtype)
    return {
        f"teacher, in {dtype_name(models.teachers[''].dtype)}": parts.teacher,
        f"the student's trained weights, as they are updated, in {wide}": parts.masters,
        f"the student as it multiplies, in {dtype_name(models.student.dtype)}": parts.copy,
        f"gradients, in {wide}": parts.gradients,
        f"the optimizer's moments, in {wide}": parts.moments,
        "loss": parts.loss,
        "decoding": parts.decoding,
    }


def on_one_gpu(config: TrainConfig, models: Models, masters: Masters, spread: Spread) -> dict[str, float]:
    """Bytes that each GPU holds, by part, activations by their rule among them."""
    parts = held(config, models, masters)
    if config.load_in_4bit:
        parts = replace(parts, copy=parts.copy - _saved_by_4bit(models.student))
    if spread.teacher > 1:
        teachers = sum(_split_bytes(model, spread.teacher) for model in models.own_weights)
        parts = replace(parts, teacher=teachers, decoding=_decoding(config, models, spread.teacher))
    if config.fsdp and spread.processes > 1:
        share = 1 / spread.processes
        # Gradients of several micro-batches are added up whole, before they become shards.
        summed = parts.gradients if config.gradient_accumulation_steps > 1 else 0.0
        parts = replace(
            parts,
            masters=parts.masters * share,
            copy=num_parameters(models.student) * models.student.dtype.itemsize,
            gradients=parts.gradients * share + summed,
            moments=parts.moments * share,
        )
    largest, student = _largest(models), models.student
    longest = config.max_prompt_length + _completion(config)
    micro, prompt = config.per_device_train_batch_size, models.teacher_prompt
    kept = _rows(config) * _completion(config) * _hidden(largest) * largest.dtype.itemsize
    # Prompts of all rows before they are decoded, whole texts of a micro-batch where nobody has read them yet.
    tokens = max(_at_once(config, spread.teacher) * prompt, micro * (prompt + _completion(config)))
    return labelled(parts, models, masters) | {
        "activations of the student's forward and backward": micro * longest * activation_bytes(student, config),
        "the teacher's states of the step's texts": float(kept) if config.objective.reads_teacher else 0.0,
        "the teacher's forward over prompts or texts": float(tokens * reading_bytes(largest)),
    }


def activation_bytes(model: PreTrainedModel, config: TrainConfig) -> float:
    """Bytes that the forward of one token keeps for its backward, by the rule of this file."""
    layers, layer = model.config.get_text_config().num_hidden_layers, 10 * _hidden(model) + 4 * _wide(model)
    numbers = layers * _hidden(model) + layer if config.gradient_checkpointing else layers * layer
    return float(numbers * model.dtype.itemsize)


def reading_bytes(model: PreTrainedModel) -> float:
    """Bytes that one token takes in a forward of which nothing is kept, by the rule of this file."""
    return float((4 * _hidden(model) + 3 * _wide(model)) * model.dtype.itemsize)


def _saved_by_4bit(student: PreTrainedModel) -> float:
    head = student.get_output_embeddings()
    linear = [m for m in student.modules() if isinstance(m, nn.Linear) and m is not head and not m.weight.requires_grad]
    return sum(layer.weight.numel() * (layer.weight.element_size() - NF4_BYTES) for layer in linear)


def splits(model: PreTrainedModel, over: int) -> bool:
    """Whether a model can be split over so many processes."""
    return bool(_plan(model)) and _kv_heads(model) % over == 0


def _plan(model: PreTrainedModel) -> list[str]:
    """The modules whose weights a model's own plan for tensor parallelism splits; ``*`` stands for a layer's number."""
    return [name for name, style in (model._tp_plan or {}).items() if not style.startswith(("replicated", "sequence"))]


def _kv_heads(model: PreTrainedModel) -> int:
    text = model.config.get_text_config()
    return getattr(text, "num_key_value_heads", None) or text.num_attention_heads


def _split_bytes(model: PreTrainedModel, over: int) -> float:
    """Bytes of a model's weights on one of the processes that it is split over; raises ConfigError where it cannot be."""
    kind, plan = model.config.model_type, _plan(model)
    if not plan:
        raise ConfigError(f"{kind} has no plan by which it could be split; leave teacher_tensor_parallel out")
    if not splits(model, over):
        raise ConfigError(
            f"teacher_tensor_parallel {over}: {kind} has {_kv_heads(model)} key/value heads, which cannot be split so; take a "
            "divisor"
        )
    found = re.compile("|".join(re.escape(name).replace(r"\*", r"\d+") + r"(\.weight|\.bias)?" for name in plan))
    sizes = ((bool(found.fullmatch(name)), p.numel() * p.element_size()) for name, p in model.named_parameters())
    return sum(size / over if split else size for split, size in sizes)


# --- sizes of a model ---------------------------------------------------------------------------------------------


def _hidden(model: PreTrainedModel) -> int:
    return model.config.get_text_config().hidden_size


def _wide(model: PreTrainedModel) -> int:
    """The width of the MLP that a token passes; with experts, of those that it is sent to."""
    text = model.config.get_text_config()
    width = getattr(text, "intermediate_size", None) or getattr(text, "ffn_dim", None) or 4 * text.hidden_size
    chosen = getattr(text, "num_experts_per_tok", None)
    return (getattr(text, "moe_intermediate_size", None) or width) * chosen if chosen else width


def _completion(config: TrainConfig) -> int:
    """Tokens of the longest completion of a step."""
    return max(config.max_new_tokens if config.mix.generates else 0, config.max_completion_length)


def _largest(models: Models) -> PreTrainedModel:
    return max(models.teachers.values(), key=num_parameters)


class Work(NamedTuple):
    """What a model's forwards are made of: the weights of its body that a token is multiplied by, and what they take in memory."""

    body: float
    output: float
    read: float
    layers: int
    attention: float
    cache: int

    @staticmethod
    def of(model: PreTrainedModel, beside: frozenset[int]) -> "Work":
        """Counted over the parameters that are not ``beside`` the way of text. Embeddings are looked up, and cost nothing."""
        base = model.student if isinstance(model, BaseModel) else model
        text, head = base.config.get_text_config(), base.get_output_embeddings().weight
        table = base.get_input_embeddings().weight
        body = read = 0.0
        for name, parameter in model.named_parameters():
            if parameter is head or parameter is table or id(parameter) in beside:
                continue
            count = parameter.numel()
            if ".experts." in name and (chosen := getattr(text, "num_experts_per_tok", None)):
                count = count * chosen / max(parameter.shape[0], chosen)
            body, read = body + count, read + parameter.numel()
        kinds, size = layer_kinds(text), 0.0
        if attending := sum(kind in ATTENDING for kind in kinds):  # others have a state, whose arithmetic is small
            heads = text.num_attention_heads
            size = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads) * attending / len(kinds)
        item = base.dtype.itemsize
        return Work(
            body, head.numel(), (read + head.numel()) * item, text.num_hidden_layers, size, cache_bytes_per_token(base)
        )


# --- time ---------------------------------------------------------------------------------------------------------


def seconds(config: TrainConfig, models: Models, masters: Masters, spread: Spread, gpu: Gpu) -> dict[str, float]:
    """Seconds of a step on each GPU, by part: one whose text is written, or where a run writes none, one on the data's."""
    student, teacher = (Work.of(model, models.beside) for model in (models.student, _largest(models)))
    split, prompt, answer, rows = spread.teacher, config.max_prompt_length, _completion(config), _rows(config)
    layer = KERNELS * IN_GRAPH if config.graphs else OPERATORS * LAUNCH
    rate, moved = OF_PEAK * gpu.tflops * 1e12, OF_BANDWIDTH * gpu.bandwidth * 1e9

    def forward(model: Work, tokens: float, behind: float, of: int, over: int = 1, output: float = 0.0) -> float:
        arithmetic = (
            2 * (model.body * tokens + model.output * output) + 4 * model.layers * model.attention * behind * tokens
        )
        read = model.read + of * behind * model.cache
        return max(arithmetic / rate / over, read / moved / over, model.layers * layer)

    writes = reads = 0.0
    asked = config.objective.reads_teacher and config.teacher_cache == "none"
    if config.mix.generates:
        answer = config.max_new_tokens
        at_once = _at_once(config, split)
        turns, alone = math.ceil(rows * split / at_once), isinstance(config.policy, StudentOnly)
        block = 1 if alone else BLOCK
        rounds = answer / (1 if alone else (1 - AGREEMENT**BLOCK) / (1 - AGREEMENT))
        step = forward(student, at_once, prompt + answer / 2, at_once, output=at_once)
        begin = forward(student, at_once * prompt, prompt / 2, at_once)
        writes = turns * (begin + rounds * (block * step + ROUND_OPERATORS * LAUNCH))
        if not alone:
            asked, heard = False, models.teacher_prompt
            verify = forward(teacher, at_once * block, heard + answer / 2, at_once, split, at_once * block)
            reads = turns * (forward(teacher, at_once * heard, heard / 2, at_once, split) + rounds * verify)
    if asked:
        read = models.teacher_prompt + answer
        reads += forward(teacher, rows * split * read, read / 2, 0, split)
    trained = sum(weight.numel() for weight in masters.named.values())
    passes = 2 + (trained > student.body / 2) + config.gradient_checkpointing
    backward = passes * forward(student, rows * (prompt + answer), (prompt + answer) / 2, 0)
    tokens = rows * answer
    loss = max(
        2 * tokens * (teacher.output + 3 * student.output) / rate, LOSS_PASSES * 4 * tokens * models.vocab_size / moved
    )
    update = 7 * 4 * trained / (spread.processes if config.fsdp else 1) / moved
    return {
        "the student writes": writes,
        "the teacher reads": reads,
        "forward and backward": backward + loss,
        "update": update,
    }
