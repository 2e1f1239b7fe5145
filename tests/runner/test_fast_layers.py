"""Layers in their fast form: the same numbers, only within their context, only where they may, and never of an old weight."""

import gc
import weakref

import pytest
import torch
from tiny import FAMILIES, new_model, tiny_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from switchkd import Switch, decode
from switchkd.runner import fast_layers
from switchkd.runner.fast_layers import FastLayers


@pytest.fixture
def packs(monkeypatch):
    """The shapes of the weights that were copied."""
    fast_layers._packs()  # makes one of its own, once
    made, original = [], fast_layers._packed
    monkeypatch.setattr(fast_layers, "_packed", lambda weight: made.append(tuple(weight.shape)) or original(weight))
    return made


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_has_its_logits_and_is_afterwards_as_it_was(family):
    model = new_model(family, 3, torch.float32)
    fast, tokens = FastLayers(model), torch.tensor([[3, 4, 5, 6, 7, 8], [9, 2, 4, 4, 11, 5]])
    expected = model(tokens).logits
    with fast():
        assert any("forward" in vars(module) for module in model.modules())
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-4)
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(model(tokens).logits, expected)


@torch.no_grad()
def test_layers_give_the_same_numbers_for_every_shape():
    generator = torch.Generator().manual_seed(0)
    for bias in (False, True):
        for size in (24, 25):
            layer = nn.Linear(size, 41, bias=bias)
            fast = FastLayers(layer)
            for shape in ((1, size), (8, size), (2, 3, size), (0, size), (5, 1, size), (300, size)):
                x = torch.randn(*shape, generator=generator)
                expected = layer(x)
                with fast():
                    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
                    torch.testing.assert_close(layer(x.expand(2, *shape)[1]), expected, rtol=1e-5, atol=1e-6)


def fused_adamw(layer):
    layer.weight.grad = torch.ones_like(layer.weight)
    torch.optim.AdamW(layer.parameters(), lr=1e-3, fused=True).step()


def one_bit(layer):
    """Of one weight, and past the count of versions."""
    layer.weight.detach().numpy().view("int32")[3, 2] ^= 1


def another_tensor(layer):
    layer.weight.data = torch.ones_like(layer.weight)


def swapped(layer):
    """All bits are still there."""
    layer.weight.copy_(layer.weight.flip(0))


