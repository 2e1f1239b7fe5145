"""Before and after: divergence to the teacher, perplexity and ROUGE-L on held-out examples.

Evaluation draws no random numbers of its own: generated text is keyed by (seed, example id, position).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rouge_score.rouge_scorer import RougeScorer
from transformers import PreTrainedModel

from switchkd.cache import evaluating
from switchkd.data import Batch, TokenizedExample, collate
from switchkd.decoding import decode
from switchkd.divergences import forward_kl, log_probs
from switchkd.errors import DataError
from switchkd.loss import Head, response_hidden
from switchkd.models import Pair
from switchkd.policies import StudentOnly
from switchkd.rollouts import Rollout, mean


@dataclass(frozen=True)
class Scores:
    """Scores of one model on held-out examples.

    ``forward_kl`` is KL(teacher ‖ model) in nats per reference token, ``perplexity`` that of the reference tokens,
    ``rouge_l`` the mean ROUGE-L F1 × 100 (stemmed, best over an example's references) of ``examples`` completions.
    """

    forward_kl: float
    perplexity: float
    rouge_l: float
    examples: int
    reference_tokens: int


@dataclass(frozen=True)
class EvalSettings:
    """Everything the scores depend on beside models and examples; stored with them."""

    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    batch_size: int = 32
    score_batch_size: int = 4

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "rouge": "rouge_score rougeL F1 x 100, use_stemmer=True, best over references"}


Progress = Callable[[int], None]  # told of every example whose scoring or completion is done


def evaluate(
    pair: Pair,
    model: PreTrainedModel,
    examples: Sequence[TokenizedExample],
    settings: EvalSettings,
    progress: Progress = lambda _: None,
) -> Scores:
    """Score ``model`` (the pair's student or its teacher) against the pair's teacher and the references.

    Calls ``progress`` with a count of examples, twice for each example in all: once scored, once completed.
    """
    if not examples:
        raise DataError("no held-out examples to evaluate on; give an eval_file with at least one usable row")
    kl, nll, tokens = _likelihood(pair, model, examples, settings.score_batch_size, progress)
    texts = complete(pair, model, examples, settings, progress)
    rouge = mean(rouge_l(text, example.references) for text, example in zip(texts, examples, strict=True))
    perplexity = torch.tensor(nll / tokens, dtype=torch.float64).exp().item()  # inf where math.exp would raise
    return Scores(kl / tokens, perplexity, rouge, len(examples), tokens)


def complete(
    pair: Pair,
    model: PreTrainedModel,
    examples: Sequence[TokenizedExample],
    settings: EvalSettings,
    progress: Progress = lambda _: None,
) -> list[str]:
    """The model's own completions as text, special tokens left out."""
    rollouts: list[Rollout] = []
    for start in range(0, len(examples), settings.batch_size):
        part = examples[start : start + settings.batch_size]
        rollouts += decode(
            model,
            pair.teacher,
            [example.prompt_ids for example in part],
            StudentOnly(),
            settings.max_new_tokens,
            settings.temperature,
            settings.seed,
            sample_ids=[example.id for example in part],
            eos_token_ids=pair.eos_token_ids,
            batch_size=settings.batch_size,
            vocab_size=pair.vocab_size,
        )
        progress(len(part))
    if failed := [rollout for rollout in rollouts if rollout.error]:
        raise DataError(f"{len(failed)} of {len(examples)} held-out prompts cannot be completed: {failed[0].error}")
    return pair.tokenizer.batch_decode([rollout.completion_ids for rollout in rollouts], skip_special_tokens=True)


def rouge_l(text: str, references: Sequence[str]) -> float:
    """ROUGE-L F1 × 100 against the best of the references, with the Porter stemmer."""
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return 100 * max(scorer.score(reference, text)["rougeL"].fmeasure for reference in references)


@torch.no_grad()
def _likelihood(
    pair: Pair, model: PreTrainedModel, examples: Sequence[TokenizedExample], batch_size: int, progress: Progress
) -> tuple[float, float, int]:
    """Summed forward KL to the teacher, summed negative log-likelihood (nats) and number of the reference tokens."""
    kl = nll = 0.0
    tokens = 0
    head_p, head_q = (Head.of(scored, pair.vocab_size) for scored in (pair.teacher, model))
    with evaluating(model):
        for start in range(0, len(examples), batch_size):
            part = examples[start : start + batch_size]
            batch: Batch = collate([(example.prompt_ids, example.completion_ids) for example in part]).to(model.device)
            logq = log_probs(head_q(response_hidden(model, batch)))
            if model is not pair.teacher:
                logp = log_probs(head_p(response_hidden(pair.teacher, batch)))
                kl += forward_kl(logp, logq).double().sum().item()
            targets = batch.input_ids[batch.loss_mask]
            nll -= logq.gather(1, targets.unsqueeze(1)).double().sum().item()
            tokens += targets.numel()
            progress(len(part))
    return kl, nll, tokens
