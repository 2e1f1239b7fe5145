"""The block engine: one model drafts K tokens, the other scores them in one forward, the policy walks them in order.

Shapes: B rows, K positions of a block, V vocabulary. p is the teacher, q the student.
"""

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from switchkd.decoding.pace import Pace, Plan, Stopwatch
from switchkd.decoding.rollouts import DecodeCost
from switchkd.decoding.rows import Job, Row
from switchkd.forward.cache import CachedModel
from switchkd.methods.policy import STUDENT, TEACHER, State
from switchkd.methods.sampling import draw, gumbel_noise, noise_key, speakers

# Hidden states of a call that may stay on the teacher's device; larger ones go to the host.
HIDDEN_BYTES = 2**30


class _Block:
    """What two models say about the K positions of a round. Lists are indexed by STUDENT, TEACHER, then by position."""

    def __init__(self, plan: Plan, keys: list[list[int]], noise: list[Tensor], reads: list[Tensor]):
        self.plan, self.keys, self.noise = plan, keys, noise
        self.drafts: list[Tensor] = []  # [B] each; none for the last position if nobody asks the drafter about it
        self.logs: list[list[Tensor]] = [[], []]  # [B, V] each
        # For a row what entered the teacher's output layer, [positions, hidden size].
        self.hidden: dict[int, Tensor] = {}
        # [B] bool each: whether the row of ``logs`` is the model's own, and not the other's in its place
        drafted = [torch.full_like(reads[STUDENT], k < plan.forwards) for k in range(plan.block)]
        verified = [reads[1 - plan.drafter]] * plan.block
        self.has = [drafted, verified] if plan.drafter == STUDENT else [verified, drafted]


