"""The proof that a model is read and decoded exactly: with the ragged cache, and in a padded batch, as each row alone.

What an architecture does with masks, positions and windows is proved on a small random twin of it (``switchkd/twin.py``) with
rows that straddle every number of its config that acts by position. The model itself is then read on a short probe, since its
dtype, device and kernels are its own. A model is proved when it is first used; once for all is enough.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from switchkd.base.errors import ModelError, SwitchKDError
from switchkd.base.memory import out_of_memory
from switchkd.data.texts import collate
from switchkd.forward.base_model import BaseModel
from switchkd.forward.twin import positions, twin
from switchkd.runner.architecture import (
    batch_inputs,
    check_layers,
    context_length,
    has_router_logits,
    keeps_state,
)
from switchkd.runner.cache import Places
from switchkd.runner.modes import evaluating
from switchkd.runner.runner import ONE_BY_ONE, Runner

# Relative error of logits (root mean square over the vocabulary) that rounding may explain; and the most that it may be where the
# model's plain forward differs a tenth or a hundredth of it from itself, on the same text in another shape.
TOLERANCES = {torch.float64: (1e-6, 1e-6, 1), torch.float32: (1e-3, 1e-2, 100)}
# Of layers that keep a state, which many compute in fp32 whatever the rest is in, and otherwise for one token than for several.
STATES = (1e-2, 1e-2, 1)
HALF = (2e-2, 5e-2, 10)  # of a model that cannot be read in fp32: quantised, or on its way between devices
# A model without a twin is itself read up to here; that takes a while.
LONGEST = 8192
_NEW = 6  # tokens of each row that are decoded
_SHORT = 7

# What each model was when it was proved, and the architectures of which a twin has been.
_proved: WeakKeyDictionary[nn.Module, object] = WeakKeyDictionary()
_architectures: dict[str, bool] = {}  # and whether these are read one token after the other


@torch.no_grad()
def prove(model: PreTrainedModel) -> None:
    """Prove that rows of different lengths, rolled back and extended, and rows of a padded batch get the logits of each row alone.

    Whatever the architecture does with masks, positions or windows, it is either exact here or refused. The second call for a
    model costs nothing.

    Raises:
        ModelError: the logits differ by more than rounding, or the model cannot be called this way.
    """
    weight = next(model.parameters())
    state = model.dtype, weight.device.type, getattr(model.config, "_attn_implementation", None)
    if _proved.get(model) == state:
        return
    check_layers(model)
    with evaluating(model), torch.autocast(weight.device.type, enabled=False):
        numbers = None if _prove_twin(model) else _straddled(model)
        try:
            with _in_fp32(model):
                _compare(model, numbers, torch.promote_types(model.dtype, torch.float32))
        except _CannotBeCalled:
            _compare(model, numbers, model.dtype)
        except _NotANumber:  # its weights are broken; whoever reads a text with it says so, by sample and position
            return
    _proved[model] = state


class _CannotBeCalled(ModelError):
    """An architecture does not know a way of calling it."""


class _NotANumber(ModelError):
    """A model's logits are not finite, so that there is nothing to compare."""


def _prove_twin(model: nn.Module) -> bool:
    """Prove the architecture on a twin; whether there is one."""
    while isinstance(model, BaseModel):
        model = model.student
    if not isinstance(model, PreTrainedModel):
        return False
    key = f"{type(model)} {model.config._attn_implementation} {model.config.to_json_string(use_diff=False)}"
    if key not in _architectures:
        if (small := _usable_twin(model)) is None:
            return False
        numbers = sorted(set(positions(small.config.get_text_config(decoder=True)).values()))
        try:
            _compare(small, numbers, small.dtype)
        except ModelError:  # perhaps of float64 alone, which few have in mind
            ONE_BY_ONE.discard(small)
            _compare(small.float(), numbers, torch.float32)
        _architectures[key] = small in ONE_BY_ONE
    if _architectures[key]:
        ONE_BY_ONE.add(model)
    return True


def _usable_twin(model: PreTrainedModel) -> PreTrainedModel | None:
    """A twin whose plain forward works, in float64 if it does there; None for a class that makes none, which is read itself."""
    try:
        small = twin(type(model), model.config)
    except Exception:  # it raises what it likes
        return None
    for dtype in (torch.float64, torch.float32):
        try:
            _plain(small.to(dtype), [1, 2, 3])
        except Exception:
            continue
        return small
    return None


