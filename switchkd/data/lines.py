"""The rows of a data file, one a line: where they lie, what the file is, how much of it is read, and which rows are bad.

A file is whole, of a kind that is read, and of bounded size; else a DataError says what it is and the way out.
"""

from __future__ import annotations

import gzip
import logging
import math
import re
import zlib
from collections.abc import Iterator
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from switchkd.base.errors import ConfigError, DataError, nearest
from switchkd.base.plain import json_object
from switchkd.base.storage import expanded
from switchkd.data.small_data import SMALL, small_data_file

logger = logging.getLogger(__name__)

SAMPLE = "gsm8k-sample"
_SAMPLE_ROWS = {"train": range(512), "heldout": range(512, 576)}
MOST_BYTES = 2**22  # of a row: a million tokens; a tokenizer takes three hundred times as much memory as its text
MOST_UNZIPPED = 2**26  # bytes that any gzip file may hold …
MOST_GROWTH = 100  # … and how many times its own size a larger one


class OtherKind(DataError):
    """The file as a whole is something else; correcting a row is no way out."""


class BadRows:
    """The rows of one file that cannot be used, as reading, template and tokenizer find them; ``tolerated`` may be left out."""

    def __init__(self, path: str, tolerated: int = 0) -> None:
        self.path, self.tolerated = path, tolerated
        self._found: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._found)

    def add(self, source: str, error: DataError) -> None:
        """Count a row, once. Raises DataError where that is one too many."""
        self._found.setdefault(source, f"{source}: {error}")
        if len(self) <= self.tolerated:
            return
        if len(self) > 1:
            raise DataError(
                f"{len(self)} bad rows, more than skip_bad={self.tolerated}: {'; '.join(self.first())}"
            ) from error
        way_out = "" if isinstance(error, OtherKind) else ". Correct the row, or tolerate bad rows with skip_bad"
        raise DataError(f"{self.first()[0]}{way_out}") from error

    def first(self) -> list[str]:
        """The first three, in words."""
        return list(self._found.values())[:3]

    def tell(self) -> None:
        """Log how many were left out, if any were."""
        if self._found:
            logger.warning(
                "%s: skipped %d bad rows (skip_bad=%d): %s",
                self.path,
                len(self),
                self.tolerated,
                "; ".join(self.first()),
            )


def rows_of(path: str) -> Iterator[tuple[int, str, dict[str, Any] | DataError]]:
    """(row index, ``file:line``, row or what is wrong with its line) of every row that ``path`` stands for.

    Blank lines are not rows. Raises DataError for a file that cannot be read, or that is no file of rows.
    """
    if path.startswith(PREFIX):
        yield from hub_rows(path)
        return
    file, wanted = _resolve(path)
    number, index = 0, -1
    try:
        with file.open("rb") as raw:
            unzipped, most = _unzipped(raw)
            if kind := _binary_kind(unzipped):
                raise OtherKind(f"{path}: it is {kind}")
            for number, line in enumerate(_lines(unzipped, most, path), start=1):
                index += bool(line.strip())
                if line.strip() and (wanted is None or index in wanted):
                    yield index, f"{path}:{number}", _parsed(line, path, first=index == 0)
    except IsADirectoryError as error:
        raise DataError(f"{path} cannot be read: it is a folder; name the .jsonl file in it") from error
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: no such file (from {Path.cwd()}). Give a .jsonl or .jsonl.gz, or {SAMPLE!r}"
        ) from error
    except DataError:
        raise
    except (OSError, EOFError, zlib.error, ValueError) as error:  # a ValueError for a name that no file can have
        raise DataError(
            f"{path}: cannot be read after line {number}: {error}. Is it a whole, plain or gzip file?"
        ) from error


