"""A pruned model is the same model with layers skipped, and nothing else."""

import copy
import re

import pytest
import torch
from tiny import FAMILIES, VOCAB, save, tiny_model, tiny_tokenizer
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from switchkd.base.errors import ConfigError, ModelError, NonFiniteError
from switchkd.data.examples import Example
from switchkd.data.fields import Message
from switchkd.models.loading import load_model, load_tokenizer
from switchkd.runner.cache import CACHE
from switchkd.runner.layers import decoder_layers, prune_layers
from switchkd.studies import pruning
from switchkd.studies.pruning import choose_layers, layer_influence, prune

KEEP = [0, 2, 4]
IDS = torch.tensor([[3, 7, 11, 2, 19, 5, 5, 8]])


def deep_model(family: str, layers: int = 5):
    """A random float64 model of five different layers (tests.tiny has two)."""
    config = copy.deepcopy(FAMILIES[family]().config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = (["sliding_attention", "full_attention"] * layers)[:layers] if "gemma3" in family else None
        config = type(config)(**config.to_dict())
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = type(FAMILIES[family]())(config).to(torch.float64).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def logits_skipping(model, dropped: list[int]) -> torch.Tensor:
    """The whole model's forward with the dropped layers' outputs replaced by their inputs."""

    def skip(_, args, kwargs, output):
        before = args[0] if args else kwargs["hidden_states"]
        return (before, *output[1:]) if isinstance(output, tuple) else before

    layers = decoder_layers(model)[1]
    handles = [layers[i].register_forward_hook(skip, with_kwargs=True) for i in dropped]
    result = logits(model)
    for handle in handles:
        handle.remove()
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_every_layer_gives_bit_equal_logits(family):
    model = deep_model(family)
    assert torch.equal(logits(prune_layers(model, range(5))), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_dropping_layers_is_skipping_them(family):
    model = deep_model(family)
    smaller = prune_layers(model, KEEP)
    assert type(smaller) is type(model)
    assert torch.equal(logits(smaller), logits_skipping(model, [1, 3]))
    assert not torch.allclose(logits(smaller), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_model_decodes_with_a_cache_after_saving_and_loading(family, tmp_path):
    smaller = prune_layers(deep_model(family), KEEP)
    smaller.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), "float64", "cpu")
    assert torch.equal(logits(loaded), logits(smaller))
    with torch.no_grad():
        cache = DynamicCache(config=loaded.config)
        loaded(input_ids=IDS[:, :5], use_cache=True, **{CACHE: cache})
        step = loaded(input_ids=IDS[:, 5:], use_cache=True, **{CACHE: cache}).logits
    torch.testing.assert_close(step, logits(smaller)[:, 5:], rtol=1e-10, atol=1e-10)


def test_layer_types_are_taken_along():
    smaller = prune_layers(deep_model("gemma3-hybrid"), [0, 1, 2, 4])
    assert smaller.config.layer_types == [
        "sliding_attention",
        "full_attention",
        "sliding_attention",
        "sliding_attention",
    ]
    assert smaller.config.num_hidden_layers == 4


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma"])
def test_tied_embeddings_stay_tied(family):
    model = deep_model(family)
    smaller = prune_layers(model, KEEP)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert smaller.get_output_embeddings().weight is smaller.get_input_embeddings().weight


def test_the_original_and_the_random_state_are_left_alone():
    model = deep_model("llama")
    before, state = logits(model), torch.random.get_rng_state()
    smaller = prune_layers(model, KEEP)
    assert torch.equal(torch.random.get_rng_state(), state)
    with torch.no_grad():
        for parameter in smaller.parameters():
            parameter.zero_()
    assert model.config.num_hidden_layers == 5 and torch.equal(logits(model), before)


def test_dtype_mode_and_eos_are_kept():
    model = tiny_model(dtype=torch.bfloat16)
    model.generation_config.eos_token_id = [1, 4]
    smaller = prune_layers(model, [1])
    assert smaller.dtype == torch.bfloat16 and not smaller.training
    assert smaller.generation_config.eos_token_id == [1, 4]
    # Rotary frequencies in bf16 would turn far positions by the wrong angle.
    assert smaller.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("keep", [[], [0, 0], [1, 0], [-1, 0], [0, 2]])
def test_a_wrong_choice_of_layers_is_refused(keep):
    with pytest.raises(ConfigError, match="must name layers of 0 to 1"):
        prune_layers(tiny_model(), keep)


def test_a_model_without_a_list_of_layers_is_refused():
    model = tiny_model()
    model.config.num_hidden_layers = 7
    with pytest.raises(ModelError, match="no list of 7 decoder layers"):
        prune_layers(model, [0])


def test_the_outermost_list_is_taken_when_an_inner_one_is_as_long():
    model = tiny_model()
    model.model.layers[0].experts = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
    assert decoder_layers(model)[0] == "model.layers"


# --- influence ----------------------------------------------------------------------------------------------------


def hand_influence(model, rows: list[list[int]]) -> list[float]:
    """From output_hidden_states, whose last entry follows the final norm; so the last layer is left out."""
    sums, tokens = [0.0] * (model.config.num_hidden_layers - 1), 0
    for row in rows:
        with torch.no_grad():
            states = model(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states
        for i in range(len(sums)):
            x, y = states[i][0], states[i + 1][0]
            sums[i] += sum(1 - float(a @ b / (a.norm() * b.norm())) for a, b in zip(x, y, strict=True))
        tokens += len(row)
    return [value / tokens for value in sums]


@pytest.mark.parametrize("family", FAMILIES)
def test_influence_is_the_mean_over_tokens_not_over_rows(family):
    model, rows = deep_model(family), [[3, 7, 11, 2, 19, 5], [4], []]
    influence = layer_influence(model, rows)
    assert len(influence) == 5
    assert influence[:-1] == pytest.approx(hand_influence(model, rows[:2]), rel=1e-6)


def test_a_layer_that_does_nothing_has_no_influence_and_is_dropped_first():
    model = deep_model("llama")
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
    influence = layer_influence(model, [IDS[0].tolist()])
    assert influence[2] == pytest.approx(0, abs=1e-12) and min(influence) == influence[2]
    kept = choose_layers(influence, 4)
    assert kept == [0, 1, 3, 4]
    assert torch.equal(logits(prune_layers(model, kept)), logits(model))


def test_influence_of_a_bf16_model_is_not_rounded_to_bf16():
    """1 - cos of near-equal vectors is below bf16's spacing at 1 (0.0039)."""
    model = tiny_model(dtype=torch.bfloat16)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.004)
            layer.mlp.down_proj.weight.mul_(0.004)
    wide = copy.deepcopy(model).to(torch.float64)
    rows = [IDS[0].tolist()]
    assert layer_influence(model, rows) == pytest.approx(layer_influence(wide, rows), rel=0.2)
    assert max(layer_influence(model, rows)) < 0.003


def test_influence_leaves_no_hook_mode_or_gradient_behind():
    model = deep_model("llama").train()
    layer_influence(model, [[3, 4]])
    assert model.training
    assert all(not layer._forward_hooks for layer in model.model.layers)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_influence_ignores_dropout():
    model = deep_model("gpt2")
    expected = layer_influence(model, [IDS[0].tolist()])
    assert layer_influence(model.train(), [IDS[0].tolist()]) == expected


def test_no_token_and_nan_are_errors():
    model = tiny_model()
    with pytest.raises(ConfigError, match="there is no token"):
        layer_influence(model, [[]])
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="not finite"):
        layer_influence(model, [[3, 4]])


