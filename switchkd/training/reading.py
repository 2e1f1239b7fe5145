"""Which text each step reads: rows of the data, texts that the models write now, or texts of earlier steps."""

from collections.abc import Callable, Sequence

from accelerate import Accelerator

from switchkd.data.texts import TokenizedExample, batch_indices
from switchkd.decoding.decode import Runners
from switchkd.decoding.rollouts import DecodeCost, Rollout, Rollouts
from switchkd.decoding.settings import DecodeSettings
from switchkd.forward.parallel import Together
from switchkd.methods.mixes import Source
from switchkd.methods.sampling import Use, keyed_uniform, noise_key
from switchkd.models.pair import Pair
from switchkd.teachers.asked import Rows
from switchkd.teachers.states import TeacherCache
from switchkd.training.processes import all_rollouts, check_agreed, from_main
from switchkd.training.settings import TrainConfig
from switchkd.writing.examples import costs_of, decode_examples
from switchkd.writing.turns import check_policy

OnRound = Callable[[DecodeCost], None]  # told of what decoding has cost so far in the step


class Reading:
    """The rows of one step after another, of which every rank has an equal part.

    ``rows_read`` is the whole data cursor. ``replay`` holds texts of earlier steps, for mixes that read them again, and ``memory``
    what the mix has learned. ``generation_rows`` are decoded at a time: fewer than the settings say once memory ran out.
    """

    def __init__(
        self,
        pair: Pair,
        examples: Sequence[TokenizedExample],
        config: TrainConfig,
        accelerator: Accelerator,
        teacher_cache: TeacherCache | None = None,
    ):
        self.pair, self.examples, self.config = pair, examples, config
        self.accelerator, self.teacher_cache = accelerator, teacher_cache
        self.together = Together.of(pair.teacher)
        self.policy = config.policy.bind(pair.tokenizer, config.max_new_tokens)
        if pair.bridges and config.mix.generates:
            check_policy(self.policy)
        self.memory = config.mix.memory()
        self.replay: list[Rollout] = []
        self.rows_read = 0
        self.generation_rows, self.runners = config.generation_batch_size, Runners()
        self.share(self.rows_by_settings * accelerator.num_processes)

    def share(self, rows: int) -> None:
        """Read so many rows in a step, an equal part of them on every rank."""
        self.rows_per_step, self.rows_per_rank = rows, rows // self.accelerator.num_processes

    @property
    def rows_by_settings(self) -> int:
        """Rows of a step on one rank, as the settings say."""
        return self.config.per_device_train_batch_size * self.config.gradient_accumulation_steps

    @property
    def mine(self) -> slice:
        """This rank's part of a step's rows."""
        first = self.accelerator.process_index * self.rows_per_rank
        return slice(first, first + self.rows_per_rank)

    @property
    def ours(self) -> slice:
        """The part of a step's rows that this rank decodes: its own, and those of ranks that run the teacher together with it."""
        rows = self.rows_per_rank * self.together.size
        first = self.accelerator.process_index // self.together.size * rows
        return slice(first, first + rows)

    def source(self, step: int, schedule: float) -> Source:
        """Where a step's text comes from; the same on every rank."""
        chance = keyed_uniform(self.config.seed, step, 0, Use.CHOICE)
        return self.config.mix.source(chance, schedule, len(self.replay), self.memory)

    def rows(
        self, source: Source, step: int, schedule: float, on_round: OnRound | None = None
    ) -> tuple[Rows, Rollouts]:
        """This rank's rows of a step, and what all ranks generated for it."""
        if source == "replay":
            return self.replayed(step), Rollouts()
        examples = self.next(self.examples)
        if source == "examples":
            return examples, Rollouts()
        ours = self.generate(self.next(self.examples, self.ours), step, schedule, on_round)
        check_agreed(ours, self.together, f"step {step + 1}")
        first, cost = self.mine.start - self.ours.start, ours.cost if self.together.rank == 0 else DecodeCost()
        mine = Rollouts(ours[first : first + self.rows_per_rank], cost)
        rollouts = all_rollouts(mine)
        if self.config.mix.capacity:  # for replay; the oldest go first
            self.replay = [*self.replay, *rollouts][-self.config.mix.capacity :]
        return ([*examples, *mine] if source == "pairs" else mine), rollouts

    def next(self, examples: Sequence[TokenizedExample], part: slice | None = None) -> list[TokenizedExample]:
        """The rows of ``examples`` in the coming step: this rank's, or another ``part`` of them."""
        indices = batch_indices(len(examples), self.rows_per_step, self.rows_read, self.config.seed)[part or self.mine]
        if self.teacher_cache is None or examples is not self.examples:
            return [examples[i] for i in indices]
        return [self.teacher_cache.attached(examples[i], i) for i in indices]

    def replayed(self, step: int) -> list[Rollout]:
        """Texts of earlier steps, drawn by (seed, step) without replacement while there are enough."""
        keys = [noise_key(self.config.seed, step, i, Use.REPLAY) for i in range(len(self.replay))]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        return [self.replay[order[i % len(order)]] for i in range(self.rows_per_step)[self.mine]]

    def generate(
        self, examples: Sequence[TokenizedExample], step: int, schedule: float, on_round: OnRound | None = None
    ) -> Rollouts:
        """Complete the prompts of the whole accumulation window at once, of all ranks that run the teacher together."""
        first = self.rows_read + self.ours.start
        settings, ids = self.decoding(step, schedule), range(first, first + len(examples))
        rollouts = decode_examples(self.pair, examples, settings, ids, on_round, runners=self.runners)
        self.generation_rows = rollouts.rows_that_fit or self.generation_rows
        for rollout, example in zip(rollouts, examples, strict=True):
            if rollout.error:
                raise rollout.failure(f"step {step + 1}, {example.source}")
        return rollouts

    def decoding(self, step: int, schedule: float) -> DecodeSettings:
        """How the text of a step is decoded."""
        return self.config.decoding(
            policy=self.policy.at(schedule, step),
            max_new_tokens=self.config.token_budget(schedule),
            seed=self.config.seed,
            keep_hidden=self.config.objective.reads_teacher,
            batch_size=self.generation_rows,
        )

    def costs(self) -> tuple[float, ...]:
        """What rounds of this run are planned by: given, or measured now; the same on every rank."""
        config = self.config
        if config.costs or not config.mix.generates:
            return config.costs
        rows = self.examples[: self.generation_rows]
        settings = self.decoding(0, 0.0)
        if self.together.alone:
            return from_main(self.accelerator, lambda: costs_of(self.pair, rows, settings)) or ()
        mine = costs_of(self.pair, rows, settings)  # which needs them all
        return from_main(self.accelerator, lambda: mine)
