"""What a data file is: rows, or something else that is named with the way out; and how much of it is read."""

import gzip
import io
import json
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from switchkd.base.errors import DataError, ModelError
from switchkd.base.storage import expanded
from switchkd.cli.compare import CompareConfig
from switchkd.cli.flags import parse
from switchkd.data import lines
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
    "a.csv": (b"prompt,completion\na,b\n", "it looks like CSV; write one JSON object a line: python"),
    "b.csv": (b"prompt;completion\na;b\n", "it looks like CSV; .*delimiter=';'"),
    "c.tsv": (b"prompt\tcompletion\na\tb\n", "it looks like TSV"),
    "d.csv": (b'\xef\xbb\xbf"prompt","completion"\n"a","b"\n', "it looks like CSV"),
    "e.json": (f"[{TEXT}, {TEXT}]".encode(), "it looks like one JSON list; .*json.load"),
    "f.json": (f"[\n  {TEXT},\n  {TEXT}\n]".encode(), "it looks like one JSON list"),
    "g.json": (json.dumps({"data": [ROW]}, indent=1).encode(), "one JSON object over several lines"),
    "h.xml": (b"<rows>\n<row/>\n</rows>\n", "it looks like XML"),
    "i.parquet": (b"PAR1\x15\x04\x15\n\0PAR1", "it is Parquet; .*read_parquet"),
    "j.arrow": (b"ARROW1\0\0\n", "it is an Arrow file"),
    "k.arrow": (b"\xff\xff\xff\xff\x10\0", "it is an Arrow stream"),
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
        out.write(b'{"prompt": "' + b"a" * (10 * lines.MOST_BYTES) + b'", "completion": "b"}\n')
        out.write(f"{TEXT}\n".encode())
    with pytest.raises(DataError, match=r"a\.jsonl:2: the row is longer than 4 MiB"):
        load_examples(str(file))
    tracemalloc.start()
    assert [example.id for example in load_examples(str(file), skip_bad=1)] == [0, 2]
    assert tracemalloc.get_traced_memory()[1] < 6 * lines.MOST_BYTES
    tracemalloc.stop()


@pytest.mark.parametrize("row", [b"a" * 1000, TEXT.encode() + b"\n"], ids=["one row", "many rows"])
def test_a_gzip_file_may_not_grow_without_end(tmp_path, monkeypatch, row):
    monkeypatch.setattr(lines, "MOST_UNZIPPED", 2**16)
    monkeypatch.setattr(lines, "MOST_BYTES", 2**14)
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
    assert {getattr(config, name) for name in paths} | {*config.teachers.values()} == {f"{tmp_path}/x"}
    compare = parse(CompareConfig, ["compare", "--output-dir=~/x", "~/x"])
    assert (compare.runs, compare.output_dir) == ((f"{tmp_path}/x",), f"{tmp_path}/x")
    assert parse(TrainConfig, ["train", "~/r.yaml", "--train-file=~/y"]).train_file == f"{tmp_path}/y"
    with pytest.raises(ModelError, match="nobody-of-that-name"):
        load_pair("~nobody-of-that-name/x", "demo")
    assert expanded("~nobody-of-that-name/x") == "~nobody-of-that-name/x"
    assert TrainConfig(teacher_prompt="~/ {prompt}").teacher_prompt == "~/ {prompt}", "no path"
