"""Texts in turns of words, sooner: the writer drafts a block of tokens, and the other reads all words of it in one forward.

The words that a block completes are known once its tokens are: then the other model reads them in its own tokens, and the rule is
asked at every place between them, in order. A row keeps its draft up to the first place at which the rule names the other. Every
token has the law and the noise that it has in `decode_turns_reference`, so that texts are equal for any block and batch.

Shapes: b rows of a group, K drafted tokens, P places of all rows, V ids of one model. p is the teacher, q the student.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from switchkd.base import signals
from switchkd.base.memory import halving
from switchkd.decoding.decide import spread
from switchkd.decoding.decode import DEFAULT_BATCH, Runners, threads
from switchkd.decoding.pace import BLOCKS
from switchkd.decoding.rollouts import DecodeCost, Rollouts
from switchkd.forward.parallel import Together
from switchkd.methods.policy import STUDENT, TEACHER, State
from switchkd.methods.sampling import as_int64, draw, gumbel_noise, keys_at, keys_tensor, row_key
from switchkd.runner.cache import Places
from switchkd.runner.modes import evaluating
from switchkd.runner.runner import Runner
from switchkd.writing.turn_laws import TurnLaws
from switchkd.writing.turn_texts import USES, TurnText
from switchkd.writing.turns import TurnJob

# Numbers of the laws of a block, over all of its rows and tokens.
_NUMBERS = 2**24
# What a forward costs beside the model's weights that it reads, as a share of these, for every token more.
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
        texts = [
            replace(text, student_ids=[], teacher_ids=[], speakers=[], divergences=[], thresholds=[])
            for text in job.texts
        ]
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


@dataclass
class _Draft:
    """What a row's writer would go on with: its tokens, and the places among them."""

    row: int
    text: TurnText
    tokens: list[int]
    places: list[int] = field(default_factory=list)  # before which tokens
    tails: list[bytes] = field(default_factory=list)  # how the text ends there
    clocks: list[int] = field(default_factory=list)
    read: list[int] = field(default_factory=list)  # the words before them, as the other reads them
    offsets: list[int] = field(default_factory=list)  # how many tokens of these lie before each place
    broken: int | None = None  # the first token whose law is not finite


