"""Text whose teacher is behind a server: it reads whole texts at a time, and is not asked at single tokens.

Where a rule never asks the teacher, the student writes alone. Where the teacher, once it writes, writes to the end, whole texts are
drafted, by the student until then and by a server that writes from then on; the server that reads says what the teacher thinks of
the draft, and ``decide`` keeps tokens up to the first that the draft did not foresee. So the text is the engine's, whoever drafted;
a wrong draft costs another round.

Shapes: B rows, K positions of a piece, V vocabulary, H hidden size. p is the teacher, q the student.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from switchkd.base import signals
from switchkd.base.errors import ConfigError, SwitchKDWarning
from switchkd.decoding.decide import Block, Verdict, decide
from switchkd.decoding.rollouts import DecodeCost, Rollouts
from switchkd.decoding.rows import Job, Row
from switchkd.forward.head import Scorer, sizes_on
from switchkd.forward.served import ServedReader
from switchkd.methods.policy import STUDENT, TEACHER, Policy, State, StudentOnly
from switchkd.methods.rules import name_of
from switchkd.methods.sampling import gumbel_noise, keys_at, keys_tensor, row_key

Engine = Callable[[Job], Rollouts]  # decodes a job whose models are both in this process

# Rows that are decided together, and, where no setting says how many are decoded together, that too; and that the student reads.
_ROWS, _READ = 32, 8
# Of the writer's drafts: fewer kept than this share, of so many at least, and something is said about it.
_FEW, _ENOUGH = 0.9, 100
# Tokens that the writer drafts at least, where its last draft of a row was wrong.
_SHORTEST = 16


def decode_served(job: Job, by_engine: Engine) -> Rollouts:
    """``decode_job`` of a job whose teacher is a `ServedModel`; ``by_engine`` decodes one whose models are both here.

    Raises ConfigError for a rule that may ask the teacher at single tokens; ServerError and ModelError as `ServedModel.hidden`.
    """
    check_served(job.settings.policy, job.teacher.server.address, job.teacher.writer is not None)
    if reads_none(job.settings.policy):
        return by_engine(by_student(job))
    rollouts, size = Rollouts(), job.settings.batch_size or _ROWS
    for first in range(0, len(job.rows), size):  # what the servers say of so many texts is here at a time
        part = _Drafted(replace(job, rows=job.rows[first : first + size]), by_engine).run()
        rollouts = Rollouts([*rollouts, *part], rollouts.cost + part.cost)
    return rollouts


def by_student(job: Job, rows: list[Row] | None = None) -> Job:
    """The same rows, or others, written by the student alone, which sits in the engine's other seat too, where nobody asks it."""
    settings = replace(job.settings, policy=StudentOnly(), keep_hidden=False)
    return replace(job, teacher=job.student, settings=settings, rows=job.rows if rows is None else rows)


def reads_none(policy: Policy) -> bool:
    """Whether a rule never asks the teacher."""
    return type(policy).init is Policy.init and policy.reads(())[TEACHER] is False


def check_served(policy: Policy, address: str, writes: bool) -> None:
    """Raise ConfigError for a rule that may ask the teacher where it cannot be asked, behind the server at ``address``.

    ``writes``: whether there is a server that writes as the teacher, too.
    """
    if reads_none(policy) or (policy.hands_over and writes):
        return
    others = (
        "Take the teacher into the process (its folder or hub name as --teacher; over several GPUs with "
        "--teacher-tensor-parallel), or a method whose text the student writes, or the data: on_policy, gkd, distillm, kd …"
    )
    if policy.hands_over:
        raise ConfigError(
            f"the policy {name_of(policy)} has the teacher write, and the server at {address} only reads; give one that writes, of "
            f"the same model: --teacher-writer http://host:port (docs/server.md). Or: {others[0].lower()}{others[1:]}"
        )
    raise ConfigError(
        f"the policy {name_of(policy)} asks the teacher at every token, and the teacher behind {address} reads a whole text at a "
        f"time. {others}"
    )


@dataclass
class _Text:
    """A row on its way: how its next tokens are drafted, and what the teacher said at those that it has."""

    row: Row
    budget: int
    draft: list[int] = field(default_factory=list)
    said: list[Tensor] = field(default_factory=list)
    longest: int = 2**31  # of the writer's next draft
    by_writer: bool = False

    @property
    def start(self) -> int:
        """The position of the next token."""
        return len(self.row.completion)

    @property
    def left(self) -> int:
        return self.budget - self.start


