"""Write the tables of `PAGES` from the raw values in ``benchmarks/results``: nothing in them is typed by hand.

A table stands behind a line ``<!-- NAME: column, column -->`` and is of ``results/NAME.json``: what its cells differ in, the
contender, and the columns named. ``seconds`` is the median of the measured runs, with the least and the most in brackets; every
other column is a number of the rows, or the median of its values. ``<!-- NAME(part=text): … -->`` takes the cells of which that
is true. ``<!-- machine -->`` is followed by machine, versions and revision of all results, ``<!-- claims(study=NAME) -->`` and
``<!-- scores(study=NAME) -->`` by the tables of a study (`benchmarks.evidence`).
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.evidence import TABLES
from switchkd.base.storage import write_file
from switchkd.base.terminal import console, number

ROOT = Path(__file__).parent
PAGES, RESULTS = (ROOT / "RESULTS.md", ROOT.parent / "docs" / "which_method.md"), ROOT / "results"
MARK = re.compile(r"<!-- (?P<name>\w+)(?:\((?P<only>[^)]*)\))?(?:: (?P<columns>[^>]*))? -->\n(?P<table>(?:[|*].*\n)*)")
MACHINE = "machine"


def main(argv: Sequence[str] | None = None) -> int:
    """Put the tables of today's raw values into the pages."""
    for page in PAGES:
        write_file(page, with_tables(page.read_text(encoding="utf-8")))
        console.print(f"written: {page}", soft_wrap=True)
    return 0


def with_tables(page: str) -> str:
    """The page with every table as the raw values have it."""
    return MARK.sub(lambda mark: mark[0][: mark.start("table") - mark.start()] + _behind(mark), page)


def _behind(mark: re.Match[str]) -> str:
    if mark["name"] == MACHINE:
        return machines()
    only = dict(part.split("=") for part in (mark["only"] or "").split(", ") if part)
    if mark["name"] in TABLES:
        return TABLES[mark["name"]](only["study"])
    return table(mark["name"], [column.strip() for column in mark["columns"].split(",")], only)


def table(name: str, columns: Sequence[str], only: dict[str, str]) -> str:
    """The rows of a benchmark as Markdown."""
    rows = [
        row for row in _read(name)["rows"] if all(str(row["cell"].get(key)) == value for key, value in only.items())
    ]
    cells = [key for key in dict.fromkeys(key for row in rows for key in row["cell"]) if key not in only]
    lines = [[*cells, "", *("s" if column == "seconds" else column for column in columns)]]
    lines.append([*(["---"] * (len(cells) + 1)), *(["---:"] * len(columns))])
    for row in rows:
        values = [_value(row, column) for column in columns]
        lines.append([*(str(row["cell"].get(key, "")) for key in cells), row["contender"], *values])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def machines() -> str:
    """What the results were measured on: one line, or one for each set of results that differ in it."""
    by_machine: dict[str, list[str]] = {}
    for file in sorted(RESULTS.glob("*.json")):
        told = " · ".join(f"{key} {value}" for key, value in _read(file.stem)[MACHINE].items() if key != "threads")
        by_machine.setdefault(told, []).append(file.stem)
    if len(by_machine) == 1:
        return f"*{next(iter(by_machine))}*\n"
    return "".join(f"* {', '.join(names)}: {told}\n" for told, names in by_machine.items())


def _value(row: dict[str, Any], column: str) -> str:
    if column == "seconds":
        spans = row["seconds"]
        return f"{number(median(spans))} ({number(min(spans))}–{number(max(spans))})" if spans else row["note"]
    value = row["numbers"].get(column)
    if value is None:
        return ""
    return number(median(value) if isinstance(value, list) else value)


def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    sys.exit(main())
