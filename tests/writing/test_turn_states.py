"""Texts in turns of models whose layers keep a state: what a model has read of words or drafts that are cut must leave no trace."""

import numpy as np
import pytest
import torch
from families import small_model
from tiny import assert_same
from two_tokenizers import bridge_of, tokenizer_of

from switchkd.decoding.settings import DecodeSettings
from switchkd.methods.policies import SSD, AdaSwitch, Switch
from switchkd.runner.runner import Runner
from switchkd.writing.turn_engine import decode_turns
from switchkd.writing.turns import TurnJob, decode_turns_reference

PROMPTS = [b"the cat", b"What is", b"12", b"x", b"\n\nand so on, we sat"]
# A state beside attention as student or teacher; a state alone in both.
PAIRS = [("granitemoehybrid", "llama"), ("llama", "qwen3_5_text"), ("mamba2", "mamba2")]
POLICIES = [SSD(tau=0.2), Switch(tau_0=0.9, decay=0.05), AdaSwitch(window=2, ratio=1.1)]


def model_of(family, tokenizer, seed):
    model, own = small_model(family, seed), tokenizer_of(tokenizer)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model.resize_token_embeddings(len(own), mean_resizing=False)
        model.get_output_embeddings().weight.normal_(0, 0.5)
        model.get_input_embeddings().weight.normal_(0, 0.1)
    return model.eval()


@pytest.fixture(scope="module")
def models():
    made = {}

    def pair(families):
        if families not in made:
            made[families] = model_of(families[0], "coarse", 1), model_of(families[1], "fine", 2)
        return made[families]

    return pair


def written(models, policy, write, **how):
    bridge, settings = bridge_of("coarse", "fine"), DecodeSettings(policy, 22, seed=3, **how)
    prompts = [[side.spelling.encode(prompt) for prompt in PROMPTS] for side in bridge.sides]
    return write(TurnJob.of(bridge, *models, *prompts, settings))


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
@pytest.mark.parametrize("families", PAIRS, ids=" ".join)
def test_every_block_and_batch(models, families, policy):
    """Also where rows take the places of finished ones."""
    reference = written(models(families), policy, decode_turns_reference)
    for block, batch in ((1, 5), (3, 2), (8, 3), ("auto", None)):
        made = written(models(families), policy, decode_turns, block_size=block, batch_size=batch)
        assert_same(made, reference, 2e-3)  # states are in fp32, beside weights in fp64
        assert [r.teacher_completion_ids for r in made] == [r.teacher_completion_ids for r in reference]


def test_mutant_in_which_a_row_goes_back_to_the_state_of_the_one_before_it(models, monkeypatch):
    restart = Runner.restart

    def forgetful(self, row):
        marks = np.array(self.marks)
        restart(self, row)
        self.marks[row] = min(marks[row], 1)

    monkeypatch.setattr(Runner, "restart", forgetful)
    with pytest.raises(AssertionError):
        test_every_block_and_batch(models, PAIRS[0], POLICIES[0])
