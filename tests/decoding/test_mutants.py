"""Negative controls of the decoding engine: each mistake, put into the source, must make a check fail."""

import math
import sys
import types
from pathlib import Path

import pytest
import torch
from tiny import POLICIES, VOCAB, assert_same, tiny_model

from switchkd import Switch, TeacherOnly, decode_reference
from switchkd.decoding import decode as decoding
from switchkd.decoding import engine
from switchkd.forward.ends import Ends
from switchkd.methods.policies import SKD

SOURCE = Path(engine.__file__).read_text(encoding="utf-8")
PROMPTS = [[3, 4, 5], [7], [2, 2, 9, 11, 4, 6, 8], [7], [3, 4, 5]]
# Longer and shorter ones of the same rows.
TEACHER_PROMPTS = [[5, 6], [8, 9, 10, 2, 3, 7, 7, 4], [12], [7], [9, 3, 4, 5, 6]]
BUDGET = 10
ENDS = Ends((5, 13, 14), 13)  # one event

HEARS = "self.policy.spoke(self.policy.observe(decision.state, token), speaker)"
STEP = "decision = self.policy.step(self.state, logq, logp, start + k)"
ROLLBACK = "min(length, len(row.tokens_of(who)) - 1)"
READ = "whole = [self.rows[row].tokens_of(who) for row in rows]"
MUTANTS = {
    "accept every draft": [("token = self._draw(decision.log_probs, g)", "token = (block.drafts + [start])[k]")],
    "speaker decided once per block": [
        (
            STEP,
            f"{STEP}\n"
            "            first = decision.speaker if k == 0 else first\n"
            "            target = torch.where(first.bool().unsqueeze(1), logp, logq)\n"
            "            decision = decision._replace(log_probs=target, speaker=first)",
        )
    ],
    "threshold by block instead of position": [(STEP, STEP.replace("start + k", "start"))],
    "state not rolled back over discarded drafts": [
        (
            f"self._keep_state(sound, {HEARS})",
            f"self.state = {HEARS}",
        )
    ],
    "the state does not hear the token": [
        (
            f"self._keep_state(sound, {HEARS})",
            "self._keep_state(sound, decision.state)",
        )
    ],
    "the state hears the draft": [
        ("observe(decision.state, token)", "observe(decision.state, (block.drafts + [token])[k])")
    ],
    "the state does not hear who spoke": [(HEARS, "self.policy.observe(decision.state, token)")],
    "a text that the policy ends goes on": [("ends = told | ", "ends = "), ("bool(ends), self.job", "False, self.job")],
    "the policy is asked for the end before the token": [
        ("told = self._spread(self.policy.ends(self.state))", "told = before"),
        (
            "speaker = speakers(decision",
            "before = self._spread(self.policy.ends(self.state))\n            speaker = speakers(decision",
        ),
    ],
    "drafts and tokens from different cuts": [
        (
            "return self._draw(self.policy.proposal(who, logs), noise)",
            "return draw(logs, noise, self.job.settings.sampling.temperature)",
        )
    ],
    "the decision sees what the cuts leave": [
        (
            STEP,
            STEP.replace(
                "logq, logp,", "self.job.settings.sampling.shape(logq), self.job.settings.sampling.shape(logp),"
            ),
        )
    ],
    "a draft that broke a cache stays in it": [("self.models[who].clear_stale(b)", "pass")],
    "a row is given up for a draft behind it": [("if block.plan.block == 1:", "if True:")],
    "speakers of a blend by another position": [("block.keys[k])", "block.keys[0])")],
    "cache one long after a rejection": [(ROLLBACK, "min(length, len(row.tokens_of(who)))")],
    # Catching up mends a short cache by itself, so this mutant also leaves that out after the prompt.
    "cache one short after a rejection": [
        (ROLLBACK, "min(length, len(row.tokens_of(who)) - 2)"),
        (
            READ,
            "read = self.models[who].lengths\n"
            f"        {READ}\n"
            "        whole = [text[: read[row]] + text[-1:] if read[row] else text for row, text in zip(rows, whole)]\n"
            "        whole = whole",
        ),
    ],
    "policy sees the draft at another temperature": [("log_probs(logits[:, 0])", "log_probs(logits[:, 0], 0.8)")],
    "another temperature in the draft than reported": [
        (
            "return self._draw(self.policy.proposal(who, logs), noise)",
            "return draw(self.policy.proposal(who, logs), noise, 1.5 * self.job.settings.sampling.temperature)",
        )
    ],
    "drafts of the plain model where the policy sharpens it": [
        ("return self._draw(self.policy.proposal(who, logs), noise)", "return self._draw(logs, noise)")
    ],
    "noise shared between rows": [
        ("noise_key(self.job.settings.seed, row.id,", "noise_key(self.job.settings.seed, 0,")
    ],
    "the teacher's cache rolled back to the student's length": [(ROLLBACK, ROLLBACK.replace("(who)", "(STUDENT)"))],
    "the teacher read with the student's prompt": [(READ, READ.replace("(who)", "(STUDENT)"))],
    "the teacher's drafts stored up to the student's budget": [("prompt_of(who)", "prompt_of(STUDENT)")],
    "the ends of the drafter not merged": [
        ("self.job.ends.log_probs(logits[:, 0])", "logits[:, 0].log_softmax(-1)"),
    ],
    "the ends of the verifier not merged": [
        ("self.job.ends.log_probs(logits[:, k])", "logits[:, k].log_softmax(-1)"),
    ],
    "a block goes on without a distribution that the policy wants": [("& ~(lacks[STUDENT] | lacks[TEACHER])", "")],
}


def mutated_decode(edits):
    """``decode`` over an engine with the edits in its source."""
    source = SOURCE
    for old, new in edits:
        assert source.count(old) == 1, f"the mutant no longer fits the source: {old}"
        source = source.replace(old, new)
    module = types.ModuleType("switchkd_mutant")
    sys.modules[module.__name__] = module
    exec(compile(source, "mutant", "exec"), module.__dict__)

    def decode(*args, **settings):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decoding, "BlockEngine", module.BlockEngine)
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
    mutant = mutated_decode(MUTANTS[name])
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        check_engine(mutant)
