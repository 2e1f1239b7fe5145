"""Who drafts and how far: the plan with the most tokens a second, from what was seen and measured."""

import random
import time

import pytest
import torch
from tiny import POLICIES, tiny_model, toy_examples, toy_pair

from switchkd import AdaSwitch, Switch, TeacherOnly, decode
from switchkd.decoding import decode as decoding
from switchkd.decoding.pace import BLOCKS, Pace, Plan, Stopwatch
from switchkd.methods.mixes import Generated
from switchkd.methods.policy import STUDENT, TEACHER
from switchkd.training.settings import TrainConfig
from switchkd.training.trainer import Trainer

CPU = torch.device("cpu")
BOTH, ONLY_STUDENT, ONLY_TEACHER = (True, True), (True, False), (False, True)


def pace(student=1e8, teacher=1e9, **settings):
    return Pace((int(student), int(teacher)), 1000, CPU, **settings)


def settle(p, student, teacher, equal):
    """So many of 100 draws were final, and equal, for long."""
    for _ in range(50):
        p.observe(100, student, teacher, 100, equal)
    return p


def test_the_plan_is_the_one_of_most_tokens_a_second():
    """Against a simulation: rows keep tokens until their first draft that fails, forwards take their time."""
    p = settle(pace(), 80, 30, 30)
    plan = p.plan([BOTH] * 4, left=100)
    assert plan.drafter == STUDENT and plan.forwards == plan.block > 1
    coin = random.Random(0)

    def rate(block):
        kept = 0
        for _ in range(4000):
            kept += next((k for k in range(1, block) if coin.random() > 0.8), block)
        seconds = block * p.forward[STUDENT](4) + p.forward[TEACHER](4 * block) + block * 4 * p.position.value
        return kept / seconds

    rates = {block: rate(block) for block in BLOCKS}
    assert rates[plan.block] > 0.97 * max(rates.values())


def test_who_agrees_drafts():
    assert settle(pace(1e9, 1e9), 90, 40, 40).plan([BOTH], 50).drafter == STUDENT
    assert settle(pace(1e9, 1e9), 40, 90, 40).plan([BOTH], 50).drafter == TEACHER
    # A teacher ten times as dear may agree more often and still not pay.
    assert settle(pace(1e8, 1e9), 85, 95, 80).plan([BOTH], 50).drafter == STUDENT


def test_hopeless_drafts_are_not_made():
    assert settle(pace(), 0, 0, 0).plan([BOTH] * 8, 50).block == 1


def test_exploration_grows_while_the_student_goes_on():
    p = pace()
    blocks = []
    for _ in range(12):
        blocks.append(p.plan([BOTH] * 2, 200).block)
        p.observe(40, 40, 10, 40, 10)
    assert blocks == sorted(blocks) and blocks[-1] > 2 * blocks[0]


def test_a_resting_student_is_asked_for_drafts_only_if_they_pay():
    assert settle(pace(), 90, 90, 85).plan([ONLY_TEACHER] * 2, 50).drafter == STUDENT
    assert settle(pace(), 90, 90, 5).plan([ONLY_TEACHER] * 2, 50).block == 1
    assert settle(pace(1e9, 1e9), 90, 90, 60).plan([ONLY_TEACHER] * 2, 50).block == 1


def test_the_last_draft_of_a_block_is_not_made_where_nobody_asks_for_its_distribution():
    plan = settle(pace(drafter="student", block_size=5), 50, 50, 50).plan([ONLY_TEACHER], 50)
    assert plan == Plan(STUDENT, 5, 4)
    assert pace(drafter="student", block_size=5).plan([ONLY_TEACHER, BOTH], 50).forwards == 5


def test_a_lone_student_writes_one_token_a_round_and_never_runs_the_teacher():
    for p in (pace(), settle(pace(1e9, 1), 90, 90, 99)):
        assert p.plan([ONLY_STUDENT] * 3, 50) == Plan(STUDENT, 1, 1)


def test_where_nobody_is_read_nobody_runs():
    assert pace().plan([(False, False)] * 2, 50) == Plan(STUDENT, 1, 0)
    assert pace(block_size=4).plan([(False, False), ONLY_TEACHER], 50).block == 4


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
    assert p.plan([BOTH], 3).block == 3 and p.plan([BOTH], 1).block == 1
    assert pace(block_size=7).plan([BOTH], 4).block == 4


def test_wide_batches_take_shorter_blocks():
    """What a round holds grows with rows times positions times the vocabulary."""
    p = settle(pace(), 99, 99, 99)
    assert p.plan([BOTH] * 64, 100).block <= 4 < p.plan([BOTH] * 4, 100).block
    assert p.plan([BOTH] * 1000, 100).block == 1


