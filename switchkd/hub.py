"""Rows of data sets on the Hugging Face Hub: ``hub:OWNER/NAME[/CONFIG]:SPLIT[@REVISION]``.

``datasets`` 4 and later cannot run code from a data set's repository; older ones are refused here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from switchkd.errors import ConfigError, DataError

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
