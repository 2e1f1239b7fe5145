"""Who drafts and how far: the plan with the most tokens a second, from what was seen and measured."""

import itertools
import math
import random
import time

import pytest
import torch
from tiny import POLICIES, tiny_model, toy_examples, toy_pair

from switchkd import AdaSwitch, StudentOnly, Switch, TeacherOnly, decode
from switchkd.base.errors import ConfigError
from switchkd.decoding import decode as decoding
from switchkd.decoding import engine
from switchkd.decoding import pace as pacing
from switchkd.decoding.pace import BLOCKS, Costs, Pace, Plan, Stopwatch
from switchkd.methods.mixes import Generated
from switchkd.methods.policy import STUDENT, TEACHER
from switchkd.training.settings import TrainConfig
from switchkd.training.trainer import Trainer

CPU = torch.device("cpu")
LINE = pacing.line  # which conftest replaces
BOTH, ONLY_STUDENT, ONLY_TEACHER, NEITHER = (True, True), (True, False), (False, True), (False, False)


def pace(student=0.04, teacher=0.4, **settings):
    """Of models whose forwards take so long, and a thirtieth more for each token."""
    return Pace(Costs((student, student / 30), (teacher, teacher / 30), (1e-4, 1e-5)), **settings)


def settle(p, student, teacher, equal):
    """So many of 100 draws were final, and equal, for long."""
    for _ in range(50):
        p.observe(100, student, teacher, 100, equal)
    return p


def test_the_plan_is_the_one_of_most_tokens_a_second():
    """Against a simulation: rows keep tokens until their first draft that fails, forwards take their time."""
    p = settle(pace(), 80, 30, 30)
    plan = p.plan({BOTH: 4}, left=100)
    assert plan.drafter == STUDENT and plan.forwards == plan.block > 1
    coin = random.Random(0)

    def rate(block):
        kept = 0
        for _ in range(4000):
            kept += next((k for k in range(1, block) if coin.random() > 0.8), block)
        seconds = block * p.costs(STUDENT, 4) + p.costs(TEACHER, 4 * block) + p.costs.deciding(4 * block)
        return kept / seconds

    rates = {block: rate(block) for block in BLOCKS}
    assert rates[plan.block] > 0.97 * max(rates.values())


def test_who_agrees_drafts():
    assert settle(pace(1, 1), 90, 40, 40).plan({BOTH: 1}, 50).drafter == STUDENT
    assert settle(pace(1, 1), 40, 90, 40).plan({BOTH: 1}, 50).drafter == TEACHER
    # A teacher ten times as dear may agree more often and still not pay.
    assert settle(pace(), 85, 95, 80).plan({BOTH: 1}, 50).drafter == STUDENT


def test_hopeless_drafts_are_not_made():
    assert settle(pace(), 0, 0, 0).plan({BOTH: 8}, 50).block == 1


def test_a_round_serves_rows_that_go_together():
    """Where a few rows explore and most are the teacher's, whoever keeps more tokens a second is served, and the others wait."""
    dear = settle(Pace(Costs((0.05, 0.05), (2.0, 0.1), (0.0, 0.0))), 90, 60, 5)
    assert dear.plan({BOTH: 4, ONLY_TEACHER: 4}, 50).served == {BOTH}
    hopeless = settle(pace(0.3, 0.4), 0, 0, 5)
    assert BOTH in hopeless.plan({BOTH: 1, ONLY_TEACHER: 7}, 50).served  # who will join the others
    hopeless.returned = True
    assert hopeless.plan({BOTH: 1, ONLY_TEACHER: 7}, 50).served == {ONLY_TEACHER}
    # Where the teacher is all that costs, one forward for everybody is cheaper than two.
    cheap = settle(pace(1e-4, 0.4), 0, 0, 0)
    assert cheap.plan({BOTH: 4, ONLY_TEACHER: 4}, 50).served == {BOTH, ONLY_TEACHER}


@pytest.mark.parametrize("rows", [{BOTH: 3}, {BOTH: 1, ONLY_TEACHER: 5}, {ONLY_STUDENT: 2, BOTH: 2, NEITHER: 1}])
def test_no_plan_keeps_more_tokens_a_second_than_the_one_chosen(rows):
    """Of all groups, drafters and lengths."""
    p = settle(pace(0.1, 0.3), 70, 60, 50)
    p.returned = True
    rate = p._rate(p.plan(rows, 40), rows)
    for count in range(1, len(rows) + 1):
        for served in itertools.combinations(rows, count):
            if 1 < count < len(rows) or not any(map(any, served)):
                continue  # groups are of one kind, or all
            for drafter, block in itertools.product((STUDENT, TEACHER), BLOCKS):
                if block * sum(rows[kind] for kind in served) <= 256 and block <= 40:
                    if drafter == TEACHER and not any(teacher for _, teacher in served):
                        continue
                    assert p._rate(p.round_of(drafter, block, frozenset(served)), rows) <= rate


