"""Data files and data sets on the hub to examples: every row layout, and every way in which a row or file is wrong."""

import gzip
import json
import logging
import sys
from importlib.machinery import ModuleSpec
from importlib.resources import files
from pathlib import Path
from types import ModuleType

import pytest
from tiny import byte_level_tokenizer

from switchkd.base.errors import ConfigError, DataError
from switchkd.data.examples import load_examples
from switchkd.data.texts import tokenize

PAIR = {"prompt": "What is two and two?", "completion": "It is four."}


def write(path: Path, *rows: object) -> str:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    data = b"\n".join(lines) + b"\n"
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


# --- formats ------------------------------------------------------------------------------------------------------

FORMATS = {
    "pair": (PAIR, ["What is two and two?"], "", ("It is four.",)),
    "conversation": (
        {
            "messages": [
                {"role": "system", "content": "Be short."},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello"},
                {"role": "user", "content": "Bye"},
                {"role": "assistant", "content": "See you"},
                {"role": "user", "content": "not used"},
            ]
        },
        ["Be short.", "Hi", "Hello", "Bye"],
        "",
        ("See you",),
    ),
    "alpaca": ({"instruction": "Add.", "input": "2 2", "output": "4"}, ["Add."], "2 2", ("4",)),
    "alpaca without input": ({"instruction": "Add.", "input": None, "response": "4"}, ["Add."], "", ("4",)),
    "dolly": ({"instruction": "Who?", "context": "Ada.", "response": "Ada"}, ["Who?"], "Ada.", ("Ada",)),
    "minillm": (
        {"prompt": "### Instruction: Add.", "instruction": "Add.", "input": "1 1", "output": "2"},
        ["Add."],
        "1 1",
        ("2",),
    ),
    "several outputs": ({"instruction": "Say", "output": ["yes", "aye"]}, ["Say"], "", ("yes", "aye")),
    "gsm8k": (
        {"question": "2+2+1?", "answer": "2+2=<<2+2=4>>4, 4+1=<<4+1=5>>5.\n#### 5"},
        ["2+2+1?"],
        "",
        ("2+2=4, 4+1=5.\n#### 5",),
    ),
    "gsm-plus": (
        {
            "question": "2+2+x?",
            "solution": "2+2=<<2+2=4>>4.\n#### None",
            "answer": "None",
            "perturbation_type": "critical thinking",
            "seed_answer": "5",
        },
        ["2+2+x?"],
        "",
        ("2+2=4.\n#### None",),
    ),
    "gsm-plus, solution without the answer": (
        {"question": "1?", "solution": "Half.", "answer": "1/2", "perturbation_type": "digit expansion"},
        ["1?"],
        "",
        ("Half.\n#### 1/2",),
    ),
    "math": (
        {"problem": "$1+1$?", "solution": r"\boxed{2}", "answer": "2", "subject": "Algebra"},
        ["$1+1$?"],
        "",
        (r"\boxed{2}",),
    ),
    "instances": (
        {"id": "a", "instruction": "Add.", "instances": [{"input": "1 1", "output": "2"}], "is_classification": False},
        ["Add."],
        "1 1",
        ("2",),
    ),
    "dialogue": (
        {"dialogue": "#Person1#: Hi", "summary": "A greets.", "topic": "greeting"},
        ["Summarize the following dialogue."],
        "#Person1#: Hi",
        ("A greets.",),
    ),
    "dialogue, three references": (
        {"dialogue": "#Person1#: Hi", "summary1": "one", "summary2": "two", "summary3": "three"},
        ["Summarize the following dialogue."],
        "#Person1#: Hi",
        ("one", "two", "three"),
    ),
    "pair wins over all": ({**PAIR, "instruction": "x", "output": "y", "messages": []}, [PAIR["prompt"]], "", None),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_every_format_plain_and_gzip(tmp_path, name, suffix):
    row, turns, context, references = FORMATS[name]
    path = write(tmp_path / f"data.{suffix}", row)
    [read] = load_examples(path)
    assert [message.content for message in read.messages] == turns
    assert read.messages[-1].role == "user"
    assert read.input == context
    assert read.references == (references or (PAIR["completion"],))
    assert read.completion == read.references[0]
    assert read.source == f"{path}:1"


@pytest.mark.parametrize(
    ("row", "group", "layout"),
    [
        ({"instruction": "a", "output": "b", "topic": "closed_qa"}, "closed_qa", "instruction"),
        ({"instruction": "a", "response": "b", "category": "brainstorming"}, "brainstorming", "instruction"),
        ({"instruction": "a", "output": "b", "topic": ["not", "text"]}, "", "instruction"),
        ({"instruction": "a", "motivation_app": "Gmail", "instances": [{"output": "b"}]}, "Gmail", "instances"),
        ({"question": "a", "solution": "b", "answer": "1", "perturbation_type": "x"}, "x", "gsm_plus"),
        ({"problem": "a", "solution": "b", "type": "Geometry"}, "Geometry", "math"),
        ({"dialogue": "a", "summary": "b", "topic": "greeting"}, "", "dialogue"),
        (PAIR, "", "pair"),
    ],
)
def test_a_row_tells_its_group_and_layout(tmp_path, row, group, layout):
    [read] = load_examples(write(tmp_path / "a.jsonl", row))
    assert (read.group, read.format) == (group, layout)
    lengths = {"max_prompt_length": 400, "max_completion_length": 200}
    [kept], _ = tokenize([read], byte_level_tokenizer(), template="chat", **lengths)
    assert kept.group == group


def test_every_instance_is_an_example_with_an_id_of_its_own(tmp_path):
    rows = [
        {"instruction": f"Add {i}.", "instances": [{"input": f"{k}", "output": f"{i + k}"} for k in range(3)]}
        for i in range(2)
    ]
    path = write(tmp_path / "a.jsonl", *rows)
    read = load_examples(path)
    assert [row.id for row in read] == [0, 2**32, 2 * 2**32, 1, 1 + 2**32, 1 + 2 * 2**32]
    assert [(row.input, row.completion) for row in read] == [
        ("0", "0"), ("1", "1"), ("2", "2"), ("0", "1"), ("1", "2"), ("2", "3")
    ]  # fmt: skip
    assert [row.source for row in read] == [f"{path}:1"] * 3 + [f"{path}:2"] * 3
    assert load_examples(path, limit=4) == read[:4]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "a", "instances": []}, "'instances' must be a list of one or more"),
        ({"instruction": "a", "instances": ["b"]}, "'instances' must be a list of one or more"),
        ({"instruction": "a", "instances": [{"output": "b"}, {"output": " "}]}, "empty completion"),
        ({"instruction": "a", "instances": [{"input": "b"}]}, "empty completion"),
        ({"instruction": "a", "output": ["b", ""]}, "empty completion"),
        ({"dialogue": "a", "summary1": "b", "summary2": ""}, "empty completion"),
        ({"question_id": 1, "text": "a", "category": "generic"}, "Vicuna's question.jsonl has no answers"),
    ],
)
def test_a_first_row_without_an_answer_is_an_error(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        load_examples(write(tmp_path / "a.jsonl", row))


def test_a_row_with_one_bad_instance_is_a_bad_row(tmp_path, caplog):
    bad = {"instruction": "a", "instances": [{"output": "b"}, {"output": ""}]}
    good = {"instruction": "a", "instances": [{"output": "c"}]}
    [read] = load_examples(write(tmp_path / "a.jsonl", bad, good), skip_bad=1)
    assert (read.id, read.completion) == (1, "c")
    assert "skipped 1 bad rows" in caplog.text


def test_ids_are_row_indices_whatever_is_skipped_or_limited(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", PAIR, b"", b"{broken", PAIR, PAIR)
    with caplog.at_level(logging.WARNING):
        read = load_examples(path, skip_bad=1)
    assert [(row.id, row.source) for row in read] == [(0, f"{path}:1"), (2, f"{path}:4"), (3, f"{path}:5")]
    assert "skipped 1 bad rows" in caplog.text and f"{path}:3: broken JSON" in caplog.text
    assert load_examples(path, skip_bad=1, limit=2) == read[:2]


def test_limit_stops_reading_before_later_damage(tmp_path):
    assert len(load_examples(write(tmp_path / "a.jsonl", PAIR, PAIR, b"{broken"), limit=2)) == 2


def test_byte_order_mark_and_line_separators_inside_strings(tmp_path):
    row = json.dumps({"prompt": "a\u2028b", "completion": "c"}, ensure_ascii=False).encode()
    [read] = load_examples(write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + row))
    assert read.messages[0].content == "a\u2028b"


BAD_ROWS = {
    "json": (b'{"prompt": ', "broken JSON at column 12"),
    "utf-8": (b'{"prompt": "\xff"}', "not UTF-8: byte 0xff at 12"),
    "surrogate": (b'{"prompt": "\\ud800", "completion": "a"}', "half of a surrogate pair"),
    "array": ([1, 2], "must be a JSON object, not list"),
    "missing field": (
        {"prompt": "a", "text": "b"},
        "has the fields prompt, text; needed are, as in the file's first row: prompt|query + completion|response",
    ),
    "type": ({"prompt": ["a"], "completion": "b"}, "'prompt' must be a list of one or more objects, not ['a']"),
    "null": ({"prompt": None, "completion": "b"}, "has the fields completion, prompt (null); needed are, as"),
    "empty prompt": ({"prompt": " \n", "completion": "b"}, "empty prompt"),
    "empty completion": ({"prompt": "a", "completion": ""}, "empty completion"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, name):
    row, message = BAD_ROWS[name]
    path = write(tmp_path / "a.jsonl", PAIR, row)
    with pytest.raises(DataError) as caught:
        load_examples(path)
    assert str(caught.value).startswith(f"{path}:2: ") and message in str(caught.value)


BAD_FIRST_ROWS = {
    "unknown fields": (
        {"text": "b"},
        "the row has the fields text; needed are: prompt|query + completion|response; or messages; or conversations; "
        "or instruction + output|response; or instruction + instances; "
        "or question + perturbation_type + solution + answer; or question + answer; "
        "or problem + solution; or dialogue + summary|summary1. Rows of plain `text` are for lm_file",
    ),
    "no fields": ({}, "has the fields (none)"),
    "no assistant": ({"messages": [{"role": "user", "content": "a"}]}, "no assistant turn (roles: ['user'])"),
    "not turns": ({"messages": "hello"}, "'messages' is neither a list of objects nor one as JSON text"),
    "content parts": (
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]},
        "'messages[].content' holds {'image': 'a.png', 'type': 'image'}; of content in parts only",
    ),
    "nothing before": ({"messages": [{"role": "assistant", "content": "a"}]}, "empty prompt"),
    "only a system turn": (
        {"messages": [{"role": "system", "content": "a"}, {"role": "assistant", "content": "b"}]},
        "empty prompt",
    ),
    "no outputs": ({"instruction": "a", "output": []}, "empty completion"),
    "one empty reference": ({"dialogue": "a", "summary1": "b", "summary2": ""}, "empty completion"),
    "empty dialogue": ({"dialogue": " ", "summary": "b"}, "empty prompt"),
}


@pytest.mark.parametrize("name", BAD_FIRST_ROWS)
def test_a_first_row_that_cannot_be_read(tmp_path, name):
    row, message = BAD_FIRST_ROWS[name]
    with pytest.raises(DataError) as caught:
        load_examples(write(tmp_path / "a.jsonl", row))
    assert message in str(caught.value)


def test_more_bad_rows_than_tolerated(tmp_path):
    path = write(tmp_path / "a.jsonl", b"{", PAIR, b"[", PAIR)
    assert [row.id for row in load_examples(path, skip_bad=2)] == [1, 3]
    with pytest.raises(
        DataError, match=r"2 bad rows, more than skip_bad=1: .*:1: .*:3: "
    ):  # the first and the one too many
        load_examples(path, skip_bad=1)


def test_no_usable_row(tmp_path):
    with pytest.raises(DataError, match="no usable row"):
        load_examples(write(tmp_path / "a.jsonl", b"", b"  "))
    with pytest.raises(DataError, match=r"no usable row\n.*a.jsonl:1: broken JSON"):
        load_examples(write(tmp_path / "a.jsonl", b"{"), skip_bad=1)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"none.jsonl: no such file .*'gsm8k-sample'"):
        load_examples(str(tmp_path / "none.jsonl"))
    with pytest.raises(
        DataError, match=r"it is a folder, and datasets\.save_to_disk did not write it; name the files in it"
    ):
        load_examples(str(tmp_path))
    whole = Path(
        write(tmp_path / "a.jsonl.gz", *[{**PAIR, "prompt": f"{i} {i * i}"} for i in range(2000)])
    ).read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:200] + b"\xff" * 50 + whole[250:]):
        (tmp_path / "b.jsonl.gz").write_bytes(damaged)
        with pytest.raises(DataError, match=r"b.jsonl.gz.*(cannot be read: |not UTF-8|broken JSON)"):
            load_examples(str(tmp_path / "b.jsonl.gz"))


