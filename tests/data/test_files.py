"""What a data file is: rows, or something else that is named with the way out; and how much of it is read."""

import csv
import gzip
import io
import json
import tracemalloc
import zipfile
from pathlib import Path

import datasets
import pyarrow.ipc
import pyarrow.parquet
import pytest

from switchkd.base.errors import DataError, ModelError
from switchkd.base.storage import expanded
from switchkd.cli.compare import CompareConfig
from switchkd.cli.flags import parse
from switchkd.data import fields, files
from switchkd.data.examples import load_examples
from switchkd.data.texts import load_text
from switchkd.models.pair import load_pair
from switchkd.training.settings import TrainConfig, load_recipe

ROW = {"prompt": "a", "completion": "b"}
TEXT = json.dumps(ROW)


def zipped(*names):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return file.getvalue()


KINDS = {
    "a.txt": (b"Once upon a time.\nThere was more.\n", "it looks like plain text"),
    "b.csv": (b'prompt,completion\n"a,b\n', r"a table with the delimiter ',', and is not well formed"),
    "c.csv": (b"prompt,prompt\na,b\n", "its first line names a field twice"),
    "d.csv": (
        "prompt,completion\né,b\n".encode("latin-1"),
        ":2: not UTF-8: byte 0xe9 at 0; save the table as UTF-8",
    ),
    "e.json": (
        f"[{TEXT}, {TEXT}".encode(),
        "it begins like one JSON list of rows, and cannot be read as one: broken JSON",
    ),
    "g.json": (json.dumps({"data": [ROW]}, indent=1).encode(), "one JSON object over several lines"),
    "h.xml": (b"<rows>\n<row/>\n</rows>\n", "it looks like XML"),
    "i.parquet": (b"PAR1\x15\x04\x15\n\0PAR1", "it is Parquet, and cannot be read: .*Is it whole"),
    "j.arrow": (b"ARROW1\0\0\n", "it is an Arrow file, and cannot be read: .*Is it whole"),
    "k.arrow": (b"\xff\xff\xff\xff\x10\0", "it is an Arrow stream, and cannot be read: .*Is it whole"),
    "i.parquet.gz": (gzip.compress(b"PAR1\x15\x04"), "it is Parquet, packed with gzip; unpack it"),
    "l.zip": (zipped("data.jsonl"), "it is a zip archive; unpack it"),
    "m.xlsx": (zipped("[Content_Types].xml", "xl/workbook.xml"), "it is an Excel sheet; .*read_excel"),
    "n.zst": (b"\x28\xb5\x2f\xfd\0", "it is zstandard"),
    "o.tar.gz": (gzip.compress(b"a.jsonl".ljust(257, b"\0") + b"ustar\x0000" + b"\0" * 248), "it is a tar archive"),
    "p.jsonl": (TEXT.encode("utf-16"), "it is text in UTF-16; save it as UTF-8"),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("read", [load_examples, lambda path: load_text(path, None, 8)])
def test_a_file_of_another_kind_is_named_with_the_way_out(tmp_path, name, read):
    content, words = KINDS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"(?s){name}.*{words}") as caught:
        read(str(tmp_path / name))
    assert "Correct the row" not in str(caught.value)


def test_a_row_is_bounded_and_does_not_take_memory(tmp_path, caplog):
    file = tmp_path / "a.jsonl"
    with file.open("wb") as out:
        out.write(f"{TEXT}\n".encode())
        out.write(b'{"prompt": "' + b"a" * (10 * fields.MOST_BYTES) + b'", "completion": "b"}\n')
        out.write(f"{TEXT}\n".encode())
    with pytest.raises(DataError, match=r"a\.jsonl:2: the row is longer than 4 MiB"):
        load_examples(str(file))
    tracemalloc.start()
    assert [example.id for example in load_examples(str(file), skip_bad=1)] == [0, 2]
    assert tracemalloc.get_traced_memory()[1] < 6 * fields.MOST_BYTES
    tracemalloc.stop()


