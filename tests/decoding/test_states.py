"""Models whose layers keep a state are decoded as the reference loop does, and each step that keeps states right is needed."""

import math

import numpy as np
import pytest
import torch
from families import small_model
from test_mutants import mutated_decode
from tiny import POLICIES, assert_same

from switchkd import AdaSwitch, StudentOnly, Switch, TeacherOnly, decode, decode_reference
from switchkd.decoding import decode as decoding
from switchkd.decoding.decode import Runners
from switchkd.decoding.pace import Costs, Pace
from switchkd.decoding.rows import row_bytes
from switchkd.forward.head import Scorer
from switchkd.runner import cache, runner
from switchkd.runner.cache import Places, state_bytes
from switchkd.runner.runner import Runner

# Of several lengths, so that a forward may not hold all of them; one is of a single token.
PROMPTS = [[3, 4, 5], [7], [2, 2, 9, 11, 4, 6, 8], [5, 5], [10, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21], [7], [30, 31]]
BUDGET = 9
# A conv and a gated delta rule beside attention; a state alone; both in one layer; a conv alone; one token at a time.
PAIRS = {
    "qwen3_5": ("qwen3_5_text", "qwen3_5_text"),
    "mamba2": ("mamba2", "mamba2"),
    "falcon_h1": ("falcon_h1", "falcon_h1"),
    "lfm2": ("lfm2, conv layers", "lfm2, conv layers"),
    "student": ("granitemoehybrid", "llama"),
    "teacher": ("llama", "mamba2"),
    "one by one": ("jamba", "mamba"),
}
TOLERANCE = 2e-3  # of divergences: states are in fp32, beside weights in fp64


@pytest.fixture(scope="module")
def pairs():
    made = {}

    def pair(name):
        if name not in made:
            made[name] = [small_model(family, seed) for seed, family in enumerate(PAIRS[name], 1)]
        return made[name]

    return pair


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("policy", ["switch_exponential", "adaswitch"])
def test_every_pair_block_and_batch(pairs, name, policy):
    settings = {"eos_token_ids": [5, 13, 14]}
    reference = decode_reference(*pairs(name), PROMPTS, POLICIES[policy], BUDGET, **settings)
    for block, batch, drafter in ((4, 3, "student"), (5, 2, "teacher"), (3, 1, "auto")):
        out = decode(
            *pairs(name),
            PROMPTS,
            POLICIES[policy],
            BUDGET,
            block_size=block,
            batch_size=batch,
            drafter=drafter,
            **settings,
        )
        assert_same(out, reference, TOLERANCE)


@pytest.mark.parametrize(
    "families", [("granitemoehybrid", "mamba2"), ("qwen3_5_text", "falcon_h1"), ("jamba", "lfm2, conv layers")]
)
def test_fast_layers_of_fp32(families):
    """Whose norms may be told of a gate, and whose experts and convolutions are no plain products."""
    pair = [small_model(family, seed).float() for seed, family in enumerate(families, 1)]
    reference = decode_reference(*pair, PROMPTS, POLICIES["switch_constant"], BUDGET)
    out = decode(*pair, PROMPTS, POLICIES["switch_constant"], BUDGET, block_size=4, batch_size=3)
    assert_same(out, reference, TOLERANCE)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy(pairs, policy):
    reference = decode_reference(*pairs("teacher"), PROMPTS, POLICIES[policy], BUDGET)
    for block, drafter in ((4, "student"), (3, "teacher"), (1, "auto"), ("auto", "auto")):
        out = decode(
            *pairs("teacher"), PROMPTS, POLICIES[policy], BUDGET, block_size=block, batch_size=3, drafter=drafter
        )
        assert_same(out, reference, TOLERANCE)


