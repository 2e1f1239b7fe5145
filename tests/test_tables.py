"""Tables in the pages come from raw values: what stands behind a mark is written anew, and nothing else."""

import json

import pytest

from benchmarks import tables

ROWS = [
    {"cell": {"rows": 8, "pair": "a"}, "contender": "loop", "seconds": [3.0, 1.0, 2.0], "numbers": {"tokens/s": 4}, "note": ""},
    {"cell": {"rows": 8, "pair": "b"}, "contender": "engine", "seconds": [], "numbers": {"tokens/s": [1, 9, 5]}, "note": "none"},
]  # fmt: skip
PAGE = "# Page\n\n<!-- speed(pair={}): seconds, tokens/s -->\n| old |\n| --- |\n\nWords | with a bar.\n"


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    for name, revision in (("speed", "abc"), ("other", "abc")):
        record = {"machine": {"cores": 2, "threads": 1, "revision": revision}, "rows": ROWS}
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    return tmp_path


@pytest.mark.parametrize(
    ("pair", "line"), [("a", "| 8 | loop | 2.00 (1.00–3.00) | 4.00 |"), ("b", "| 8 | engine | none | 5.00 |")]
)
def test_a_table_is_of_the_raw_values_of_its_cells(results, pair, line):
    made = tables.with_tables(PAGE.format(pair))
    head = f"# Page\n\n<!-- speed(pair={pair}): seconds, tokens/s -->\n"
    assert made == f"{head}| rows |  | s | tokens/s |\n| --- | --- | ---: | ---: |\n{line}\n\nWords | with a bar.\n"
    assert tables.with_tables(made) == made


def test_results_of_several_revisions_are_told_apart(results):
    assert tables.with_tables("<!-- machine -->\n") == "<!-- machine -->\n*cores 2 · revision abc*\n"
    record = json.loads((results / "other.json").read_text())
    record["machine"]["revision"] = "def"
    (results / "other.json").write_text(json.dumps(record))
    assert tables.machines() == "* other: cores 2 · revision def\n* speed: cores 2 · revision abc\n"


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_the_pages_have_the_tables_of_the_raw_values(page):
    text = page.read_text(encoding="utf-8")
    assert tables.with_tables(text) == text, "run python -m benchmarks.tables"
