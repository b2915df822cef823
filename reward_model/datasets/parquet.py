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
_MOST_INFLATED = 100
"""Largest ratio of the bytes of a table in memory to those of its file, beyond _ALWAYS_FREE: published ones have 5."""
_ALWAYS_FREE = 256 * 2**20
_MAX_VALUES = 1_000_000
"""Values of one column that any file may have; one with more has at least a byte for each."""


class _InflatedError(ValueError):
    """A file that takes far more memory than it has bytes."""


def read_parquet(path: Path, *, skip_columns: Collection[str], with_bytes: bool = True) -> Iterator[RawRecord]:
    """Yield the rows of a Parquet file, numbered from 1, without the columns `skip_columns`.

    Without `with_bytes`, columns of bytes and images are left out too. Raises ValueError if the file is broken, or if
    it takes far more memory than it has bytes.
    """
    import pyarrow.parquet as pq

    number, limit, total = 0, max(_ALWAYS_FREE, _MOST_INFLATED * path.stat().st_size), 0
    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True) as file:
            _refuse_inflated(file.metadata, path.stat().st_size, limit)
            columns = _columns(file.schema_arrow, skip_columns, with_bytes=with_bytes)
            with_images = any(_has_bytes(file.schema_arrow.field(name).type) for name in columns)
            for batch in file.iter_batches(batch_size=1 if with_images else _TEXT_BATCH, columns=columns):
                total += 0 if with_images else batch.nbytes
                if total > limit:
                    raise _InflatedError(f"its texts take more than {limit:,} bytes of memory")
                for fields in batch.to_pylist():
                    number += 1
                    yield RawRecord(f"{path}:ROW {number}", fields)
    except _InflatedError as error:
        raise ValueError(f"{path} is refused, since a file of any size can be made so: {error}.") from error
    # Broken bytes cause a dozen exception types, not all of them Arrow's own.
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as Parquet after row {number}: {str(error)[:200]}. Download the file again."
        ) from error


def _refuse_inflated(metadata: Any, size: int, limit: int) -> None:
    """Raise _InflatedError if the footer of a file of `size` bytes states over `limit` bytes, or too many values."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    if (stated := sum(group.total_byte_size for group in groups)) > limit:
        raise _InflatedError(f"its columns take {stated:,} bytes of memory, and it has {size:,}")
    for column in range(metadata.num_columns):
        if (count := sum(group.column(column).num_values for group in groups)) > max(_MAX_VALUES, size):
            raise _InflatedError(f"its column {column + 1} has {count:,} values in {size:,} bytes")


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
