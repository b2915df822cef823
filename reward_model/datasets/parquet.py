"""Tables: Parquet files, and data sets of the Hub or of a folder through `datasets`."""

# pyarrow and datasets have no usable types.
# pyright: reportAttributeAccessIssue=false, reportUnknownMemberType=false, reportCallIssue=false
# pyright: reportArgumentType=false
from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from reward_model.datasets.raw_records import RawRecord

_ROWS_AT_ONCE = 16
"""Rows may hold images of megabytes."""


def read_parquet(path: Path, *, skip_columns: Collection[str]) -> Iterator[RawRecord]:
    """The rows of a Parquet file, numbered from 1, a few at a time and without the columns `skip_columns`.

    Raises ValueError if the file as a whole is broken.
    """
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name not in skip_columns]
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns):
                for fields in batch.to_pylist():
                    number += 1
                    yield RawRecord(f"{path}:ROW {number}", fields)
    # Broken bytes end in a dozen types of errors, some of them not Arrow's own.
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as Parquet behind row {number}: {str(error)[:200]}. Fetch the file again."
        ) from error


def read_hub_dataset(place: str, *, skip_columns: Collection[str]) -> Iterator[RawRecord]:
    """The rows of ID@SPLIT, a data set of the Hub (or a folder that `datasets` understands), numbered from 1.

    Raises ValueError if there is none such. Data sets that are Python scripts are none since datasets 4; `docs/data.md`
    says which files of theirs to fetch instead.
    """
    from datasets import Dataset, Image, load_dataset

    name, at, split = place.rpartition("@")
    if not (name and at and split):
        raise ValueError(f"hf:{place} names no split; write hf:ID@SPLIT, such as hf:yuvalkirstain/pickapic_v2@test.")
    try:
        table: Any = load_dataset(name, split=split)
    # Whatever goes wrong on the way to the Hub has one of a dozen types of several libraries.
    except Exception as error:
        raise ValueError(f"hf:{place} cannot be loaded: {type(error).__name__}: {str(error)[:300]}") from error
    assert isinstance(table, Dataset)
    table = table.remove_columns([column for column in table.column_names if column in skip_columns])
    for column, feature in table.features.items():
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, Image):
            bare = Image(decode=False)
            table = table.cast_column(column, bare if inner is feature else type(feature)(bare))
    for number, fields in enumerate(table, start=1):
        yield RawRecord(f"hf:{place}:ROW {number}", fields)