class _Drafted:
    """Rows of a job that are drafted as whole texts and decided from what a server reads."""

    def __init__(self, job: Job, by_engine: Engine):
        self.job, self.by_engine, self.policy = job, by_engine, job.settings.policy
        self.reader = ServedReader(job.teacher, job.vocab_size, job.ends)
        self.student = Scorer(job.student, job.vocab_size, job.ends)
        self.device = self.student.head.linear.weight.device
        self.texts = [_Text(row, job.settings.max_new_tokens) for row in job.rows if row.stop_reason is None]
        self.state = self.policy.init(len(self.texts), self.device)
        self.cost = DecodeCost()
        self.right = self.judged = 0  # of the writer's drafts

    def run(self) -> Rollouts:
        start = time.perf_counter()
        while open_ := [place for place, text in enumerate(self.texts) if text.row.stop_reason is None]:
            signals.check()
            reads = self._spread(self.policy.reads(self.state)[STUDENT], len(self.texts))
            self._draft([place for place in open_ if reads[place]], [place for place in open_ if not reads[place]])
            hidden = self._teacher_reads(open_)
            for first in range(0, len(open_), _ROWS):
                self._decide(open_[first : first + _ROWS], hidden, reads)
            self.cost.rounds += 1
        self._tell()
        for text in self.texts:
            if self.job.settings.keep_hidden and text.said and text.row.error is None:
                text.row.said = torch.cat(text.said)
        self.cost.seconds = time.perf_counter() - start
        return Rollouts([row.rollout() for row in self.job.rows], self.cost)

    # --- drafts ---------------------------------------------------------------------------------------------------

    def _draft(self, students: Sequence[int], writers: Sequence[int]) -> None:
        """Put the rest of each text into its draft: the student's own, or the writer's."""
        if students:
            rows = [self._rest(self.texts[place]) for place in students]
            cost = self.by_engine(by_student(self.job, rows)).cost
            self.cost.student_forwards += cost.student_forwards
            self.cost.student_prefill_tokens += cost.student_prefill_tokens
            for place, row in zip(students, rows, strict=True):
                self.texts[place].draft, self.texts[place].by_writer = row.completion, False
        if writers:
            asked = [self.texts[place] for place in writers]
            prompts = [text.row.tokens_of(TEACHER) for text in asked]
            keys = [row_key(text.row.seed, text.row.id) for text in asked]
            sizes = [min(text.left, text.longest) for text in asked]
            starts = [text.start for text in asked]
            written = self.job.teacher.written(prompts, sizes, keys, starts, self.job.ends.ids, self.job.vocab_size,
                                               self.job.settings.temperature)  # fmt: skip
            for text, draft in zip(asked, written, strict=True):
                text.draft, text.by_writer = draft, True
        for place in (*students, *writers):
            text = self.texts[place]
            # One token at least, right or wrong: the teacher is asked about the place where it stands.
            text.draft = text.draft[: text.left] or [0]

    def _rest(self, text: _Text) -> Row:
        """What the student is still to write of a text, with the noise of those positions."""
        return Row(text.row.id, text.row.tokens_of(STUDENT), text.row.seed, start=text.start)

    def _teacher_reads(self, places: Sequence[int]) -> dict[int, Tensor]:
        """What enters the teacher's output layer before each token of the drafts, ``[n, H]`` on the host."""
        rows = [(self.texts[place].row.tokens_of(TEACHER), self.texts[place].draft) for place in places]
        states = self.job.teacher.hidden([prompt + draft[:-1] for prompt, draft in rows])
        self.cost.teacher_forwards += len(rows)
        return {
            place: each[-len(draft) :].clone() for place, each, (_, draft) in zip(places, states, rows, strict=True)
        }

    def _student_reads(self, places: Sequence[int], reads: Sequence[bool]) -> dict[int, Tensor]:
        """The same of the student, on its device, for the texts of which it is asked."""
        asked = [place for place in places if reads[place]]
        found: dict[int, Tensor] = {}
        for first in range(0, len(asked), _READ):
            part = asked[first : first + _READ]
            rows = [(self.texts[place].row.tokens_of(STUDENT), self.texts[place].draft) for place in part]
            hidden = self.student.hidden(rows).split([len(draft) for _, draft in rows])
            found |= dict(zip(part, hidden, strict=True))
            self.cost.student_forwards += len(part)
        return found

    # --- decisions ------------------------------------------------------------------------------------------------

    def _decide(self, places: Sequence[int], teacher: dict[int, Tensor], reads: Sequence[bool]) -> None:
        """Walk the rule over the drafts of these texts, a piece of positions at a time, and keep what it keeps."""
        student = self._student_reads(places, reads)
        done = dict.fromkeys(places, 0)  # of each draft
        while places:
            longest = max(len(self.texts[place].draft) - done[place] for place in places)
            size = min(longest, max(1, sizes_on(self.device).chunk // (4 * self.job.vocab_size * len(places))))
            block = self._block(places, done, size, teacher, student)
            index = torch.tensor(list(places), device=self.device)
            state: State = tuple(part[index] for part in self.state)
            verdict = decide(self.policy, state, self.job.settings.sampling, self.job.ends, block)
            for part, new in zip(self.state, verdict.state, strict=True):
                part[index] = new
            places = [place for at, place in enumerate(places) if self._keep(place, at, verdict, done, teacher[place])]

    def _block(
        self,
        places: Sequence[int],
        done: dict[int, int],
        size: int,
        teacher: dict[int, Tensor],
        student: dict[int, Tensor],
    ) -> Block:
        """The next ``size`` positions of drafts; where a draft is shorter, or the student is not asked, nobody was run."""
        logs = [self._logs(who, places, done, size, states) for who, states in ((STUDENT, student), (TEACHER, teacher))]
        (q, ran_q), (p, ran_p) = logs
        drafts = torch.zeros(len(places), size, dtype=torch.int64)
        for at, place in enumerate(places):
            part = self.texts[place].draft[done[place] : done[place] + size]
            drafts[at, : len(part)] = torch.tensor(part)
        texts = [self.texts[place] for place in places]
        start = torch.tensor([text.start for text in texts], device=self.device)
        left = torch.tensor([text.left for text in texts], device=self.device)
        rows = keys_tensor([row_key(text.row.seed, text.row.id) for text in texts], self.device).unsqueeze(1)
        keys = keys_at(rows, start.unsqueeze(1) + torch.arange(size, device=self.device))
        noise = gumbel_noise(keys, self.job.vocab_size)
        return Block((q, p), (ran_q, ran_p), drafts.to(self.device), keys, noise, start, left)

    def _logs(
        self, who: int, places: Sequence[int], done: dict[int, int], size: int, states: dict[int, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Log-distributions ``[B, K, V]`` of a model, and where it was run ``[B, K]``; uniform elsewhere."""
        reader = self.student if who == STUDENT else self.reader
        parts = [states[place][done[place] : done[place] + size] if place in states else None for place in places]
        ran = torch.zeros(len(places), size, dtype=torch.bool, device=self.device)
        for at, part in enumerate(parts):
            ran[at, : 0 if part is None else len(part)] = True
        wide = torch.promote_types(self.job.student.dtype, torch.float32)
        logs = torch.zeros(*ran.shape, self.job.vocab_size, dtype=wide, device=self.device)
        if known := [part for part in parts if part is not None]:
            hidden = torch.cat(known).to(reader.head.linear.weight.device)
            logs[ran] = reader.log_probs(hidden).to(logs)
        return logs, ran

    def _keep(self, place: int, at: int, verdict: Verdict, done: dict[int, int], states: Tensor) -> bool:
        """Write down what a row keeps of a piece; whether its draft was right so far, and goes on."""
        text, kept = self.texts[place], int(verdict.kept[at])
        row, first, drafted = text.row, done[place], text.draft
        tokens = verdict.tokens[at, :kept].tolist()
        row.completion += tokens
        row.speakers += verdict.speakers[at, :kept].tolist()
        row.divergences += verdict.divergences[at, :kept].tolist()
        row.thresholds += verdict.thresholds[at, :kept].tolist()
        text.said.append(states[first : first + kept])
        done[place] = first + kept
        right = sum(one == other for one, other in zip(tokens, drafted[first:], strict=False))
        self.cost.kept_tokens += kept
        self.cost.teacher_tokens += sum(row.speakers[len(row.speakers) - kept :])
        if text.by_writer:
            self.right, self.judged = self.right + right, self.judged + kept
            text.longest = 2**31 if right == kept else max(_SHORTEST, 2 * done[place])
        for name, broken in zip(("student", "teacher"), verdict.broken, strict=True):
            if broken[at] and row.stop_reason is None:
                row.fail_non_finite(name, text.start)
        if row.stop_reason is None and kept:
            over = text.left == 0
            row.stop_reason = "eos" if verdict.eos[at] else "policy" if verdict.told[at] else "length" if over else None
        return row.stop_reason is None and right == kept > 0 and done[place] < len(drafted)

    @staticmethod
    def _spread(read: Tensor | bool, rows: int) -> list[bool]:
        return read.tolist() if isinstance(read, Tensor) else [read] * rows

    def _tell(self) -> None:
        """Say it, once, where the writer drafts otherwise than the teacher draws."""
        teacher = self.job.teacher
        if self.judged >= _ENOUGH and self.right < _FEW * self.judged and not teacher.told_of_drafts:
            teacher.told_of_drafts = True
            warnings.warn(
                f"{teacher.writer.address} foresees {self.right / self.judged:.0%} of the teacher's tokens, so that texts "
                "take many rounds. Is it the same model, and does it draw with our noise (--logits-processors "
                "switchkd_noise:KeyedNoise, docs/server.md)? Cuts such as top_p have the same effect. The text is the same",
                SwitchKDWarning,
                stacklevel=2,
            )
