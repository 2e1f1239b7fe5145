"""Negative controls of the decoding engine: each mistake, put into the source, must make a check fail."""

import math
import sys
import types
from pathlib import Path

import pytest
import torch
from tiny import POLICIES, VOCAB, assert_same, tiny_model

from switchkd import Switch, TeacherOnly, decode_reference
from switchkd.decoding import board, decide, engine
from switchkd.decoding import decode as decoding
from switchkd.forward.ends import Ends
from switchkd.methods.policies import SKD
from switchkd.runner import cache, runner

PROMPTS = [[3, 4, 5], [7], [2, 2, 9, 11, 4, 6, 8], [7], [3, 4, 5], [6, 9]]
# Longer and shorter ones of the same rows.
TEACHER_PROMPTS = [[5, 6], [8, 9, 10, 2, 3, 7, 7, 4], [12], [7], [9, 3, 4, 5, 6], [8, 8, 2]]
BUDGET = 10
ENDS = Ends((5, 13, 14), 13)  # one event

# Where what a module makes is used.
USERS = {
    decide: [(engine, "decide"), (engine, "Said")],
    engine: [(decoding, "BlockEngine")],
    board: [(engine, "Board")],
    runner: [(decoding, "Runner")],
    cache: [(runner, "RaggedCache")],
}
STEP = "decision = policy.step(state, logq, logp, positions)"
HEARS = "state = policy.spoke(policy.observe(decision.state, token), speaker)"
OWN_DRAW = "return draw(self.sampling.shape(self.policy.proposal(who, logs)), noise, self.sampling.temperature)"
LAST = "eos, told = (each.gather(1, last)[:, 0] for each in (eos, steps.told))"
ROLLBACK = "board.prompts_n[who] + board.written_n - 1"
MUTANTS = {
    "accept every draft": (
        decide,
        (
            "eos = ends.among(steps.tokens)",
            "steps = steps._replace(tokens=block.drafts)\n    eos = ends.among(steps.tokens)",
        ),
    ),
    "speaker decided once per block": (
        decide,
        (
            STEP,
            f"{STEP}\n"
            "    first = decision.speaker.view(rows, size)[:, :1].expand(rows, size).flatten()\n"
            "    target = torch.where(first.bool().unsqueeze(1), logp, logq)\n"
            "    decision = decision._replace(log_probs=target, speaker=first)",
        ),
    ),
    "threshold by block instead of position": (decide, (STEP, STEP.replace("positions", "positions // size * size"))),
    "state not rolled back over discarded drafts": (decide, ("torch.stack(parts, 1)[rows, last]", "parts[-1]")),
    "the state does not hear the token": (decide, (HEARS, "state = policy.spoke(decision.state, speaker)")),
    "the state hears the draft": (
        decide,
        (HEARS, HEARS.replace("token", "block.drafts[:, k] if k < block.drafts.shape[1] else token")),
    ),
    "the state does not hear who spoke": (decide, (HEARS, "state = policy.observe(decision.state, token)")),
    "a text that the policy ends goes on": (
        decide,
        ("sound & ~eos & ~steps.told", "sound & ~eos"),
        (LAST, f"{LAST}\n    told = told & False"),
    ),
    "the policy is asked for the end before the token": (
        decide,
        ("reads = policy.reads(state)\n", "reads, before = policy.reads(state), policy.ends(state)\n"),
        ("policy.ends(state), *reads)", "before, *reads)"),
    ),
    "drafts and tokens from different cuts": (
        engine,
        (OWN_DRAW, "return draw(self.policy.proposal(who, logs), noise, self.sampling.temperature)"),
    ),
    "the decision sees what the cuts leave": (
        decide,
        (STEP, STEP.replace("logq, logp", "sampling.shape(logq), sampling.shape(logp)")),
    ),
    "a row is given up for a draft behind it": (engine, ("if plan.block == 1:", "if True:")),
    "speakers of a blend by another position": (
        decide,
        ("block.keys.flatten())", "block.keys[:, :1].expand(rows, size).flatten())"),
    ),
    "cache one long after a rejection": (engine, (ROLLBACK, ROLLBACK.removesuffix(" - 1"))),
    "drafts counted as read text after a rejection": (
        runner,
        ("self.read = np.minimum(", "self.read = np.maximum("),
    ),
    "policy sees the draft at another temperature": (
        engine,
        ("log_probs(extend(k, last)[:, 0])", "log_probs(extend(k, last)[:, 0], 0.8)"),
    ),
    "another temperature in the draft than reported": (
        engine,
        (OWN_DRAW, OWN_DRAW.replace("self.sampling.temperature", "1.5 * self.sampling.temperature")),
    ),
    "drafts of the plain model where the policy sharpens it": (
        engine,
        (OWN_DRAW, OWN_DRAW.replace("self.policy.proposal(who, logs)", "logs")),
    ),
    "noise shared between rows": (board, ("row_key(row.seed, row.id)", "row_key(row.seed, 0)")),
    "noise of the first place for all": (board, ("rows.of(self.keys)", "self.keys[: len(start)]")),
    "the teacher's cache rolled back to the student's length": (engine, (ROLLBACK, ROLLBACK.replace("who", "STUDENT"))),
    "the teacher read with the student's prompt": (
        board,
        ("prompt = row.prompt_of(who)", "prompt = row.prompt"),
    ),
    "the teacher's text written at the student's places": (
        board,
        ("(at + rows.of(prompts).unsqueeze(1))", "(at + rows.of(self.prompts[0]).unsqueeze(1))"),
    ),
    "the ends of the drafter not merged": (
        engine,
        ("self.job.ends.log_probs(extend(k, last)[:, 0])", "extend(k, last)[:, 0].log_softmax(-1)"),
    ),
    "the ends of the verifier not merged": (
        engine,
        ("self.job.ends.log_probs(extend(0, drafts))", "extend(0, drafts).log_softmax(-1)"),
    ),
    "a block goes on without a distribution that the policy wants": (
        decide,
        ("goes_on = goes_on & (ran | ~read)[:, 1:]", "pass"),
    ),
    "a verifier's words given to other rows": (
        decide,
        ("index_copy(0, index, logs)", "index_copy(0, index.flip(0), logs)"),
    ),
    "a row that moves leaves its state behind": (board, ("self.notes, *self.state]", "self.notes]")),
    "a row that moves leaves its keys behind": (
        board,
        ("self.written, self.keys, self.notes,", "self.written, self.notes,"),
    ),
    "a row that moves leaves its cache behind": (runner, ("layer.move(to.device, source.device)", "pass")),
}