@pytest.mark.parametrize("row", [b"a" * 1000, TEXT.encode() + b"\n"], ids=["one row", "many rows"])
def test_a_gzip_file_may_not_grow_without_end(tmp_path, monkeypatch, row):
    monkeypatch.setattr(files, "MOST_UNZIPPED", 2**16)
    monkeypatch.setattr(files, "MOST_BYTES", 2**14)
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(gzip.compress(row * 5000))
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: it unzips to more than .* times its size"):
        load_examples(str(file), skip_bad=10)
    text = "".join(json.dumps({"prompt": f"{i * i}", "completion": "b"}) + "\n" for i in range(3000))
    file.write_bytes(gzip.compress(text.encode()))
    assert len(text) > 2**16 and len(load_examples(str(file))) == 3000


def test_a_tilde_is_the_home_directory_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_text(TEXT + "\n")
    assert len(load_examples("~/a.jsonl")) == 1
    paths = ["train_file", "eval_file", "validation_file", "lm_file", "output_dir", "teacher_store_dir", "resume_from"]
    paths += ["teacher_model_name_or_path", "student_model_name_or_path"]
    recipe = Path("~/r.yaml")
    (tmp_path / "r.yaml").write_text(
        "".join(f"{name}: ~/x\n" for name in paths) + "teachers: {math: ~/x}\nteacher_field: t\n"
    )
    config = load_recipe(str(recipe))
    named = [getattr(config, name) for name in paths]
    flat = {*config.teachers.values()}.union(*([one] if isinstance(one, str) else one for one in named))
    assert flat == {f"{tmp_path}/x"}
    compare = parse(CompareConfig, ["compare", "--output-dir=~/x", "~/x"])
    assert (compare.runs, compare.output_dir) == ((f"{tmp_path}/x",), f"{tmp_path}/x")
    assert parse(TrainConfig, ["train", "~/r.yaml", "--train-file=~/y"]).train_file == (f"{tmp_path}/y",)
    with pytest.raises(ModelError, match="nobody-of-that-name"):
        load_pair("~nobody-of-that-name/x", "demo")
    assert expanded("~nobody-of-that-name/x") == "~nobody-of-that-name/x"
    assert TrainConfig(teacher_prompt="~/ {prompt}").teacher_prompt == "~/ {prompt}", "no path"


# --- every kind of file gives the same rows -------------------------------------------------------------------------

TRICKY = [
    {"prompt": "Agent?", "completion": "007"},
    {"prompt": "Any left?", "completion": "NA"},
    {"prompt": 'Say "a, b"\nand c.', "completion": "None"},
    {"prompt": "When?", "completion": "2020-01-01 10:00:00"},
    {"prompt": "é\u2028|;\t", "completion": "1e5"},
]


