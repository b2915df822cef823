"""Reading of images that lie within other files: members of archives, cells of Parquet files and of `datasets` tables.

Nothing is unpacked. A member of an archive is read from its place, which may be in a bucket. The cells of a Parquet
file are compressed together with their neighbours, so those of the row groups in use are kept, in at most 512 MiB of a
process.
"""

# pyarrow and datasets have no usable types.
# pyright: reportAttributeAccessIssue=false, reportUnknownMemberType=false
from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from reward_model.locations import BucketPath, is_in_bucket, is_of_hub, version_in_bucket

MAX_BYTES = 256 * 2**20
"""Largest image that is read from an archive. A file with holes can claim any size at no cost."""
_MAX_KEPT = 512 * 2**20
"""Bytes of images of Parquet files that a process keeps; a row group beyond that is decoded again for each image."""
_kept: OrderedDict[tuple[Any, ...], tuple[list[Any], int]] = OrderedDict()
"""First values of a column of a row group, and their bytes; the group that was used last is the last one."""


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image within another file, or in a bucket: some bytes, or a cell of a table. It is read when it is needed."""

    file: str
    """Path of the archive or table, or hf:ID@SPLIT; in a bucket also that of an image file, from byte 0."""
    start: int
    """First byte of the image in the archive; its row in the table, from 0."""
    size: int
    """Number of bytes; in a table, the index among the images of the cell, or -1 if the cell is one image."""
    column: str = ""
    """Column of the table; empty for bytes."""

    def __str__(self) -> str:
        if not self.column:
            if not self.start:
                return self.file
            return f"at byte {self.start:,} of {self.file}"
        return f"{self.column!r} of row {self.start + 1:,} of {self.file}"


ImageSource = Path | StoredImage
"""Where an image lies: in a file of its own, or within another file."""


def read_bytes(image: StoredImage) -> bytes:
    """Return the content of the image file. Raises ValueError or OSError, naming the data file, if it is not there."""
    if not image.column:
        return _read_member(image)
    try:
        cell = open_hub_dataset(image.file)[image.start][image.column] if is_of_hub(image.file) else _cell(image)
        found = cell[image.size] if image.size >= 0 else cell
    except (IndexError, KeyError, TypeError) as error:
        raise ValueError(f"There is no image {image}; the data have changed.") from error
    content = found.get("bytes") if isinstance(found, dict) else found
    if not isinstance(content, bytes):
        raise ValueError(f"There is no image {image}; the data have changed.")
    return content


@lru_cache(maxsize=8)
def open_hub_dataset(source: str) -> Any:
    """Return the `datasets.Dataset` of hf:ID@SPLIT or hf:ID:CONFIG@SPLIT, with images as they are stored.

    Raises ValueError if it cannot be loaded.
    """
    from datasets import Dataset, Image, load_dataset

    folder, config, split = _parts(source)
    try:
        table: Any = load_dataset(folder, config or None, split=split)
    # Failures on the way to the Hub have a dozen exception types of several libraries.
    except Exception as error:
        raise ValueError(f"{source} cannot be loaded: {type(error).__name__}: {str(error)[:300]}") from error
    assert isinstance(table, Dataset)
    for column, feature in table.features.items():
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, Image):
            undecoded = Image(decode=False)
            table = table.cast_column(column, undecoded if inner is feature else type(feature)(undecoded))
    return table


def data_files_of_hub(source: str) -> list[str]:
    """Return the addresses of the data files of hf:ID@SPLIT or hf:ID:CONFIG@SPLIT, none of which is downloaded.

    Raises ValueError if there is no such data set, configuration or split.
    """
    from datasets import load_dataset_builder

    folder, config, split = _parts(source)
    try:
        files = load_dataset_builder(folder, config or None).config.data_files or {}
    except Exception as error:  # on the way to the Hub, as in `open_hub_dataset`
        raise ValueError(f"{source} cannot be found: {type(error).__name__}: {str(error)[:300]}") from error
    if split not in files:
        raise ValueError(f"{source} has no split {split!r}; it has {', '.join(map(str, files)) or 'no data files'}.")
    return [str(file) for file in files[split]]


def _parts(source: str) -> tuple[str, str, str]:
    """Return ID, CONFIG and SPLIT of hf:ID:CONFIG@SPLIT."""
    name, at, split = source.removeprefix("hf:").rpartition("@")
    if not (name and at and split):
        raise ValueError(f"{source} has no split; write hf:ID@SPLIT, such as hf:yuvalkirstain/pickapic_v2@test.")
    folder, _, config = (name, "", "") if Path(name).exists() else name.partition(":")
    return folder, config, split


def _read_member(image: StoredImage) -> bytes:
    if is_in_bucket(image.file):
        content = BucketPath(image.file).read_range(image.start, min(image.size, MAX_BYTES))
        if len(content) != image.size:
            raise ValueError(f"The image {image} has {image.size:,} bytes, of which {len(content):,} are there.")
        return content
    with open(image.file, "rb") as file:
        left = os.fstat(file.fileno()).st_size - image.start
        if not 0 <= image.size <= min(left, MAX_BYTES):
            raise ValueError(f"The image {image} has {image.size:,} bytes, of which {max(left, 0):,} are there.")
        file.seek(image.start)
        return file.read(image.size)


def _cell(image: StoredImage) -> Any:
    """Return the value of a cell of a Parquet file, and keep those of its row group while they are small enough."""
    # A process of a data loader does not share its parent's open files.
    identity = _identity(image.file)
    file, starts = _open_parquet(image.file, identity, os.getpid())
    group = next((g for g, end in enumerate(starts[1:]) if image.start < end), -1)
    if group < 0:
        raise IndexError(image.start)
    row, key = image.start - starts[group], (identity, group, image.column)
    if key in _kept:
        _kept.move_to_end(key)
        if row < len(_kept[key][0]):
            return _kept[key][0][row]
    values, taken, found = list[Any](), 0, None
    for index, value in enumerate(_values(file, group, image.column)):
        found = value if index == row else found
        if taken + _size(value) > _MAX_KEPT:
            if index >= row:
                break
            continue
        taken += _size(value)
        values.append(value)
    _kept[key] = values, taken
    while len(_kept) > 1 and sum(size for _, size in _kept.values()) > _MAX_KEPT:
        _kept.popitem(last=False)
    return found


def _identity(path: str) -> tuple[int | str, ...]:
    """Return what changes when a file is replaced."""
    if is_in_bucket(path):
        return (path, version_in_bucket(path))
    info = os.stat(path)
    return (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns)


def _values(file: Any, group: int, column: str) -> Iterator[Any]:
    """Yield the values of a column of a row group, one at a time: a file of kilobytes can claim gigabytes."""
    try:
        for batch in file.iter_batches(batch_size=1, row_groups=[group], columns=[column]):
            yield batch.column(0)[0].as_py()
    except ConnectionError:
        raise
    # Broken bytes cause a dozen exception types, not all of them Arrow's own.
    except Exception as error:
        raise ValueError(f"The column {column!r} cannot be read from the Parquet file: {str(error)[:200]}") from error


def _size(value: Any) -> int:
    match value:
        case bytes():
            return len(value)
        case list():
            return sum(map(_size, value))
        case dict():
            return sum(map(_size, value.values()))
        case _:
            return 16


@lru_cache(maxsize=64)
def _open_parquet(path: str, identity: tuple[int | str, ...], process: int) -> tuple[Any, list[int]]:
    """Return a Parquet file of which nothing is read ahead, and the first row of each group, with the end."""
    import pyarrow.parquet as pq

    opened = BucketPath(path).open() if is_in_bucket(path) else path
    try:
        file = pq.ParquetFile(opened, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True)
    except ConnectionError:
        raise
    except Exception as error:  # of broken bytes, as in `_values`
        raise ValueError(f"{path} cannot be read as Parquet: {str(error)[:200]}. Download the file again.") from error
    starts = [0]
    for group in range(file.metadata.num_row_groups):
        starts.append(starts[-1] + file.metadata.row_group(group).num_rows)
    return file, starts