def test_what_is_not_seen_for_long_is_tried_again():
    p = settle(pace(), 90, 90, 0)
    for _ in range(4000):
        p.observe(0, 0, 0, 0, 0)
    assert p.plan([ONLY_TEACHER], 50).drafter == STUDENT


def test_measured_forwards_change_the_plan_and_sizes_not_met_take_the_nearest():
    p = settle(pace(), 90, 90, 90)
    assert p.plan([BOTH], 50).drafter == STUDENT
    for _ in range(20):  # the small model turns out to be the slow one
        p.measure([[(1, 1.0)], [(1, 0.01)]], 0.0, 1)
    assert p.plan([BOTH], 50).drafter == TEACHER
    assert p.forward[STUDENT](64) == pytest.approx(1.0 * (1 + 64 / 32) / (1 + 1 / 32))


def test_the_first_forward_of_a_size_is_not_measured():
    """It prepares kernels; as a measurement it would keep the size from ever being tried again."""
    p = pace()
    before = p.forward[TEACHER](8)
    p.measure([[], [(8, 100.0)]], 0.0, 1)
    assert p.forward[TEACHER](8) == before
    p.measure([[], [(8, 0.5)]], 0.0, 1)
    assert p.forward[TEACHER](8) == pytest.approx(0.5)


def test_a_repeatable_run_does_not_look_at_the_clock(monkeypatch):
    """The same plans whatever the clock says, also with a block size of one's own; otherwise the clock is heard."""
    measure, plan = Pace.measure, Pace.plan

    def plans(slow, **settings):
        """Plans of a run on whose clock the model ``slow`` takes a thousand times as long as the other."""
        made = []

        def clock(self, forwards, rest, positions):
            laps = [[(n, 1.0 if who == slow else 1e-3) for n, _ in each] for who, each in enumerate(forwards)]
            measure(self, laps, 1e-6, positions)

        with monkeypatch.context() as patch:
            patch.setattr(Pace, "measure", clock)
            patch.setattr(Pace, "plan", lambda *args: made.append(plan(*args)) or made[-1])
            pair = tiny_model("llama", 1), tiny_model("llama", 2)
            decode(*pair, [[3], [4, 5]], Switch(), 30, eos_token_ids=[], **settings)
        return made

    assert plans(STUDENT) != plans(TEACHER)
    assert plans(STUDENT, repeatable=True) == plans(TEACHER, repeatable=True)
    assert plans(STUDENT, block_size=3) == plans(TEACHER, block_size=3)


def test_forwards_and_the_rest_of_a_round_are_measured(monkeypatch):
    seen = []
    monkeypatch.setattr(Pace, "measure", lambda self, *args: seen.append(args))
    pair = tiny_model("llama", 1), tiny_model("llama", 2)
    decode(*pair, [[3, 4, 5, 6]] * 2, Switch(), 8, block_size=3, drafter="student", eos_token_ids=[])
    forwards, rest, positions = seen[0]
    assert [tokens for tokens, _ in forwards[STUDENT]] == [2, 2, 2] and [n for n, _ in forwards[TEACHER]] == [6]
    assert positions == 6 and rest > 0 and all(s > 0 for each in forwards for _, s in each)


@pytest.mark.parametrize("policy", [Switch(), AdaSwitch(window=2, ratio=1.5), TeacherOnly(), POLICIES["student_only"]])
def test_automatic_choices_decode_to_the_end(policy):
    pair = tiny_model("llama", 1), tiny_model("llama", 2)
    for settings in ({}, {"repeatable": True}):
        rollouts = decode(*pair, [[3], [4, 5], [6]] * 3, policy, 40, eos_token_ids=[], batch_size=4, **settings)
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


@pytest.mark.parametrize("settings", [{}, {"block_size": 3}, {"keep_hidden": True}])
def test_rounds_that_are_timed_wait_for_their_events(on_cuda, settings):
    pair = tiny_model("llama", 1), tiny_model("llama", 2)
    decode(*pair, [[3], [4, 5]], Switch(), 6, eos_token_ids=[], **settings)
    assert Event.made > 0


def test_a_repeatable_round_makes_no_event_and_reads_no_clock(on_cuda, monkeypatch):
    pair = tiny_model("llama", 1), tiny_model("llama", 2)
    monkeypatch.setattr(Stopwatch, "take", lambda self: pytest.fail("a lap was read"))
    monkeypatch.setattr("switchkd.decoding.pace.time", None)
    decode(*pair, [[3], [4, 5]], Switch(), 6, eos_token_ids=[], repeatable=True)
    assert Event.made == 0


def test_the_trainers_laps_wait_for_their_events(on_cuda, tmp_path):
    config = TrainConfig(mix=Generated(0.0), max_steps=1, per_device_train_batch_size=2, output_dir=str(tmp_path))
    metrics, _ = Trainer(toy_pair(), toy_examples(), config).train_step()
    assert Event.made > 0 and metrics["seconds/teacher"] > 0