@pytest.mark.parametrize("settings_", [{"limit": 0}, {"limit": -1}, {"skip_bad": -1}])
def test_settings_out_of_range(tmp_path, settings_):
    with pytest.raises(ConfigError, match="at least"):
        load_examples(write(tmp_path / "a.jsonl", PAIR), **settings_)


def test_packaged_sample():
    train, heldout = load_examples("gsm8k-sample:train"), load_examples("gsm8k-sample:heldout")
    assert [row.messages for row in load_examples("gsm8k-sample")] == [row.messages for row in train]
    assert [row.id for row in train + heldout] == list(range(576)) and len(heldout) == 64
    assert len({row.messages for row in train + heldout}) == 576
    for row in train + heldout:
        assert "<<" not in row.completion and row.completion.splitlines()[-1].startswith("#### ")
    assets = files("switchkd") / "data" / "sample"
    packed = (assets / "gsm8k_sample.jsonl.gz").read_bytes()
    assert len(packed) < 200_000 and packed[3:8] == bytes(5), "no name flag and no time stamp: rebuilds are equal"
    assert "MIT License" in (assets / "README.md").read_text()
    with pytest.raises(DataError, match="did you mean 'heldout'"):
        load_examples("gsm8k-sample:held-out")


# --- the hub ------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the package datasets that records what it is asked and gives three rows, one with a null."""
    module = ModuleType("datasets")
    module.__spec__ = ModuleSpec("datasets", None)
    module.__version__ = "4.1.0"
    module.asked = []
    rows = [{"question": f"{i}?", "answer": f"#### {i}", "note": None} for i in range(3)]

    def load_dataset(repository, **settings):
        module.asked.append((repository, settings))
        return rows

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_a_data_set_on_the_hub(hub):
    read = load_examples("hub:openai/gsm8k/main:test", limit=2)
    assert [(row.id, row.source) for row in read] == [
        (0, "hub:openai/gsm8k/main:test:0"),
        (1, "hub:openai/gsm8k/main:test:1"),
    ]
    assert read[1].completion == "#### 1" and read[1].format == "gsm8k"
    assert hub.asked == [("openai/gsm8k", {"name": "main", "split": "test", "revision": None, "streaming": False})]