@contextmanager
def _in_fp32(model: nn.Module) -> Iterator[None]:
    """Each module of a model in half precision works with its weights in fp32 while it runs, one after the other."""
    kept: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
    in_shards: dict[nn.Module, dict[str, nn.Parameter]] = {}  # their data cannot be exchanged: others take their place

    def widen(module: nn.Module, *_: Any) -> None:
        half, weights = (torch.bfloat16, torch.float16), dict(module.named_parameters(recurse=False))
        shards = {name: own for name, own in weights.items() if isinstance(own, DTensor) and own.dtype in half}
        in_shards[module] = {name: weights[name] for name in shards}
        module._parameters.update({name: nn.Parameter(own.float(), False) for name, own in shards.items()})
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        kept[module] = [(tensor, tensor.data) for tensor in own if tensor.dtype in half]
        for tensor, data in kept[module]:
            tensor.data = data.float()

    def restore(module: nn.Module, *_: Any) -> None:
        for tensor, data in kept.pop(module, ()):
            tensor.data = data
        module._parameters.update(in_shards.pop(module, {}))

    with ExitStack() as stack:
        if next(model.parameters()).dtype in (torch.bfloat16, torch.float16):
            for module in model.modules():
                stack.callback(module.register_forward_pre_hook(widen, prepend=True).remove)
                stack.callback(module.register_forward_hook(restore, always_call=True).remove)
        yield


def _straddled(model: PreTrainedModel) -> list[int]:
    """The numbers of the config that act by position, for the model itself to straddle.

    Raises:
        ModelError: one is too large for that.
    """
    acting = positions(model.config.get_text_config(decoder=True))
    found = {name: number for name, number in acting.items() if number < context_length(model)}
    if large := [f"{name} = {number}" for name, number in found.items() if number > LONGEST]:
        raise ModelError(
            f"{model.config.model_type} cannot be proved to be decoded exactly: its config has {', '.join(large)}, its class makes "
            "no small copy of the model, and so long a text is too much to try; choose another model"
        )
    return sorted(set(found.values()))


