"""Whatever a file or prompt holds, the outcome is an error that names it, or a counted skip; never a traceback or a wrong count."""

import copy
import gzip
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from fabricated import TOKENIZER, metric, rollout, run, sample
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from tiny import VOCAB, tiny_model

from switchkd.base import plain
from switchkd.base.errors import ConfigError, DataError
from switchkd.base.settings import to_dict
from switchkd.cli.main import main
from switchkd.data.examples import load_examples
from switchkd.data.settings import DataConfig
from switchkd.data.templates import Encoder
from switchkd.data.texts import load_text
from switchkd.decoding import rows
from switchkd.decoding.decode import decode
from switchkd.methods.policies import Switch
from switchkd.reports.compare import load_result
from switchkd.reports.curves import cost
from switchkd.reports.panels import has
from switchkd.reports.record import RunRecord
from switchkd.reports.viewer import payload
from switchkd.runs.opening import prompt_examples
from switchkd.studies.plan import cells, load_plan
from switchkd.training.settings import TrainConfig, load_recipe

LAYOUTS = {
    "pair": {"prompt": "a", "completion": "b"},
    "messages": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "calls": {
        "messages": [
            {"role": "user", "content": "a", "name": "u"},
            {
                "role": "assistant",
                "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}],
                "thinking": "c",
                "weight": 1,
            },
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "system": "d",
    },
    "instruction": {"instruction": "a", "input": "c", "output": "b", "topic": "d", "history": [["e", "f"]]},
    "instances": {"instruction": "a", "instances": [{"input": "c", "output": "b"}]},
    "gsm_plus": {"question": "a", "solution": "b", "answer": "1", "perturbation_type": "x"},
    "gsm8k": {"question": "a", "answer": "#### 1"},
    "math": {"problem": "a", "solution": "b", "subject": "x"},
    "dialogue": {"dialogue": "a", "summary1": "b", "summary2": "c"},
}
GOOD = [json.dumps(LAYOUTS["pair"]).encode() + end for end in (b"", b"\r", b"  ")] + [
    b"\xef\xbb\xbf"
    + json.dumps({"prompt": "nul \0 inside", "completion": "b", "unused": {"a": [1e999, None]}}).encode(),
    json.dumps({"prompt": "a" * 2**20, "completion": "\U0001f600"}).encode(),
]
BAD = [
    b'{"prompt": "a", "completion": "b"',
    b'{"prompt": "\xff", "completion": "b"}',
    b'{"prompt": "a\0", "completion": "b"}',
    b"\0\0\0",
    b'{"prompt": "\\ud800", "completion": "b"}',
    b'{"prompt": "a", "completion": "b", "unused\\uD800": 1}',
    b'{"prompt": "a", "completion": "b", "unused": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    b'{"prompt": "a", "completion": "b", "unused": ' + b"9" * 5000 + b"}",
    b'{"prompt": "a", "completion": "b", "prompt": "c"}',
    b'{"prompt": "a", "completion": "b", "unused": {"a": 1, "a": 2}}',
    b'{"prompt": 1, "completion": "b"}',
    b'{"prompt": " \\n", "completion": "b"}',
    b"[" * 2**20,
    b"null",
    b"{}",
]
HOSTILE = [None, True, "x", -1, 0.5, 10**30, math.nan, math.inf, [], {}, [[1]], {"a": 1}, "\ud800"]
slow = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])

