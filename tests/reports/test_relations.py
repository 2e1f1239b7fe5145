"""Records whose fields are each of the right type and do not fit together are refused by file and line, whatever they are of."""

import json

import pytest
from fabricated import metric, rollout, run, sample
from test_resume import write_state
from test_teacher_store import build, texts
from test_trainer import trainer
from tiny import toy_examples

from switchkd.base.errors import CheckpointError, ConfigError, DataError
from switchkd.evaluation.results import read_results
from switchkd.methods.mixes import Adaptive
from switchkd.reports.record import RunRecord
from switchkd.runs.continuation import check_origin, check_run
from switchkd.training.settings import TrainConfig

LISTS = [("speakers",), ("divergences",), ("thresholds",), ("completion_ids",)]
TRACED = [("jsd",), ("log_probs", 0), ("log_probs", 1), ("top", 0), ("top", 1)]
LENGTHS = [("rollouts.jsonl", path) for path in LISTS] + [("samples.jsonl", path) for path in LISTS + TRACED]


@pytest.fixture
def folder(tmp_path):
    samples = [sample(step, "yes", sample_id=i) for step in (0, 2) for i in (0, 1)]
    scores = {"student before": [1.0, 2.0], "student after": [3.0, 4.0]}
    return run(tmp_path / "run", [metric(1), metric(2)], samples, [rollout(1, "no"), rollout(2, "yes")], scores=scores)


def change(file, number, path, value):
    """One value of a line of a file replaced, or changed by a function."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    at = lines[number]
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value(at[path[-1]]) if callable(value) else value
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def read(folder):
    record = RunRecord.read(folder)
    return record, record.rollouts(9)


@pytest.mark.parametrize(("name", "path"), LENGTHS)
@pytest.mark.parametrize("how", [lambda own: own[:-1], lambda own: own + own[-1:], lambda own: []])
def test_lists_by_token_have_an_entry_for_each(folder, name, path, how):
    """Of lists of unequal length a page showed other tokens' numbers."""
    read(folder)
    change(folder / name, 1, path, how)
    with pytest.raises(DataError, match=rf"{name}, line 2 is damaged: it does not fit together: "):
        read(folder)


VALUES = {
    "speaker": ("rollouts.jsonl", 0, ("speakers", 0), 2, r"speakers\[0\] must be"),
    "stop_reason": ("rollouts.jsonl", 0, ("stop_reason",), "tired", "stop_reason 'tired' is none of eos, policy"),
    "error": ("samples.jsonl", 0, ("error",), "broke", "stop_reason is 'eos', and error is 'broke'"),
    "no error": ("samples.jsonl", 0, ("stop_reason",), "non_finite", "stop_reason is 'non_finite', and error is None"),
    "jsd": ("samples.jsonl", 0, ("jsd", 0), 1.5, r"a jsd is not in 0..1 bits"),
    "top": ("samples.jsonl", 0, ("top", 1, 0), [], "a token of top has no likely ones"),
    "step before": ("samples.jsonl", 2, ("step",), -1, "step must be"),
    "samples go back": (
        "samples.jsonl",
        0,
        ("step",),
        1,
        "2 is damaged: its step is 0, and that of a line above it is 1",
    ),
    "rollouts go back": ("rollouts.jsonl", 0, ("step",), 3, "2 is damaged: its step is 2"),
    "metrics go back": ("metrics.jsonl", 0, ("step",), 3, "2 is damaged: its step is 2"),
    "metrics twice": ("metrics.jsonl", 1, ("step",), 1, "2 is damaged: step 1 is there twice"),
    "fewer tokens": ("metrics.jsonl", 1, ("num_tokens",), 3, "2 is damaged: num_tokens falls from 10 to 3"),
}


@pytest.mark.parametrize("case", VALUES)
def test_values_that_no_run_writes_are_named_with_their_line(folder, case):
    name, number, path, value, words = VALUES[case]
    change(folder / name, number, path, value)
    with pytest.raises(DataError, match=rf"{name}, line .*{words}"):
        read(folder)


def other_text(**changes):
    text = {"model": "student after", "example": 0, "seed": None, "text": "a", "tokens": 1, "stop_reason": "eos"}
    return json.dumps(text | changes) + "\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (other_text(model="teacher"), r"line 1: .* is of no model and example that was scored"),
        (other_text(example=7), r"line 1: .* is of no model and example"),
        (other_text() * 2, r"line 2: .* is there twice"),
        (other_text(), "is of another evaluation, or damaged"),
    ],
)
def test_text_of_other_examples_does_not_stand_beside_scores(folder, content, words):
    (folder / "evaluation.completions.jsonl").write_text(content)
    with pytest.raises(DataError, match=rf"evaluation.completions.jsonl.*{words}.*make it again"):
        read_results(folder / "evaluation.json")


