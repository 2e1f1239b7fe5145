"""Recorded work: what would be replayed on a GPU is here done anew on the same tensors, in batches of a few sizes."""

import pytest
import torch
from tiny import POLICIES, assert_same, tiny_model

from switchkd import AdaSwitch, StudentOnly, Switch, decode_reference
from switchkd.decoding.decode import Runners, decode_job
from switchkd.decoding.rows import Job
from switchkd.decoding.settings import DecodeSettings
from switchkd.forward.ends import Ends
from switchkd.methods.policies import SKD
from switchkd.runner.graphs import Graphs, bucket

PROMPTS = [[3 + (7 * i + j) % 17 for j in range(1 + i % 5)] for i in range(7)]


def test_batches_are_recorded_at_powers_of_two_and_at_the_places_there_are():
    assert [bucket(rows, 64) for rows in (1, 2, 3, 4, 5, 8, 9, 33, 64)] == [1, 2, 4, 4, 8, 8, 16, 64, 64]
    assert [bucket(rows, 6) for rows in (3, 4, 5, 6)] == [4, 4, 6, 6]


def test_a_recording_keeps_its_tensors_and_takes_new_numbers():
    recorded, seen = Graphs(), []

    def work(x, y):
        seen.append((x.data_ptr(), y.data_ptr()))
        return x + y, x * y

    for k in range(3):
        x = torch.arange(4.0) + k
        total, product = recorded("name", work, x, x)
        assert torch.equal(total, 2 * x) and torch.equal(product, x * x)
        seen.append((total.data_ptr(), product.data_ptr()))
    assert len(set(seen)) == 2  # one pair of inputs, one of outputs
    assert len(recorded.made) == 1
    recorded.forget()
    assert not recorded.made


def decoded(runners, policy, prompts=PROMPTS, **more):
    pair = tiny_model("llama", 1), tiny_model("llama", 2)
    if runners is not None:
        pair = runners.pair
    settings = DecodeSettings(policy, 9, block_size=3, drafter="student", graphs=True, **more)
    return pair, decode_job(Job.of(*pair, prompts, settings), runners=runners)


@pytest.fixture
def runners():
    kept = Runners()
    kept.pair = tiny_model("llama", 1), tiny_model("llama", 2)
    return kept


@pytest.mark.parametrize("policy", [StudentOnly(), Switch(tau_0=0.6, decay=0.03), AdaSwitch(window=2, ratio=1.1)])
def test_recordings_are_few_and_last_from_call_to_call(policy, runners):
    """Rows end one by one, and those of 5 to 7 are one size: what has ended rides along."""
    reference = decode_reference(*runners.pair, PROMPTS, policy, 9)
    _, first = decoded(runners, policy)
    assert_same(first, reference)
    student = runners._of[id(runners.pair[0])]
    names, places = set(student.graphs.made), [layer.keys.data_ptr() for layer in student.cache.layers]
    assert names and {name[-1] for name in names} <= {1, 2, 4, 7}
    _, again = decoded(runners, policy)
    assert_same(again, reference)
    assert set(student.graphs.made) == names and [layer.keys.data_ptr() for layer in student.cache.layers] == places


def test_what_a_recording_depends_on_is_part_of_its_name(runners):
    """The same models and shapes, with other ends that are one event, another temperature, another rule."""
    for policy, ends, temperature in (
        (Switch(tau_0=0.6, decay=0.03), Ends((5, 13, 14), 13), 1.0),
        (Switch(tau_0=0.6, decay=0.03), Ends((5, 13, 14)), 1.0),
        (Switch(tau_0=0.6, decay=0.03), Ends((5, 13, 14)), 0.5),
        (SKD(3, student_temperature=0.7), Ends((5, 13, 14)), 0.5),
    ):
        settings = DecodeSettings(policy, 9, temperature, block_size=3, drafter="student", graphs=True)
        made = decode_job(Job.of(*runners.pair, PROMPTS, settings, eos_token_ids=ends), runners=runners)
        assert_same(made, decode_reference(*runners.pair, PROMPTS, policy, 9, temperature, eos_token_ids=ends))


def test_longer_texts_or_more_rows_are_recorded_anew(runners):
    """The buffers move, and nothing that was recorded on the old ones may be replayed."""
    policy = POLICIES["spell"]
    decoded(runners, policy, PROMPTS[:2])
    student = runners._of[id(runners.pair[0])]
    old = student.cache
    _, made = decoded(runners, policy)
    assert student.cache is not old
    assert_same(made, decode_reference(*runners.pair, PROMPTS, policy, 9))


def test_mutant_that_keeps_recordings_of_other_buffers_is_caught(runners, monkeypatch):
    """They would go on reading and writing the old ones."""
    policy = Switch(tau_0=0.6, decay=0.03)
    decoded(runners, policy, [[5, 6]] * 7)
    monkeypatch.setattr(Graphs, "forget", lambda self: None)
    student = runners._of[id(runners.pair[0])]
    for name, recording in student.graphs.made.items():  # deaf to the new cache, as a graph is
        student.graphs.made[name] = recording._replace(replay=lambda: None)
    student.keeps = None
    _, made = decoded(runners, policy)
    with pytest.raises(AssertionError):
        assert_same(made, decode_reference(*runners.pair, PROMPTS, policy, 9))


def test_rows_with_more_than_one_token_to_read_are_not_recorded(monkeypatch):
    """A row that lags behind, or an index of rows, has no recording; the text is the same."""
    pair, made = decoded(None, POLICIES["forced"], batch_size=3)
    assert_same(made, decode_reference(*pair, PROMPTS, POLICIES["forced"], 9))