CHANGES = {
    "fused AdamW": fused_adamw,
    "one bit": one_bit,
    "another tensor": another_tensor,
    "swapped": swapped,
    "copy_": lambda layer: layer.weight.copy_(layer.weight * 2),
    "data.copy_": lambda layer: layer.weight.data.copy_(layer.weight * 2),
    "_foreach_copy_": lambda layer: torch._foreach_copy_([layer.weight], [layer.weight * 2]),
    "load_state_dict": lambda layer: layer.load_state_dict({"weight": torch.ones(6, 4), "bias": torch.ones(6)}),
    "bias": lambda layer: layer.bias.data.add_(1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_weight_that_has_changed_is_copied_anew(change, packs):
    """Fused AdamW, ``.data`` and numpy do not count versions: such a weight would be used as it was."""
    layer, x = nn.Linear(4, 6), torch.eye(4)
    fast = FastLayers(layer)
    with fast(), torch.no_grad():
        layer.requires_grad_(False)(x)
    layer.requires_grad_(change == "fused AdamW")
    with torch.no_grad():
        CHANGES[change](layer)
    with fast(), torch.no_grad():
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert len(packs) == 1 + (change != "bias")


@torch.no_grad()
def test_a_copy_outlives_its_context_and_a_weight_without_use_has_none(packs, monkeypatch):
    looks, look = [], fast_layers._state
    monkeypatch.setattr(fast_layers, "_state", lambda weight: looks.append(weight) or look(weight))
    used, unused, x = nn.Linear(4, 6).requires_grad_(False), nn.Linear(4, 5), torch.ones(2, 4)
    fast = FastLayers(nn.ModuleList([used, unused]))
    for _ in range(3):
        with fast():
            used(x)
            used(x)
    assert packs == [(6, 4)] and len(looks) == 3 and all(weight is used.weight for weight in looks)  # once in a context


@torch.no_grad()
def test_a_copy_of_a_weight_that_is_trained_goes_with_its_context(packs, monkeypatch):
    """It will be another one by the next, so that nobody looks at its bits, and the copy would take room from its training."""
    monkeypatch.setattr(fast_layers, "_state", lambda weight: pytest.fail("looked"))
    layer, x = nn.Linear(4, 6), torch.ones(2, 4)
    fast = FastLayers(layer)
    for _ in range(2):
        with fast():
            layer(x)
        assert not any(product._copy.numel() for product in fast._products)
    assert packs == [(6, 4)] * 2


@torch.no_grad()
def test_contexts_may_be_nested_and_end_with_an_error(packs):
    """A student that is its own teacher is entered twice; the inner end leaves the outer context as it is."""
    layer, x = nn.Linear(4, 4).requires_grad_(False), torch.ones(2, 4)
    fast = FastLayers(layer)
    with pytest.raises(KeyboardInterrupt), fast():
        with fast(), FastLayers(layer)():
            layer(x)
        assert "forward" in vars(layer)
        layer(x)
        raise KeyboardInterrupt
    assert "forward" not in vars(layer) and len(packs) == 1


def test_only_plain_single_precision_layers_are_changed():
    class Special(nn.Linear):
        pass

    others = [nn.Linear(4, 4).double(), Special(4, 4), nn.Conv1d(4, 4, 1), nn.Linear(4, 4).bfloat16(), nn.LayerNorm(4)]
    hooked, later = nn.Linear(4, 4), nn.Linear(4, 4)
    hooked.forward = lambda x: x
    fast = FastLayers(nn.ModuleList([*others, hooked, later]))
    with fast():
        assert not any("forward" in vars(layer) for layer in others) and "forward" in vars(later)
        assert hooked(1) == 1
    assert hooked(1) == 1
    later.double()
    with fast():
        assert "forward" not in vars(later)
    later.float()
    with fast():
        assert "forward" in vars(later)
    later.weight.data = torch.ones(4, 4).tril().t()  # not in one piece
    with fast():
        assert "forward" not in vars(later)


class _Lookalike(LlamaRMSNorm):
    """Its names are those of an RMS norm."""

    def forward(self, x):
        return super().forward(x) + 1e-3


class _Unweighted(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x) / self.weight


class _LateEpsilon(LlamaRMSNorm):
    def forward(self, x):
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


@pytest.mark.parametrize(
    ("norm", "changed"),
    [
        (LlamaRMSNorm, True),
        (Qwen3RMSNorm, True),
        (GemmaRMSNorm, False),
        (_Lookalike, False),
        (_Unweighted, False),
        (_LateEpsilon, False),
    ],
)
@torch.no_grad()
def test_norms_are_changed_where_their_numbers_are_those_of_an_rms_norm(norm, changed):
    layer = norm(64, 1e-7)
    fast, x = FastLayers(layer), torch.randn(3, 2, 64, generator=torch.Generator().manual_seed(0))
    layer.weight.add_(torch.linspace(-0.5, 0.5, 64))
    expected = layer(x)
    with fast():
        assert ("forward" in vars(layer)) == changed
        torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(layer(x.bfloat16()), norm.forward(layer, x.bfloat16()))


class _Count(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.calls += 1
        return operation(*args, **(kwargs or {}))


@torch.no_grad()
def test_a_norm_takes_five_operations():
    layer, x = LlamaRMSNorm(8), torch.ones(1, 8)
    with FastLayers(layer)(), _Count() as count:
        layer(x)
    assert count.calls == 5


@torch.no_grad()
def test_what_decode_has_prepared_is_kept_as_long_as_the_model(packs):
    """Also of weights that could be trained; nothing of a model outlives it."""
    pair = [tiny_model("llama", seed, torch.float32) for seed in (1, 2)]
    first = decode(*pair, [[3, 4, 5]] * 2, Switch(), 4, eos_token_ids=[])
    made = len(packs)
    assert made and decode(*pair, [[3, 4, 5]] * 2, Switch(), 4, eos_token_ids=[]) == first and len(packs) == made
    pair[0].lm_head.weight.mul_(2)
    decode(*pair, [[3, 4, 5]] * 2, Switch(), 4, eos_token_ids=[])
    assert len(packs) == made + 1
    gone = weakref.ref(pair[0])
    del pair, first
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("wrong", ["few rows", "many rows", "nothing"])
@torch.no_grad()
def test_a_library_that_packs_for_one_number_of_rows_only_is_not_used(wrong, monkeypatch):
    """torch itself takes a packed weight for the number that it was packed for alone, so the others are tried first."""
    product = torch.ops.mkl._mkl_linear

    def spoilt(x, packed, weight, bias, rows):
        said = product(x, packed, weight, bias, rows)
        return said + (rows < 4 if wrong == "few rows" else rows > 256 if wrong == "many rows" else 0)

    monkeypatch.setattr(torch.ops.mkl, "_mkl_linear", spoilt)
    monkeypatch.setattr(fast_layers, "_packs", fast_layers._packs.__wrapped__)
    layer = nn.Linear(4, 6)
    with FastLayers(layer)():
        assert ("forward" in vars(layer)) == (wrong == "nothing")


def test_no_gradient_flows_within_the_context():
    layer, x = nn.Linear(4, 6), torch.ones(2, 4, requires_grad=True)
    with FastLayers(layer)():
        assert not layer(x).requires_grad
    assert layer(x).requires_grad