def _resolve(path: str) -> tuple[Any, range | None]:
    name, _, split = path.partition(":")
    if name == SMALL:
        return small_data_file(split or "train"), None
    if name != SAMPLE:
        return Path(expanded(path)), None
    split = split or "train"
    if split not in _SAMPLE_ROWS:
        raise DataError(f"{SAMPLE} has no part {split!r}{nearest(split, _SAMPLE_ROWS)}")
    return files("switchkd") / "data" / "sample" / "gsm8k_sample.jsonl.gz", _SAMPLE_ROWS[split]


def _unzipped(raw: IO[bytes]) -> tuple[IO[bytes], float]:
    """The file's text, and how many bytes it may have: a few megabytes of gzip may stand for any number."""
    is_gzip = raw.read(2) == b"\x1f\x8b"
    size = raw.seek(0, 2) if is_gzip else 0
    raw.seek(0)
    return (gzip.GzipFile(fileobj=raw), max(MOST_UNZIPPED, MOST_GROWTH * size)) if is_gzip else (raw, math.inf)  # type: ignore[return-value]


def _lines(file: IO[bytes], most: float, path: str) -> Iterator[bytes]:
    """The lines of a file; of one that is too long for a row only its beginning, so that it takes no memory."""
    while line := file.readline(MOST_BYTES + 1):
        yield line
        while line and not line.endswith(b"\n"):
            line = file.readline(MOST_BYTES)
            if file.tell() > most:
                break
        if file.tell() > most:
            raise DataError(
                f"{path}: it unzips to more than {most / 2**20:.0f} MiB, {MOST_GROWTH} times its size, which no text does; if it "
                "is what you want to read, unzip it"
            )


# --- what a file is -----------------------------------------------------------------------------------------------

