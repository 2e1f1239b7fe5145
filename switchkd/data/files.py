"""The rows of data files: where they lie, what a file is, how much of it is read, and which rows are bad.

Text is read here, with the modules of Python's own library that change nothing in it: JSON lines, a JSON list, CSV. (The readers of
``datasets`` make a number of the answer 007, nothing of the answer NA, a date of a text that looks like one, and give up a file for
one broken line.) Tables that have types are read in ``switchkd.data.tables``. A file is whole, of a kind that is read, and of
bounded size; else a DataError says what it is and the way out.
"""

from __future__ import annotations

import csv
import glob
import gzip
import logging
import math
import zlib
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import IO, Any, TypeAlias

from switchkd.base.errors import DataError, nearest
from switchkd.base.plain import checked_object, json_object, json_value, shown
from switchkd.base.storage import expanded
from switchkd.data.fields import MOST_BYTES
from switchkd.data.formats import FIELD_NAMES
from switchkd.data.small_data import SMALL, small_data_file
from switchkd.data.tables import PREFIX, TABLES, folder_rows, hub_rows, table_rows

logger = logging.getLogger(__name__)

SAMPLE = "gsm8k-sample"
_SAMPLE_ROWS = {"train": range(512), "heldout": range(512, 576)}
MOST_UNZIPPED = 2**26  # bytes that any gzip file may hold …
MOST_GROWTH = 100  # … and how many times its own size a larger one
Row: TypeAlias = "dict[str, Any] | DataError"  # a row, or what is wrong with its line


class OtherKind(DataError):
    """The file as a whole is something else; correcting a row is no way out."""


class BadRows:
    """The rows of data files that cannot be used, as reading, template and tokenizer find them; ``tolerated`` may be left out."""

    def __init__(self, sources: str | Sequence[str], tolerated: int = 0) -> None:
        self.path = sources if isinstance(sources, str) else ", ".join(sources)
        self.tolerated = tolerated
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


def rows_of(sources: Sequence[str], streaming: bool = False) -> Iterator[tuple[int, str, Row]]:
    """(index, ``file:line``, row or what is wrong with it) of every row that ``sources`` stand for, one file after the other.

    A source is a file, a pattern of files (``data/*.jsonl``), a folder that ``datasets.save_to_disk`` wrote, ``gsm8k-sample``,
    ``small:…`` or ``hub:…``. Blank lines are not rows. Raises DataError for a file that cannot be read, or that is no file of rows.
    """
    first = 0
    for source in sources:
        for name in _expand(source):
            index = -1  # of a file without rows
            for index, place, row in _rows(name, streaming):
                yield first + index, place, row
            first += index + 1


def _expand(source: str) -> list[str]:
    """The files that a pattern stands for, by name; anything else as it is."""
    path = expanded(source)
    if source.startswith(PREFIX) or not glob.has_magic(path) or Path(path).exists():
        return [source]
    found = sorted(glob.glob(path, recursive=True))
    if not found:
        raise DataError(f"{source}: no file fits this pattern (from {Path.cwd()})")
    return found


def _rows(name: str, streaming: bool) -> Iterator[tuple[int, str, Row]]:
    if name.startswith(PREFIX):
        yield from hub_rows(name, streaming)
        return
    file, wanted = _resolve(name)
    try:
        if isinstance(file, Path) and file.is_dir():
            yield from folder_rows(name, file)
        else:
            for index, (place, row) in enumerate(_file_rows(file, name)):
                if wanted is None or index in wanted:
                    yield index, f"{name}{place}", row
    except FileNotFoundError as error:
        raise DataError(f"{name}: no such file (from {Path.cwd()}). Give a data file, or {SAMPLE!r}") from error
    except DataError:
        raise
    except (OSError, EOFError, zlib.error, ValueError) as error:  # a ValueError for a name that no file can have
        raise DataError(f"{name}: cannot be read: {error}. Is it a whole, plain or gzip file?") from error


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


def _file_rows(file: Any, name: str) -> Iterator[tuple[str, Row]]:
    """(``:line``, row) of a file, by what it begins with."""
    with file.open("rb") as raw:
        unzipped, most = _unzipped(raw)
        head = unzipped.read(4096)
        unzipped.seek(0)
        if unzipped is raw and (kind := next((kind for mark, kind in TABLES.items() if head.startswith(mark)), "")):
            yield from table_rows(name, file, kind)
            return
        if kind := _binary_kind(head):
            raise OtherKind(f"{name}: it is {kind}")
        lines = _lines(unzipped, most, name)
        start = head.removeprefix(BOM).lstrip()
        if start.startswith(b"["):
            yield from _list_rows(unzipped, most, name)
        elif delimiter := _delimiter(start, Path(name).suffixes):
            yield from _table_rows(lines, delimiter, name)
        else:
            yield from _json_lines(lines)


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
        _check_unzipped(file.tell(), most, path)


def _check_unzipped(size: int, most: float, path: str) -> None:
    if size > most:
        raise DataError(
            f"{path}: it unzips to more than {most / 2**20:.0f} MiB, {MOST_GROWTH} times its size, which no text does; if it "
            "is what you want to read, unzip it"
        )