def test_a_prompt_of_the_teachers_own(pairs):
    own = [[5, 6], [8, 9, 10, 2, 3, 7, 7, 4], [12], [7], [9, 3, 4, 5, 6], [8, 8, 2], [1]]
    reference = decode_reference(*pairs("mamba2"), PROMPTS, POLICIES["adaswitch"], BUDGET, teacher_prompt_ids=own)
    out = decode(
        *pairs("mamba2"), PROMPTS, POLICIES["adaswitch"], BUDGET, block_size=4, batch_size=3, teacher_prompt_ids=own
    )
    assert_same(out, reference, TOLERANCE)


@pytest.mark.parametrize("name", ["qwen3_5", "one by one"])
def test_what_the_teacher_said_is_what_it_says_of_the_whole_text(pairs, name):
    student, teacher = pairs(name)
    out = decode(student, teacher, PROMPTS, Switch(tau_0=0.3), BUDGET, block_size=4, keep_hidden=True, batch_size=4)
    expected = Scorer(teacher, 61).hidden([(rollout.prompt_ids, rollout.completion_ids) for rollout in out])
    torch.testing.assert_close(torch.cat([rollout.said for rollout in out]), expected, atol=1e-3, rtol=1e-3)


def test_runners_that_decode_again_begin_anew(pairs):
    """As in training, where the same runners write the text of each step."""
    from switchkd.decoding.rows import Job
    from switchkd.decoding.settings import DecodeSettings

    runners, policy = Runners(), POLICIES["switch_exponential"]
    for seed in range(2):
        job = Job.of(*pairs("mamba2"), PROMPTS, DecodeSettings(policy, BUDGET, seed=seed, batch_size=3))
        reference = decode_reference(*pairs("mamba2"), PROMPTS, policy, BUDGET, seed=seed)
        assert_same(decoding.decode_job(job, runners=runners), reference, TOLERANCE)


def test_few_forwards_read_prompts_of_many_lengths(pairs, monkeypatch):
    """Pieces are powers of two long, so that rows of different lengths share forwards, and none is padded."""
    student, _ = pairs("mamba2")
    one, seen = Runner(student), []
    one.open(16, 80, 61)
    lengths = np.arange(50, 66)
    run = one.run
    monkeypatch.setattr(one, "run", lambda ids, *rest: (seen.append(ids.shape), run(ids, *rest))[1])
    with torch.no_grad():
        one.catch_up(Places.first(16), torch.from_numpy(lengths + 1), lengths + 1)
    assert one.read.tolist() == lengths.tolist() and one.prefill_tokens == sum(rows * width for rows, width in seen)
    assert len(seen) <= 7


def test_memory_of_a_row_counts_its_states():
    """Not keys and values of layers that have none; states twice, for the copy that a cut row goes back to."""
    model = small_model("mamba2")
    config = model.config
    conv = config.expand * config.hidden_size + 2 * config.n_groups * config.state_size
    recurrent = config.num_heads * config.head_dim * config.state_size
    states = config.num_hidden_layers * (conv * config.conv_kernel * 8 + recurrent * 4)
    assert state_bytes(model) == 2 * states and state_bytes(small_model("llama")) == 0
    assert row_bytes([model, model], [100, 100], 61) - row_bytes([model, model], [0, 0], 61) == 0


def test_a_block_that_must_be_read_again_counts_as_dearer():
    flat = Costs((1e-3, 1e-5), (5e-3, 5e-5), (1e-4, 1e-6))
    blocks = []
    for states in ((False, False), (False, True), (True, True)):
        pace = Pace(flat, keep_state=states)
        for _ in range(99):
            pace.observe(100, 80, 60, 100, 60)
        blocks.append(pace.plan({(True, True): 8}, 100).block)
    assert blocks[0] > blocks[1] >= blocks[2] >= 1


# --- negative controls ----------------------------------------------------------------------------------------------------