class BlockEngine:
    """Rounds over a batch of rows: draft, verify, walk, roll back; finished rows give their place to waiting prompts."""

    def __init__(
        self,
        job: Job,
        queue: deque[Row],
        batch_size: int,
        pace: Pace,
    ):
        self.job, self.queue, self.pace = job, queue, pace
        self.policy, self.sampling = job.settings.policy, job.settings.sampling
        self.keep_hidden = job.settings.keep_hidden
        self.rows = [queue.popleft() for _ in range(min(batch_size, len(queue)))]
        self.models = [  # indexed by STUDENT, TEACHER
            CachedModel(
                job.student, len(self.rows), job.capacity(STUDENT), job.vocab_size, static=job.settings.static_step
            ),
            CachedModel(job.teacher, len(self.rows), job.capacity(TEACHER), job.vocab_size, self.keep_hidden),
        ]
        self.device = self.models[STUDENT].device
        self.watches = [Stopwatch(model.device, pace.timed) for model in self.models]
        width = job.teacher.config.get_text_config().hidden_size * job.teacher.dtype.itemsize
        fits = len(job.rows) * job.settings.max_new_tokens * width <= HIDDEN_BYTES
        self.hidden_device = self.models[TEACHER].device if fits else torch.device("cpu")
        self.eos = torch.tensor(job.ends.ids, dtype=torch.int64, device=self.device)
        self.state: State = self.policy.init(len(self.rows), self.device)
        self.reads = self._reads()
        # Whether a row was broken in a forward that read drafts too; without them it will show whether they did it.
        self.in_doubt = False
        self.rounds = self.blocks = self.block_positions = self.compared = self.equal = 0

    def round(self) -> None:
        """Decide up to K tokens of every row, then retire finished rows and admit new ones."""
        watch = Stopwatch(self.device, self.pace.timed)
        start = watch.now()
        reads = torch.stack(self.reads, 1).tolist()
        left = max(self.job.settings.max_new_tokens - len(row.completion) for row in self.rows)
        plan = self.pace.plan(reads, 1 if self.in_doubt else left)
        self.in_doubt = False
        keys = [self._keys(k) for k in range(plan.block)]
        block = _Block(plan, keys, [gumbel_noise(each, self.job.vocab_size, self.device) for each in keys], self.reads)
        before = [list(model.lengths) for model in self.models]
        self._draft(block)
        self._verify(block)
        self._keep(block, self._walk(block), before)
        watch.lap(plan.block, start)
        if self.pace.timed:
            self._measure(plan, watch)
        self._retire()
        self.rounds += 1

    def cost(self, seconds: float) -> DecodeCost:
        student, teacher = self.models
        kept = sum(len(row.completion) for row in self.job.rows)
        by_teacher = sum(sum(row.speakers) for row in self.job.rows)
        return DecodeCost(
            seconds, kept, by_teacher, student.forwards, teacher.forwards,
            student.prefill_tokens, teacher.prefill_tokens, self.rounds,
            self.blocks, self.block_positions, self.compared, self.equal,
        )  # fmt: skip

    def _reads(self) -> list[Tensor]:
        """Which model the policy looks at next, for each row: two ``[B]`` bool tensors."""
        return [self._spread(read) for read in self.policy.reads(self.state)]

    def _spread(self, answer: Tensor | bool) -> Tensor:
        """A policy's answer for all rows or for each, ``[B]``."""
        return torch.as_tensor(answer, device=self.device).expand(len(self.rows)).clone()

    def _keys(self, offset: int) -> list[int]:
        """The keys of every row's draw ``offset`` positions from here."""
        return [noise_key(self.job.settings.seed, row.id, len(row.completion) + offset) for row in self.rows]

    def _draft(self, block: _Block) -> None:
        """Draws of one model, each read by it before the next."""
        who, rows = block.plan.drafter, range(len(self.rows))
        hidden = []
        for k in range(block.plan.forwards):
            draft = block.drafts[-1].unsqueeze(1) if k else None
            logits = self._forward(who, rows, draft, texts=k == 0)
            logs = self.job.ends.log_probs(logits[:, 0])
            block.logs[who].append(logs)
            block.drafts.append(self._own_draw(who, logs, block.noise[k]))
            hidden.append(self.models[who].hidden)
        if who == TEACHER and self.keep_hidden and hidden:
            block.hidden = dict(enumerate(torch.cat(hidden, 1)))

    def _own_draw(self, who: int, logs: Tensor, noise: Tensor) -> Tensor:
        """The token ``[B]`` that a model alone would write."""
        return self._draw(self.policy.proposal(who, logs), noise)

    def _draw(self, log_probs: Tensor, noise: Tensor) -> Tensor:
        """A token of each row ``[B]`` from the target distributions ``[B, V]``."""
        return draw(self.sampling.shape(log_probs), noise, self.sampling.temperature)

    def _verify(self, block: _Block) -> None:
        """What the other model says about all positions, in one forward over the rows that read it.

        The K-th draft is not read: its successor lies outside the block.
        """
        drafter, who = block.plan.drafter, 1 - block.plan.drafter
        rows = self.reads[who].nonzero().flatten().tolist()
        if rows:
            index = torch.tensor(rows, device=self.device)
            drafts = torch.stack(block.drafts, 1)[index, : block.plan.block - 1] if block.plan.block > 1 else None
            logits = self._forward(who, rows, drafts, texts=True)
            own = [self.job.ends.log_probs(logits[:, k]) for k in range(block.plan.block)]
            if len(rows) < len(self.rows):
                others = self._stand_ins(block, own[0].dtype)
                own = [logs.index_copy(0, index, part) for logs, part in zip(others, own, strict=True)]
            block.logs[who] = own
            block.logs[drafter] += own[len(block.logs[drafter]) :]
            if who == TEACHER and self.keep_hidden:
                block.hidden = dict(zip(rows, self.models[who].hidden, strict=True))
        else:
            block.logs[drafter] = block.logs[who] = self._stand_ins(block, torch.float32)

    def _stand_ins(self, block: _Block, dtype: torch.dtype) -> list[Tensor]:
        """What stands where a model was not run: the drafter's words, or any, where the drafter was not run either."""
        drafted = block.logs[block.plan.drafter]
        missing = block.plan.block - len(drafted)
        if not missing:
            return drafted
        anything = torch.zeros(len(self.rows), self.job.vocab_size, dtype=dtype, device=self.device).log_softmax(1)
        return drafted + [anything] * missing

    def _forward(self, who: int, rows: Sequence[int], drafts_bT: Tensor | None, texts: bool) -> Tensor:
        """Logits ``[b, T, V]`` after the rest of the rows' texts, if told to read them, and after each draft."""
        model, watch = self.models[who], self.watches[who]
        whole = [self.rows[row].tokens_of(who) for row in rows] if texts else None
        limits = [len(self.rows[row].prompt_of(who)) + self.job.settings.max_new_tokens for row in rows]
        if whole is not None:
            start = watch.now()
            model.catch_up(rows, whole)
            watch.lap(0, start)
        start = watch.now()
        logits = model.extend(rows, whole, None if drafts_bT is None else drafts_bT.to(model.device), limits)
        watch.lap(len(rows) * logits.shape[1], start)
        return logits.to(self.device)

    def _walk(self, block: _Block) -> list[list[list[float]]]:
        """Decide the positions in order; a row stops at the first token that its draft did not foresee.

        Everything stays on the device until the end, where one transfer brings home for each position and row:
        alive, token, speaker, divergence, threshold, whether the policy ends the text, whether student and teacher are broken
        here, whether either is anywhere in the block, and ``_evidence``.
        """
        start = torch.tensor([len(row.completion) for row in self.rows], device=self.device)
        alive = torch.ones_like(start, dtype=torch.bool)
        reads, columns, wide = self.reads, [], torch.result_type(block.logs[STUDENT][0], block.logs[TEACHER][0])
        spoilt = [torch.stack([logs[:, 0] for logs in block.logs[who]]).isnan().any(0) for who in (STUDENT, TEACHER)]
        for k, g in enumerate(block.noise):
            logq, logp = block.logs[STUDENT][k], block.logs[TEACHER][k]
            # Log-softmax spreads one NaN or +inf over its whole row.
            broken = [reads[s] & block.logs[s][k][:, 0].isnan() for s in (STUDENT, TEACHER)]
            sound = alive & ~(broken[STUDENT] | broken[TEACHER])
            decision = self.policy.step(self.state, logq, logp, start + k)
            token = self._draw(decision.log_probs, g)
            speaker = speakers(decision, token, block.keys[k])
            self._keep_state(sound, self.policy.spoke(self.policy.observe(decision.state, token), speaker))
            told = self._spread(self.policy.ends(self.state))
            evidence = self._evidence(block, k, token, sound, reads)
            seen = decision.divergence, decision.thresholds
            numbers = (alive, token, speaker, *seen, told, *broken, *spoilt, *evidence)
            columns.append(torch.stack([n.to(wide) for n in numbers], 1))  # ids and counts are exact in fp32 up to 2^24
            ends = told | torch.isin(token, self.eos) | (start + k + 1 == self.job.settings.max_new_tokens)
            if k + 1 == block.plan.block:
                break
            reads = self._reads()
            # A policy may want a model again that this block did not run for the row: the block ends there.
            lacks = [reads[s] & ~block.has[s][k + 1] for s in (STUDENT, TEACHER)]
            alive = sound & ~ends & (token == block.drafts[k]) & ~(lacks[STUDENT] | lacks[TEACHER])
            if self.device.type == "cpu" and not alive.any():  # elsewhere the question would cost more than the steps
                break
        return torch.stack(columns).tolist()

    def _evidence(self, block: _Block, k: int, token: Tensor, sound: Tensor, reads: list[Tensor]) -> list[Tensor]:
        """``[B]`` bools: the policy asked both models, the student's draw is final, the teacher's is; both ran, draws equal."""
        who = 1 - block.plan.drafter
        if k == len(block.drafts) or block.logs[who] is block.logs[1 - who]:
            return [torch.zeros_like(sound)] * 5  # one of the two was not run
        draws = [block.drafts[k], self._own_draw(who, block.logs[who][k], block.noise[k])]
        student, teacher = draws if who == TEACHER else draws[::-1]
        ran = sound & block.has[STUDENT][k] & block.has[TEACHER][k]
        asked = ran & reads[STUDENT] & reads[TEACHER]
        return [asked, asked & (student == token), asked & (teacher == token), ran, ran & (student == teacher)]

    def _keep(self, block: _Block, columns: list[list[list[float]]], before: list[list[int]]) -> None:
        """Write the decided tokens into their rows, and roll both models back to them.

        A row that is in doubt goes back to what the models had read ``before``: text that stood in one forward with a broken draft
        may be broken by it in a cache, too.
        """
        evidence, stale = [0] * 5, []
        for b, row in enumerate(self.rows):
            kept = 0
            for alive, token, speaker, divergence, threshold, ends, *rest in (column[b] for column in columns):
                broken, spoilt, seen = rest[:2], rest[2:4], rest[4:]
                if not alive:
                    break
                if any(broken):
                    if block.plan.block == 1:
                        row.fail_non_finite("student" if broken[STUDENT] else "teacher")
                    else:  # a draft behind this position may have broken it: its mask is a weight of 0, and 0 · NaN is NaN
                        self.in_doubt = True
                        for model, lengths in zip(self.models, before, strict=True):
                            model.lengths[b] = min(model.lengths[b], lengths[b])
                    break
                row.append(int(token), int(speaker), divergence, threshold, bool(ends), self.job)
                kept += 1
                evidence = [n + int(m) for n, m in zip(evidence, seen, strict=True)]
            stale += [(who, b) for who in (STUDENT, TEACHER) if spoilt[who]]
            if self.keep_hidden:
                hidden = block.hidden.get(b)
                row.keep_hidden(None if hidden is None else hidden[:kept].to(self.hidden_device, copy=True), kept)
        # Both models have read the last token but one at most; the last one may differ from what was drafted.
        for who, model in enumerate(self.models):
            model.lengths = [
                min(length, len(row.tokens_of(who)) - 1) for length, row in zip(model.lengths, self.rows, strict=True)
            ]
        for who, b in stale:
            self.models[who].clear_stale(b)
        self.blocks += len(self.rows)
        self.block_positions += block.plan.block * len(self.rows)
        self.compared, self.equal = self.compared + evidence[-2], self.equal + evidence[-1]
        self.pace.observe(*evidence)

    def _keep_state(self, alive: Tensor, new: State) -> None:
        """Rows whose block was cut keep the state of their last kept token."""
        self.state = tuple(
            torch.where(alive.view(-1, *[1] * (n.dim() - 1)), n, old) for n, old in zip(new, self.state, strict=True)
        )

    def _measure(self, plan: Plan, watch: Stopwatch) -> None:
        """Tell the pace what the forwards of this round cost, and what the rest of it did."""
        laps = [each.take() for each in self.watches]
        [(_, whole)] = watch.take()
        rest = whole - sum(seconds for each in laps for _, seconds in each)
        # Catching up, a lap of size 0, is not a block.
        blocks = [[(tokens, seconds) for tokens, seconds in each if tokens] for each in laps]
        self.pace.measure(blocks, rest, plan.block * len(self.rows))

    def _retire(self) -> None:
        """Give the places of finished rows to waiting prompts; when none waits, shrink the batch."""
        for place, row in enumerate(self.rows):
            if row.stop_reason is not None and self.queue:
                self.rows[place] = self.queue.popleft()
                for model in self.models:
                    model.reset(place)
                fresh = self.policy.init(1, self.device)
                for whole, first in zip(self.state, fresh, strict=True):
                    whole[place] = first[0]
        left = [place for place, row in enumerate(self.rows) if row.stop_reason is None]
        if left and len(left) < len(self.rows):
            for model in self.models:
                model.select(left)
            index = torch.tensor(left, device=self.device)
            self.state = tuple(part[index] for part in self.state)
        self.rows = [self.rows[place] for place in left]
        if self.rows:
            self.reads = self._reads()
