"""Tables: Parquet files through pyarrow, and data sets of the Hub or of a folder through `datasets`."""

# pyarrow and datasets have no usable types.
# pyright: reportAttributeAccessIssue=false, reportUnknownMemberType=false, reportCallIssue=false
# pyright: reportArgumentType=false
from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from reward_model.datasets.parquet_pages import ColumnPages, read_pages
from reward_model.datasets.raw_records import RawRecord
from reward_model.locations import Location, num_bytes
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


def read_parquet(
    path: Location, *, skip_columns: Collection[str], with_bytes: bool = True, rows: range | None = None
) -> Iterator[RawRecord]:
    """Yield the rows of a Parquet file, numbered from 1, without the columns `skip_columns`; all, or those in `rows`.

    Bytes and images are not read but given as their place, a `StoredImage`; without `with_bytes` their columns are left
    out. Raises ValueError if the file is broken, or if it takes far more memory than it has bytes.
    """
    limit, state = max(_ALWAYS_FREE, _MOST_INFLATED * num_bytes(path)), _Progress()
    try:
        with _opened(path, skip_columns, limit, with_bytes=with_bytes) as opened:
            for group in range(opened.file.num_row_groups):
                if rows is not None and state.number >= rows.stop:
                    break
                yield from _rows_of_group(path, opened, group, limit, state, rows)
    except _InflatedError as error:
        raise ValueError(f"{path} is refused, since a file of any size can be made so: {error}.") from error
    except ConnectionError:
        raise
    # Broken bytes cause a dozen exception types, not all of them Arrow's own.
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as Parquet after row {state.number}: {str(error)[:200]}. Download the file again."
        ) from error


@dataclass(slots=True)
class _Progress:
    """How far a file is read: rows, and the bytes that they take in memory."""

    number: int = 0
    total: int = 0


class _Opened(NamedTuple):
    """An open file: the columns to read, those of images, which are not, and the rows to hold at once."""

    file: Any
    columns: list[str]
    images: list[str]
    num_rows: int


def _rows_of_group(
    path: Location, opened: _Opened, group: int, limit: int, state: _Progress, rows: range | None
) -> Iterator[RawRecord]:
    """Yield the wanted rows of a row group; those before them are read and counted too if the group has both."""
    file, columns, images, num_rows = opened
    size_of_group = file.metadata.row_group(group).num_rows
    if rows is not None and state.number + size_of_group <= rows.start and num_rows == 1:
        state.number += size_of_group
        return
    batches = file.iter_batches(num_rows, row_groups=[group], columns=columns)
    for batch in batches if columns else [None] * size_of_group:
        size = 0 if batch is None else sum(_num_bytes(column) for column in batch.columns)
        state.total = size if num_rows == 1 else state.total + size  # images are held one by one
        if state.total > limit:
            raise _InflatedError(f"its texts take more than {limit:,} bytes of memory")
        length = 1 if batch is None else len(batch)
        if rows is not None and not (state.number < rows.stop and state.number + length > rows.start):
            state.number += length
            if state.number >= rows.stop:
                return
            continue
        for read in [{}] if batch is None else batch.to_pylist():
            number, state.number = state.number, state.number + 1
            if rows is None or number in rows:
                fields = {name: _placed(v, str(path), number, name) for name, v in read.items()}
                fields |= {name: StoredImage(str(path), number, -1, name) for name in images}
                yield RawRecord(f"{path}:ROW {number + 1}", fields, group if images or num_rows == 1 else -1)


@contextmanager
def _opened(path: Location, skip_columns: Collection[str], limit: int, *, with_bytes: bool) -> Iterator[_Opened]:
    """Yield the open file.

    Raises _InflatedError if the rows, or one image, may exceed `limit` bytes.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(_opened_for_arrow(path)) as file:
        metadata, schema = file.metadata, file.schema_arrow
        columns = _columns(schema, skip_columns, with_bytes=with_bytes)
        images = [name for name in columns if _is_image(file, name)]
    columns = [name for name in columns if name not in images]
    rows = 1 if any(_has_bytes(schema.field(name).type) for name in columns) else _TEXT_BATCH
    size = num_bytes(path)
    _refuse_inflated(metadata, size, limit)
    if isinstance(path, Path):  # in a bucket, it would take a request for each page of images
        _refuse_inflated_pages(read_pages(path, metadata, images), size, limit, rows=1)
    shared = _refuse_inflated_pages(read_pages(path, metadata, columns), size, limit, rows)
    with pq.ParquetFile(
        _opened_for_arrow(path), metadata=metadata, read_dictionary=shared, pre_buffer=False, buffer_size=1 << 20,
        page_checksum_verification=True,
    ) as file:  # fmt: skip
        yield _Opened(file, columns, images, rows)


def _opened_for_arrow(path: Location) -> Any:
    return path if isinstance(path, Path) else path.open()


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


def read_hub_dataset(
    source: str, *, skip_columns: Collection[str], with_bytes: bool = True, rows: range | None = None
) -> Iterator[RawRecord]:
    """Yield the rows of hf:ID@SPLIT, numbered from 1, all or those in `rows`.

    ID is a data set on the Hub, or a folder in a layout of `datasets`; hf:ID:CONFIG@SPLIT is one of its
    configurations.

    Bytes and images are given as their place; without `with_bytes` their columns are left out. Raises ValueError if it
    cannot be loaded. Data sets that are Python scripts cannot since datasets 4; `docs/data.md` lists the files to
    download instead.
    """
    table = open_hub_dataset(source)
    schema = table.features.arrow_schema
    columns = _columns(schema, skip_columns, with_bytes=with_bytes)
    images = [name for name in columns if _is_full(table, name)]
    wanted = range(len(table))[slice(rows.start, rows.stop) if rows is not None else slice(None)]
    read_columns = table.select_columns([name for name in columns if name not in images])
    if rows is not None and read_columns.column_names:
        read_columns = read_columns.select(wanted)
    for number, read in zip(wanted, read_columns if read_columns.column_names else ({} for _ in wanted), strict=True):
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