json_values = st.recursive(
    st.sampled_from(HOSTILE) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


# --- data files -------------------------------------------------------------------------------------------------------


def check_counts(path: Path, lines: list[bytes]) -> None:
    """As many bad rows as there are may be skipped, not one less; what is left are the good rows, under their own numbers."""
    path.write_bytes(b"\n".join(lines) + b"\n")
    places = [place for place, line in enumerate(lines) if line in BAD]
    read = load_examples(str(path), skip_bad=len(places))
    kept = [place for place in range(len(lines)) if place not in places]
    assert [(row.id, row.source) for row in read] == [(place, f"{path}:{place + 1}") for place in kept]
    if places:
        with pytest.raises(DataError) as caught:
            load_examples(str(path), skip_bad=len(places) - 1)
        assert f"{path}:{places[min(len(places), 3) - 1] + 1}: " in str(caught.value) and len(str(caught.value)) < 2000


@slow
@example([GOOD[0], *BAD])
@example(GOOD)
@given(st.lists(st.sampled_from(GOOD + BAD), max_size=6))
def test_bad_rows_are_counted_and_the_others_keep_their_numbers(tmp_path, lines):
    assume(any(line in GOOD for line in lines))
    check_counts(tmp_path / "a.jsonl", lines)


def test_a_reader_that_lets_a_bad_row_through_would_be_found(tmp_path, monkeypatch):
    """The negative control: json.loads keeps the last of what is given twice."""
    monkeypatch.setattr("switchkd.data.files.json_object", json.loads)
    with pytest.raises(AssertionError):
        check_counts(tmp_path / "a.jsonl", [GOOD[0], BAD[8]])


def encoded(path):
    """The examples of a file as ids."""
    return [ids for example in load_examples(path) for ids in Encoder(TOKENIZER, "chat")([example])]


@slow
@given(st.sampled_from(sorted(LAYOUTS)), st.data())
def test_fields_of_any_type_are_read_or_refused_by_file_and_line(tmp_path, layout, draw):
    places = [path for path in paths_of(LAYOUTS[layout]) if path]
    row = changed(LAYOUTS[layout], draw.draw(st.sampled_from(sorted(places, key=str))), draw.draw(json_values))
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n")
    for read in (encoded, lambda path: load_text(path, TOKENIZER, 8)):
        try:
            assert read(str(path))
        except DataError as error:
            assert str(path) in str(error) and len(str(error)) < 2000


@slow
@given(st.binary(max_size=60) | st.text(max_size=30).map(str.encode))
def test_any_bytes_are_rows_or_an_error(tmp_path, content):
    for name, written in (("a.jsonl", content), ("b.jsonl.gz", gzip.compress(content)[: len(content)])):
        (tmp_path / name).write_bytes(written)
        with pytest.raises(DataError, match=name):
            load_examples(str(tmp_path / name))


def test_a_gzip_file_cut_anywhere_gives_no_rows(tmp_path):
    whole = gzip.compress((json.dumps(LAYOUTS["pair"]) + "\n").encode() * 3)
    for length in range(len(whole)):
        (tmp_path / "a.jsonl.gz").write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"a\.jsonl\.gz"):
            load_examples(str(tmp_path / "a.jsonl.gz"))


def test_a_text_file_skips_and_counts_as_well(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": 3}\n{"text": "two"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: field 'text'"):
        load_text(str(path), TOKENIZER, 8)
    assert [row.id for row in load_text(str(path), TOKENIZER, 8, skip_bad=1)] == [0, 2]
    assert "skipped 1 bad rows" in caplog.text


# --- recipes and plans ------------------------------------------------------------------------------------------------

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)
YAML = {
    "bomb": (BOMB, "aliases"),
    "bomb in a rule": (BOMB + "policy: *j\n", "aliases"),
    "loop": ("policy: &a [*a]\n", "aliases"),
    "object": ("policy: !!python/object/apply:os.system ['touch evil']\n", "could not determine a constructor"),
    "name": ("policy: !!python/name:os.system\n", "could not determine a constructor"),
    "twice": ("seed: 1\nseed: 2\n", "the name 'seed' is given twice.*line 2"),
    "twice inside": ("policy: {name: switch, tau_0: 1, tau_0: 2}\n", "the name 'tau_0' is given twice"),
    "no text as a name": ("1: 2\n", "a name must be text, not 1.*line 1"),
    "yes as a name": ("policy: {name: switch, on: 2}\n", "a name must be text, not True"),
    "list as a name": ("? [a]\n: 1\n", "a name must be text"),
    "no number": ("learning_rate: .nan\n", "learning_rate must be"),
    "no number of a rule": ("policy: {name: switch, tau_0: .nan}\n", "tau_0"),
    "infinite": ("learning_rate: .inf\n", "learning_rate must be"),
    "huge": ("learning_rate: 1" + "0" * 400 + "\n", "learning_rate must be float"),
    "longer than Python reads": ("seed: " + "1" * 5000 + "\n", "is not valid YAML"),
    "no date": ("seed: 2001-99-99\n", "month must be in 1..12"),
    "no time": ("seed: !!timestamp x\n", "is not valid YAML"),
    "no bool": ("seed: !!bool x\n", "is not valid YAML"),
    "deep": ("seed: " + "[" * 2_000 + "\n", "nested too deeply"),
    "nul": ("seed: 1\0\n", "special characters are not allowed"),
    "surrogate": ('train_file: "\\ud800"\n', "half of a surrogate pair"),
    "long": ("policy: " + "x" * 10**6 + "\n", "unknown policy"),
}


