"""Keyed noise: a pure function of its key, Gumbel-distributed, independent across keys and tokens."""

import hashlib
import math
import re
from itertools import product
from pathlib import Path

import pytest
import torch

from switchkd.methods import sampling
from switchkd.methods.sampling import Use, draw, gumbel_noise, keyed_uniform, keys_at, keys_tensor, noise_key, row_key


def noise_of(keys, vocab_size):
    return gumbel_noise(keys_tensor(keys), vocab_size)


def plain_python_noise(key, token):
    """The same function written out over Python integers, to pin the bits on every platform."""

    def mix(x):
        x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
        x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
        return x ^ (x >> 16)

    low, high = key % 2**32, key >> 32
    bits = mix(mix((token * 0x9E3779B9 + low) % 2**32) ^ high)
    signed = bits - 2**32 if bits >= 2**31 else bits
    return -math.log(-math.log1p(-(signed + 2**31 + 0.5) / 2**32))


def test_bits_are_those_of_the_plain_loop():
    keys = [noise_key(0, 0, 0), noise_key(1, 2, 3), 0, 2**64 - 1]
    noise = noise_of(keys, 50)
    for row, key in zip(noise.tolist(), keys, strict=True):
        assert row == pytest.approx([plain_python_noise(key, token) for token in range(50)], rel=1e-4, abs=1e-5)


def test_rows_depend_on_their_own_key_alone():
    keys = [noise_key(7, sample, 4) for sample in range(6)]
    together = noise_of(keys, 100)
    for i, key in enumerate(keys):
        assert torch.equal(noise_of([key], 100)[0], together[i])
    assert torch.equal(noise_of(keys, 60), together[:, :60])


def test_each_part_of_the_key_matters():
    keys = {noise_key(s, i, p) for s in (0, 1, -1) for i in (0, 1, 2**40) for p in (0, 1, 5)}
    assert len(keys) == 27


def test_noise_is_gumbel_and_uncorrelated():
    noise = noise_of([noise_key(0, i, 0) for i in range(40)], 5000).double()
    uniform = torch.exp(-torch.exp(-noise)).flatten().sort().values
    steps = (torch.arange(uniform.numel()) + 0.5) / uniform.numel()
    assert (uniform - steps).abs().max() < 1.95 / math.sqrt(uniform.numel())  # Kolmogorov-Smirnov at 0.1 %
    rows = torch.corrcoef(noise[:20])
    assert (rows - torch.eye(20)).abs().max() < 5 / math.sqrt(5000)
    neighbours = torch.corrcoef(torch.stack([noise[:, :-1].flatten(), noise[:, 1:].flatten()]))
    assert neighbours[0, 1].abs() < 5 / math.sqrt(noise.numel())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_have_the_law(temperature):
    logp = torch.tensor([0.6, 0.3, 0.09, 0.01]).log()
    count = 60_000
    noise = noise_of([noise_key(3, i, 2) for i in range(count)], 4)
    seen = torch.bincount(draw(logp.expand(count, 4), noise, temperature), minlength=4).double()
    expected = count * torch.softmax(logp.double() / temperature, -1)
    chi_squared = ((seen - expected) ** 2 / expected).sum()
    assert chi_squared < 16.3  # 3 degrees of freedom at 0.1 %


def test_rare_tokens_are_drawn_at_their_rate():
    """32-bit uniforms keep a tail of 50,000 tokens that share a probability of 2 %."""
    vocab = 50_001
    logp = torch.full((vocab,), math.log(0.02 / 50_000))
    logp[0] = math.log(0.98)
    tail = sum(int(draw(logp.unsqueeze(0), noise_of([noise_key(0, i, 0)], vocab))) > 0 for i in range(1500))
    assert 12 < tail < 52  # mean 30, standard deviation 5.4


def test_certain_and_impossible_tokens():
    logp = torch.tensor([[-math.inf, 0.0, -math.inf]]).expand(2000, 3)
    assert (draw(logp, noise_of(range(2000), 3)) == 1).all()


def test_greedy_ignores_the_noise():
    logp = torch.randn(5, 9, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    assert torch.equal(draw(logp, torch.full((5, 9), math.nan), 0.0), logp.argmax(-1))


def test_no_global_random_state_is_touched():
    before = torch.get_rng_state()
    noise_of([1, 2], 10)
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_is_what_it_was_when_it_was_made_with_float64():
    """To the last bit, at every residue of the 32 bits that fp32 cannot hold: otherwise a seed would give another text."""
    keys = [noise_key(0, 0, 0), noise_key(7, 3, 2)]
    assert keys == [0x238275BC38FCBE91, 0x8490C52F93C7DF65]
    noise = noise_of(keys, 50257)
    # exp and log may differ in the last bit between machines; the numbers they are taken of may not.
    assert noise[:, [0, 1, 2, 50256]].flatten().tolist() == pytest.approx([
        0.41302406787872314, 0.4919813275337219, -0.4195909798145294, -0.5030237436294556,
        -0.8663524389266968, -0.006629378534853458, 0.7706639766693115, 0.9426872730255127,
    ], rel=1e-6)  # fmt: skip
    uniform = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "log1p_", lambda x: uniform.append(x.neg()) or torch.log1p(x))
        noise_of(keys, 50257)
    digest = hashlib.sha256(torch.cat(uniform).numpy().tobytes()).hexdigest()
    assert digest == "a9f06ce716771f04979f088432dca9141358138624a5b2e6b2b1320e7c215ea3"


def test_no_two_uses_of_a_key_meet():
    """The choice of step s was once the key of sample s at position 1: what a step reads decided its text."""
    numbers = range(12)
    keys = [noise_key(*words, use) for use in Use for words in product(numbers, numbers, numbers)]
    assert len(set(keys)) == len(keys)
    spoken = [noise_key(noise_key(*words), 0, 0, Use.SPEAKER) for words in product(numbers, numbers, numbers)]
    assert not set(spoken) & set(keys)
    assert keyed_uniform(3, 5, 0, Use.CHOICE) != keyed_uniform(3, 5, 0)


def test_each_use_in_the_package_names_itself():
    """Whatever asks for a key outside decoding says what for."""
    package = Path(sampling.__file__).parents[1]
    for file in package.rglob("*.py"):
        for line in file.read_text(encoding="utf-8").splitlines():
            if re.search(r"(?<!def )(noise_key|keyed_uniform)\(", line) and file.name not in (
                "engine.py",
                "decode.py",
                "replay.py",
            ):
                assert "Use." in line or "sample_id, position, use" in line, f"{file.name}: {line}"


def test_keys_as_tensors_are_the_same_keys():
    """Also of words that fill 64 bits, whose products wrap."""
    words = (0, 1, -1, 7, 2**40, 2**63, 2**64 - 1, -(2**63))
    positions = torch.arange(5)
    for seed, sample in product(words, words):
        expected = keys_tensor([noise_key(seed, sample, position) for position in range(5)])
        assert torch.equal(keys_at(keys_tensor([row_key(seed, sample)]), positions), expected)


def test_who_wrote_a_token_is_drawn_by_a_key_of_its_own():
    keys = [noise_key(*words) for words in product((0, 1, 5), (0, 3), range(40))]
    drawn = sampling._speaker_uniform(keys_tensor(keys)).tolist()
    for key, own in zip(keys, drawn, strict=True):
        assert 0 <= keyed_uniform(key, 0, 0, Use.SPEAKER) - own < 2.0**-24 and own < 1
