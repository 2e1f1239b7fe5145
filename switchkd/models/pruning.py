"""Make a student from a teacher by leaving out the decoder layers that change the hidden state least.

The measure is the block influence of ShortGPT (arXiv 2403.03853, eq. 1).
"""

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switchkd.base.errors import ConfigError, ModelError, NonFiniteError
from switchkd.base.storage import expanded, staged_folder
from switchkd.models.loading import load_model, load_tokenizer, save_tokenizer

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


INFLUENCE_TEXTS = 48
INFLUENCE_TOKENS = 256
PER_LAYER_SETTINGS = ("layer_types", "mlp_layer_types", "no_rope_layers")


def prune(
    name: str, output_dir: Path | str, layers: int, texts: Sequence[str] | None = None, seed: int = 0
) -> list[int]:
    """Save ``name`` (hub name, folder or "demo") with ``layers`` decoder layers and its tokenizer, in fp32.

    The influence is measured on ``texts``, by default some dozens of GSM8K rows drawn with ``seed``. ``output_dir``
    is written whole or not at all. Returns the layers kept; raises ConfigError for a non-empty ``output_dir`` or a
    wrong number of layers, ModelError for a model that cannot be loaded or pruned.
    """
    target = Path(expanded(output_dir))
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"{target} exists already and is not an empty folder; name another, or remove it")
    from switchkd.models.adapters import has_adapter, merged

    model, tokenizer = load_model(name), load_tokenizer(name)
    model = merged(model) if has_adapter(model) else model
    rows = influence_rows(tokenizer, default_texts(seed) if texts is None else texts)
    kept = choose_layers(layer_influence(model, rows), layers)
    student = prune_layers(model, kept)
    with staged_folder(target) as folder:
        student.save_pretrained(folder)
        save_tokenizer(tokenizer, folder)
    return kept


def default_texts(seed: int) -> list[str]:
    """Questions with answers from the packaged GSM8K sample, drawn without replacement by ``seed`` alone.

    Halving SmolLM2-135M by them gives a perplexity of 199 on held-out answers; its teacher has 4.2.
    """
    import torch

    from switchkd.data.examples import load_examples

    examples = load_examples("gsm8k-sample:train")
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = [examples[i] for i in order[:INFLUENCE_TEXTS]]
    return ["\n".join([*(message.content for message in row.messages), row.completion]) for row in chosen]


