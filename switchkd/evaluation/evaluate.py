"""Scores of a model on held-out examples: its own completions against references, and its distributions against the teacher's.

Evaluation draws no random numbers of its own: generated text is keyed by (seed, example id, position), so neither the batch
size nor the other examples can move a score, and training goes on as if nobody had looked.

p is the teacher, q the scored model; N examples, S sampling seeds.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from switchkd.base import signals
from switchkd.base.errors import ConfigError, DataError
from switchkd.base.memory import halving
from switchkd.crossing.bridge import Bridge, Side
from switchkd.crossing.laws import SharedLaw
from switchkd.data.texts import TokenizedExample
from switchkd.decoding.decode import decode_job
from switchkd.decoding.rollouts import BANDS, DecodeCost, Rollouts
from switchkd.decoding.rows import Job
from switchkd.decoding.settings import DecodeSettings
from switchkd.evaluation.generate_backend import complete_by_generate
from switchkd.evaluation.results import Completion, Evaluation, Question
from switchkd.evaluation.settings import EvalSettings
from switchkd.evaluation.statistics import Values
from switchkd.evaluation.tasks import Task
from switchkd.forward.parallel import Together
from switchkd.methods.divergences import forward_kl
from switchkd.methods.policy import STUDENT
from switchkd.models.pair import Pair
from switchkd.teachers.across import joined
from switchkd.teachers.asked import TextReader, side_reader
from switchkd.writing.turn_engine import decode_turns
from switchkd.writing.turns import TurnJob, only_reader

# Response tokens whose two distributions over the vocabulary are held at a time.
_TOKENS_AT_ONCE = 512

Progress = Callable[[int, str | None], None]  # told of examples that are done, and what to show beside the bar
# A prompt as the scored model reads it and as the teacher does, and a response as each of them does.
Read = tuple[list[int], list[int], list[int], list[int]]


@dataclass(frozen=True)
class Scored:
    """The model of a pair that is scored, beside the pair's teacher, which may have another tokenizer."""

    pair: Pair
    model: PreTrainedModel

    @property
    def is_teacher(self) -> bool:
        return self.model is self.pair.teacher

    @property
    def bridge(self) -> Bridge | None:
        """From this model to the teacher, where they have two tokenizers."""
        return None if self.is_teacher else self.pair.bridges.get("")

    @property
    def side(self) -> Side:
        """How it spells text."""
        return self.pair.side_of("") if self.is_teacher else self.pair.side

    def prompt(self, example: TokenizedExample) -> list[int]:
        """The prompt as it reads it."""
        return example.teacher_reads if self.is_teacher else example.prompt_ids

    def reference(self, example: TokenizedExample) -> Read:
        """The example's own completion, as both read it."""
        own = example.teacher_completion if self.is_teacher else example.completion_ids
        return self.prompt(example), example.teacher_reads, own, example.teacher_completion

    def own(self, example: TokenizedExample, ids: list[int]) -> Read:
        """What it wrote itself, as both read it."""
        theirs = ids if self.bridge is None else self.bridge.teacher_reading(ids)
        return self.prompt(example), example.teacher_reads, ids, theirs


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
    scored = Scored(pair, model)
    references = [scored.reference(example) for example in examples]
    scores = _likelihood_scores(scored, references, settings.score_batch_size, progress)
    completions, ids = complete(pair, model, examples, settings, progress)
    scores |= _text_scores(task, examples, completions)
    if settings.own_text:
        own = [scored.own(example, text) for row in ids for example, text in zip(examples, row, strict=True)]
        kl, _, compared, _ = _token_sums(scored, own, settings.score_batch_size, progress)
        scores["own_forward_kl"] = Values((kl.sum(0) / compared.sum(0)).reshape(len(ids), len(examples)))
    groups = [example.group for example in examples]
    asked = [Question(pair.tokenizer.decode(e.prompt_ids), tuple(e.references)) for e in examples]
    return Evaluation(scores, task.primary, groups, {}, [text for row in completions for text in row], asked)


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
    completions, ids, scored = [], [], Scored(pair, model)
    tokenizer, ends = scored.side.tokenizer, scored.side.ends
    for seed, written in zip(settings.passes, write(scored, examples, settings, progress), strict=True):
        texts = tokenizer.batch_decode([ends.answer(own, tokenizer) for own, _ in written], skip_special_tokens=True)
        completions.append([
            Completion(example.id, seed, text, len(own), reason)
            for example, text, (own, reason) in zip(examples, texts, written, strict=True)
        ])  # fmt: skip
        ids.append([own for own, _ in written])
    return completions, ids


