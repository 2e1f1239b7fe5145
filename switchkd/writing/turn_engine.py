"""Texts in turns of words, sooner: the writer drafts a block of tokens, and the other reads all words of it in one forward.

The words that a block completes are known once its tokens are: then the other model reads them in its own tokens, and the rule is
asked at every place between them, in order. A row keeps its draft up to the first place at which the rule names the other. Every
token has the law and the noise that it has in `decode_turns_reference`, so that texts are equal for any block and batch.

Shapes: b rows of a group, K drafted tokens, P places of all rows, V ids of one model. p is the teacher, q the student.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from switchkd.base import signals
from switchkd.base.memory import halving
from switchkd.decoding.decide import spread, where_rows
from switchkd.decoding.decode import DEFAULT_BATCH, Runners, threads
from switchkd.decoding.engine import forwards_of
from switchkd.decoding.pace import BLOCKS
from switchkd.decoding.rollouts import DecodeCost, Rollouts
from switchkd.forward.parallel import Together
from switchkd.methods.policy import STUDENT, TEACHER, State
from switchkd.methods.sampling import Use, as_int64, draw, gumbel_noise, keys_at, keys_tensor, row_key
from switchkd.runner.cache import Places
from switchkd.runner.modes import evaluating
from switchkd.runner.runner import Runner
from switchkd.writing.turn_drafts import Draft, Said, keep
from switchkd.writing.turn_laws import TurnLaws
from switchkd.writing.turn_texts import TurnText
from switchkd.writing.turns import TurnJob

# Numbers of the laws of a block, over all of its rows and tokens.
_NUMBERS = 2**24
# Tokens behind the longest text for which there is room in a cache: of a draft, or of the words of another row.
_SPARE = 2 * max(BLOCKS)
# What each token more of a forward costs, as a share of what it costs to read the model's weights.
_TOKEN_SHARE = 0.05


@torch.no_grad()
def decode_turns(
    job: TurnJob,
    progress: Callable[[DecodeCost], None] | None = None,
    watch: Callable[[Rollouts], None] | None = None,
    runners: Runners | None = None,
) -> Rollouts:
    """The rows of a job as `decode_turns_reference` writes them, in far fewer forwards.

    ``progress`` is told of the cost so far and ``watch`` of the rows as they stand, after every round. Raises ModelError for a
    model that is not decoded exactly, NoMemoryError where one row is too much, Stopped for a signal.
    """
    start, runners = time.perf_counter(), runners or Runners(lasting=True)
    most = max(min(job.settings.batch_size or DEFAULT_BATCH, len(job.texts)), 1)

    def work(rows: int) -> tuple[TurnEngine, list[TurnText]]:
        texts = [text.anew() for text in job.texts]
        pair = runners.of_pair(job.student, job.teacher)
        with evaluating(job.student, job.teacher), pair[STUDENT].fast(), pair[TEACHER].fast(), threads() as fitted:
            engine = TurnEngine(job, pair, texts, rows)
            while engine.rows:
                signals.check()
                fitted()
                engine.round()
                cost = engine.cost(time.perf_counter() - start)
                if progress is not None:
                    progress(cost)
                if watch is not None:
                    watch(Rollouts([text.rollout() for text in texts], cost))
        for runner in pair:
            runner.close()
        return engine, texts

    alone = Together.of(job.teacher).alone
    (engine, texts), rows = halving(work, most, "decoding", "generation_batch_size", alone)
    cost = engine.cost(time.perf_counter() - start)
    return Rollouts([text.rollout() for text in texts], cost, rows if rows < most else None)


class _Known(NamedTuple):
    """A model's laws at the places of several drafts, ``[P, V]``, and at which of them it was run, ``[P]`` bool."""

    laws: Tensor
    ran: Tensor