def influence_rows(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, cut at `INFLUENCE_TOKENS`; texts without a token are left out."""
    rows = [tokenizer.encode(text)[:INFLUENCE_TOKENS] for text in texts]
    return [row for row in rows if row]


def layer_influence(model: "PreTrainedModel", input_ids_rows: list[list[int]]) -> list[float]:
    """Mean over all tokens of 1 - cos(layer input, layer output) for each decoder layer, between 0 and 2.

    Rows run one at a time, without padding, in eval mode. Raises ConfigError without a token, NonFiniteError where a
    hidden state is NaN or infinite.
    """
    import torch

    from switchkd.forward.modes import evaluating

    tokens = sum(len(row) for row in input_ids_rows)
    if tokens == 0:
        raise ConfigError("the influence of layers is measured on texts, and there is no token in them; give some text")
    with evaluating(model), torch.no_grad(), _turning(decoder_layers(model)[1]) as totals:
        for row in input_ids_rows:
            if row:
                model(input_ids=torch.tensor([row], device=model.device), use_cache=False)
    influence = [float(total) / tokens for total in totals]
    if not all(0 <= value <= 2.001 or abs(value) < 1e-6 for value in influence):
        raise NonFiniteError(f"layer influence is {influence}: a hidden state is not finite; check the model's weights")
    return influence


def choose_layers(influence: Sequence[float], keep: int) -> list[int]:
    """The ``keep`` layers that stay, ascending: first and last, and the most influential between them.

    Of equally influential layers the earlier one goes first. Raises ConfigError unless 2 <= keep <= layers.
    """
    count = len(influence)
    if not 2 <= keep <= count:
        raise ConfigError(f"cannot keep {keep} of {count} layers; first and last stay, so choose 2 to {count}")
    weakest_first = sorted(range(1, count - 1), key=lambda layer: (influence[layer], layer))
    return sorted({0, count - 1, *weakest_first[count - keep :]})


def prune_layers(model: "PreTrainedModel", keep: Sequence[int]) -> "PreTrainedModel":
    """A new model of the same class, dtype and device with only the decoder layers ``keep`` (ascending, each once).

    ``model`` is left alone. Raises ConfigError for a wrong ``keep``, ModelError where the decoder layers are not found
    or the smaller model has no place for the weights.
    """
    import torch

    path, layers = decoder_layers(model)
    count = len(layers)
    if not keep or sorted(set(keep)) != list(keep) or keep[0] < 0 or keep[-1] >= count:
        raise ConfigError(f"keep = {list(keep)} must name layers of 0 to {count - 1} in ascending order, each once")
    config = _smaller_config(model.config, keep, count)
    # The constructor draws initial weights, which are overwritten; the caller's random state must not notice.
    with torch.random.fork_rng(devices=[]):
        smaller = type(model)._from_config(config, dtype=model.dtype).to(model.device)
    try:
        smaller.load_state_dict(_renumbered(model.state_dict(), path, keep))
    except RuntimeError as error:
        raise ModelError(
            f"{config.model_type}: layers {list(keep)} do not fit a model of {len(keep)} layers ({error}); its layers "
            "differ by position, so it cannot be pruned this way"
        ) from error
    smaller.generation_config = copy.deepcopy(model.generation_config)
    return smaller.train(model.training)


def decoder_layers(model: "PreTrainedModel") -> "tuple[str, nn.ModuleList]":
    """Path and list of the decoder's layers: the outermost ModuleList as long as ``config.num_hidden_layers``."""
    from torch import nn

    if model.config.get_text_config(decoder=True) is not model.config:
        raise ModelError(f"{model.config.model_type} is a model of several parts; prune its text model on its own")
    count = model.config.num_hidden_layers
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return path, module
    raise ModelError(f"{model.config.model_type}: no list of {count} decoder layers found, so it cannot be pruned")


@contextmanager
def _turning(layers: "nn.ModuleList") -> "Iterator[list[torch.Tensor]]":
    """While open, sums 1 - cos(input, output) over every token that passes each layer."""
    import torch

    totals = [torch.zeros((), dtype=torch.float64) for _ in layers]

    def hook(index: int) -> Any:
        def add(_: "nn.Module", args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosine = torch.nn.functional.cosine_similarity(before.cpu().double(), after.cpu().double(), dim=-1)
            totals[index] += (1 - cosine).sum()

        return add

    handles = [layer.register_forward_hook(hook(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        yield totals
    finally:
        for handle in handles:
            handle.remove()


def _smaller_config(config: "PretrainedConfig", keep: Sequence[int], count: int) -> "PretrainedConfig":
    smaller = copy.deepcopy(config)
    smaller.num_hidden_layers = len(keep)
    for name in PER_LAYER_SETTINGS:
        values = getattr(config, name, None)
        if isinstance(values, list) and len(values) == count:
            setattr(smaller, name, [values[layer] for layer in keep])
    return smaller


def _renumbered(state: "dict[str, torch.Tensor]", path: str, keep: Sequence[int]) -> "dict[str, torch.Tensor]":
    new_index = {str(old): str(new) for new, old in enumerate(keep)}
    pattern = re.compile(rf"{re.escape(path)}\.(\d+)(\..+)")
    renamed = {}
    for name, tensor in state.items():
        match = pattern.fullmatch(name)
        if match is None:
            renamed[name] = tensor
        elif match[1] in new_index:
            renamed[f"{path}.{new_index[match[1]]}{match[2]}"] = tensor
    return renamed