def _by_engine(
    scored: Scored,
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
        progress(done - told, f"{cost.kept_tokens / cost.seconds:.0f} tokens/s")
        told = done

    passes = settings.passes
    seeds = [seed or 0 for seed in passes for _ in examples]
    rollouts = _write(scored, list(examples) * len(passes), settings.decoding(0), seeds, on_round)
    if failed := [rollout for rollout in rollouts if rollout.error]:
        broken = len({rollout.id for rollout in failed})
        raise failed[0].failure(f"{broken} of {len(examples)} held-out prompts cannot be completed")
    progress(len(rollouts) - told, None)
    for start in range(0, len(rollouts), len(examples)):
        yield [(rollout.completion_ids, rollout.stop_reason) for rollout in rollouts[start : start + len(examples)]]


def _write(
    scored: Scored,
    examples: Sequence[TokenizedExample],
    settings: DecodeSettings,
    seeds: Sequence[int],
    progress: Callable[[DecodeCost], None],
) -> Rollouts:
    """The texts of examples, each with a seed of its own, in the tokens of the scored model."""
    pair, side, ids = scored.pair, scored.side, [example.id for example in examples]
    prompts = [scored.prompt(example) for example in examples]
    if scored.bridge is None or only_reader(settings.policy) == STUDENT:
        other = scored.model if "" in pair.bridges else pair.teacher
        job = Job.of(scored.model, other, prompts, settings, ids, side.ends, side.vocab_size, seeds=seeds)
        return decode_job(job, progress)
    theirs = [example.teacher_reads for example in examples]
    turns = TurnJob.of(scored.bridge, scored.model, pair.teacher, prompts, theirs, settings, ids, seeds)
    return decode_turns(turns, progress)


def _by_generate(
    scored: Scored,
    examples: Sequence[TokenizedExample],
    settings: EvalSettings,
    progress: Progress,
) -> Iterator[Sequence[tuple[list[int], str]]]:
    """Under each seed, one after the other: ``generate`` draws for a whole batch from one generator."""
    prompts, side = [scored.prompt(example) for example in examples], scored.side
    for seed in settings.passes:
        yield complete_by_generate(
            scored.model,
            prompts,
            settings.decoding(seed or 0),
            side.ends,
            side.vocab_size,
            lambda count: progress(count, None),
        )


# --- distributions ------------------------------------------------------------------------------------------------


def _likelihood_scores(scored: Scored, rows: Sequence[Read], batch_size: int, progress: Progress) -> dict[str, Values]:
    """Divergence to the teacher, in all and by position, and perplexity, on the reference tokens."""
    kl, nll, compared, tokens = _token_sums(scored, rows, batch_size, progress)
    forward_kl = _per_token(kl.sum(0), compared.sum(0))
    scores = {"forward_kl": forward_kl, "perplexity": _per_token(nll.sum(0), tokens.sum(0))}
    bands = zip(BANDS, kl, compared, strict=True)
    return scores | {f"forward_kl@{band}": _per_token(own, count) for band, own, count in bands}


def _per_token(sums: np.ndarray, tokens: np.ndarray) -> Values:
    return Values(sums[None] / np.maximum(tokens, 1), tokens)


@torch.no_grad()
def _token_sums(scored: Scored, rows: Sequence[Read], batch_size: int, progress: Progress) -> tuple[np.ndarray, ...]:
    """Forward KL KL(p‖q) and negative log-likelihood (nats) summed in each position band of each row, tokens there that are
    compared, and all tokens. With two tokenizers those are compared that match, on what both vocabularies have.

    Each ``[bands, rows]`` float64. ``batch_size`` rows are read at once, fewer where memory runs out.
    """
    pair = scored.pair
    sums = np.zeros((4, len(BANDS), len(rows)))
    teacher = side_reader(pair.teacher, pair.side_of(""))
    reader = teacher if scored.is_teacher else side_reader(scored.model, scored.side)
    law = None if scored.bridge is None else SharedLaw.of(scored.bridge, scored.model.device)
    alone = Together.of(pair.teacher).alone
    left = sorted(range(len(rows)), key=lambda place: sum(map(len, rows[place])))  # little padding

    def read(size: int) -> tuple[list[int], np.ndarray]:
        """The next ``size`` places, and what their tokens lose."""
        signals.check()
        return left[:size], _token_losses(teacher, reader, [rows[place] for place in left[:size]], law)

    while left:
        size = min(batch_size, len(left))
        (places, per_token), batch_size = halving(read, size, "scoring", "EvalSettings.score_batch_size", alone)
        lengths = [len(rows[place][2]) for place in places]
        positions = np.concatenate([np.arange(length) for length in lengths])
        owners = np.repeat(places, lengths)
        for band, (low, high) in enumerate(BANDS.values()):
            inside = (low <= positions) & (positions <= high)
            np.add.at(sums[:, band].T, owners[inside], per_token[:, inside].T)
        left = left[len(places) :]
        progress(len(places), None)
    return tuple(sums)


def _token_losses(teacher: TextReader, scored: TextReader, rows: Sequence[Read], law: SharedLaw | None) -> np.ndarray:
    """Of every response token of a batch its forward KL to the teacher and negative log-likelihood, in nats, whether it is
    compared, and 1: ``[4, N]``."""
    hidden_q = scored.hidden([(prompt, completion) for prompt, _, completion, _ in rows])
    hidden_p = hidden_q if scored is teacher else teacher.hidden([(prompt, own) for _, prompt, _, own in rows])
    written = [token for _, _, completion, _ in rows for token in completion]
    targets = scored.head.ends.events(torch.tensor(written, dtype=torch.int64, device=hidden_q.device))
    kl, nll = [], []
    for part in _chunks(len(targets)):
        logq = scored.log_probs(hidden_q[part])
        nll.append(-logq.gather(1, targets[part].unsqueeze(1))[:, 0])
        if law is None:
            logp = logq if scored is teacher else teacher.log_probs(hidden_p[part]).to(logq.device)
            kl.append(forward_kl(logp, logq))
    compared = np.ones(len(targets))
    # Sums are float64, which not every device has: on the host.
    likelihoods = torch.cat(nll).cpu().double().numpy()
    if law is None:
        divergences = torch.cat(kl).cpu().double().numpy()
    else:
        divergences, compared = _compared(teacher, scored, rows, law, hidden_p, hidden_q)
    return np.stack([divergences, likelihoods, compared, np.ones(len(targets))])


def _compared(
    teacher: TextReader, scored: TextReader, rows: Sequence[Read], law: SharedLaw, hidden_p: Tensor, hidden_q: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Forward KL at the tokens that match those of the teacher, 0 at others, and which match."""
    places = joined(
        [law.places(own, theirs) for _, _, own, theirs in rows], [(len(own), len(other)) for _, _, own, other in rows]
    )
    mine, theirs = places.student, places.teacher
    kl = [
        forward_kl(
            *law(teacher.log_probs(hidden_p[theirs[part]]).to(hidden_q.device), scored.log_probs(hidden_q[mine[part]]))
        )
        for part in _chunks(len(mine))
    ]
    divergences, compared = np.zeros((2, len(hidden_q)))
    divergences[mine], compared[mine] = torch.cat(kl).cpu().double().numpy(), 1.0
    return divergences, compared


def _chunks(tokens: int) -> Iterator[slice]:
    return (slice(start, start + _TOKENS_AT_ONCE) for start in range(0, max(tokens, 1), _TOKENS_AT_ONCE))
