"""What a run wrote down is what its models say, read again; and records that were changed are found out."""

import json
import shutil

import pytest
from tiny import Quota, byte_level_tokenizer, pair_on_disk, save_llama, toy_pair

from switchkd.base.errors import DataError
from switchkd.cli.main import main
from switchkd.decoding.decode import decode
from switchkd.evaluation.samples import Reader
from switchkd.methods.policies import AdaSwitch
from switchkd.models.pair import load_pair
from switchkd.reports.record import RunRecord
from switchkd.runs.heldout import load_heldout
from switchkd.runs.opening import load_train
from switchkd.runs.replay import Texts, _finding, check_records
from switchkd.studies.study import flags

METHODS = ["switch", "adaswitch", "skd", "switch_mix_in", "trb", "hysteresis", "on_policy", "kd"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return pair_on_disk(tmp_path_factory.mktemp("pair"))


def train(place, output, method="switch", **changes):
    settings = {
        **place, "template": "chat", "max_prompt_length": 128, "max_new_tokens": 10, "max_completion_length": 24,
        "eval_samples": 0, "per_device_train_batch_size": 3, "max_steps": 4, "save_steps": 2, "sample_steps": 1,
        "sample_prompts": 2, "dtype": "float64", "learning_rate": 3e-3, "output_dir": output,
    } | changes  # fmt: skip
    assert main(["train", method, *flags(settings)]) == 0
    return output


def findings(run):
    record = RunRecord.read(run)
    config = record.config
    pair = load_pair(config.teacher_model_name_or_path, config.student_model_name_or_path, dtype=config.dtype)
    return list(check_records(record, pair))


@pytest.mark.parametrize("method", METHODS)
def test_records_in_float64_are_reproduced_to_the_tenth_digit(place, tmp_path, method):
    own = {"mix.lmbda": 1} if method.startswith("switch") else {}
    if method == "trb":  # a budget that binds, and falls with the steps
        own = {"policy.budget": 1e-7, "policy.warmup": 5}
    run = train(place, tmp_path / "run", method, **own)
    found = findings(run)
    generated = [f"rollouts of step {step}" for step in (1, 3)] if method != "kd" else []
    assert {f.what for f in found} == {f"samples of step {step}" for step in (0, 2, 4)} | set(generated)
    assert all(f.largest < 1e-10 and f.other_speakers == 0 and f.tokens > 0 and f.holds("float64") for f in found)


@pytest.fixture(scope="module")
def run(place, tmp_path_factory):
    return train(place, tmp_path_factory.mktemp("true") / "run", **{"mix.lmbda": 1})


def changed(run, target, name, change):
    """A copy of the run in which the first record of a file is changed."""
    shutil.copytree(run, target)
    lines = (target / name).read_text().splitlines()
    record = json.loads(lines[0])
    change(record)
    (target / name).write_text("\n".join([json.dumps(record), *lines[1:]]) + "\n")
    return target


def add(name, *places):
    def change(record):
        values = record[name]
        for place in places[:-1]:
            values = values[place]
        values[places[-1]] += 1e-9

    return change


def swap_speaker(record):
    record["speakers"][1] = 1 - record["speakers"][1]


CHANGES = {
    "divergence": ("rollouts.jsonl", add("divergences", 2)),
    "threshold": ("rollouts.jsonl", add("thresholds", 3)),
    "speaker": ("rollouts.jsonl", swap_speaker),
    "log_prob": ("samples.jsonl", add("log_probs", 1, 0)),
    "token": (
        "rollouts.jsonl",
        lambda record: record["completion_ids"].__setitem__(4, record["completion_ids"][4] ^ 1),
    ),
    "prompt": ("rollouts.jsonl", lambda record: record["prompt_ids"].__setitem__(4, record["prompt_ids"][4] ^ 1)),
    "missing": ("rollouts.jsonl", lambda record: record["divergences"].__setitem__(1, None)),
}


@pytest.fixture(scope="module")
def scored(place, tmp_path_factory):
    """A run whose samples are of held-out prompts, with scores."""
    few = {
        "max_steps": 2,
        "save_steps": 1,
        "per_device_train_batch_size": 2,
        "max_new_tokens": 5,
    }
    own = {"eval_samples": 2, "eval_max_new_tokens": 2, "mix.lmbda": 1}
    return train(place, tmp_path_factory.mktemp("scored") / "run", **few | own)


@pytest.fixture(scope="module")
def wrong(scored):
    """What does not hold in a copy of that run, whose models and texts are loaded once."""
    record = RunRecord.read(scored)
    config = record.config
    pair = load_pair(config.teacher_model_name_or_path, config.student_model_name_or_path, dtype=config.dtype)
    heldout = load_heldout(config, pair, quiet=True)
    texts = Texts(load_train(config, pair, quiet=True), heldout.examples, heldout.task)
    began = {name: tensor.clone() for name, tensor in pair.student.state_dict().items()}

    def found(run):
        pair.student.load_state_dict(began)
        return [each for each in check_records(RunRecord.read(run), pair, texts=texts) if not each.holds("float64")]

    assert not found(scored)
    return found


def another(value):
    """A value of the same type: of a list or object another first one."""
    if isinstance(value, dict):
        return {name: another(inner) for name, inner in list(value.items())[:1]} | dict(list(value.items())[1:])
    if isinstance(value, (list, tuple)):
        return [another(value[0]), *value[1:]] if value else [3]
    return {int: lambda: value + 1, float: lambda: value + 1e-6, str: lambda: value + "x", type(None): lambda: [3]}[
        type(value)
    ]()


@pytest.mark.parametrize(("file", "at"), [("rollouts.jsonl", -1), ("samples.jsonl", 0)])
def test_a_change_of_any_field_of_any_record_is_noticed(scored, wrong, tmp_path, file, at):
    """Also jsd, top, scores, reference, stop_reason and step, which nothing looked at."""
    run = shutil.copytree(scored, tmp_path / "run")
    lines = (scored / file).read_text().splitlines()
    record = json.loads(lines[at])
    changes = {name: another(value) for name, value in record.items()}
    more = {
        "stop_reason": "eos",
        "error": "broke",
        "reference": "another",
        "thresholds": [*record["thresholds"][:-1], 0.5],
    }
    changes |= {name: value for name, value in more.items() if name in record}
    for name, value in changes.items():
        other = [*lines]
        other[at] = json.dumps(record | {name: value})
        (run / file).write_text("\n".join(other) + "\n")
        try:
            assert wrong(run), name
        except DataError as error:
            assert str(run / file) in str(error)


@pytest.mark.parametrize("file", ["rollouts.jsonl", "samples.jsonl", "metrics.jsonl"])
@pytest.mark.parametrize(
    "how", [lambda own: own[1:], lambda own: own[:-1], lambda own: own + own[-1:], lambda own: own[::-1]]
)
def test_a_line_that_is_missing_twice_or_elsewhere_is_noticed(scored, wrong, tmp_path, file, how):
    run = shutil.copytree(scored, tmp_path / "run")
    lines = (run / file).read_text().splitlines(keepends=True)
    (run / file).write_text("".join(how(lines)))
    try:
        found = wrong(run)
    except DataError as error:
        assert str(run / file) in str(error)
    else:
        assert [finding.what for finding in found] == ["steps and texts in order"]


@pytest.mark.parametrize("model", ["teacher", "student after"])
@pytest.mark.parametrize("score", ["rouge_l", "length"])
def test_scores_are_those_of_the_text_that_was_scored(scored, wrong, tmp_path, model, score):
    run = shutil.copytree(scored, tmp_path / "run")
    record = json.loads((run / "evaluation.json").read_text())
    record["results"][model]["scores"][score]["values"][0][1] += 1
    (run / "evaluation.json").write_text(json.dumps(record))
    [found] = wrong(run)
    assert f"scores of {model}" in str(found) and f"wrong: {score}" in str(found)


def test_a_token_that_no_model_knows_is_named(scored, wrong, tmp_path):
    broken = changed(
        scored, tmp_path / "run", "rollouts.jsonl", lambda record: record["completion_ids"].__setitem__(1, 10**6)
    )
    [found] = wrong(broken)
    assert "wrong: prompt_ids, completion_ids, teacher_prompt_ids or teacher of text 0" in str(found)


@pytest.mark.parametrize("name", CHANGES)
def test_a_record_that_was_changed_is_found_out_and_named(run, tmp_path, name, capsys):
    file, change = CHANGES[name]
    broken = changed(run, tmp_path / "run", file, change)
    wrong = [f.what for f in findings(broken) if not f.holds("float64")]
    assert wrong == [f"{file.split('.')[0]} of step {0 if file.startswith('samples') else 1}"]


def test_so_many_texts_of_each_kind_are_read_and_no_more(run):
    record = RunRecord.read(run)
    pair = load_pair(
        record.config.teacher_model_name_or_path, record.config.student_model_name_or_path, dtype="float64"
    )
    assert {f.texts for f in check_records(record, pair, most=1)} == {1}
    assert {f.texts for f in check_records(record, pair)} == {2, 3}  # samples, and rollouts of a step


def test_check_says_it_for_a_run_also_one_that_was_moved(run, tmp_path, capsys):
    broken = changed(run, tmp_path / "moved", "rollouts.jsonl", swap_speaker)
    assert main(["check", str(run)]) == 0
    assert "rollouts of step 3: 3 texts, 30 tokens read again; 0 speakers differ" in capsys.readouterr().out
    assert main(["check", str(broken)]) == 1
    assert "the records of rollouts of step 1 are not what these models" in capsys.readouterr().err


def test_another_student_in_the_same_place_is_found_out(run, tmp_path):
    record = RunRecord.read(run)
    other = save_llama(tmp_path / "other", byte_level_tokenizer(), 3, layers=1)
    pair = load_pair(record.config.teacher_model_name_or_path, other, dtype="float64")
    found = {f.what: f.holds("float64") for f in check_records(record, pair)}
    # Checkpoints bring their own weights; those that the run began with are taken from the folder.
    assert [what for what, holds in found.items() if not holds] == ["samples of step 0", "rollouts of step 1"]


def test_a_policy_that_forgets_its_state_would_be_found_out(place, tmp_path, monkeypatch):
    run = train(place, tmp_path / "run", "adaswitch", **{"policy.window": 2, "policy.ratio": 1})
    assert all(f.holds("float64") for f in findings(run))
    step = AdaSwitch.step
    monkeypatch.setattr(AdaSwitch, "step", lambda self, state, *rest: step(self, self.init(1), *rest))
    assert not all(f.holds("float64") for f in findings(run))


def test_a_text_ends_where_the_policy_says_and_nowhere_else(tmp_path):
    """Also a rule that hears who spoke, from noise: its texts, read again, end where they ended."""
    pair, policy = toy_pair(), Quota(alpha=0.4, most=2)
    rollouts = decode(pair.student, pair.teacher, [[3, 4], [5], [6, 7]], policy, 12, seed=5, eos_token_ids=[])
    records = [rollout.to_json() for rollout in rollouts]
    assert {record["stop_reason"] for record in records} == {"policy"}
    assert _finding("texts", Reader(pair), policy, records, seed=5).other_speakers == 0
    longer = [
        record
        | {
            name: record[name] + record[name][-1:]
            for name in ("completion_ids", "speakers", "divergences", "thresholds")
        }
        for record in records
    ]
    assert _finding("texts", Reader(pair), policy, longer, seed=5).other_speakers > 0
    cut = [
        record | {name: record[name][:-1] for name in ("completion_ids", "speakers", "divergences", "thresholds")}
        for record in records
    ]
    assert _finding("texts", Reader(pair), policy, cut, seed=5).other_speakers == len(cut)
