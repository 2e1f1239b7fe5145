"""Scores of a model on held-out examples: its own completions against references, and its distributions against the teacher's.

Evaluation draws no random numbers of its own: generated text is keyed by (seed, example id, position), so neither the batch
size nor the other examples can move a score, and training goes on as if nobody had looked.

p is the teacher, q the scored model; N examples, S sampling seeds.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from switchkd.base import signals
from switchkd.base.errors import ConfigError, DataError
from switchkd.base.memory import halving
from switchkd.data.texts import TokenizedExample
from switchkd.decoding.decode import decode_job
from switchkd.decoding.rollouts import BANDS, DecodeCost
from switchkd.decoding.rows import Job
from switchkd.evaluation.generate_backend import complete_by_generate
from switchkd.evaluation.results import Completion, Evaluation
from switchkd.evaluation.settings import EvalSettings
from switchkd.evaluation.statistics import Values
from switchkd.evaluation.tasks import Task
from switchkd.forward.parallel import Together
from switchkd.methods.divergences import forward_kl
from switchkd.models.pair import Pair
from switchkd.teachers.asked import TextReader, text_reader

# Response tokens whose two distributions over the vocabulary are held at a time.
_TOKENS_AT_ONCE = 512

Progress = Callable[[int, str | None], None]  # told of examples that are done, and what to show beside the bar
Read = tuple[
    list[int], list[int], list[int]
]  # of a prompt as the scored model reads it, as the teacher does, of a response


def evaluate(
    pair: Pair,
    model: PreTrainedModel,
    examples: Sequence[TokenizedExample],
    task: Task,
    settings: EvalSettings,
    progress: Progress = lambda *_: None,
) -> Evaluation:
    """Score ``model`` (the pair's student or its teacher) against the pair's teacher and the references.

    Tells ``progress`` of ``work(examples, settings)`` examples in all. Processes that run the teacher together ask in step.

    Raises:
        DataError: there is nothing to evaluate on, a reference cannot be scored against, or a prompt cannot be completed.
        ConfigError: settings that contradict.
    """
    if not examples:
        raise DataError("no held-out examples to evaluate on; give an eval_file with at least one usable row")
    if settings.temperature and not settings.seeds:
        raise ConfigError("sampled completions need at least one of eval_seeds")
    _check_references(task, examples)
    prompts = [(_asked(pair, model, example), example.teacher_reads) for example in examples]
    references = [(*asked, example.completion_ids) for asked, example in zip(prompts, examples, strict=True)]
    scores = _likelihood_scores(pair, model, references, settings.score_batch_size, progress)
    completions, ids = complete(pair, model, examples, settings, progress)
    scores |= _text_scores(task, examples, completions)
    if settings.own_text:
        own = [(*asked, text) for row in ids for asked, text in zip(prompts, row, strict=True)]
        kl, _, tokens = _token_sums(pair, model, own, settings.score_batch_size, progress)
        scores["own_forward_kl"] = Values((kl.sum(0) / tokens.sum(0)).reshape(len(ids), len(examples)))
    groups = [example.group for example in examples]
    return Evaluation(scores, task.primary, groups, {}, [text for row in completions for text in row])


def _asked(pair: Pair, model: PreTrainedModel, example: TokenizedExample) -> list[int]:
    """The prompt as the scored model reads it."""
    return example.teacher_reads if model is pair.teacher else example.prompt_ids


def work(examples: Sequence[TokenizedExample], settings: EvalSettings) -> int:
    """Examples that ``evaluate`` reports to its progress: read once, completed under each seed, perhaps read again."""
    passes = len(settings.passes)
    return len(examples) * (1 + passes + (passes if settings.own_text else 0))


def score_names(task: Task, examples: Sequence[TokenizedExample]) -> list[str]:
    """The names of the scores that ``evaluate`` gives on these examples."""
    nothing = [[Completion(example.id, None, "", 0, "length") for example in examples[:1]]]
    names = [*_text_scores(task, examples[:1], nothing), "forward_kl", "perplexity"]
    return [*names, *(f"forward_kl@{band}" for band in BANDS)]


def _check_references(task: Task, examples: Sequence[TokenizedExample]) -> None:
    """Raise DataError, naming the row, for a reference that the task cannot score against; before anything takes time."""
    for example in examples:
        try:
            task.score("", example.references, example.group)
        except DataError as error:
            raise DataError(f"{example.source}: task {task.name}: {error}") from error


def _text_scores(
    task: Task, examples: Sequence[TokenizedExample], completions: Sequence[Sequence[Completion]]
) -> dict[str, Values]:
    """What the task says of each completion, and how long it is and whether it ended by itself."""
    rows = [
        [
            {
                **task.score(text.text, example.references, example.group),
                "length": float(text.tokens),
                "eos": 100.0 * (text.stop_reason == "eos"),
            }
            for text, example in zip(row, examples, strict=True)
        ]
        for row in completions
    ]
    scores = {name: Values(np.array([[scored[name] for scored in row] for row in rows])) for name in rows[0][0]}
    for group in task.leave_out:
        rest = np.array([example.group != group for example in examples])
        if not rest.all():
            scores[f"{task.primary}_without_{group.replace(' ', '_')}"] = scores[task.primary].only(rest)
    return scores


def scored_otherwise(result: Evaluation, examples: Sequence[TokenizedExample], task: Task) -> list[str]:
    """The scores of an evaluation that are not those of its completions of ``examples``; what needs a model is not looked at."""
    by_place = {(text.seed, text.example): text for text in result.completions}
    seeds = dict.fromkeys(seed for seed, _ in by_place)
    if by_place.keys() != {(seed, example.id) for seed in seeds for example in examples} or not by_place:
        return ["completions"]
    rows = [[by_place[seed, example.id] for example in examples] for seed in seeds]
    found = _text_scores(task, examples, rows)
    return [
        name
        for name, own in found.items()
        if name not in result.scores or not np.array_equal(own.values, result.scores[name].values)
    ]


# --- completions --------------------------------------------------------------------------------------------------


def complete(
    pair: Pair,
    model: PreTrainedModel,
    examples: Sequence[TokenizedExample],
    settings: EvalSettings,
    progress: Progress = lambda *_: None,
) -> tuple[list[list[Completion]], list[list[list[int]]]]:
    """The model's own completions under each seed, ``[S][N]``, and their token ids."""
    write = _by_generate if settings.backend == "generate" else _by_engine
    completions, ids = [], []
    for seed, written in zip(settings.passes, write(pair, model, examples, settings, progress), strict=True):
        texts = pair.tokenizer.batch_decode(
            [pair.ends.answer(own, pair.tokenizer) for own, _ in written], skip_special_tokens=True
        )
        completions.append([
            Completion(example.id, seed, text, len(own), reason)
            for example, text, (own, reason) in zip(examples, texts, written, strict=True)
        ])  # fmt: skip
        ids.append([own for own, _ in written])
    return completions, ids


def _by_engine(
    pair: Pair,
    model: PreTrainedModel,
    examples: Sequence[TokenizedExample],
    settings: EvalSettings,
    progress: Progress,
) -> Iterator[Sequence[tuple[list[int], str]]]:
    """Under each seed, of which each row carries its own: all are decoded in one job, so that the batch stays full."""
    told = 0

    def on_round(cost: DecodeCost) -> None:
        """A row takes at most max_new_tokens, so that so many are done at least."""
        nonlocal told
        done = cost.kept_tokens // settings.max_new_tokens
        progress(done - told, f"{cost.kept_tokens / cost.seconds:.0f} tok/s")
        told = done

    passes = settings.passes
    seeds = [seed or 0 for seed in passes for _ in examples]
    prompts, ids = [_asked(pair, model, e) for _ in passes for e in examples], [e.id for _ in passes for e in examples]
    job = Job.of(model, pair.teacher, prompts, settings.decoding(0), ids, pair.ends, pair.vocab_size, seeds=seeds)
    rollouts = decode_job(job, on_round)
    if failed := [rollout for rollout in rollouts if rollout.error]:
        broken = len({rollout.id for rollout in failed})
        raise failed[0].failure(f"{broken} of {len(examples)} held-out prompts cannot be completed")
    progress(len(rollouts) - told, None)
    for start in range(0, len(rollouts), len(examples)):
        yield [(rollout.completion_ids, rollout.stop_reason) for rollout in rollouts[start : start + len(examples)]]


def _by_generate(
    pair: Pair,
    model: PreTrainedModel,
    examples: Sequence[TokenizedExample],
    settings: EvalSettings,
    progress: Progress,
) -> Iterator[Sequence[tuple[list[int], str]]]:
    """Under each seed, one after the other: ``generate`` draws for a whole batch from one generator."""
    prompts = [_asked(pair, model, example) for example in examples]
    for seed in settings.passes:
        yield complete_by_generate(
            model,
            prompts,
            settings.decoding(seed or 0),
            pair.ends,
            pair.vocab_size,
            lambda count: progress(count, None),
        )


# --- distributions ------------------------------------------------------------------------------------------------


def _likelihood_scores(
    pair: Pair, model: PreTrainedModel, rows: Sequence[Read], batch_size: int, progress: Progress
) -> dict[str, Values]:
    """Divergence to the teacher, in all and by position, and perplexity, on the reference tokens."""
    kl, nll, tokens = _token_sums(pair, model, rows, batch_size, progress)
    whole = tokens.sum(0)
    scores = {"forward_kl": _per_token(kl.sum(0), whole), "perplexity": _per_token(nll.sum(0), whole)}
    bands = zip(BANDS, kl, tokens, strict=True)
    return scores | {f"forward_kl@{band}": _per_token(own, count) for band, own, count in bands}


def _per_token(sums: np.ndarray, tokens: np.ndarray) -> Values:
    return Values(sums[None] / np.maximum(tokens, 1), tokens)


@torch.no_grad()
def _token_sums(
    pair: Pair, model: PreTrainedModel, rows: Sequence[Read], batch_size: int, progress: Progress
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Forward KL KL(p‖q) and negative log-likelihood (nats) summed in each position band of each row, and tokens there.

    Each ``[bands, rows]`` float64. ``batch_size`` rows are read at once, fewer where memory runs out.
    """
    sums = np.zeros((3, len(BANDS), len(rows)))
    teacher = text_reader(pair.teacher, pair.vocab_size, pair.ends)
    scored = teacher if model is pair.teacher else text_reader(model, pair.vocab_size, pair.ends)
    alone = Together.of(pair.teacher).alone
    left = sorted(range(len(rows)), key=lambda place: sum(map(len, rows[place])))  # little padding

    def read(size: int) -> tuple[list[int], np.ndarray, np.ndarray]:
        """The next ``size`` places, and what their tokens lose."""
        signals.check()
        return left[:size], *_token_losses(teacher, scored, [rows[place] for place in left[:size]])

    while left:
        size = min(batch_size, len(left))
        (places, kl, nll), batch_size = halving(read, size, "scoring", "EvalSettings.score_batch_size", alone)
        lengths = [len(rows[place][2]) for place in places]
        positions = np.concatenate([np.arange(length) for length in lengths])
        owners = np.repeat(places, lengths)
        per_token = np.stack([kl, nll, np.ones(len(owners))])
        for band, (low, high) in enumerate(BANDS.values()):
            inside = (low <= positions) & (positions <= high)
            np.add.at(sums[:, band].T, owners[inside], per_token[:, inside].T)
        left = left[len(places) :]
        progress(len(places), None)
    return sums[0], sums[1], sums[2]


def _token_losses(teacher: TextReader, scored: TextReader, rows: Sequence[Read]) -> tuple[np.ndarray, np.ndarray]:
    """Forward KL to the teacher and negative log-likelihood of every response token of a batch, in nats."""
    hidden_q = scored.hidden([(prompt, completion) for prompt, _, completion in rows])
    hidden_p = (
        hidden_q if scored is teacher else teacher.hidden([(prompt, completion) for _, prompt, completion in rows])
    )
    written = [token for *_, completion in rows for token in completion]
    targets = scored.head.ends.events(torch.tensor(written, dtype=torch.int64, device=hidden_q.device))
    kl, nll = [], []
    for part in _chunks(len(targets)):
        logq = scored.log_probs(hidden_q[part])
        logp = logq if scored is teacher else teacher.log_probs(hidden_p[part]).to(logq.device)
        kl.append(forward_kl(logp, logq))
        nll.append(-logq.gather(1, targets[part].unsqueeze(1))[:, 0])
    # Sums are float64, which not every device has: on the host.
    return torch.cat(kl).cpu().double().numpy(), torch.cat(nll).cpu().double().numpy()


def _chunks(tokens: int) -> Iterator[slice]:
    return (slice(start, start + _TOKENS_AT_ONCE) for start in range(0, max(tokens, 1), _TOKENS_AT_ONCE))