_WRITE = "write its rows as JSON lines"
_BY_PANDAS = (
    _WRITE + """: python -c "import pandas; pandas.{}('FILE').to_json('FILE.jsonl', orient='records', lines=True)\""""
)
_UNPACK = "unpack it, and name the .jsonl or .jsonl.gz file"
_PARQUET, _EXCEL = _BY_PANDAS.format("read_parquet"), _BY_PANDAS.format("read_excel")
_ARROW = _WRITE + """: python -c "import datasets; datasets.Dataset.from_file('FILE').to_json('FILE.jsonl')\""""
_BEGINNINGS = (
    (b"PAR1", "Parquet", _PARQUET),
    (b"ARROW1", "an Arrow file", _BY_PANDAS.format("read_feather")),
    (b"\xff\xff\xff\xff", "an Arrow stream, as datasets keeps it", _ARROW),
    (b"ORC", "ORC", _BY_PANDAS.format("read_orc")),
    (b"Obj\x01", "Avro", _WRITE),
    (b"\xd0\xcf\x11\xe0", "an Excel sheet of the old kind", _EXCEL),
    (b"PK\x03\x04", "a zip archive", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!", "a rar archive", _UNPACK),
    (b"BZh", "bzip2", "unpack it, or pack it with gzip"),
    (b"\xfd7zXZ\x00", "xz", "unpack it, or pack it with gzip"),
    (b"\x28\xb5\x2f\xfd", "zstandard", "unpack it, or pack it with gzip"),
    (b"SQLite format 3\x00", "an SQLite database", _WRITE),
    (b"\x89HDF\r\n", "HDF5", _WRITE),
    (b"\x93NUMPY", "a NumPy array", "give text: token ids are made here"),
    (b"%PDF-", "PDF", "write its text as JSON lines"),
    (b"\xff\xfe", "text in UTF-16", "save it as UTF-8"),
    (b"\xfe\xff", "text in UTF-16", "save it as UTF-8"),
)


def _binary_kind(file: IO[bytes]) -> str:
    """What a file that holds no text of rows is, with the way out; "" for any other."""
    head = file.read(4096)
    file.seek(0)
    if head[257:262] == b"ustar":
        return f"a tar archive; {_UNPACK}"
    if head.startswith(b"PK\x03\x04") and b"[Content_Types].xml" in head:
        return f"an Excel sheet; {_EXCEL}"
    return next((f"{what}; {way_out}" for start, what, way_out in _BEGINNINGS if head.startswith(start)), "")


_BY_PYTHON = (
    "write one JSON object a line: "
    """python -c "import csv, json, sys; [print(json.dumps(row)) for row in {}]" < FILE > FILE.jsonl"""
)
_TABLES = (
    (b"\t", "TSV", "csv.DictReader(sys.stdin, delimiter='\\t')"),
    (b",", "CSV", "csv.DictReader(sys.stdin)"),
    (b";", "CSV", "csv.DictReader(sys.stdin, delimiter=';')"),
)


def _text_kind(line: bytes) -> str:
    """What a file looks like whose first line is no row, with the way out; "" where nobody can tell."""
    start = line.removeprefix(b"\xef\xbb\xbf").strip()
    if start.startswith(b"["):
        return f"it looks like one JSON list; {_BY_PYTHON.format('json.load(sys.stdin)')}"
    if start == b"{":
        return "it looks like one JSON object over several lines; write one object a line"
    if start.startswith(b"<"):
        return "it looks like XML or HTML; write one JSON object a line"
    if start.startswith((b"{", b'"{')):
        return ""
    for mark, name, reader in _TABLES:
        if mark in start:
            return f"it looks like {name}; {_BY_PYTHON.format(reader)}"
    return ""


def _parsed(line: bytes, path: str, first: bool) -> dict[str, Any] | DataError:
    """The row on a line, or what is wrong with it; of the first line, what the file may be."""
    try:
        if len(line) > MOST_BYTES:
            raise DataError(
                f"the row is longer than {MOST_BYTES / 2**20:.0f} MiB, which is more than is read; split it"
            )
        return json_object(line)
    except DataError as error:
        kind = _text_kind(line) if first else ""
        return OtherKind(f"{error}. Of the whole file: {kind}") if kind else error


# --- data sets on the Hugging Face Hub ----------------------------------------------------------------------------

PREFIX = "hub:"
_NAME = re.compile(
    r"hub:(?P<repository>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w./ -]+))?:(?P<split>[\w.-]+)(?:@(?P<revision>\S+))?"
)
_FILES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")


def hub_rows(name: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(row index, ``hub:…:row``, row) of every row of a split, in the data set's order.

    A CONFIG that ends in .json, .jsonl or their .gz is one file of the repository, and its split is called ``train``. The data
    is kept in the cache of ``datasets``, where it can be read again without a network. Raises ConfigError for a name that is
    not one or when ``datasets`` is missing, DataError when the data cannot be had.
    """
    parts = _NAME.fullmatch(name)
    if not parts:
        raise ConfigError(f"{name!r} is not of the form hub:OWNER/NAME[/CONFIG]:SPLIT[@REVISION]")
    repository, config, split, revision = parts.group("repository", "config", "split", "revision")
    place = {"data_files": config} if config and config.endswith(_FILES) else {"name": config}
    load = dataset_loader(name)
    try:
        table = load(repository, **place, split=split, revision=revision)
    except Exception as error:  # datasets, huggingface_hub and the HTTP client below them each have their own errors
        raise DataError(
            f"{name}: cannot be read from the Hugging Face Hub: {type(error).__name__}: {error}. Check the name and the network "
            "(it is needed unless the data is in the cache of datasets), or give a local .jsonl file"
        ) from error
    for index, row in enumerate(table):
        yield index, f"{name}:{index}", dict(row)


def dataset_loader(name: str) -> Any:
    """What reads the data set ``name``; raises ConfigError if its package is missing or too old."""
    if find_spec("datasets") is None:
        raise ConfigError(f"{name} is read with the package datasets: pip install 'switchkd[data]'")
    import datasets

    if int(datasets.__version__.split(".")[0]) < 4:
        raise ConfigError(
            f"{name}: datasets {datasets.__version__} may run code from a data set's repository: pip install 'switchkd[data]'"
        )
    return datasets.load_dataset