@pytest.mark.parametrize(
    ("name", "settings_"),
    [
        ("hub:a/b", {"name": None, "split": "train", "revision": None}),
        ("hub:a/b@v1.0", {"name": None, "split": "train", "revision": "v1.0"}),
        ("hub:a/b:test", {"name": None, "split": "test", "revision": None}),
        ("hub:a/b:test@v1.0", {"name": None, "split": "test", "revision": "v1.0"}),
        ("hub:a/b/c/d.jsonl:train", {"data_files": "c/d.jsonl", "split": "train", "revision": None}),
        ("hub:a/b/c d:x@refs/pr/1", {"name": "c d", "split": "x", "revision": "refs/pr/1"}),
    ],
)
def test_names_on_the_hub(hub, name, settings_):
    load_examples(name)
    load_examples(name, streaming=True)
    assert hub.asked == [("a/b", settings_ | {"streaming": streaming}) for streaming in (False, True)]


def test_a_null_on_the_hub_is_a_missing_field(hub, monkeypatch):
    rows = [{"dialogue": "a", "summary": None, "summary1": "b", "summary2": "c", "summary3": None}]
    monkeypatch.setattr(hub, "load_dataset", lambda *_, **__: rows)
    [read] = load_examples("hub:a/b:test")
    assert read.references == ("b", "c")


@pytest.mark.parametrize("name", ["hub:gsm8k:test", "hub:gsm8k", "hub:a/b/main:", "hub:a/b:test[:10]", "hub:"])
def test_names_that_are_not_of_the_hub(hub, name):
    with pytest.raises(ConfigError, match=r"not of the form hub:OWNER/NAME"):
        load_examples(name)


def test_a_hub_that_cannot_be_reached(hub, monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(hub, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"hub:a/b:test: cannot be read .*ConnectionError: Couldn't reach.*the network"):
        load_examples("hub:a/b:test", skip_bad=5)
