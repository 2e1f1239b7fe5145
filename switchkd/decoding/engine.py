"""The scheduler of the block engine: which rows are decoded, round after round, and what each round costs.

A round drafts, verifies, decides and rolls back. One summary comes home at its end; beside it the host waits only where rows end
(their notes) and where prompts enter.

Shapes: b rows of a round, K positions of a block, V vocabulary. p is the teacher, q the student.
"""

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from switchkd.decoding.board import Board
from switchkd.decoding.decide import Block, Said, Verdict, decide, spread, stacked
from switchkd.decoding.pace import NO_COSTS, Costs, Pace, Plan, time_decision, time_forwards
from switchkd.decoding.rollouts import DecodeCost
from switchkd.decoding.rows import Job, Row
from switchkd.methods.policy import STUDENT, TEACHER
from switchkd.methods.sampling import draw, gumbel_noise
from switchkd.runner.cache import Places, index
from switchkd.runner.graphs import Work, bucket
from switchkd.runner.runner import Runner

# From how many forwards of a draft came before, and the drafts to be read, to logits.
Extend = Callable[[int, Tensor | None], Tensor]
# Hidden states of a call that may stay on the teacher's device; larger ones go to the host.
HIDDEN_BYTES = 2**30


class BlockEngine:
    """Rounds over a batch of rows; finished rows give their place to waiting prompts."""

    def __init__(self, job: Job, queue: deque[Row], places: int, runners: Sequence[Runner]):
        self.job, self.queue, self.runners = job, queue, runners
        self.policy, self.sampling = job.settings.policy, job.settings.sampling
        self.device = runners[STUDENT].device
        wide = torch.promote_types(torch.promote_types(job.student.dtype, job.teacher.dtype), torch.float32)
        self.board = Board(job, places, [runner.device for runner in runners], wide)
        self.keep_hidden = job.settings.keep_hidden
        width = job.teacher.config.get_text_config().hidden_size * job.teacher.dtype.itemsize
        fits = len(job.rows) * job.settings.max_new_tokens * width <= HIDDEN_BYTES
        self.hidden_device = runners[TEACHER].device if fits else torch.device("cpu")
        # Whether a row was broken in a forward that read drafts too; without them it will show whether they did it.
        self.in_doubt = False
        self.settled = True  # whether all of the board is of one moment
        self.total = DecodeCost()
        self._open(places)
        self._admit(np.arange(places))
        student, teacher = (runner.keeps_state for runner in runners)
        self.pace = Pace(
            self._costs(), job.settings.block_size, job.settings.drafter, job.vocab_size, (student, teacher)
        )

    def _open(self, places: int) -> None:
        """Room in both caches for so many rows, of which nothing has been read yet."""
        self.places = places
        for who, runner in enumerate(self.runners):
            keep = self.keep_hidden and who == TEACHER
            runner.open(
                places,
                self.board.slots[who],
                self.job.vocab_size,
                self.board.texts[who],
                keep,
                self.job.settings.graphs,
            )

    def shrink(self) -> int:
        """Go on with half as many rows, which it returns, after memory ran out: the others begin again later.

        What the rows that stay have written is read again, as nothing is in the caches any more.
        """
        board, places = self.board, max(self.board.count // 2, 1)
        first = places if self.settled else 0
        begun = [place for place in range(first, board.count) if self.rows[place].stop_reason is None]
        self.total = self.cost(0.0)  # with what the runners have counted, which begin again
        self.total.kept_tokens -= int(board.written_n[begun].sum())
        self.queue.extendleft(self.rows[place] for place in reversed(begun))
        del self.rows[first:]
        self.settled = True
        self._open(places)
        if not self.rows:
            self._admit(np.arange(places))
        return places

    # --- what rounds cost -----------------------------------------------------------------------------------------

    def _costs(self) -> Costs:
        """What rounds are planned by: given, or measured where there is something to plan."""
        settings = self.job.settings
        if settings.costs:
            return Costs.of(settings.costs)
        if settings.block_size != "auto" and settings.drafter != "auto":
            return NO_COSTS
        read = [bool(self.board.state) or first for first in self.board.first_reads]
        read[STUDENT] |= read[TEACHER] and settings.drafter != "teacher"  # it may draft where nobody else reads it
        rows, nothing = self.board.count, NO_COSTS.student
        student, teacher = (
            time_forwards(runner, rows) if it else nothing for runner, it in zip(self.runners, read, strict=True)
        )
        decision = time_decision(self.policy, self.sampling, self.job.ends, self.job.vocab_size, rows, self.device)
        return Costs(student, teacher, decision)

    @property
    def rows(self) -> list[Row]:
        """The rows that are being decoded."""
        return self.board.rows

    def round(self) -> None:
        """Decide up to K tokens of the rows that the plan serves, then retire finished rows and admit new ones."""
        board = self.board
        left = self.job.settings.max_new_tokens - board.written_n[: board.count]
        plan = self.pace.plan(board.reading(), 1 if self.in_doubt else int(left.max()))
        self.in_doubt = False
        rows = board.serving(plan.served)
        reads = board.reads_n[rows.host]
        start = rows.of(board.written)
        said = self._hear(plan, rows, board.keys_of(rows, start, plan.block))
        block = said.block(start, self.job.settings.max_new_tokens - start)
        verdict = decide(self.policy, board.state_of(rows), self.sampling, self.job.ends, block)
        self.settled = False
        board.write(rows, verdict)
        self._keep(plan, rows, reads, self._summary(plan, block, said, verdict))
        self._retire()
        self.settled = True

    def cost(self, seconds: float) -> DecodeCost:
        """What decoding has cost so far; the teacher's tokens are those of rows that came home."""
        return forwards_of(self.runners, seconds) + self.total

    # --- what the models say --------------------------------------------------------------------------------------

    def _hear(self, plan: Plan, rows: Places, keys: Tensor) -> Said:
        """Draft and verify."""
        said = Said(keys, plan.drafter)
        if plan.forwards:
            said.drafted(*self._draft(plan, rows, keys))
        else:
            said.noise = gumbel_noise(keys, self.job.vocab_size)
        which = np.flatnonzero(self.board.reads_n[rows.host, 1 - plan.drafter])
        if len(which) == len(rows.host):
            said.verified(self._verify(plan, rows, said.drafts))
        elif len(which):
            some = index(which, self.board.columns)
            said.verified(self._verify(plan, self.board.at(rows.host[which]), said.drafts[some]), some)
        return said

    def _draft(self, plan: Plan, rows: Places, keys: Tensor) -> tuple[Tensor, ...]:
        """Draws of one model, each read by it before the next: log-distributions, drafts, and the noise of all positions."""
        who, runner = plan.drafter, self.runners[plan.drafter]
        ends_b, ends = self.board.ends(who, rows)
        there = rows.on(runner.device)
        runner.catch_up(there, ends_b, ends)
        steps = partial(self._steps, who, plan.forwards)
        if (wide := self._recorded(who, rows, ends)) is None:

            def extend(k: int, last: Tensor | None) -> Tensor:
                return runner.extend(there, ends_b + (k - 1) if k else ends_b, ends + max(k - 1, 0), last, tail=k == 0)

            said = steps(extend, keys)
        else:
            said = self._replayed(("draft", plan.forwards, plan.block), steps, who, wide, keys)
            runner.has_read(rows, ends, plan.forwards - 1, plan.forwards)
        self._listen(who, rows, said[3:])
        return said[:3]

    def _steps(self, who: int, forwards: int, extend: Extend, keys: Tensor) -> tuple[Tensor, ...]:
        """So many drafts: log-distributions, drafts, noise, and, if it is kept, what entered the output layer."""
        noise = gumbel_noise(keys, self.job.vocab_size)
        logs: list[Tensor] = []
        drafts: list[Tensor] = []
        hidden: list[Tensor] = []
        for k in range(forwards):
            last = drafts[-1].unsqueeze(1).to(self.runners[who].device) if k else None
            logs.append(self.job.ends.log_probs(extend(k, last)[:, 0]).to(self.device))
            drafts.append(self._own_draw(who, logs[-1], noise[:, k]))
            hidden += [self.runners[who].hidden] if self.runners[who].keep_hidden else []
        return *(stacked(each) for each in (logs, drafts)), noise, *([torch.cat(hidden, 1)] if hidden else [])

    def _verify(self, plan: Plan, rows: Places, drafts: Tensor) -> Tensor:
        """What the other model says about all positions, ``[b, K, V]``, in one forward over the rows that read it.

        The K-th draft is not read: its successor lies outside the block.
        """
        who = 1 - plan.drafter
        runner, (ends_b, ends) = self.runners[who], self.board.ends(who, rows)
        there = rows.on(runner.device)
        read = drafts[:, : plan.block - 1].to(runner.device) if plan.block > 1 else None
        runner.catch_up(there, ends_b, ends)
        words = partial(self._words, who)
        if (wide := self._recorded(who, rows, ends)) is None:
            said = words(lambda _, drafts: runner.extend(there, ends_b, ends, drafts), read)
        else:
            said = self._replayed(("verify", plan.block), words, who, wide, *([] if read is None else [read]))
            runner.has_read(rows, ends, plan.block - 1)
        self._listen(who, rows, said[1:])
        return said[0]

    def _words(self, who: int, extend: Extend, drafts: Tensor | None = None) -> tuple[Tensor, ...]:
        """Log-distributions behind a text and its drafts, and, if it is kept, what entered the output layer."""
        runner = self.runners[who]
        logs = self.job.ends.log_probs(extend(0, drafts)).to(self.device)
        return logs, *([runner.hidden] if runner.keep_hidden else [])

    # --- what is recorded -----------------------------------------------------------------------------------------

    def _recorded(self, who: int, rows: Places, ends: np.ndarray) -> Places | None:
        """The rows of a recording that serves these, if there may be one: the first rows, each with one token to read."""
        runner = self.runners[who]
        if runner.keeps is None or rows.device is not None or (runner.unread(rows, ends) != 1).any():
            return None
        return Places.first(bucket(len(ends), self.places))

    def _replayed(
        self, name: tuple[Hashable, ...], work: Work, who: int, wide: Places, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        """``work(extend, *inputs)`` as it was recorded for so many rows, of which those behind the inputs' ride along."""
        runner, count = self.runners[who], len(wide.host)
        ends_b, _ = self.board.ends(who, wide)
        last = wide.of(runner.texts).gather(1, (ends_b - 1).clamp(min=0).unsqueeze(1))
        padded = [nn.functional.pad(each, (0, 0, 0, count - len(each))) for each in inputs]

        def recorded(last: Tensor, ends_b: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            def extend(k: int, drafts: Tensor | None) -> Tensor:
                if k and drafts is not None:
                    return runner.step(drafts, ends_b + k, None)
                return runner.step(last, ends_b, drafts)

            return work(extend, *inputs)

        said = runner.graphs(
            (*name, repr(self.policy), self.sampling, self.job.ends, count), recorded, last, ends_b, *padded
        )
        rows = len(inputs[0]) if inputs else count
        return tuple(each[:rows] for each in said)

    def _own_draw(self, who: int, logs: Tensor, noise: Tensor) -> Tensor:
        """The token that a model alone would write, from log-distributions ``[n, V]``."""
        return draw(self.sampling.shape(self.policy.proposal(who, logs)), noise, self.sampling.temperature)

    def _listen(self, who: int, rows: Places, hidden: Sequence[Tensor]) -> None:
        for each in hidden if who == TEACHER else ():
            self.board.listen(rows, each)

    # --- what is kept ---------------------------------------------------------------------------------------------

    def _summary(self, plan: Plan, block: Block, said: Said, verdict: Verdict) -> np.ndarray:
        """All that the host learns of a round, in one transfer, ``[columns, b]``.

        Yes or no: an end token, an end by the policy, student and teacher not a number behind the kept tokens, student and teacher
        not a number anywhere, student and teacher read at the next step. Then counts: tokens kept, and, where both models ran,
        the five of ``_evidence``.
        """
        reads = [spread(read, verdict.kept) for read in self.policy.reads(verdict.state)]
        spoilt = [logs[..., 0].isnan().any(1) for logs in block.logs]
        counts = [verdict.kept]
        if said.both:
            counts += self._evidence(plan, block, verdict).unbind()
        flags = torch.stack([verdict.eos, verdict.told, *verdict.broken, *spoilt, *reads])
        return torch.cat([flags.long(), torch.stack(counts)]).cpu().numpy()

    def _evidence(self, plan: Plan, block: Block, verdict: Verdict) -> Tensor:
        """``[5, b]`` kept positions at which the policy asked both models, and of these where the student's draw is final, and the
        teacher's; at which both ran, and of these where their draws are equal."""
        who, size = 1 - plan.drafter, block.drafts.shape[1]
        logs, noise = (each[:, :size].flatten(0, 1) for each in (block.logs[who], block.noise))
        draws = [block.drafts, self._own_draw(who, logs, noise).view_as(block.drafts)]
        student, teacher = draws if who == TEACHER else draws[::-1]
        tokens = verdict.tokens[:, :size]
        ran = self.board.columns[:size] < verdict.kept.unsqueeze(1)
        for each in block.ran:
            ran = ran if each is None else ran & each[:, :size]
        asked = ran & verdict.asked[:, :size]
        return torch.stack(
            [asked, asked & (student == tokens), asked & (teacher == tokens), ran, ran & (student == teacher)]
        ).sum(2)

    def _keep(self, plan: Plan, rows: Places, read: np.ndarray, summary: np.ndarray) -> None:
        """Move on by what was kept of rows that ``read`` ``[b, 2]`` so, and roll both models back to it."""
        board, here = self.board, rows.host
        (eos, told, *broken, student, teacher), reads, (kept, *evidence) = summary[:6], summary[6:8], summary[8:]
        board.written_n[here] += kept
        board.reads_n[here] = reads.T.astype(bool)
        self.pace.returned |= bool((board.reads_n[here].all(1) & ~read.all(1) & (kept > 0)).any())
        if self.keep_hidden:
            heard = plan.forwards if plan.drafter == TEACHER else plan.block * read[:, TEACHER]
            board.heard[here] &= heard >= kept
        for who, runner in enumerate(self.runners):
            runner.roll_back(np.maximum(board.prompts_n[who] + board.written_n - 1, 0)[: len(runner.read)])
        assert kept.any() or any(each.any() for each in broken), "a round keeps at least a token of each row"
        for at in np.flatnonzero(broken[STUDENT] | broken[TEACHER]).tolist():
            self._broken(plan, here[at], broken[STUDENT][at])
        for runner, spoilt in zip(self.runners, (student, teacher), strict=True):
            for place in here[spoilt.astype(bool)].tolist():
                runner.clear(place)
        over = board.written_n[here] == self.job.settings.max_new_tokens
        for at in np.flatnonzero((eos | told | over) & (kept > 0)).tolist():
            self.rows[here[at]].stop_reason = "eos" if eos[at] else "policy" if told[at] else "length"
            board.ended[here[at]] = True
        numbers = [int(each.sum()) for each in evidence] or [0] * 5
        self.pace.observe(*numbers)
        self.total += DecodeCost(
            kept_tokens=int(kept.sum()), rounds=1, blocks=len(here), block_positions=plan.block * len(here),
            compared=numbers[3], equal=numbers[4],
        )  # fmt: skip

    def _broken(self, plan: Plan, place: int, by_student: bool) -> None:
        """A model that is read is not a number behind a row's tokens: the row's end, unless a draft behind them may have done it
        (its mask is a weight of 0, and 0 · NaN is NaN).

        Whatever stood in one forward with the draft may then be broken in a cache too, so that the row is read again from its
        beginning.
        """
        if plan.block == 1:
            at, name = int(self.board.written_n[place]), "student" if by_student else "teacher"
            self.rows[place].fail_non_finite(name, at)
            self.board.ended[place] = True
            return
        self.in_doubt = True
        for runner in self.runners:
            runner.restart(place)
            runner.clear(place)

    # --- who comes and goes ---------------------------------------------------------------------------------------

    def _retire(self) -> None:
        """Bring finished rows home, give their places to waiting prompts, and close the gaps that remain."""
        done = np.flatnonzero(self.board.ended[: self.board.count])
        if not len(done):
            return
        board = self.board
        board.fetch(done)
        for place in done.tolist():
            row = self.rows[place]
            row.said = board.hidden_of(place, self.hidden_device)
            self.total.teacher_tokens += sum(row.speakers)
            for runner in self.runners:
                runner.restart(place)
                if row.error:  # what is not a number must not stay for the next one
                    runner.clear(place)
        self._admit(done)

    def _admit(self, free: np.ndarray) -> None:
        """Fill ``free`` places from the queue, and move rows into the ones that stay free."""
        board = self.board
        entering = [self.queue.popleft() for _ in range(min(len(free), len(self.queue)))]
        if entering:
            board.admit(entering, free[: len(entering)])
        free = free[len(entering) :]
        if len(free) and board.rows:
            count = board.count - len(free)
            gaps = free[free < count]
            movers = np.setdiff1d(np.arange(count, board.count), free)
            if len(gaps):
                to, source = (Places(each, index(each, board.columns)) for each in (gaps, movers))
                board.move(to, source)
                for runner in self.runners:
                    runner.move(to, source)
            del board.rows[count:]


def forwards_of(runners: Sequence[Runner], seconds: float) -> DecodeCost:
    """What the models of student and teacher have read since they were opened."""
    student, teacher = runners
    return DecodeCost(
        seconds,
        student_forwards=student.forwards,
        teacher_forwards=teacher.forwards,
        student_prefill_tokens=student.prefill_tokens,
        teacher_prefill_tokens=teacher.prefill_tokens,
    )
