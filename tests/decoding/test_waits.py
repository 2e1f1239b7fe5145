"""How often the host waits for the device in a round of decoding: a GPU stands still meanwhile. Counted on the CPU."""

import pytest
from tiny import POLICIES, tiny_model

from benchmarks.waits import counting_waits
from switchkd import AdaSwitch, StudentOnly, Switch, decode
from switchkd.decoding.board import Board
from switchkd.methods.policies import SKD

RULES = {
    "student_only": StudentOnly(),
    "switch": Switch(tau_0=0.6, decay=0.03),
    "adaswitch": AdaSwitch(window=2, ratio=1.1),
    "skd": SKD(top_k=3),
    "relay": POLICIES["relay"],
    "spell": POLICIES["spell"],
}
COSTS = (2e-3, 5e-6, 3e-3, 2e-5, 1e-3, 2e-6)


def waits_of(policy, rows, **settings):
    """Of the rounds of a call, in which prompts of many lengths enter a batch of ``rows`` as others end."""
    pair = tiny_model("llama", 1), tiny_model("llama", 2)
    prompts = [[3 + (7 * i + j) % 19 for j in range(1 + i % 9)] for i in range(rows + rows // 2)]
    with counting_waits() as waits:
        decode(*pair, prompts, policy, 12, batch_size=rows, eos_token_ids=[4, 9], progress=waits.round, **settings)
    return waits


@pytest.mark.parametrize("rows", [8, 64])
@pytest.mark.parametrize("name", RULES)
def test_a_round_waits_three_times_at_most(name, rows):
    """For its summary, for the notes of rows that ended, for prompts that enter."""
    for settings in (
        {"costs": COSTS},
        {"block_size": 4, "drafter": "student"},
        {"block_size": 3, "drafter": "teacher"},
    ):
        waits = waits_of(RULES[name], rows, **settings)
        assert waits.most() <= 3, waits.places
        assert waits.per_round() < 3


@pytest.mark.parametrize("name", ["switch", "adaswitch"])
def test_hidden_states_and_graphs_cost_no_wait(name):
    assert waits_of(RULES[name], 8, costs=COSTS, keep_hidden=True, graphs=True).most() <= 3


def test_mutant_that_asks_for_every_row_is_caught(monkeypatch):
    """The lengths of the rows are known to the host; asked of the device, each is a wait."""
    ends = Board.ends

    def asking(self, who, rows):
        found, _ = ends(self, who, rows)
        return found, found.cpu().numpy()

    monkeypatch.setattr(Board, "ends", asking)
    assert waits_of(RULES["switch"], 8, costs=COSTS).most() > 3
