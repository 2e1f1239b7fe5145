"""Make a student from a teacher by leaving out the decoder layers that change the hidden state least.

The measure is the block influence of ShortGPT (arXiv 2403.03853, eq. 1).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from switchkd.base.errors import ConfigError, NonFiniteError
from switchkd.base.storage import expanded, staged_folder
from switchkd.data.examples import load_examples
from switchkd.models.loading import load_model, load_tokenizer
from switchkd.models.vocabulary import save_tokenizer
from switchkd.runner.layers import decoder_layers, prune_layers, turning

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


INFLUENCE_TEXTS = 48
INFLUENCE_TOKENS = 256


def prune(
    name: str, output_dir: Path | str, layers: int, texts: Sequence[str] | None = None, seed: int = 0
) -> list[int]:
    """Save ``name`` (as in `load_model`) with ``layers`` decoder layers and its tokenizer, in fp32.

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

    from switchkd.runner.modes import evaluating

    tokens = sum(len(row) for row in input_ids_rows)
    if tokens == 0:
        raise ConfigError("the influence of layers is measured on texts, and there is no token in them; give some text")
    with evaluating(model), torch.no_grad(), turning(decoder_layers(model)[1]) as totals:
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
