"""Tables: Parquet files through pyarrow, and data sets of the Hub or of a folder through `datasets`."""

# pyarrow and datasets have no usable types.
# pyright: reportAttributeAccessIssue=false, reportUnknownMemberType=false, reportCallIssue=false
# pyright: reportArgumentType=false
from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from reward_model.datasets.raw_records import RawRecord

_TEXT_BATCH = 16
"""Rows in memory at once of a table of texts and numbers; of one with images a single row, because a file of kilobytes
can claim gigabytes of equal bytes."""


def read_parquet(path: Path, *, skip_columns: Collection[str], with_bytes: bool = True) -> Iterator[RawRecord]:
    """Yield the rows of a Parquet file, numbered from 1, without the columns `skip_columns`.

    Without `with_bytes`, columns of bytes and images are left out too. Raises ValueError if the file is broken.
    """
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            columns = _columns(file.schema_arrow, skip_columns, with_bytes=with_bytes)
            with_images = any(_has_bytes(file.schema_arrow.field(name).type) for name in columns)
            for batch in file.iter_batches(batch_size=1 if with_images else _TEXT_BATCH, columns=columns):
                for fields in batch.to_pylist():
                    number += 1
                    yield RawRecord(f"{path}:ROW {number}", fields)
    # Broken bytes cause a dozen exception types, not all of them Arrow's own.
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as Parquet after row {number}: {str(error)[:200]}. Download the file again."
        ) from error


def read_hub_dataset(path: str, *, skip_columns: Collection[str], with_bytes: bool = True) -> Iterator[RawRecord]:
    """Yield the rows of ID@SPLIT, numbered from 1; ID is a data set on the Hub, or a folder in a layout of `datasets`.

    Without `with_bytes`, columns of bytes and images are left out too. Raises ValueError if it cannot be loaded. Data
    sets that are Python scripts cannot since datasets 4; `docs/data.md` lists the files to download instead.
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
    table = table.select_columns(_columns(table.features.arrow_schema, skip_columns, with_bytes=with_bytes))
    for column, feature in table.features.items():
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, Image):
            undecoded = Image(decode=False)
            table = table.cast_column(column, undecoded if inner is feature else type(feature)(undecoded))
    for number, fields in enumerate(table, start=1):
        yield RawRecord(f"hf:{path}:ROW {number}", fields)


def _columns(schema: Any, skip_columns: Collection[str], *, with_bytes: bool) -> list[str]:
    """Return the names of the columns to read."""
    return [
        field.name for field in schema if field.name not in skip_columns and (with_bytes or not _has_bytes(field.type))
    ]


def _has_bytes(kind: Any) -> bool:
    """True for a column of bytes, and for one that nests them, as `datasets` stores images."""
    import pyarrow.types as types

    if types.is_nested(kind):
        return any(_has_bytes(kind.field(i).type) for i in range(kind.num_fields))
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