@pytest.mark.parametrize(
    ("keep", "expected"),
    [(6, [0, 1, 2, 3, 4, 5]), (5, [0, 1, 2, 3, 5]), (4, [0, 2, 3, 5]), (3, [0, 3, 5]), (2, [0, 5])],
)
def test_first_and_last_stay_and_the_weakest_go_one_by_one(keep, expected):
    assert choose_layers([0.0, 0.3, 0.5, 0.9, 0.1, 0.0], keep) == expected


def test_of_equal_layers_the_earlier_goes_first():
    assert choose_layers([1.0, 0.5, 0.5, 0.5, 1.0], 4) == [0, 2, 3, 4]


@pytest.mark.parametrize("keep", [1, 0, -1, 5])
def test_a_wrong_number_of_layers_is_refused(keep):
    with pytest.raises(ConfigError, match=f"cannot keep {keep} of 4 layers"):
        choose_layers([0.1] * 4, keep)


# --- the command's function ---------------------------------------------------------------------------------------


@pytest.fixture
def teacher(tmp_path):
    folder = save(tmp_path / "teacher")
    config = LlamaConfig(**{**tiny_model().config.to_dict(), "num_hidden_layers": 4})
    with torch.random.fork_rng():
        torch.manual_seed(5)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_prune_saves_model_and_tokenizer(teacher, tmp_path):
    kept = prune(str(teacher), tmp_path / "student", 3, texts=["2042 abc", "fed", ""])
    assert len(kept) == 3 and kept[0] == 0 and kept[-1] == 3
    student = load_model(str(tmp_path / "student"), device="cpu")
    expected = prune_layers(load_model(str(teacher), device="cpu"), kept)
    assert torch.equal(logits(student), logits(expected))
    assert load_tokenizer(str(tmp_path / "student")).get_vocab() == tiny_tokenizer().get_vocab()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student", "teacher"]


def test_prune_takes_an_empty_folder_and_refuses_any_other(teacher, tmp_path):
    (tmp_path / "empty").mkdir()
    prune(str(teacher), tmp_path / "empty", 2, texts=["abc"])
    saved = (tmp_path / "empty" / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="not an empty folder"):
        prune(str(teacher), tmp_path / "empty", 3, texts=["abc"])
    assert (tmp_path / "empty" / "model.safetensors").read_bytes() == saved


def test_a_failure_while_saving_leaves_nothing(teacher, tmp_path, monkeypatch):
    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    tokenizer = load_tokenizer(str(teacher))
    monkeypatch.setattr(type(tokenizer), "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space left"):
        prune(str(teacher), tmp_path / "student", 2, texts=["abc"])
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_default_texts_depend_on_the_seed_alone(monkeypatch):
    def load_examples(path: str) -> list[Example]:
        return [Example(i, (Message("user", f"{path} {i}?"),), f"{i}!", (), "") for i in range(200)]

    monkeypatch.setattr("switchkd.studies.pruning.load_examples", load_examples)
    torch.manual_seed(1)
    first, state = pruning.default_texts(0), torch.random.get_rng_state()
    torch.manual_seed(2)
    assert pruning.default_texts(0) == first != pruning.default_texts(1)
    assert len(set(first)) == pruning.INFLUENCE_TEXTS and re.fullmatch(r"gsm8k-sample:train (\d+)\?\n\1!", first[0])
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_long_texts_are_cut_and_empty_ones_left_out():
    rows = pruning.influence_rows(tiny_tokenizer(), ["a" * 1000, "", "ab"])
    assert [len(row) for row in rows] == [pruning.INFLUENCE_TOKENS, 2]
    assert max(max(row) for row in rows) < VOCAB