def mutated_decode(module, edits):
    """``decode`` over a module with the edits in its source."""
    source = Path(module.__file__).read_text(encoding="utf-8")
    for old, new in edits:
        assert source.count(old) == 1, f"the mutant no longer fits the source: {old}"
        source = source.replace(old, new)
    mutant = types.ModuleType("switchkd_mutant")
    sys.modules[mutant.__name__] = mutant
    exec(compile(source, "mutant", "exec"), mutant.__dict__)

    def decode(*args, **settings):
        with pytest.MonkeyPatch.context() as patch:
            for user, name in USERS[module]:
                patch.setattr(user, name, vars(mutant)[name])
            return decoding.decode(*args, **settings)

    return decode


REFERENCES = {}


def reference_of(name, own, ends):
    """What the reference loop says, which no mutant touches: it is asked once."""
    key = name, own is None, str(ends)
    if key not in REFERENCES:
        pair = tiny_model("llama", 1), tiny_model("llama", 2)
        settings = {"eos_token_ids": ends, "teacher_prompt_ids": own}
        REFERENCES[key] = decode_reference(*pair, PROMPTS, POLICIES[name], BUDGET, **settings)
    return REFERENCES[key]


def check_engine(decode):
    """The guarantees of the engine in one go, for the real one and for the mutants."""
    student, teacher = tiny_model("llama", 1), tiny_model("llama", 2)
    names = ("switch_exponential", "adaswitch", "spell", "mix_in", "parity", "quota", "forced")
    cases = [(name, None, []) for name in names] + [("spell", TEACHER_PROMPTS, []), ("parity", TEACHER_PROMPTS, [])]
    cases += [(name, None, ENDS) for name in ("switch_exponential", "mix_in")]
    for name, own, ends in cases:
        settings = {"eos_token_ids": ends, "teacher_prompt_ids": own}
        reference = reference_of(name, own, ends)
        for drafter in ("student", "teacher"):
            out = decode(student, teacher, PROMPTS, POLICIES[name], BUDGET, block_size=4, drafter=drafter, **settings)
            assert_same(out, reference)
    cuts = {"eos_token_ids": [], "top_k": 3, "min_p": 0.2}
    reference = decode_reference(student, teacher, PROMPTS, POLICIES["switch_constant"], BUDGET, **cuts)
    assert_same(decode(student, teacher, PROMPTS, POLICIES["switch_constant"], BUDGET, block_size=4, **cuts), reference)
    # A student that always speaks always agrees with its own drafts: no round is cut.
    for never in (Switch(schedule="constant", tau_0=2.0), SKD(top_k=VOCAB, student_temperature=0.3)):
        for own in ({}, {"top_k": 2}):
            out = decode(
                student, teacher, PROMPTS, never, BUDGET, block_size=5, eos_token_ids=[], drafter="student", **own
            )
            assert out.cost.rounds == 2
    check_broken_drafts(decode)


def check_broken_drafts(decode):
    """What the student proposes and the teacher does not write may break the teacher, and leaves nothing."""
    student, teacher = tiny_model("llama", 1), tiny_model("llama", 2)
    free = decode(student, teacher, PROMPTS, TeacherOnly(), BUDGET, eos_token_ids=[], block_size=1)
    written = {token for rollout in free for token in [*rollout.prompt_ids, *rollout.completion_ids]}
    others = torch.tensor(sorted(set(range(VOCAB)) - written))
    with torch.no_grad():
        teacher.get_input_embeddings().weight[others] = math.nan
    out = decode(student, teacher, PROMPTS, TeacherOnly(), BUDGET, eos_token_ids=[], block_size=4, drafter="student")
    assert_same(out, free)


def test_the_engine_passes():
    check_engine(decoding.decode)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name):
    module, *edits = MUTANTS[name]
    mutant = mutated_decode(module, edits)
    with pytest.raises((AssertionError, IndexError, RuntimeError, ValueError)):
        check_engine(mutant)
