"""Tables: Parquet files through pyarrow, and data sets of the Hub or of a folder through `datasets`."""

# pyarrow and datasets have no usable types.
# pyright: reportAttributeAccessIssue=false, reportUnknownMemberType=false, reportCallIssue=false
# pyright: reportArgumentType=false
from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from reward_model.datasets.raw_records import RawRecord

_BATCH_SIZE = 16
"""Rows in memory at once; a row may contain images of several megabytes."""


def read_parquet(path: Path, *, skip_columns: Collection[str]) -> Iterator[RawRecord]:
    """Yield the rows of a Parquet file, numbered from 1, without the columns `skip_columns`.

    Raises ValueError if the file is broken.
    """
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name not in skip_columns]
            for batch in file.iter_batches(batch_size=_BATCH_SIZE, columns=columns):
                for fields in batch.to_pylist():
                    number += 1
                    yield RawRecord(f"{path}:ROW {number}", fields)
    # Broken bytes cause a dozen exception types, not all of them Arrow's own.
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as Parquet after row {number}: {str(error)[:200]}. Download the file again."
        ) from error


def read_hub_dataset(path: str, *, skip_columns: Collection[str]) -> Iterator[RawRecord]:
    """Yield the rows of ID@SPLIT, numbered from 1; ID is a data set on the Hub, or a folder in a layout of `datasets`.

    Raises ValueError if it cannot be loaded. Data sets that are Python scripts cannot since datasets 4; `docs/data.md`
    lists the files to download instead.
    """
    from datasets import Dataset, Image, load_dataset

    name, at, split = path.rpartition("@")
    if not (name and at and split):
        raise ValueError(f"hf:{path} has no split; write hf:ID@SPLIT, such as hf:yuvalkirstain/pickapic_v2@test.")
    try:
        table: Any = load_dataset(name, split=split)
    # Failures on the way to the Hub have a dozen exception types of several libraries.
    except Exception as error:
        raise ValueError(f"hf:{path} cannot be loaded: {type(error).__name__}: {str(error)[:300]}") from error
    assert isinstance(table, Dataset)
    table = table.remove_columns([column for column in table.column_names if column in skip_columns])
    for column, feature in table.features.items():
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, Image):
            undecoded = Image(decode=False)
            table = table.cast_column(column, undecoded if inner is feature else type(feature)(undecoded))
    for number, fields in enumerate(table, start=1):
        yield RawRecord(f"hf:{path}:ROW {number}", fields)
