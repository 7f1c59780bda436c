"""Rows from a user's file."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

_READERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "tsv", ".json": "json", ".jsonl": "json"}


def load_data(data: Dataset | str | os.PathLike[str]) -> Dataset:
    """Rows from a file, or a `datasets.Dataset` as it is.

    Args:
        data (`datasets.Dataset` or `str`):
            A `.parquet`, `.csv`, `.tsv`, `.json` or `.jsonl` file. TSV cells are taken literally, quotation
            marks included, as in GLUE's own files. Words such as "null" or "NA" stay text.

    Raises:
        `FileNotFoundError`: if there is no such file.
        `ValueError`: for an unknown kind of file, an unreadable one, or one without rows.
        `TypeError`: for anything else, such as a `DatasetDict`.
    """
    from datasets import Dataset, DatasetDict

    if isinstance(data, (dict, DatasetDict)):
        splits = list(data)
        raise TypeError(
            f"`data` holds several splits ({listed(splits)}); pass one, for example data[{splits[-1]!r}]."
            if splits
            else "`data` is empty."
        )
    if not isinstance(data, (str, os.PathLike, Dataset)):
        raise TypeError(f"`data` must be a `datasets.Dataset` or the path of a file, got {type(data).__name__}.")
    dataset = data if isinstance(data, Dataset) else _read(Path(data))
    if len(dataset) == 0:
        raise ValueError(f"`data` ({'a Dataset' if dataset is data else data}) has no rows.")
    return dataset


def _read(path: Path) -> Dataset:
    from datasets import Dataset

    kind = _READERS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path}: unknown kind of data file {path.suffix!r}. Allowed: {listed(_READERS)}.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no data file {path}.")
    name = str(path)
    try:
        if kind == "parquet":
            return Dataset.from_parquet(name)
        if kind == "json":
            return Dataset.from_json(name)
        # Empty cells and words like "null" are text here, not missing numbers.
        if kind == "tsv":
            return Dataset.from_csv(name, sep="\t", quoting=csv.QUOTE_NONE, keep_default_na=False)
        return Dataset.from_csv(name, keep_default_na=False)
    except Exception as error:  # datasets wraps whatever pandas, pyarrow or json raised
        cause = error.__cause__ or error
        raise ValueError(f"{path} could not be read as {kind}: {cause}") from error


def listed(names: Iterable[str]) -> str:
    """Names as messages show them: `'a', 'b'`."""
    return ", ".join(repr(str(name)) for name in names)