def _compare(model: PreTrainedModel, numbers: Sequence[int] | None, dtype: torch.dtype) -> None:
    """Raise ModelError unless decoding and reading rows that straddle ``numbers`` give the logits of each row alone.

    ``dtype`` is what the model computes in.
    """
    name = model.config.model_type
    rows = _rows(model, numbers)
    with _explained(name, "by itself", _by_itself(model)):
        alone = [_plain(model, row) for row in rows]
        again = _plain(model, rows[0][: len(rows[0]) // 2 + 1])
    if any(logits.isnan().any() for logits in alone):
        raise _NotANumber(f"{name} gives logits that are not finite; check its weights and dtype")
    own = _error(again, alone[0][: len(again)])
    exact = not getattr(model, "is_quantized", False)
    floor, most, times = TOLERANCES.get(alone[0].dtype, HALF) if exact else HALF
    if keeps_state(model.config) and floor < STATES[0]:
        floor, most, times = STATES
    if not own <= most:
        raise ModelError(
            f"{name} gives other logits for a text when more text follows it: on a probe they are off by {own:.2g} (relative), "
            f"where rounding in {alone[0].dtype} explains {most:.2g}. It does not look at the past alone (is_decoder in its "
            "config?); choose another model"
        )
    tolerance = min(max(floor, times * own), most)
    way_out = "its attention is neither full nor sliding-window, or it keeps a state outside of its cache; choose another model"
    with _explained(name, "with the ragged cache", way_out):
        error = _decoding_error(model, rows, alone, dtype)
        if not error <= tolerance and keeps_state(model.config) and model not in ONE_BY_ONE:
            ONE_BY_ONE.add(model)
            error = _decoding_error(model, rows, alone, dtype)
    if not error <= tolerance:
        raise ModelError(
            f"{name} cannot be decoded exactly with the ragged cache: on a probe its logits are off by {error:.2g} (relative). "
            f"{way_out[0].upper()}{way_out[1:]}"
        )
    with _explained(name, "in a padded batch", way_out):
        batch = zip(_batch(model, rows), rows, alone, strict=True)
        error = _worst(_error(own[: len(row)], whole) for own, row, whole in batch)
    if not error <= tolerance:
        raise ModelError(
            f"{name} cannot be read in batches: on a probe a row's logits beside a longer one are off by {error:.2g} "
            f"(relative); {way_out}"
        )


def _decoding_error(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], alone: Sequence[Tensor], dtype: torch.dtype
) -> float:
    decoded = _decoded(model, rows, dtype)
    return _worst(_error(logits, alone[row][end - len(logits) : end]) for row, end, logits in decoded)


def _by_itself(model: PreTrainedModel) -> str:
    experts = has_router_logits(model) or "expert" in str(model.config)
    if model.dtype == torch.float64 and experts:
        return "its experts may have no float64: call model.set_experts_implementation('eager'), or take float32"
    return "load it in another dtype or on another device, or choose another model"


def _rows(model: PreTrainedModel, numbers: Sequence[int] | None) -> list[list[int]]:
    """Texts: one far beyond all ``numbers``, one across each of them, and a short one; none longer than the context.

    At least three, but where ``numbers`` is None two short ones.
    """
    context, vocab_size = context_length(model), model.config.get_text_config(decoder=True).vocab_size
    far = numbers[0] + numbers[-1] + 2 * _NEW if numbers else 2 * _NEW
    lengths = [int(min(length, context)) for length in [far, *(n + _NEW // 2 for n in numbers or ()), _SHORT]]
    lengths = sorted({length for length in lengths if length >= _SHORT}, reverse=True) or [int(context)]
    lengths += [lengths[-1]] * ((2 if numbers is None else 3) - len(lengths))
    return [[(7 * i + i // 5 + 3 * row + 2) % vocab_size for i in range(n)] for row, n in enumerate(lengths)]


def _decoded(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], dtype: torch.dtype
) -> Iterator[tuple[int, int, Tensor]]:
    """Decode the last tokens of each row as the engine does; yields a row, how many of its tokens were read, and its last logits.

    Wrong drafts are rejected, right ones kept, one row is left behind for a round, and the last block goes beyond the budget.
    """
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    runner, room = Runner(model, dtype), len(rows[0]) + _NEW
    runner.open(len(rows), room, vocab_size)
    runner.texts.copy_(torch.tensor([[*row, *[0] * (room - len(row))] for row in rows]))
    new = min(_NEW, len(rows[-1]) - 1)
    read = np.array([len(row) - new for row in rows])

    def extend(here: np.ndarray, drafts: Tensor) -> Tensor:
        places, ends = Places(here, torch.tensor(here, device=runner.device)), read[here]
        ends_b = torch.tensor(ends, device=runner.device)
        runner.catch_up(places, ends_b, ends)
        return runner.extend(places, ends_b, ends, drafts)

    every = np.arange(len(rows))
    wrong = torch.full((len(rows), new // 2), vocab_size // 2, device=runner.device)
    if runner.keeps_state:  # one token goes another way through such layers than several
        for _ in range(new // 2):
            for row, own in enumerate(extend(every, wrong[:, :0])):
                yield row, int(read[row]), own
            read += 1
        read -= new // 2
        runner.roll_back(read - 1)
    extend(every, wrong)
    runner.roll_back(np.maximum(read - 1 - every % 2, 0))  # some are further behind than others
    steps = 3 if len(rows) > 2 else 1  # of two rows none is left behind
    for step in range(steps):
        here = every[every != 1] if step == 1 else every
        block = new // 3
        drafts = torch.tensor(
            [list(rows[row][read[row] : read[row] + block]) for row in here.tolist()], device=runner.device
        )
        # Where a budget ends within a block, drafts behind it are read and not kept.
        behind = wrong[: len(here)] if step + 1 == steps else wrong[: len(here), :0]
        logits = extend(here, torch.cat([drafts, behind], 1))
        read[here] += block
        for row, own in zip(here.tolist(), logits, strict=True):
            yield row, int(read[row]), own[: block + 1]
        runner.roll_back(read - 1)


def _plain(model: PreTrainedModel, row: Sequence[int]) -> Tensor:
    """Logits ``[T, V]`` of a row alone, as the reference loop takes them."""
    return model(input_ids=torch.tensor([row], device=next(model.parameters()).device)).logits[0]


def _batch(model: PreTrainedModel, rows: Sequence[list[int]]) -> Tensor:
    """Logits ``[B, T, V]`` of all rows in one padded batch, as the loss reads them."""
    batch = collate([(row[:1], row[1:]) for row in rows]).to(next(model.parameters()).device)
    return model(**batch_inputs(model, batch)).logits


def _error(logits: Tensor, expected: Tensor) -> float:
    """The largest error of any position: root mean square of the difference, relative to how the logits there vary."""
    logits, expected = (each.cpu().double() for each in (logits, expected))  # not every device has float64
    logits, expected = logits[:, : expected.shape[1]], expected[:, : logits.shape[1]]
    off = torch.where(logits == expected, 0.0, logits - expected)  # of a masked token both are -inf
    finite = torch.where(expected.isfinite(), expected, 0.0)
    spread = finite - finite.mean(1, keepdim=True)
    return (off.square().mean(1) / spread.square().mean(1).clamp(min=1e-12)).sqrt().max().item()


def _worst(errors: Iterable[float]) -> float:
    """The largest; NaN if one is, which ``max`` would pass over."""
    return torch.tensor(list(errors)).max().item()


@contextmanager
def _explained(name: str, how: str, way_out: str) -> Iterator[None]:
    """Whatever an architecture raises where it is called in a way that it does not know becomes one error."""
    try:
        yield
    except Exception as error:
        if isinstance(error, SwitchKDError) or out_of_memory(error):
            raise
        raise _CannotBeCalled(f"{name} cannot be called {how} ({type(error).__name__}: {error}); {way_out}") from error