def _table(rows, delimiter):
    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def _columns(rows, write):
    out = pyarrow.BufferOutputStream()
    write(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue().to_pybytes()


def _ipc(writer):
    def write(table, out):
        with writer(out, table.schema) as file:
            file.write_table(table)

    return write


def _lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


TAKEN = {
    "a.jsonl": _lines,
    "b.jsonl.gz": lambda rows: gzip.compress(_lines(rows)),
    "c.json": lambda rows: json.dumps(rows).encode(),
    "d.json": lambda rows: b"\xef\xbb\xbf\n" + json.dumps(rows, indent=2).encode(),
    "e.json.gz": lambda rows: gzip.compress(json.dumps(rows).encode()),
    "f.json": _lines,
    "g.csv": lambda rows: _table(rows, ","),
    "h.csv": lambda rows: b"\xef\xbb\xbf" + _table(rows, ";"),
    "i.tsv": lambda rows: _table(rows, "\t"),
    "j.txt": lambda rows: _table(rows, "|"),
    "k.csv": lambda rows: _table(rows, ",").replace(b"prompt,completion", b"prompt, completion", 1),
    "k.csv.gz": lambda rows: gzip.compress(_table(rows, ",")),
    "l.parquet": lambda rows: _columns(rows, pyarrow.parquet.write_table),
    "m.bin": lambda rows: _columns(rows, pyarrow.parquet.write_table),
    "n.arrow": lambda rows: _columns(rows, _ipc(pyarrow.ipc.new_file)),
    "o.arrow": lambda rows: _columns(rows, _ipc(pyarrow.ipc.new_stream)),
}


def said(examples):
    return [(example.messages[-1].content, example.completion) for example in examples]


@pytest.mark.parametrize("name", TAKEN)
def test_a_file_of_any_kind_gives_the_text_that_is_in_it(tmp_path, name):
    (tmp_path / name).write_bytes(TAKEN[name](TRICKY))
    examples = load_examples(str(tmp_path / name))
    assert said(examples) == [(row["prompt"], row["completion"]) for row in TRICKY]
    assert [example.id for example in examples] == list(range(len(TRICKY)))
    assert all(example.source.startswith(str(tmp_path / name)) for example in examples)


def test_a_folder_of_datasets_is_read_and_one_of_several_parts_names_them(tmp_path):
    table = datasets.Dataset.from_list(TRICKY)
    table.save_to_disk(str(tmp_path / "one"))
    assert said(load_examples(str(tmp_path / "one"))) == [(row["prompt"], row["completion"]) for row in TRICKY]
    datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(DataError, match=r"a data set in parts \(test, train\); name one, such as .*/two/test"):
        load_examples(str(tmp_path / "two"))
    assert len(load_examples(str(tmp_path / "two" / "test"))) == 1
    (tmp_path / "one" / "data-00000-of-00001.arrow").write_bytes(b"\xff\xff\xff\xff")
    with pytest.raises(DataError, match=r"one: cannot be read by datasets: .*Is it whole"):
        load_examples(str(tmp_path / "one"))


def test_several_files_and_patterns_are_one_after_the_other(tmp_path):
    for place, name in enumerate(("b.jsonl", "a.json", "c.csv")):
        (tmp_path / name).write_bytes(
            TAKEN["a.jsonl" if place == 0 else "c.json" if place == 1 else "g.csv"](TRICKY[place : place + 2])
        )
    read = load_examples([str(tmp_path / "c.csv"), str(tmp_path / "*.js*")])
    assert [example.completion for example in read] == ["None", "2020-01-01 10:00:00", "NA", "None", "007", "NA"]
    assert [example.id for example in read] == list(range(6)), "an id is a row's place among all of them"
    (tmp_path / "empty.jsonl").write_text("")
    empty = [str(tmp_path / name) for name in ("empty.jsonl", "b.jsonl", "empty.jsonl", "c.csv")]
    assert [example.id for example in load_examples(empty)] == list(range(4)), "a file without rows takes no place"
    with pytest.raises(DataError, match=r"\*\.parquet: no file fits this pattern"):
        load_examples(str(tmp_path / "*.parquet"))
    (tmp_path / "a[1].jsonl").write_bytes(_lines(TRICKY))
    assert len(load_examples(str(tmp_path / "a[1].jsonl"))) == len(TRICKY), "a file of that name is no pattern"


def test_a_row_of_a_table_that_does_not_fit_is_a_bad_row_and_the_others_stay(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,completion\na,b\nc\n\n"d\ne",f\ng,h,i\nj,k\n')
    with pytest.raises(DataError, match=r"a\.csv:3: it has 1 cells, and the first line names 2 fields"):
        load_examples(str(tmp_path / "a.csv"))
    read = load_examples(str(tmp_path / "a.csv"), skip_bad=2)
    assert [example.source.rpartition(":")[2] for example in read] == ["2", "5", "8"]
    with pytest.raises(DataError, match=r"a\.csv:7: it has 3 cells|more than skip_bad=1: .*a\.csv:7: it has 3 cells"):
        load_examples(str(tmp_path / "a.csv"), skip_bad=1)


def test_what_a_typed_table_writes_for_fields_that_a_row_lacks_is_no_field(tmp_path):
    calls = [
        {"function": {"name": name, "arguments": arguments}} for name, arguments in (("f", {"a": 1}), ("g", {"b": "x"}))
    ]
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]}
        for call in calls
    ]
    (tmp_path / "a.parquet").write_bytes(_columns(rows, pyarrow.parquet.write_table))
    (tmp_path / "a.jsonl").write_bytes(_lines(rows))
    of_table, of_lines = (load_examples(str(tmp_path / name)) for name in ("a.parquet", "a.jsonl"))
    assert [example.answer for example in of_table] == [example.answer for example in of_lines]
    assert [example.answer.calls[0]["arguments"] for example in of_table] == [{"a": 1}, {"b": "x"}]


def test_a_table_can_hold_conversations_as_json(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (tmp_path / "a.csv").write_bytes(_table([{"messages": json.dumps(turns), "tools": ""}], ","))
    assert said(load_examples(str(tmp_path / "a.csv"))) == [("q", "a")]
