"""Tables: Parquet files through pyarrow, and data sets of the Hub or of a folder through `datasets`."""

# pyarrow and datasets have no usable types.
# pyright: reportAttributeAccessIssue=false, reportUnknownMemberType=false, reportCallIssue=false
# pyright: reportArgumentType=false
from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reward_model.datasets.parquet_pages import ColumnPages, read_pages
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
    number, limit, total = 0, max(_ALWAYS_FREE, _MOST_INFLATED * path.stat().st_size), 0
    try:
        with _opened(path, skip_columns, limit, with_bytes=with_bytes) as (file, columns, rows):
            for batch in file.iter_batches(batch_size=rows, columns=columns):
                size = sum(_num_bytes(column) for column in batch.columns)
                total = size if rows == 1 else total + size  # images are held one by one
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


@contextmanager
def _opened(
    path: Path, skip_columns: Collection[str], limit: int, *, with_bytes: bool
) -> Iterator[tuple[Any, list[str], int]]:
    """Yield the file, the columns to read, and the rows to hold at once; _InflatedError if they may exceed `limit`."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        metadata, schema = file.metadata, file.schema_arrow
    columns = _columns(schema, skip_columns, with_bytes=with_bytes)
    rows = 1 if any(_has_bytes(schema.field(name).type) for name in columns) else _TEXT_BATCH
    _refuse_inflated(metadata, path.stat().st_size, limit)
    pages = read_pages(path, metadata, columns)
    shared = _refuse_inflated_pages(pages, path.stat().st_size, limit, rows)
    with pq.ParquetFile(
        path, metadata=metadata, read_dictionary=shared, pre_buffer=False, buffer_size=1 << 20,
        page_checksum_verification=True,
    ) as file:  # fmt: skip
        yield file, columns, rows


def _refuse_inflated(metadata: Any, size: int, limit: int) -> None:
    """Raise _InflatedError if the footer of a file of `size` bytes states over `limit` bytes, or too many values."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    if (stated := sum(group.total_byte_size for group in groups)) > limit:
        raise _InflatedError(f"its columns take {stated:,} bytes of memory, and it has {size:,}")
    for column in range(metadata.num_columns):
        if (count := sum(group.column(column).num_values for group in groups)) > max(_MAX_VALUES, size):
            raise _InflatedError(f"its column {column + 1} has {count:,} values in {size:,} bytes")


def _refuse_inflated_pages(pages: Sequence[ColumnPages], size: int, limit: int, rows: int) -> list[str]:
    """Return the columns whose values must go on sharing bytes in memory; _InflatedError if pages state too much.

    A list of ten thousand times one text is a dictionary of that text and ten thousand numbers, in the file as in
    memory; only `_num_bytes` tells what its rows would take.
    """
    if (stated := sum(column.num_bytes for column in pages)) > limit:
        raise _InflatedError(f"its pages take {stated:,} bytes of memory, and it has {size:,}")
    shared: list[str] = []
    for column in pages:
        if column.num_values > max(_MAX_VALUES, size):
            raise _InflatedError(f"the pages of {column.path} have {column.num_values:,} values in {size:,} bytes")
        if (most := column.largest_batch(rows)) > limit:
            if column.kind != "BYTE_ARRAY" or column.largest_of_prefixes:
                raise _InflatedError(f"values of {column.path} that share bytes may take {most:,} bytes of memory")
            shared.append(column.path)
    return shared


def _num_bytes(array: Any) -> int:
    """Return the bytes that the values of a column take, each for itself."""
    import pyarrow.compute as pc
    import pyarrow.types as types

    kind = array.type
    if types.is_dictionary(kind):
        return pc.sum(pc.take(pc.binary_length(array.dictionary), array.indices)).as_py() or 0
    if types.is_map(kind):
        return _num_bytes(array.keys) + _num_bytes(array.items)
    if types.is_struct(kind):
        return sum(_num_bytes(field) for field in array.flatten())
    return _num_bytes(array.flatten()) if types.is_nested(kind) else array.nbytes


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