def test_exploration_grows_while_the_student_goes_on():
    p = pace()
    blocks = []
    for _ in range(12):
        blocks.append(p.plan({BOTH: 2}, 200).block)
        p.observe(40, 40, 10, 40, 10)
    assert blocks == sorted(blocks) and blocks[-1] > 2 * blocks[0]


def test_a_resting_student_is_asked_for_drafts_only_if_they_pay():
    assert settle(pace(), 90, 90, 85).plan({ONLY_TEACHER: 2}, 50).drafter == STUDENT
    for p in (settle(pace(), 90, 90, 5), settle(pace(1, 1), 90, 90, 60)):
        plan = p.plan({ONLY_TEACHER: 2}, 50)
        assert plan.drafter == TEACHER or plan.forwards == 0


def test_the_last_draft_of_a_block_is_not_made_where_nobody_asks_for_its_distribution():
    plan = settle(pace(drafter="student", block_size=5), 50, 50, 50).plan({ONLY_TEACHER: 1}, 50)
    assert plan == Plan(STUDENT, 5, 4, frozenset([ONLY_TEACHER]))
    assert pace(drafter="student", block_size=5).round_of(STUDENT, 5, frozenset([ONLY_TEACHER, BOTH])).forwards == 5


def test_a_lone_student_never_runs_the_teacher_and_writes_as_far_as_a_decision_costs():
    """What is drafted behind an end is lost, so that blocks stay short unless deciding is dear."""
    for teacher in (0.4, 1e-9):
        plan = settle(pace(teacher=teacher), 90, 90, 99).plan({ONLY_STUDENT: 3}, 50)
        assert (plan.drafter, plan.block) == (STUDENT, 1)
    dear = Pace(Costs((1e-3, 0.0), (1e-3, 0.0), (1e-3, 0.0))).plan({ONLY_STUDENT: 3}, 50)
    assert dear.drafter == STUDENT and 4 <= dear.block <= 12


def test_many_rows_have_longer_blocks_where_the_vocabulary_is_small():
    """What a position holds grows with the vocabulary: 12 of 256 rows are 7 MB a tensor at 600 ids, and 600 MB at 49,152."""

    def block(rows, vocab_size):
        flat = Costs((1.0, 0.0), (1.0, 0.0), (0.0, 0.0))
        return settle(Pace(flat, vocab_size=vocab_size), 99, 99, 99).plan({BOTH: rows}, 100).block

    assert [block(rows, 600) for rows in (8, 64, 256)] == [12, 12, 12]
    assert [block(rows, 49_152) for rows in (8, 64, 256)] == [12, 4, 1]
    assert [block(rows, 151_936) for rows in (8, 64, 256)] == [12, 4, 1]


@pytest.mark.parametrize("vocab_size", [7, 23])
def test_decoding_plans_by_its_own_vocabulary(vocab_size, monkeypatch):
    paces, init, expected = [], Pace.__init__, pace(vocab_size=vocab_size).positions
    monkeypatch.setattr(Pace, "__init__", lambda self, *rest: paces.append(self) or init(self, *rest))
    decode(tiny_model("llama", 1), tiny_model("llama", 2), [[3]], Switch(), 2, vocab_size=vocab_size)
    assert [each.positions for each in paces] == [expected]


def test_where_nobody_is_read_nobody_runs():
    assert pace().plan({NEITHER: 2}, 50) == Plan(STUDENT, 1, 0, frozenset([NEITHER]))