class TurnEngine:
    """Rounds over a batch of rows; a finished row's place goes to the next."""

    def __init__(self, job: TurnJob, runners: Sequence[Runner], texts: Sequence[TurnText], places: int):
        self.job, self.runners, self.policy = job, runners, job.settings.policy
        self.device = runners[STUDENT].device
        self.laws = TurnLaws(job.bridge, self.device)
        self.queue = deque(text for text in texts if not text.stop_reason)
        self.total = DecodeCost()
        self.filled = np.zeros((2, places), dtype=np.int64)  # tokens of each row that a runner's buffer holds
        self.sizes = []  # by STUDENT, TEACHER: by how much each token moves the clock of a text
        for who, side in enumerate(job.bridge.sides):
            sizes = side.spelling.lengths[: side.vocab_size].clip(min=1)
            self.sizes.append(torch.from_numpy(sizes).to(self.device))
            longest = max((len(text.prompts[who]) for text in self.queue), default=0)
            runners[who].open(places, longest + job.settings.max_new_tokens + _SPARE, side.vocab_size)
        self.state: State = self.policy.init(places, self.device)
        self.rows: dict[int, TurnText] = {}
        self.weights = [sum(each.numel() for each in model.parameters()) for model in (job.student, job.teacher)]
        # Of each writer's drafts: tokens kept, and how often the other took over.
        self.kept, self.cuts = [8.0, 8.0], [1.0, 1.0]
        self._admit(range(places))

    def cost(self, seconds: float) -> DecodeCost:
        """What writing has cost so far."""
        return forwards_of(self.runners, seconds) + self.total

    # --- a round --------------------------------------------------------------------------------------------------

    def round(self) -> None:
        """Let each row's writer go on for a block, and ask the rule at every place in it."""
        reads = self._reads()
        groups = {
            who: [row for row, text in self.rows.items() if text.writer == who] for who in (None, STUDENT, TEACHER)
        }
        for who, group in groups.items():
            if not group:
                continue
            if who is None:
                drafts, own = [Draft.first(row, self.rows[row]) for row in group], None
            else:
                drafts, own = self._draft(who, group)
            self._decide(who, drafts, own, reads)
        self.total.rounds += 1
        for who, runner in enumerate(self.runners):
            most = np.zeros(len(runner.read), dtype=np.int64)
            for row, text in self.rows.items():
                most[row] = max(len(text.ids(who)) - 1, 0)
            runner.roll_back(most)
        self._retire()

    def _reads(self) -> np.ndarray:
        """Which models the rule reads at each row's next place, ``[rows, 2]`` bool."""
        like = torch.zeros(len(self.filled[0]), dtype=torch.bool, device=self.device)
        return torch.stack([spread(read, like) for read in self.policy.reads(self.state)], 1).cpu().numpy()

    def _draft(self, who: int, group: Sequence[int]) -> tuple[list[Draft], Tensor]:
        """Draws of a writer from its own law, each read before the next, and the laws ``[b, K, V]``."""
        block, side, runner = self._block(who, group), self.job.bridge.sides[who], self.runners[who]
        there, ends_b, ends = self._filled(who, group)
        runner.catch_up(there, ends_b, ends)
        settings, texts = self.job.settings, [self.rows[row] for row in group]
        use = Use.TOKEN if who == STUDENT else Use.TEACHER
        row_keys = torch.tensor([as_int64(row_key(text.seed, text.id, use)) for text in texts], device=self.device)
        clock = torch.tensor([text.clock for text in texts], device=self.device)
        laws, tokens, last = [], [], None
        for k in range(block):
            at, ahead = (ends_b + (k - 1), k - 1) if k else (ends_b, 0)
            logits = runner.extend(there, at, ends + ahead, last, tail=k == 0)[:, 0]
            law = self.laws.own(who, side.ends.log_probs(logits).to(self.device))
            noise = gumbel_noise(keys_at(row_keys, clock), side.vocab_size)
            token = draw(settings.sampling.shape(law), noise, settings.temperature)
            laws.append(law)
            tokens.append(token)
            clock = clock + self.sizes[who][token]
            last = token.unsqueeze(1).to(runner.device)
        own = torch.stack(laws, 1)
        drawn, broken = torch.stack([torch.stack(tokens, 1), own[..., 0].isnan().long()]).cpu().tolist()
        return [Draft.of(*each) for each in zip(group, texts, drawn, broken, strict=True)], own

    # --- decisions ------------------------------------------------------------------------------------------------

    def _decide(self, who: int | None, drafts: list[Draft], own: Tensor | None, reads: np.ndarray) -> None:
        """Ask the rule at the places of drafts of one writer, and write down what is kept."""
        first = np.cumsum([0, *(len(draft.places) for draft in drafts)]).tolist()
        known = self._known(who, drafts, own, reads) if first[-1] else (None, None)
        said = self._ask(who, drafts, first, known) if first[-1] else []
        relieved: list[tuple[TurnText, int, int]] = []  # with who writes now, and at which of the P places
        for at, draft in enumerate(drafts):
            before, mine = len(draft.text.student_ids), said[first[at] : first[at + 1]]
            kept, place = keep(draft, mine)
            if place is not None:
                relieved.append((draft.text, mine[place].speaker, first[at] + place))
            if who is not None:
                self.kept[who] = 0.99 * self.kept[who] + kept
                self.cuts[who] = 0.99 * self.cuts[who] + (place is not None)
            self.total += DecodeCost(
                blocks=1, block_positions=len(draft.tokens), kept_tokens=len(draft.text.student_ids) - before
            )
        self._hand_over(known, relieved)

    def _known(
        self, who: int | None, drafts: list[Draft], own: Tensor | None, reads: np.ndarray
    ) -> tuple[_Known | None, _Known | None]:
        """By STUDENT, TEACHER: what each says at the places; None for one that is not asked anywhere."""
        found: list[_Known | None] = [None, None]
        for model in (STUDENT, TEACHER):
            if model == who:
                assert own is not None
                at = [(i, k) for i, draft in enumerate(drafts) for k in draft.places]
                rows, tokens = (torch.tensor(each, device=self.device) for each in zip(*at, strict=True))
                found[model] = _Known(own[rows, tokens], torch.ones(len(at), dtype=torch.bool, device=self.device))
            elif asked := [draft for draft in drafts if draft.places and reads[draft.row, model]]:
                found[model] = self._verify(model, drafts, asked)
        return found[STUDENT], found[TEACHER]

    def _verify(self, model: int, drafts: list[Draft], asked: list[Draft]) -> _Known:
        """One model reads the words of drafts, of those that are ``asked``."""
        runner, side = self.runners[model], self.job.bridge.sides[model]
        words = [draft.read[: draft.offsets[-1]] for draft in asked]
        width, longest = max(map(len, words)), max(len(draft.text.ids(model)) for draft in asked)
        if len(asked) > 1 and longest + width > runner.cache.slots:  # the padding of one would lie in another's place
            middle = len(asked) // 2
            one, other = (self._verify(model, drafts, part) for part in (asked[:middle], asked[middle:]))
            return _Known(where_rows(one.ran, one.laws, other.laws), one.ran | other.ran)
        there, ends_b, ends = self._filled(model, [draft.row for draft in asked])
        runner.catch_up(there, ends_b, ends)
        padded = (
            torch.tensor([word + [0] * (width - len(word)) for word in words], device=runner.device) if width else None
        )
        logits = runner.extend(there, ends_b, ends, padded)
        at = [(i, offset) for i, draft in enumerate(asked) for offset in draft.offsets]
        rows, columns = (torch.tensor(each, device=runner.device) for each in zip(*at, strict=True))
        laws = self.laws.own(model, side.ends.log_probs(logits[rows, columns]).to(self.device))
        by_row = {draft.row for draft in asked}
        ran = torch.tensor([draft.row in by_row for draft in drafts for _ in draft.places], device=self.device)
        if len(laws) == len(ran):
            return _Known(laws, ran)
        whole = laws.new_zeros(len(ran), laws.shape[-1]).log_softmax(-1)
        whole[ran] = laws
        return _Known(whole, ran)

    def _ask(
        self, who: int | None, drafts: list[Draft], first: Sequence[int], known: tuple[_Known | None, _Known | None]
    ) -> list[Said]:
        """What the rule says at every place, as long as its row goes on; the state moves on with it. One wait for the device."""
        said: dict[int, Tensor] = {}
        going = torch.ones(len(drafts), dtype=torch.bool, device=self.device)
        turns = torch.tensor([draft.text.turns for draft in drafts], device=self.device)
        for place in range(max(len(draft.places) for draft in drafts)):
            at = [i for i, draft in enumerate(drafts) if len(draft.places) > place]
            flat = [first[i] + place for i in at]
            index, here = (torch.tensor(each, device=self.device) for each in (at, flat))
            home, going[index], turns[index] = self._ask_at(
                who, [drafts[i] for i in at], place, here, known, going[index], turns[index]
            )
            said |= dict(zip(flat, home, strict=True))
        return [Said.of(numbers) for numbers in torch.stack([said[i] for i in range(first[-1])]).cpu().tolist()]

    def _ask_at(
        self,
        who: int | None,
        drafts: list[Draft],
        place: int,
        here: Tensor,
        known: tuple[_Known | None, _Known | None],
        going: Tensor,
        turns: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the rule says at one place of each of n drafts, which is the one ``here`` of all P: numbers as `Said` has them
        ``[n, 7]``; then, ``[n]`` each, which of the rows go on, and how often their rule was asked."""
        index = torch.tensor([draft.row for draft in drafts], device=self.device)
        state: State = tuple(part[index] for part in self.state)
        laws = [None if each is None else each.laws[here] for each in known]
        writer = torch.full_like(index, STUDENT if who is None else who)
        tails = [draft.tails[place] for draft in drafts]
        turn = self.laws.decide(self.policy, state, (laws[STUDENT], laws[TEACHER]), tails, writer, turns)
        broken = []
        for model, read in enumerate(self.policy.reads(state)):
            asked, law = known[model], laws[model]
            wanted = torch.ones_like(going) if model == who else spread(read, going)
            ran = torch.zeros_like(going) if asked is None else asked.ran[here]
            # Where the rule wants a model again that was not run, the row goes on later.
            going = going & (ran | ~wanted)
            is_nan = torch.zeros_like(going) if law is None else law[..., 0].isnan()
            broken.append(wanted & is_nan)
        broken = [going & each for each in broken]
        decided = going & ~(broken[STUDENT] | broken[TEACHER])
        for part, new in zip(self.state, turn.state, strict=True):
            part[index] = where_rows(decided, new, part[index])
        numbers = decided, turn.asked, turn.speaker, turn.divergence, turn.threshold, *broken
        # Of float64 where a law is, so that what was compared comes home as it is.
        home = torch.stack([each.to(turn.divergence.dtype) for each in numbers], 1)
        goes_on = torch.zeros_like(decided) if who is None else decided & (turn.speaker == writer)
        return home, goes_on, turns + (decided & turn.asked)

    def _hand_over(
        self, known: tuple[_Known | None, _Known | None], relieved: Sequence[tuple[TurnText, int, int]]
    ) -> None:
        """Whoever writes now draws the first token of its word, with noise of its own."""
        settings = self.job.settings
        for who in (STUDENT, TEACHER):
            mine = [(text, place) for text, speaker, place in relieved if speaker == who]
            if not mine:
                continue
            own = known[who]
            assert own is not None, "a rule names a model that it has read"
            texts = [text for text, _ in mine]
            places = torch.tensor([place for _, place in mine], device=self.device)
            law, _ = self.laws.beginning(who, own.laws[places], [text.tail for text in texts])
            noise = gumbel_noise(keys_tensor([text.key(who) for text in texts], self.device), law.shape[-1])
            tokens = draw(settings.sampling.shape(law), noise, settings.temperature).tolist()
            for text, token in zip(texts, tokens, strict=True):
                before = len(text.student_ids)
                text.begin(token, who, *text.said)
                self.total.kept_tokens += len(text.student_ids) - before

    # --- rows -----------------------------------------------------------------------------------------------------

    def _block(self, who: int, group: Sequence[int]) -> int:
        """How many tokens a writer drafts: as many as the settings say, or as give the most kept ones for what they cost.

        Nothing here is measured in seconds: the plan, and with it the rounding of a text's numbers, is the same each time.
        """
        left = max(
            self.rows[row].budget - len(self.rows[row].ids(who)) + len(self.rows[row].prompts[who]) for row in group
        )
        room = min(left, max(1, _NUMBERS // (len(group) * self.job.bridge.sides[who].vocab_size)))
        if self.job.settings.block_size != "auto":
            return min(self.job.settings.block_size, room, _SPARE)
        goes_on = self.kept[who] / (self.kept[who] + self.cuts[who])
        mine, theirs = self.weights[who], self.weights[1 - who]

        def worth(block: int) -> float:
            kept = block if goes_on == 1 else (1 - goes_on**block) / (1 - goes_on)
            return kept / (block * mine + (1 + _TOKEN_SHARE * block) * theirs)

        return min(max(BLOCKS, key=worth), room)

    def _filled(self, who: int, group: Sequence[int]) -> tuple[Places, Tensor, np.ndarray]:
        """The places of rows in a model's cache, with their texts in its buffer; how long these are, on the device and here."""
        runner, rows = self.runners[who], np.array(group)
        texts = [self.rows[row].ids(who) for row in group]
        ends = np.array([len(ids) for ids in texts])
        new = [
            (row, at, ids[at])
            for row, ids in zip(group, texts, strict=True)
            for at in range(self.filled[who, row], len(ids))
        ]
        if new:
            there, at, tokens = torch.tensor(new, device=runner.device).T
            runner.texts[there, at] = tokens
            self.filled[who, rows] = ends
        return Places.at(rows, runner.columns), torch.from_numpy(ends).to(runner.device), ends

    def _retire(self) -> None:
        done = [row for row, text in self.rows.items() if text.stop_reason]
        for row in done:
            text = self.rows.pop(row)
            self.total += DecodeCost(teacher_tokens=sum(text.speakers), words=text.words)
            for runner in self.runners:
                runner.restart(row)
                if text.error:
                    runner.clear(row)
        self._admit(done)

    def _admit(self, free: Sequence[int]) -> None:
        """Give places to rows that wait."""
        for row in free:
            if not self.queue:
                return
            self.rows[row] = self.queue.popleft()
            self.filled[:, row] = 0
            for part, new in zip(self.state, self.policy.init(1, self.device), strict=True):
                part[row] = new[0]