def _json_lines(lines: Iterator[bytes], kind: str = "") -> Iterator[tuple[str, Row]]:
    """A row a line; of a first line that is none it is said what the file may be, if ``kind`` does not know better."""
    first = True
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield f":{number}", _parsed(line, (kind or _text_kind(line)) if first else "")
            first = False


def _parsed(line: bytes, kind: str) -> Row:
    """The row on a line, or what is wrong with it; and of what ``kind`` the whole file is then, where that is known."""
    try:
        if len(line) > MOST_BYTES:
            raise DataError(
                f"the row is longer than {MOST_BYTES / 2**20:.0f} MiB, which is more than is read; split it"
            )
        return json_object(line)
    except DataError as error:
        return OtherKind(f"{error}. Of the whole file: {kind}") if kind else error


def _list_rows(file: IO[bytes], most: float, name: str) -> Iterator[tuple[str, Row]]:
    """The objects of one JSON list; or the lines of a file that only begins like one."""
    text = file.read(-1 if most == math.inf else int(most) + 1)
    _check_unzipped(len(text), most, name)
    try:
        rows = json_value(text)
    except DataError as error:
        file.seek(0)
        kind = f"it begins like one JSON list of rows, and cannot be read as one: {error}"
        yield from _json_lines(_lines(file, most, name), kind)
        return
    for place, row in enumerate(rows):
        try:
            yield f"[{place}]", checked_object(row)
        except DataError as error:
            yield f"[{place}]", error


def _table_rows(lines: Iterator[bytes], delimiter: str, name: str) -> Iterator[tuple[str, Row]]:
    """The rows of a CSV file, whose first line names the fields. Every cell is the text that it is."""
    csv.field_size_limit(MOST_BYTES)
    reader = csv.reader(_decoded(lines, name), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(reader)]
        if len(set(header)) < len(header):
            raise OtherKind(f"{name}: its first line names a field twice: {shown(header)}")
        line = reader.line_num
        for cells in reader:
            place, line = f":{line + 1}", reader.line_num
            if len(cells) == len(header):
                yield place, dict(zip(header, cells, strict=True))
            elif cells:
                yield place, DataError(f"it has {len(cells)} cells, and the first line names {len(header)} fields")
    except csv.Error as error:
        raise DataError(
            f"{name}:{reader.line_num}: it was read as a table with the delimiter {delimiter!r}, and is not well formed here: "
            f"{error}. A cell with quotes, delimiters or line breaks in it stands in quotes, and quotes in it are doubled"
        ) from error


def _decoded(lines: Iterator[bytes], name: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if len(line) > MOST_BYTES:
            raise DataError(f"{name}:{number}: the line is longer than {MOST_BYTES / 2**20:.0f} MiB; split its row")
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            byte = f"byte {error.object[error.start]:#04x} at {error.start}"
            raise DataError(f"{name}:{number}: not UTF-8: {byte}; save the table as UTF-8") from error


# --- what a file is -----------------------------------------------------------------------------------------------

BOM = b"\xef\xbb\xbf"
_EXCEL = (
    """write its rows as JSON lines: python -c "import pandas; pandas.read_excel('FILE').to_json('FILE.jsonl', """
    """orient='records', lines=True)\", or save it as CSV"""
)
_WRITE = "write its rows as JSON lines"
_UNPACK = "unpack it, and name the files in it"
_BEGINNINGS = (
    (b"ORC", "ORC", _WRITE),
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
    *((mark, f"{kind}, packed with gzip", "unpack it: it is packed already") for mark, kind in TABLES.items()),
)


def _binary_kind(head: bytes) -> str:
    """What a file that holds no text of rows is, with the way out; "" for any other."""
    if head[257:262] == b"ustar":
        return f"a tar archive; {_UNPACK}"
    if head.startswith(b"PK\x03\x04") and b"[Content_Types].xml" in head:
        return f"an Excel sheet; {_EXCEL}"
    return next((f"{what}; {way_out}" for start, what, way_out in _BEGINNINGS if head.startswith(start)), "")


_DELIMITERS = {".csv": ",;\t|", ".tsv": "\t"}


def _delimiter(start: bytes, suffixes: Sequence[str]) -> str:
    """What stands between the cells of a table, which its name or the fields in its first line show; "" if it is none."""
    line = start.split(b"\n", 1)[0].decode(errors="replace").strip()
    if not line or line.startswith(("{", '"{', "<")):
        return ""
    candidates = next((marks for suffix, marks in _DELIMITERS.items() if suffix in suffixes), "")
    found = max(candidates or ",;\t|", key=line.count)
    cells = {cell.strip(' "') for cell in line.split(found)}
    return found if candidates or cells & FIELD_NAMES else ""


def _text_kind(line: bytes) -> str:
    """What a file looks like whose first line is no row, with the way out; "" where nobody can tell."""
    start = line.removeprefix(BOM).strip()
    if start == b"{":
        return "it looks like one JSON object over several lines; write one object a line, or a list of objects"
    if start.startswith(b"<"):
        return "it looks like XML or HTML; write one JSON object a line"
    if start.startswith((b"{", b'"{')):
        return ""
    said = shown(start[:40].decode(errors="replace"))
    return f"it looks like plain text, or a table whose first line, {said}, names no known field; write one JSON object a line"
