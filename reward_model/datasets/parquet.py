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
from reward_model.stored_images import StoredImage, open_hub_dataset

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

    Bytes and images are not read but given as their place, a `StoredImage`; without `with_bytes` their columns are left
    out. Raises ValueError if the file is broken, or if it takes far more memory than it has bytes.
    """
    number, limit, total = 0, max(_ALWAYS_FREE, _MOST_INFLATED * path.stat().st_size), 0
    try:
        with _opened(path, skip_columns, limit, with_bytes=with_bytes) as (file, columns, images, rows):
            for group in range(file.num_row_groups):
                batches = file.iter_batches(rows, row_groups=[group], columns=columns)
                for batch in batches if columns else [None] * file.metadata.row_group(group).num_rows:
                    size = 0 if batch is None else sum(_num_bytes(column) for column in batch.columns)
                    total = size if rows == 1 else total + size  # images are held one by one
                    if total > limit:
                        raise _InflatedError(f"its texts take more than {limit:,} bytes of memory")
                    for read in [{}] if batch is None else batch.to_pylist():
                        fields = {name: _placed(v, str(path), number, name) for name, v in read.items()}
                        fields |= {name: StoredImage(str(path), number, -1, name) for name in images}
                        number += 1
                        yield RawRecord(f"{path}:ROW {number}", fields, group if images or rows == 1 else -1)
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
) -> Iterator[tuple[Any, list[str], list[str], int]]:
    """Yield the file, the columns to read, those of images, which are not, and the rows to hold at once.

    Raises _InflatedError if the rows, or one image, may exceed `limit` bytes.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        metadata, schema = file.metadata, file.schema_arrow
        columns = _columns(schema, skip_columns, with_bytes=with_bytes)
        images = [name for name in columns if _is_image(file, name)]
    columns = [name for name in columns if name not in images]
    rows = 1 if any(_has_bytes(schema.field(name).type) for name in columns) else _TEXT_BATCH
    _refuse_inflated(metadata, path.stat().st_size, limit)
    _refuse_inflated_pages(read_pages(path, metadata, images), path.stat().st_size, limit, rows=1)
    shared = _refuse_inflated_pages(read_pages(path, metadata, columns), path.stat().st_size, limit, rows)
    with pq.ParquetFile(
        path, metadata=metadata, read_dictionary=shared, pre_buffer=False, buffer_size=1 << 20,
        page_checksum_verification=True,
    ) as file:  # fmt: skip
        yield file, columns, images, rows


def _is_image(file: Any, column: str) -> bool:
    """True if every row of a column has bytes, or an image with bytes as `datasets` stores it, by the file's footer."""
    import pyarrow.types as types

    kind, metadata = file.schema_arrow.field(column).type, file.metadata
    leaf = f"{column}.bytes" if types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else column
    if not _has_bytes(kind) or (types.is_nested(kind) and leaf == column):
        return False
    if leaf != column and not _has_bytes(kind.field("bytes").type):
        return False
    for group in (metadata.row_group(index) for index in range(metadata.num_row_groups)):
        found = [group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema == leaf]
        if len(found) != 1 or found[0].statistics is None or not found[0].statistics.has_null_count:
            return False
        if found[0].statistics.null_count:
            return False
    return True


def _placed(value: Any, file: str, row: int, column: str, index: int = -1) -> Any:
    """Return the value of a cell with the place of each image or bytes instead of its content."""
    match value:
        case bytes() | {"bytes": bytes()}:
            return StoredImage(file, row, index, column)
        case list() if index < 0:
            return [_placed(one, file, row, column, i) for i, one in enumerate(value)]
        case _:
            return value


def _refuse_inflated(metadata: Any, size: int, limit: int) -> None:
    """Raise _InflatedError if the footer of a file of `size` bytes states over `limit` bytes, or too many values."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    if (stated := sum(group.total_byte_size for group in groups)) > limit:
        raise _InflatedError(f"its columns take {stated:,} bytes of memory, and it has {size:,}")
    for column in range(metadata.num_columns):
        if (count := sum(group.column(column).num_values for group in groups)) > max(_MAX_VALUES, size):
            raise _InflatedError(f"its column {column + 1} has {count:,} values in {size:,} bytes")
    if (rows := sum(group.num_rows for group in groups)) > max(_MAX_VALUES, size):
        raise _InflatedError(f"it has {rows:,} rows in {size:,} bytes")


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


def read_hub_dataset(source: str, *, skip_columns: Collection[str], with_bytes: bool = True) -> Iterator[RawRecord]:
    """Yield the rows of hf:ID@SPLIT, numbered from 1; ID is a data set on the Hub, or a folder in a layout of
    `datasets`, and hf:ID:CONFIG@SPLIT one of its configurations.

    Bytes and images are given as their place; without `with_bytes` their columns are left out. Raises ValueError if it
    cannot be loaded. Data sets that are Python scripts cannot since datasets 4; `docs/data.md` lists the files to
    download instead.
    """
    table = open_hub_dataset(source)
    schema = table.features.arrow_schema
    columns = _columns(schema, skip_columns, with_bytes=with_bytes)
    images = [name for name in columns if _is_full(table, name)]
    rows = table.select_columns([name for name in columns if name not in images])
    for number, read in enumerate(rows if rows.column_names else ({} for _ in range(len(table)))):
        fields = {name: _placed(value, source, number, name) for name, value in read.items()}
        fields |= {name: StoredImage(source, number, -1, name) for name in images}
        yield RawRecord(f"{source}:ROW {number + 1}", fields)


def _is_full(table: Any, column: str) -> bool:
    """True if every row of a column of a `datasets.Dataset` has bytes, or an image with bytes."""
    import pyarrow.compute as compute
    import pyarrow.types as types

    values = table.data.column(column)
    if types.is_struct(values.type) and values.type.get_field_index("bytes") >= 0:
        if values.null_count:
            return False
        values = compute.struct_field(values, "bytes")
    return not types.is_nested(values.type) and _has_bytes(values.type) and not values.null_count


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