def test_rows_that_have_switched_say_nothing_of_those_that_explore():
    """AdaSwitch in one batch: a row past its switch is the teacher's, whatever the student would have written there."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pace, "observe", lambda self, *evidence: seen.append(evidence))
        pair = tiny_model("llama", 1), tiny_model("llama", 2)
        decode(*pair, [[3], [4]], AdaSwitch(window=1, ratio=0.0), 8, block_size=4, drafter="student", eos_token_ids=[])
    asked, _, _, ran, _ = (sum(column) for column in zip(*seen, strict=True))
    assert asked == 4 and ran > asked  # two tokens a row until the switch; drafts go on after it


def test_blocks_end_with_the_budget():
    p = settle(pace(), 99, 99, 99)
    assert p.plan({BOTH: 1}, 3).block == 3 and p.plan({BOTH: 1}, 1).block == 1
    assert pace(block_size=7).plan({BOTH: 1}, 4).block == 4


def test_wide_batches_take_shorter_blocks():
    """What a round holds grows with rows times positions times the vocabulary."""
    p = settle(pace(), 99, 99, 99)
    assert p.plan({BOTH: 64}, 100).block <= 4 < p.plan({BOTH: 4}, 100).block
    assert p.plan({BOTH: 1000}, 100).block == 1


def test_what_is_not_seen_for_long_is_tried_again():
    p = settle(pace(), 90, 90, 0)
    for _ in range(4000):
        p.observe(0, 0, 0, 0, 0)
    assert p.plan({ONLY_TEACHER: 1}, 50).drafter == STUDENT


def test_a_line_goes_through_the_shortest_times_of_two_sizes(monkeypatch):
    """The first call of a size prepares kernels, and whatever else the machine does only adds."""
    clock, calls = [0.0], []
    monkeypatch.setattr(pacing.time, "perf_counter", lambda: clock[0])

    def work(size):
        calls.append(size)
        first, busy = calls.count(size) == 1, calls.count(size) == 3
        clock[0] += 0.2 + 0.01 * size + 5.0 * first + 1.0 * busy

    assert LINE(work, (10, 40), CPU) == (0.2, 0.01)
    assert len(calls) == 8


def test_what_forwards_and_decisions_cost_is_measured_once_and_leaves_nothing(monkeypatch):
    """Once for a model, whatever is decoded with it afterwards; the text is that of a call that measured nothing."""
    pair, timed = (tiny_model("llama", 1), tiny_model("llama", 2)), []
    monkeypatch.setattr(pacing, "line", lambda work, sizes, _: timed.append(sizes) or work(sizes[1]) or (1e-3, 1e-4))
    monkeypatch.setattr(pacing, "_decisions", {})
    settings = {"max_new_tokens": 9, "eos_token_ids": []}
    first = decode(*pair, [[3, 4, 5, 6], [7, 8]], Switch(), **settings)
    assert timed == [(2, 8)] * 3
    second = decode(*pair, [[3, 4, 5, 6], [7, 8]], Switch(), **settings)
    given = decode(*pair, [[3, 4, 5, 6], [7, 8]], Switch(), costs=(1e-3, 1e-4) * 3, **settings)
    assert len(timed) == 3
    for other in (second, given):
        assert [r.completion_ids for r in other] == [r.completion_ids for r in first]
        assert other.cost.student_forwards == first.cost.student_forwards
        assert other.cost.student_prefill_tokens == first.cost.student_prefill_tokens == 4 or other is given


def test_nothing_is_measured_where_nothing_is_chosen_and_no_model_that_is_never_read(monkeypatch):
    pair, timed = (tiny_model("llama", 1), tiny_model("llama", 2)), []
    monkeypatch.setattr(pacing, "time_forwards", lambda runner, rows: timed.append(runner.model) or (1e-3, 1e-4))
    monkeypatch.setattr(engine, "time_forwards", pacing.time_forwards)
    decode(*pair, [[3]], Switch(), 4, block_size=2, drafter="student")
    assert not timed
    decode(*pair, [[3]], POLICIES["student_only"], 4)
    assert timed == [pair[0]]


def test_equal_costs_give_equal_rounds_whatever_the_clock_says(monkeypatch):
    """A run that is planned by given costs does not look at the clock at all."""
    plan, pair = Pace.plan, (tiny_model("llama", 1), tiny_model("llama", 2))

    def plans(**settings):
        made = []
        with monkeypatch.context() as patch:
            patch.setattr(Pace, "plan", lambda *args: made.append(plan(*args)) or made[-1])
            decode(*pair, [[3], [4, 5]], Switch(), 30, eos_token_ids=[], **settings)
        return made

    dear_teacher, dear_student = (1e-3, 1e-5, 1.0, 1e-2, 1e-4, 1e-6), (1.0, 1e-2, 1e-3, 1e-5, 1e-4, 1e-6)
    assert plans(costs=dear_teacher) != plans(costs=dear_student)
    monkeypatch.setattr(pacing, "time", None)
    assert plans(costs=dear_teacher) == plans(costs=dear_teacher)


@pytest.mark.parametrize("name,comes_back", [("adaswitch", False), ("switch_constant", False), ("spell", True)])
def test_whether_rows_come_back_to_both_models_is_seen(name, comes_back, monkeypatch):
    """After AdaSwitch's switch nobody does; behind a spell of the teacher's every row does."""
    paces, init = [], Pace.__init__
    monkeypatch.setattr(Pace, "__init__", lambda self, *rest: paces.append(self) or init(self, *rest))
    pair = tiny_model("llama", 1), tiny_model("llama", 2)
    rollouts = decode(*pair, [[3], [4, 5], [6]], POLICIES[name], 30, eos_token_ids=[])
    assert any(rollout.speakers.count(TEACHER) for rollout in rollouts)
    assert [each.returned for each in paces] == [comes_back]


@pytest.mark.parametrize(
    ("policy", "drafter", "measured"),
    [
        (Switch(), "auto", ["student", "teacher"]),
        (StudentOnly(), "auto", ["student"]),
        (TeacherOnly(), "auto", ["student", "teacher"]),  # the student may draft what the teacher writes
        (TeacherOnly(), "student", ["student", "teacher"]),
        (TeacherOnly(), "teacher", ["teacher"]),
    ],
)
def test_models_that_may_run_are_measured(policy, drafter, measured, monkeypatch):
    pair = {"student": tiny_model("llama", 1), "teacher": tiny_model("llama", 2)}
    timed = []
    monkeypatch.setattr(engine, "time_forwards", lambda runner, rows: timed.append(runner.model) or (1e-3, 1e-5))
    decode(*pair.values(), [[3], [4, 5]], policy, 4, eos_token_ids=[], drafter=drafter)
    assert timed == [pair[name] for name in measured]


@pytest.mark.parametrize("costs", [(1.0,), (1.0,) * 7, (-1.0,) * 6, (math.nan,) * 6])
def test_costs_that_are_none_are_refused(costs):
    with pytest.raises(ConfigError, match="six numbers of seconds"):
        decode(tiny_model("llama", 1), tiny_model("llama", 2), [[3]], Switch(), 4, costs=costs)


@pytest.mark.parametrize("policy", [Switch(), AdaSwitch(window=2, ratio=1.5), TeacherOnly(), POLICIES["student_only"]])
def test_automatic_choices_decode_to_the_end(policy):
    pair = tiny_model("llama", 1), tiny_model("llama", 2)
    rollouts = decode(*pair, [[3], [4, 5], [6]] * 3, policy, 40, eos_token_ids=[], batch_size=4)
    assert all(len(r.completion_ids) == 40 for r in rollouts)


def test_a_memory_budget_sets_the_batch():
    pair = tiny_model("llama", 1), tiny_model("llama", 2)
    widths = []
    original = decoding.BlockEngine

    def engine(job, queue, rows, *rest):
        widths.append(rows)
        return original(job, queue, rows, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "BlockEngine", engine)
        texts = [
            [r.completion_ids for r in decode(*pair, [[3, 4]] * 6, Switch(), 8, batch_size=batch, memory_gib=gib)]
            for batch, gib in ((None, None), (None, 7e-5), (2, 7e-5), (None, 1.0))
        ]
    assert widths[0] == 6 and 1 < widths[1] < 6 and widths[2] == 2 and widths[3] >= 6
    assert texts[1] == texts[2] == texts[3] == texts[0]
    # A row that is refused for its length takes none of the budget.
    refused = decode(*pair, [[3, 4], [5] * 2000], Switch(), 8, memory_gib=7e-5)
    assert [r.stop_reason for r in refused][1] == "prompt_too_long" and refused[0].completion_ids == texts[0][0]
    with pytest.raises(decoding.ConfigError, match="memory_gib is 1e-06; raise it"):
        decode(*pair, [[3, 4]], Switch(), 8, memory_gib=1e-6)


class Event:
    """A CUDA event as a CPU can have it: it happens when it is waited for, and has no time before."""

    made = 0

    def __init__(self, enable_timing=False):
        assert enable_timing
        Event.made += 1
        self.happened = False

    def record(self, *_):
        self.time = time.perf_counter()

    def synchronize(self):
        self.happened = True

    def elapsed_time(self, end):
        if not end.happened:
            raise RuntimeError("Both events must be completed before calculating elapsed time.")
        return 1e3 * (end.time - self.time)


@pytest.fixture
def on_cuda(monkeypatch):
    """Watches that take this machine for one with CUDA."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "made", 0)
    make = Stopwatch.__init__

    def init(self, device, *rest):
        make(self, device, *rest)
        self.cuda = True

    monkeypatch.setattr(Stopwatch, "__init__", init)


def test_on_cuda_laps_are_waited_for(on_cuda):
    watch = Stopwatch(CPU)
    starts = [watch.now() for _ in range(2)]
    for size, start in enumerate(starts):
        watch.lap(size, start)
    assert [size for size, _ in watch.take()] == [0, 1] and watch.take() == []


def test_what_is_timed_on_cuda_is_waited_for(on_cuda):
    assert len(LINE(lambda _: None, (1, 4), CPU)) == 2 and Event.made == 16


def test_the_trainers_laps_wait_for_their_events(on_cuda, tmp_path):
    config = TrainConfig(mix=Generated(0.0), max_steps=1, per_device_train_batch_size=2, output_dir=str(tmp_path))
    metrics, _ = Trainer(toy_pair(), toy_examples(), config).train_step()
    assert Event.made > 0 and metrics["seconds/teacher"] > 0
