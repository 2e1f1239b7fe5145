"""Rows of tables that have types: Parquet and Arrow files, folders of ``datasets.save_to_disk``, data sets of the Hugging Face Hub.

Such a table writes a field for every row that lacks it, also inside of objects; a null in an object is taken for that here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switchkd.base.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pyarrow

TableRow = tuple[str, dict[str, Any]]
TABLES = {
    b"PAR1": "Parquet",
    b"ARROW1": "an Arrow file",
    b"\xff\xff\xff\xff": "an Arrow stream",
}  # by their first bytes


def table_rows(name: str, file: Path, kind: str) -> Iterator[TableRow]:
    """(``:row``, row) of a table in a file, read piece by piece. Raises DataError for one that is damaged."""
    import pyarrow

    try:
        for place, row in enumerate(_batch_rows(_batches(file, kind))):
            yield f":{place}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{name}: it is {kind}, and cannot be read: {error}. Is it whole?") from error


def _batches(file: Path, kind: str) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow
    import pyarrow.parquet

    if kind == "Parquet":
        with pyarrow.parquet.ParquetFile(file) as parquet:
            yield from parquet.iter_batches(1024)
        return
    with pyarrow.OSFile(str(file)) as raw:
        if kind == "an Arrow stream":
            yield from pyarrow.ipc.open_stream(raw)
        else:
            reader = pyarrow.ipc.open_file(raw)
            yield from map(reader.get_batch, range(reader.num_record_batches))


def _batch_rows(batches: Iterable[Any]) -> Iterator[dict[str, Any]]:
    for batch in batches:
        yield from map(_without_nulls, batch.to_pylist())


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    return {name: _filled(value) for name, value in row.items()}


def _filled(value: Any) -> Any:
    """A value without the fields of its objects that are null."""
    if isinstance(value, dict):
        return {name: _filled(one) for name, one in value.items() if one is not None}
    return [_filled(one) for one in value] if isinstance(value, list) else value


def folder_rows(name: str, folder: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(index, ``folder:row``, row) of a folder that ``datasets.save_to_disk`` wrote. Raises DataError for any other."""
    if (folder / "dataset_dict.json").is_file():
        parts = sorted(file.parent.name for file in folder.glob("*/state.json"))
        raise DataError(
            f"{name}: it is a data set in parts ({', '.join(parts)}); name one, such as {folder / parts[0]}"
        )
    if not (folder / "state.json").is_file():
        raise DataError(
            f"{name}: it is a folder, and datasets.save_to_disk did not write it; name the files in it, such as {name}/*.jsonl"
        )
    import datasets

    try:
        table = datasets.load_from_disk(str(folder)).with_format("arrow")  # which opens no picture or sound
        for index, row in enumerate(_batch_rows(table.iter(1024))):
            yield index, f"{name}:{index}", row
    except Exception as error:  # datasets and pyarrow have errors of many kinds
        raise DataError(f"{name}: cannot be read by datasets: {type(error).__name__}: {error}. Is it whole?") from error


# --- data sets on the Hugging Face Hub ----------------------------------------------------------------------------

PREFIX = "hub:"
_NAME = re.compile(
    r"hub:(?P<repository>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w./ -]+))?(?::(?P<split>[\w.-]+))?(?:@(?P<revision>\S+))?"
)
_FILES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet", ".csv")


def hub_rows(name: str, streaming: bool = False) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(row index, ``hub:…:row``, row) of every row of a split, ``train`` if none is named, in the data set's order.

    A CONFIG that ends in .jsonl, .json, .parquet, .csv is one file of the repository, and its split is called ``train``. The data
    is kept in the cache of ``datasets``, where it can be read again without a network; ``streaming`` reads it over the network
    instead, as far as it is asked for. Raises ConfigError for a name that is not one, DataError when the data cannot be had.
    """
    parts = _NAME.fullmatch(name)
    if not parts:
        raise ConfigError(f"{name!r} is not of the form hub:OWNER/NAME[/CONFIG][:SPLIT][@REVISION]")
    repository, config, split, revision = parts.group("repository", "config", "split", "revision")
    place = {"data_files": config} if config and config.endswith(_FILES) else {"name": config}
    import datasets

    try:
        table = datasets.load_dataset(
            repository, **place, split=split or "train", revision=revision, streaming=streaming
        )
        for index, row in enumerate(table):
            yield index, f"{name}:{index}", _without_nulls(row)
    except Exception as error:  # datasets, huggingface_hub and the HTTP client below them each have their own errors
        raise DataError(
            f"{name}: cannot be read from the Hugging Face Hub: {type(error).__name__}: {error}. Check the name and the network "
            "(it is needed unless the data is in the cache of datasets), or give a local file"
        ) from error