class TurnEngine:
    """Rounds over a batch of rows; a finished row's place goes to the next."""

    def __init__(self, job: TurnJob, runners: Sequence[Runner], texts: Sequence[TurnText], places: int):
        self.job, self.runners, self.policy = job, runners, job.settings.policy
        self.device = runners[STUDENT].device
        self.laws = TurnLaws(job.bridge, self.device)
        self.queue = deque(text for text in texts if not text.stop_reason)
        self.total = DecodeCost()
        self.filled = np.zeros((2, places), dtype=np.int64)  # tokens of each row that a runner's buffer holds
        sizes = [
            np.array([max(len(data), 1) for data in side.spelling.bytes_of[: side.vocab_size]])
            for side in job.bridge.sides
        ]
        self.sizes = [torch.from_numpy(each).to(self.device) for each in sizes]
        longest = [max((len(text.prompts[who]) for text in self.queue), default=0) for who in (STUDENT, TEACHER)]
        for who, runner in enumerate(runners):
            slots = longest[who] + job.settings.max_new_tokens + 2 * max(BLOCKS)
            runner.open(places, slots, job.bridge.sides[who].vocab_size)
        self.state: State = self.policy.init(places, self.device)
        self.rows: dict[int, TurnText] = {}
        self.kept, self.cuts = (
            [8.0, 8.0],
            [1.0, 1.0],
        )  # of each writer's drafts: tokens kept, and how often the other took over
        self._admit(range(places))

    def cost(self, seconds: float) -> DecodeCost:
        """What writing has cost so far."""
        student, teacher = self.runners
        own = DecodeCost(
            seconds,
            student_forwards=student.forwards,
            teacher_forwards=teacher.forwards,
            student_prefill_tokens=student.prefill_tokens,
            teacher_prefill_tokens=teacher.prefill_tokens,
        )
        return own + self.total

    # --- a round --------------------------------------------------------------------------------------------------

    def round(self) -> None:
        """Let each row's writer go on for a block, and ask the rule at every place in it."""
        reads = self._reads()
        groups = {
            who: [row for row, text in self.rows.items() if text.writer == who] for who in (None, STUDENT, TEACHER)
        }
        for who, group in groups.items():
            if group:
                drafts, own = self._begun(group) if who is None else self._draft(who, group)
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

    def _begun(self, group: Sequence[int]) -> tuple[list[_Draft], None]:
        """Rows of which nothing is written: the place before their first word."""
        return [_Draft(row, self.rows[row], [], [0], [b""], [0], [], [0]) for row in group], None

    def _draft(self, who: int, group: Sequence[int]) -> tuple[list[_Draft], Tensor]:
        """Draws of a writer from its own law, each read before the next, and the laws ``[b, K, V]``."""
        block, side, runner = self._block(who, len(group)), self.job.bridge.sides[who], self.runners[who]
        there, ends_b, ends = self._filled(who, group)
        runner.catch_up(there, ends_b, ends)
        settings, sizes = self.job.settings, self.sizes[who]
        keys = [as_int64(row_key(text.seed, text.id, USES[who])) for text in map(self.rows.__getitem__, group)]
        row_keys = torch.tensor(keys, device=self.device)
        clock = torch.tensor([self.rows[row].clock for row in group], device=self.device)
        laws, tokens, last = [], [], None
        for k in range(block):
            at, ahead = (ends_b + (k - 1), k - 1) if k else (ends_b, 0)
            logits = runner.extend(there, at, ends + ahead, last, tail=k == 0)[:, 0]
            law = self.laws.own(who, side.ends.log_probs(logits).to(self.device))
            noise = gumbel_noise(keys_at(row_keys, clock), side.vocab_size)
            token = draw(settings.sampling.shape(law), noise, settings.temperature)
            laws.append(law)
            tokens.append(token)
            clock = clock + sizes[token]
            last = token.unsqueeze(1).to(runner.device)
        own = torch.stack(laws, 1)
        home = torch.stack([torch.stack(tokens, 1), own[..., 0].isnan().long()]).cpu().tolist()
        drafts = [
            self._walk(_Draft(row, self.rows[row], drawn), broken)
            for row, drawn, broken in zip(group, *home, strict=True)
        ]
        return drafts, own

    def _walk(self, draft: _Draft, broken: Sequence[int]) -> _Draft:
        """Find the places of a draft, and what the other reads of the words before each."""
        text = draft.text
        assert text.writer is not None
        side, other = self.job.bridge.sides[text.writer], self.job.bridge.sides[1 - text.writer]
        tail, spelt, clock, read = text.tail, text.spelt, text.clock, 0
        begins, budget = (
            self.job.bridge.beginnings[text.writer].begins,
            text.budget - len(text.reading(1 - text.writer)),
        )
        for k, token in enumerate(draft.tokens):
            if broken[k]:
                draft.broken = k
                break
            if begins(tail, token):
                draft.read += other.spelling.encode(spelt)
                read = len(draft.read)
                if read >= budget:  # the text ends before
                    break
                draft.places.append(k)
                draft.tails.append(tail)
                draft.clocks.append(clock)
                draft.offsets.append(read)
                spelt = b""
                if token in side.ends.ids:
                    break
            data = side.spelling.bytes_of[token]
            tail, spelt, clock = (tail + data)[-8:], spelt + data, clock + max(len(data), 1)
        return draft

    # --- decisions ------------------------------------------------------------------------------------------------

    def _decide(self, who: int | None, drafts: list[_Draft], own: Tensor | None, reads: np.ndarray) -> None:
        """Ask the rule at the places of drafts of one writer, and write down what is kept."""
        index = [(at, place) for at, draft in enumerate(drafts) for place in range(len(draft.places))]
        laws = self._laws(who, drafts, own, reads, index)
        first: dict[int, int] = {}  # of each draft's places, in the flat order
        for flat, (at, _) in enumerate(index):
            first.setdefault(at, flat)
        said = self._ask(who, drafts, laws, first) if index else []
        other: list[tuple[int, int, int]] = []  # drafts in which another writes, at a place: its law's row
        for at, draft in enumerate(drafts):
            mine = said[first[at] : first[at] + len(draft.places)] if at in first else []
            self._keep(draft, mine, at, first.get(at, 0), other)
        self._hand_over(drafts, laws, said, other)

    def _laws(
        self,
        who: int | None,
        drafts: list[_Draft],
        own: Tensor | None,
        reads: np.ndarray,
        index: Sequence[tuple[int, int]],
    ) -> list[tuple[Tensor, np.ndarray] | None]:
        """By STUDENT, TEACHER: the laws at the places, ``[P, V]``, and at which of them it was run, ``[P]``."""
        found: list[tuple[Tensor, np.ndarray] | None] = [None, None]
        if not index:
            return found
        for model in (STUDENT, TEACHER):
            if model == who:
                assert own is not None
                rows, at = ([draft for draft, _ in index], [drafts[d].places[p] for d, p in index])
                found[model] = own[rows, at], np.ones(len(index), dtype=bool)
                continue
            asked = [at for at, draft in enumerate(drafts) if draft.places and reads[draft.row, model]]
            if asked:
                found[model] = self._verify(model, drafts, asked, index)
        return found

    def _verify(
        self, model: int, drafts: list[_Draft], asked: Sequence[int], index: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, np.ndarray]:
        """One model reads the words of drafts: its laws at all places, of those that are ``asked``."""
        runner, side = self.runners[model], self.job.bridge.sides[model]
        there, ends_b, ends = self._filled(model, [drafts[at].row for at in asked])
        runner.catch_up(there, ends_b, ends)
        words = [drafts[at].read[: drafts[at].offsets[-1]] for at in asked]
        width = max(map(len, words))
        padded = (
            torch.tensor([word + [0] * (width - len(word)) for word in words], device=runner.device) if width else None
        )
        logits = runner.extend(there, ends_b, ends, padded)
        row_of = {at: row for row, at in enumerate(asked)}
        ran = np.array([at in row_of for at, _ in index])
        rows = [row_of[at] for at, _ in index if at in row_of]
        columns = [drafts[at].offsets[place] for at, place in index if at in row_of]
        law = self.laws.own(model, side.ends.log_probs(logits[rows, columns]).to(self.device))
        if ran.all():
            return law, ran
        whole = law.new_zeros(len(index), law.shape[-1]).log_softmax(-1)
        whole[torch.from_numpy(np.flatnonzero(ran)).to(self.device)] = law
        return whole, ran

    def _ask(
        self, who: int | None, drafts: list[_Draft], laws: list[tuple[Tensor, np.ndarray] | None], first: dict[int, int]
    ) -> list[list[float]]:
        """What the rule says at every place while its row goes on: whether it goes on, whom it names, divergence, threshold, and
        whether student or teacher is not a number there. The state moves on with it."""
        count = sum(len(draft.places) for draft in drafts)
        said: list[Tensor | None] = [None] * count
        going: dict[int, Tensor] = {}
        turns = {at: torch.tensor(drafts[at].text.turns, device=self.device) for at in first}
        wide = torch.promote_types(next(law[0].dtype for law in laws if law is not None), torch.float64)
        for place in range(max(len(draft.places) for draft in drafts)):
            rows = [at for at in first if len(drafts[at].places) > place]
            flat = [first[at] + place for at in rows]
            index = torch.tensor([drafts[at].row for at in rows], device=self.device)
            state: State = tuple(part[index] for part in self.state)
            here = tuple(None if law is None else law[0][flat] for law in laws)
            writer = torch.full((len(rows),), STUDENT if who is None else who, device=self.device)
            turn = self.laws.decide(
                self.policy,
                state,
                (here[STUDENT], here[TEACHER]),
                [drafts[at].tails[place] for at in rows],
                writer,
                torch.stack([turns[at] for at in rows]),
            )
            alive = torch.stack([going.get(at, torch.ones((), dtype=torch.bool, device=self.device)) for at in rows])
            broken = []
            for model, (law, read) in enumerate(zip(laws, self.policy.reads(state), strict=True)):
                wanted = spread(read, alive) if model != who else torch.ones_like(alive)
                ran = torch.zeros_like(alive) if law is None else torch.from_numpy(law[1][flat]).to(self.device)
                alive = alive & (
                    ran | ~wanted
                )  # a model that the rule wants again and that was not run: the row goes on later
                words = here[model]
                is_nan = torch.zeros_like(alive) if words is None else words[..., 0].isnan()
                broken.append(alive & wanted & is_nan)
            alive = alive & ~(broken[STUDENT] | broken[TEACHER])
            for part, new in zip(self.state, turn.state, strict=True):
                part[index] = torch.where(alive.view(-1, *[1] * (new.dim() - 1)), new, part[index])
            numbers = alive, turn.asked, turn.speaker, turn.divergence, turn.threshold, *broken
            home = torch.stack([each.to(wide) for each in numbers], 1)
            on = alive & (turn.speaker == writer) if who is not None else torch.zeros_like(alive)
            for i, at in enumerate(rows):
                said[flat[i]], going[at] = home[i], on[i]
                turns[at] = turns[at] + (alive & turn.asked)[i]
        return torch.stack([each for each in said if each is not None]).cpu().tolist()

    def _keep(
        self, draft: _Draft, said: Sequence[Sequence[float]], at: int, first: int, other: list[tuple[int, int, int]]
    ) -> None:
        """Write down the tokens of a draft up to the place at which another writes, or the row ends."""
        text, places, before = draft.text, dict(zip(draft.places, said, strict=True)), len(draft.text.student_ids)
        tokens = draft.tokens or [-1]
        writer, kept = text.writer, 0
        for k, token in enumerate(tokens):
            if k == draft.broken:
                assert writer is not None
                text.fail(writer)
            elif k in places:
                alive, asked, speaker, divergence, threshold, *broken = places[k]
                if not alive:
                    if any(broken):
                        text.close()
                        text.fail(TEACHER if broken[TEACHER] else STUDENT)
                    break
                if text.writer is not None:
                    text.close()
                text.turns += int(asked)
                if speaker != writer:
                    other.append((at, first + draft.places.index(k), int(speaker)))
                    text.said = (divergence, threshold)
                    break
                text.begin(token, int(speaker), divergence, threshold)
            else:
                text.go_on(token)
            kept += 1
            if text.stop_reason:
                break
        if writer is not None:
            self.kept[writer] = 0.99 * self.kept[writer] + kept
            self.cuts[writer] = 0.99 * self.cuts[writer] + (kept < len(tokens) and not text.stop_reason)
        self.total.kept_tokens += len(text.student_ids) - before
        self.total.blocks += 1
        self.total.block_positions += len(tokens)

    def _hand_over(
        self,
        drafts: list[_Draft],
        laws: list[tuple[Tensor, np.ndarray] | None],
        said: Sequence[Sequence[float]],
        other: Sequence[tuple[int, int, int]],
    ) -> None:
        """Whoever writes now draws the first token of its word, with noise of its own."""
        settings = self.job.settings
        for who in (STUDENT, TEACHER):
            mine = [(drafts[at], flat) for at, flat, speaker in other if speaker == who]
            if not mine:
                continue
            known = laws[who]
            assert known is not None, "a rule names a model that it has read"
            texts = [draft.text for draft, _ in mine]
            law, _ = self.laws.beginning(who, known[0][[flat for _, flat in mine]], [text.tail for text in texts])
            noise = gumbel_noise(keys_tensor([text.key(who) for text in texts], self.device), law.shape[-1])
            tokens = draw(settings.sampling.shape(law), noise, settings.temperature).tolist()
            for text, token in zip(texts, tokens, strict=True):
                before = len(text.student_ids)
                text.begin(token, who, *text.said)
                self.total.kept_tokens += len(text.student_ids) - before

    # --- rows -----------------------------------------------------------------------------------------------------

    def _block(self, who: int, rows: int) -> int:
        """How many tokens a writer drafts: as many as the settings say, or as give the most kept ones for what they cost.

        Nothing here is measured in seconds: the plan, and with it the rounding of a text's numbers, is the same each time.
        """
        room = max(1, _NUMBERS // (rows * self.job.bridge.sides[who].vocab_size))
        if self.job.settings.block_size != "auto":
            return min(self.job.settings.block_size, room)
        goes_on = self.kept[who] / (self.kept[who] + self.cuts[who])
        mine, theirs = (self._weight(model) for model in (who, 1 - who))

        def worth(block: int) -> float:
            kept = block if goes_on == 1 else (1 - goes_on**block) / (1 - goes_on)
            return kept / (block * mine + (1 + _TOKEN_SHARE * block) * theirs)

        return min(max(BLOCKS, key=worth), room)

    def _weight(self, who: int) -> float:
        model = (self.job.student, self.job.teacher)[who]
        return float(sum(parameter.numel() for parameter in model.parameters()))

    def _filled(self, who: int, group: Sequence[int]) -> tuple[Places, Tensor, np.ndarray]:
        """The places of rows in a model's cache, with their texts in its buffer; how long these are, on the device and here."""
        runner, rows = self.runners[who], np.array(group)
        texts = [self.rows[row].ids(who) for row in group]
        ends = np.array([len(ids) for ids in texts])
        first = self.filled[who, rows]
        width = int((ends - first).max())
        if width:
            new = np.zeros((len(group), width), dtype=np.int64)
            for i, (ids, begin) in enumerate(zip(texts, first.tolist(), strict=True)):
                new[i, : len(ids) - begin] = ids[begin:]
            columns = torch.from_numpy(first[:, None] + np.arange(width)).clamp(max=runner.texts.shape[1] - 1)
            there = torch.from_numpy(rows)[:, None].expand(-1, width)
            inside = torch.from_numpy(np.arange(width) < (ends - first)[:, None])
            runner.texts[there[inside].to(runner.device), columns[inside].to(runner.device)] = torch.from_numpy(new)[
                inside
            ].to(runner.device)
            self.filled[who, rows] = ends
        return Places.at(rows, runner.columns), torch.from_numpy(ends).to(runner.device), ends

    def _retire(self) -> None:
        done = [row for row, text in self.rows.items() if text.stop_reason]
        for row in done:
            text = self.rows.pop(row)
            self.total.teacher_tokens += sum(text.speakers)
            self.total.words += text.words
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