# --- what a run goes on from ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("state")
    mix = Adaptive(share=1.0, capacity=6, validation_steps=1)
    t = trainer(folder, mix=mix, validation=toy_examples(2), max_steps=1, save_steps=1)
    t.train()
    return folder / "checkpoint-1", (folder / "checkpoint-1" / "state.json").read_text()


STATES = {
    "step": (("step",), 2, "holds step 2"),
    "num_tokens": (("num_tokens",), -1, "num_tokens and seconds count from 0"),
    "seconds": (("seconds",), float("nan"), "num_tokens and seconds count from 0"),
    "a best without a score": (("best",), {"step": 1.0}, r"best is \{'step': 1.0\}, and step 1"),
    "a best of the future": (("best",), {"step": 2.0, "score": 1.0}, "best is .*, and step 1"),
    "due": (("due",), {"step": 4}, r"due is \{'step': 4\}, and step 1"),
    "rows": (("rows",), 0, "1 steps read only 0 rows"),
    "no rows": (("rows_per_step",), 0, "rows_per_step must be"),
    "replay": (("replay", 0, "speakers"), [], r"replay\[0\] does not fit together: speakers has 0 entries"),
}


@pytest.mark.parametrize("case", STATES)
def test_a_state_that_does_not_fit_together_is_refused(checkpoint, case):
    from switchkd.training.checkpoint import read_state

    folder, text = checkpoint
    path, value, words = STATES[case]
    state = json.loads(text)
    at = state
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    write_state(folder, json.dumps(state).encode())
    with pytest.raises(CheckpointError, match=words):
        read_state(folder)


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", '{"train_file": 3}', '{"train_file": {"examples": 3}}', '{"a": {"sha256": 1}}', "\0", '{"a"',
        '{"conditions": 3}', '{"conditions": [3]}',
    ],
)  # fmt: skip
def test_a_damaged_origin_is_named_with_a_way_to_go_on(tmp_path, content):
    config = TrainConfig(output_dir=str(tmp_path), resume=True)
    (tmp_path / "origin.json").write_text(content)
    with pytest.raises(
        CheckpointError, match=rf"{tmp_path}/origin.json is damaged: .* delete {tmp_path}/origin.json and resume"
    ):
        check_origin(tmp_path, config, {"train_file": toy_examples(2)}, {}, {})


def test_settings_that_somebody_wrote_are_not_written_over_by_a_run(tmp_path):
    (tmp_path / "config.yaml").write_text("# my notes\nseed: 3\n")
    with pytest.raises(ConfigError, match="already exists and is not empty"):
        check_run(tmp_path, TrainConfig(output_dir=str(tmp_path)))
    (tmp_path / "origin.json").write_text("{}")  # a run that was stopped before it did anything
    check_run(tmp_path, TrainConfig(output_dir=str(tmp_path)))


# --- what a teacher did once ------------------------------------------------------------------------------------------

MANIFESTS = {
    "not a list": lambda m: m | {"firsts": 3},
    "made from nothing": lambda m: m | {"made_from": []},
    "no offsets": lambda m: {"made_from": m["made_from"], "firsts": m["firsts"]},
    "an offset": lambda m: m | {"offsets": [m["offsets"][0] + 1, *m["offsets"][1:]]},
    "fewer offsets": lambda m: m | {"offsets": m["offsets"][:-1]},
    "a shard of nothing": lambda m: m | {"firsts": [*m["firsts"], m["firsts"][-1]]},
    "no shards": lambda m: m | {"firsts": []},
}


@pytest.mark.parametrize("how", MANIFESTS)
def test_a_cache_whose_places_do_not_fit_is_refused(tmp_path, how):
    build(tmp_path, "hidden")
    file = tmp_path / "manifest.json"
    file.write_text(json.dumps(MANIFESTS[how](json.loads(file.read_text()))))
    with pytest.raises(CheckpointError, match=r"manifest.json (is damaged|cannot be read)|is missing; build"):
        build(tmp_path, "hidden")


ROWS = {
    "id": {"id": 5},
    "longer than the budget": {"completion_ids": [3] * 99, "truncated": True},
    "cut before the budget": {"truncated": True, "completion_ids": [3]},
    "no end": {"truncated": False, "completion_ids": [3]},
    "a number for a truth": {"truncated": 1},
}


@pytest.mark.parametrize("how", ROWS)
def test_a_row_of_a_store_that_no_teacher_wrote_is_refused(tmp_path, how):
    """Before the last row is there, no checksum tells."""
    texts(tmp_path)
    (tmp_path / "complete.json").unlink()
    file = tmp_path / "texts.jsonl"
    first, *rest = file.read_text().splitlines()
    file.write_text("\n".join([json.dumps(json.loads(first) | ROWS[how]), *rest]) + "\n")
    with pytest.raises(CheckpointError, match=r"texts.jsonl:1 is damaged: not a completion of example"):
        texts(tmp_path)
