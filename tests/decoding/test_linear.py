"""Packed linear layers: the same numbers, only within their context, and only where they may."""

import torch
from tiny import tiny_model
from torch import nn

from switchkd import Switch, decode
from switchkd.decoding.linear import packed


@torch.no_grad()
def test_packed_layers_give_the_same_numbers_for_every_shape():
    generator = torch.Generator().manual_seed(0)
    for bias in (False, True):
        layer = nn.Linear(24, 40, bias=bias)
        for shape in ((1, 24), (8, 24), (2, 3, 24), (0, 24), (5, 1, 24)):
            x = torch.randn(*shape, generator=generator)
            expected = layer(x)
            with packed(layer):
                torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(layer(x.expand(2, *shape)[1]), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_the_copy_lives_in_its_context_alone():
    layer, x = nn.Linear(4, 4), torch.ones(1, 4)
    with packed(layer):
        layer(x)
    layer.weight.mul_(2)
    with packed(layer):
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert "forward" not in vars(layer)
    try:
        with packed(layer):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert "forward" not in vars(layer)


def test_only_plain_single_precision_layers_are_packed():
    class Special(nn.Linear):
        pass

    others = [nn.Linear(4, 4).double(), Special(4, 4), nn.Conv1d(4, 4, 1), nn.Linear(4, 4).bfloat16()]
    hooked = nn.Linear(4, 4)
    hooked.forward = lambda x: x
    with packed(nn.ModuleList([*others, hooked]), nn.Linear(4, 4)):
        assert not any("forward" in vars(layer) for layer in others)
        assert hooked(1) == 1
    assert hooked(1) == 1


def test_decoding_packs_and_unpacks(monkeypatch):
    """A single-precision pair decodes through packed layers; afterwards the models are as they were."""
    student, teacher = (tiny_model("llama", seed, torch.float32) for seed in (1, 2))
    calls = []
    original = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *args: calls.append(1) or original(*args))
    [row] = decode(student, teacher, [[3, 4, 5]], Switch(), 6, eos_token_ids=[])
    assert calls and len(row.completion_ids) == 6
    for model in (student, teacher):
        assert not any("forward" in vars(module) for module in model.modules())