MUTANTS = {
    "a cut row goes on with the state of its drafts": (runner, ("layer.restore(rows)", "pass")),
    "what was kept of a block is not read again": (
        runner,
        ("self.read[cut] = self.marks[cut]", "self.read[cut] = most[cut]"),
    ),
    "a mark is of the state, its place another": (
        runner,
        (
            "self.marked[rows.host] = self.read[rows.host], True",
            "self.marked[rows.host] = self.read[rows.host] + 1, True",
        ),
    ),
    "rows of different lengths in one forward": (
        runner,
        ("self._catch_up_in_step(rows, ends - 1)\n            return", "self.marked[rows.host] = False"),
    ),
    "a new prompt goes on from the row before": (runner, ("layer.restart(row)", "pass")),
    "a row that moves leaves its states behind": (
        cache,
        ("            own[to.to(own.device)] = own[source.to(own.device)]", "            pass"),
    ),
    "states of the first rows for all": (
        cache,
        ("own is None else rows.on(own.device).of(own)", "own is None else own[: len(rows.host)].clone()"),
    ),
    "states of some rows are not put back": (cache, ("own[places] = new", "pass")),
    "a mark of the first rows alone": (
        cache,
        (
            "_put(self.marked[key], rows, rows.on(own.device).of(own))",
            "_put(self.marked[key], rows, own[: len(rows.host)])",
        ),
    ),
    "the second prompt begins where nothing was read": (runner, ("bool(self.read[rows.host].any())", "False")),
}
REFERENCES = {}


def check_states(pairs, decode):
    for name in ("mamba2", "student"):
        for policy in ("switch_exponential", "adaswitch"):
            settings = {"eos_token_ids": [5, 13, 14]}
            if (name, policy) not in REFERENCES:
                REFERENCES[name, policy] = decode_reference(*pairs(name), PROMPTS, POLICIES[policy], BUDGET, **settings)
            for drafter in ("student", "teacher"):
                out = decode(
                    *pairs(name),
                    PROMPTS,
                    POLICIES[policy],
                    BUDGET,
                    block_size=4,
                    batch_size=3,
                    drafter=drafter,
                    **settings,
                )
                assert_same(out, REFERENCES[name, policy], TOLERANCE)
    check_broken_drafts(decode)


def check_broken_drafts(decode):
    """What the student proposes and the teacher does not write may break the teacher's state, and leaves nothing."""
    student, teacher = (small_model("mamba2", seed) for seed in (1, 2))
    free = decode(student, teacher, PROMPTS, TeacherOnly(), BUDGET, eos_token_ids=[], block_size=1)
    written = {token for rollout in free for token in [*rollout.prompt_ids, *rollout.completion_ids]}
    others = torch.tensor(sorted(set(range(61)) - written))
    with torch.no_grad():
        teacher.get_input_embeddings().weight[others] = math.nan
    out = decode(student, teacher, PROMPTS, TeacherOnly(), BUDGET, eos_token_ids=[], block_size=4, drafter="student")
    assert_same(out, free, TOLERANCE)


def test_the_engine_passes(pairs):
    check_states(pairs, decode)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(pairs, name):
    module, *edits = MUTANTS[name]
    mutant = mutated_decode(module, edits)
    with pytest.raises((AssertionError, IndexError, RuntimeError, ValueError)):
        check_states(pairs, mutant)


def test_students_alone_make_one_forward_a_token(pairs):
    """Nothing is rolled back where nobody checks the drafts, so that nothing is read again."""
    out = decode(*pairs("mamba2"), PROMPTS, StudentOnly(), 8, eos_token_ids=[], block_size=4)
    assert out.cost.student_forwards == 8 * len(PROMPTS) and out.cost.rounds == 2


def test_adaswitch_reads_nothing_twice_with_blocks_of_one(pairs):
    out = decode(*pairs("mamba2"), PROMPTS, AdaSwitch(window=2, ratio=1.1), 8, eos_token_ids=[], block_size=1)
    assert out.cost.student_prefill_tokens == sum(len(prompt) - 1 for prompt in PROMPTS)