@pytest.mark.parametrize("name", YAML)
def test_a_recipe_or_plan_that_is_none_is_explained(tmp_path, name):
    text, words = YAML[name]
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=f"(?s){words}") as caught:
        load_recipe(str(file))
    assert "r.yaml" in str(caught.value) and len(str(caught.value)) < 2000
    with pytest.raises(ConfigError, match=r"r\.yaml"):
        load_plan(str(file))
    assert not Path("evil").exists()


@slow
@given(st.sampled_from(sorted(to_dict(TrainConfig()))), json_values)
def test_settings_of_any_type_are_taken_or_refused_by_name(tmp_path, name, value):
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump({name: value}))
    try:
        load_recipe(str(file))
    except ConfigError as error:
        assert len(str(error)) < 2000


PLAN = {
    "title": "t",
    "methods": {"a": "switch"},
    "sizes": {"small": {"seeds": [0], "pairs": {"p": {}}, "budgets": {"b": {}}}},
}


def paths_of(value, path=()):
    """The places in a JSON value."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from paths_of(inner, (*path, key))


def changed(value, path, new):
    """The value with another at one place."""
    if not path:
        return new
    value = copy.copy(value)
    value[path[0]] = changed(value[path[0]], path[1:], new)
    return value


@slow
@given(st.data())
def test_a_plan_of_any_shape_is_read_or_refused(tmp_path, draw):
    plan = changed(PLAN, draw.draw(st.sampled_from(sorted(paths_of(PLAN), key=str))), draw.draw(json_values))
    file = tmp_path / "p.yaml"
    file.write_text(yaml.safe_dump(plan))
    try:
        plan = load_plan(str(file))
        for size in plan.sizes.values():
            cells(plan, size, tmp_path)
    except ConfigError as error:
        assert len(str(error)) < 2000


@pytest.mark.parametrize("kind", ["methods", "pairs", "budgets"])
def test_a_name_in_a_plan_stays_in_the_studys_folder(tmp_path, kind):
    plan = copy.deepcopy(PLAN)
    (plan if kind == "methods" else plan["sizes"]["small"])[kind] = {"../../up": "switch" if kind == "methods" else {}}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(plan))
    with pytest.raises(ConfigError, match=r"p\.yaml: '\.\./\.\./up' names files"):
        load_plan(str(tmp_path / "p.yaml"))


# --- what a run wrote -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """A whole run directory, and the records in it by file."""
    folder = run(
        tmp_path_factory.mktemp("runs") / "a", [metric(1), metric(2)], [sample(1, "yes")], [rollout(1, "no")],
        scores={"student before": [1.0, 2.0], "student after": [3.0, 4.0]},
    )  # fmt: skip
    evaluation = json.loads((folder / "evaluation.json").read_text())
    del evaluation["completions_sha256"]  # each file is changed alone
    evaluation["task"] = {"name": "t", "version": 1, "primary": "strict"}
    evaluation["data"] |= {"file": "f", "sha256": "0" * 64}
    for result in evaluation["results"].values():
        result["model"] = {"sha256": "0" * 64}
    files = {
        name: [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "samples.jsonl", "rollouts.jsonl")
    }
    text = {"model": "student after", "example": 0, "seed": None, "text": "a", "tokens": 1, "stop_reason": "eos"}
    return folder, files | {"evaluation.json": [evaluation], "evaluation.completions.jsonl": [text]}


def check_record(folder, files, name, path, value):
    """With one value changed, everything that reads the run takes it, or refuses it by the name of its file."""
    for each, lines in files.items():
        lines = changed(lines, path, value) if each == name else lines
        (folder / each).write_text("".join(json.dumps(line) + "\n" for line in lines))
    try:
        record = RunRecord.read(folder)
        json.dumps(payload(record, "a", 10**6), allow_nan=False).encode()
        cost(record.metrics)
        assert all(has(record.metrics, metric) in (True, False) for metric in record.metrics[0])
        assert record.state and record.not_finite is not None
    except DataError as error:
        assert str(folder / name) in str(error) and len(str(error)) < 2000
    try:
        load_result(str(folder))
    except DataError as error:
        assert "evaluation" in str(error)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_records_of_any_type_are_shown_or_refused_by_file(records, draw):
    folder, files = records
    name = draw.draw(st.sampled_from(sorted(files)))
    places = [path for path in paths_of(files[name]) if path]
    check_record(folder, files, name, draw.draw(st.sampled_from(places)), draw.draw(st.sampled_from(HOSTILE)))


def test_a_reader_of_unchecked_records_would_be_found(records, monkeypatch):
    monkeypatch.setattr(plain, "check_type", lambda *_: None)
    with pytest.raises((AssertionError, KeyError, TypeError, ValueError, AttributeError)):
        check_record(*records, "samples.jsonl", (0, "top"), None)


def test_a_folder_that_looks_like_a_checkpoint_is_none(records):
    folder, files = records
    (folder / "checkpoint-3x").mkdir()
    check_record(folder, files, "metrics.jsonl", (0, "loss"), 1.0)
    assert "it has no checkpoint" in RunRecord.read(folder).state


# --- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["chat", "none"])
def test_prompts_are_tokens_or_an_error(template):
    pair, config = SimpleNamespace(tokenizer=TOKENIZER, teacher_templates={}, bridges={}), DataConfig(template=template)
    for text in ("\0", "<|im_end|>", "<|im_end|><|im_end|>", "a" * 2**14, "a<|im_end|>"):
        [one] = prompt_examples([text], config, pair)
        assert text in TOKENIZER.decode(one.prompt_ids)
    for text, words in ((" \n\t", "prompt 0 is empty"), ("\udcff", "prompt 0 holds half of a surrogate pair")):
        with pytest.raises(DataError, match=words):
            prompt_examples([text], config, pair)


LIMIT = 64  # of the tiny models
FIT = st.lists(st.integers(2, VOCAB - 1), min_size=1, max_size=6)
UNFIT = st.sampled_from([[], [3, VOCAB], [-1], [4] * (LIMIT - 5), [10**30]])


@pytest.fixture(scope="module")
def pair():
    return tiny_model(seed=1), tiny_model(seed=2)


def check_neighbours(pair, prompts: list[list[int]], bad: set[int]) -> None:
    """Rows that can be decoded are decoded as they are alone, whatever else is in the batch."""
    together = decode(*pair, prompts, Switch(), 6, batch_size=3)
    assert [place for place, row in enumerate(together) if row.error] == sorted(bad)
    good = [place for place in range(len(prompts)) if place not in bad]
    alone = decode(*pair, [prompts[place] for place in good], Switch(), 6, batch_size=3, sample_ids=good)
    assert [together[place].completion_ids for place in good] == [row.completion_ids for row in alone]


@settings(deadline=None, max_examples=15)
@example([([4] * (LIMIT - 6), False), ([4] * (LIMIT - 5), True)])
@given(st.lists(st.tuples(FIT, st.just(False)) | st.tuples(UNFIT, st.just(True)), min_size=1, max_size=5))
def test_a_bad_prompt_moves_no_other_row(pair, drawn):
    check_neighbours(pair, [prompt for prompt, _ in drawn], {place for place, (_, bad) in enumerate(drawn) if bad})


def test_a_decoder_that_does_not_look_at_prompts_would_be_found(pair, monkeypatch):
    monkeypatch.setattr(rows, "_check_row", lambda row, job: None)
    with pytest.raises((AssertionError, IndexError, ValueError, RuntimeError)):
        check_neighbours(pair, [[3, 4], [3, VOCAB]], {1})


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "{0}/r.yaml"], "r.yaml is not valid YAML"),
        (["study", "{0}/r.yaml"], "r.yaml is not valid YAML"),
        (["study", "first", "--set", "seed=["], "--set seed is not valid YAML"),
        (
            ["report", "{0}/run"],
            "run/metrics.jsonl, line 2 is damaged: num_tokens must be int from 0 to 9223372036854775807, got '\\x1b'",
        ),
        (["plot", "{0}/run"], "run/metrics.jsonl, line 2 is damaged"),
        (["compare", "{0}/run"], "run/evaluation.json cannot be read: broken JSON: nested too deeply"),
        (["train", "x" * 300], "x"),
    ],
)
def test_the_command_line_explains_and_returns_1(tmp_path, capsys, arguments, words):
    (tmp_path / "r.yaml").write_text("seed: 1\nseed: 2\n")
    folder = run(tmp_path / "run", [metric(1), metric(2, num_tokens="\x1b")])
    (folder / ("evaluation.json" if arguments[0] == "compare" else "other")).write_text("[" * 200_000)
    capsys.readouterr()
    plan = PLAN | {"title": "first"}
    arguments = [argument.format(tmp_path) for argument in arguments]
    if "first" in arguments:
        (tmp_path / "p.yaml").write_text(yaml.safe_dump(plan))
        arguments[1] = str(tmp_path / "p.yaml")
    assert main(arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and words in err and "\x1b" not in err
