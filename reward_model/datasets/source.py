"""A source of records: where its data files lie, how they are read, and the parts that are read side by side."""

# datasets has no usable types.
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from reward_model.datasets.containers import Container, Part, data_files, open_file, open_hub, open_image_folder
from reward_model.datasets.formats import Format
from reward_model.datasets.raw_records import parts_of_lines
from reward_model.datasets.stamp import DataFile
from reward_model.locations import BucketPath, Location, is_of_hub, location, version_in_bucket
from reward_model.stored_images import data_files_of_hub, open_hub_dataset

_CACHED_FROM = 2**18
"""Bytes of data files from which their records are kept in the cache."""
_PART_LINES, _PART_ROWS = 2**23, 2**17
"""Bytes of lines, and rows of a table, of a part. Parts do not depend on the machine."""
_VERSION = 3
"""Part of the key of cached records; to be raised when their conversion changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A source and how it is read."""

    form: Format
    path: str
    image_root: Location | None = None
    prefix: tuple[str, str] | None = None
    with_references: bool = False
    streaming: bool = False

    @property
    def is_folder(self) -> bool:
        """True for a folder of images."""
        return self.form.name == "image_folder"

    @property
    def is_table_of_hub(self) -> bool:
        """True if `datasets` loads the source, which is hf:ID@SPLIT."""
        return is_of_hub(self.path) and not self.streaming

    def locations(self) -> list[Location]:
        """Return the data files; none if the source is a table of the Hub or a folder of images."""
        if self.is_table_of_hub or self.is_folder:
            return []
        if is_of_hub(self.path):
            return list(map(location, data_files_of_hub(self.path)))
        return data_files(self.path)

    def files(self) -> list[DataFile]:
        """Return path, size and times of change of each data file."""
        return [_facts(path) for path in self.locations() if path.is_file()]

    def cache(self) -> Path | None:
        """Return the folder of the converted records; None for sources that are so small that they are read anew."""
        files: list[Any] = self.files()
        if self.is_table_of_hub:
            table = open_hub_dataset(self.path)
            if table.info.dataset_size is None or table.info.dataset_size < _CACHED_FROM:
                return None
            files = [table._fingerprint]
        elif sum(size for _, size, *_ in files) < _CACHED_FROM:
            return None
        # repr of a partial would name an address
        convert = getattr(self.form.convert, "keywords", {})
        options = convert, self.image_root, self.prefix, self.with_references
        key = repr((_VERSION, self.form.name, options, self.path, os.getcwd(), files))
        return Path(datasets.config.HF_DATASETS_CACHE) / "preferences" / hashlib.sha256(key.encode()).hexdigest()[:32]

    def parts(self) -> Iterator[Part]:
        """Yield parts of the source whose records, one after the other, are those of the source.

        A part is a whole file, some lines of a JSONL file, or some rows of a table. A format that merges records that
        follow one another is not divided within a file, and neither is a file in a bucket.
        """
        if self.is_folder:
            yield Part(0, self.path)
        elif self.is_table_of_hub:
            rows = len(open_hub_dataset(self.path))
            size = _PART_ROWS if self.form.group is iter else max(rows, 1)
            for start in range(0, max(rows, 1), size):
                yield Part(0, self.path, start, start + size)
        else:
            for number, path in enumerate(self.locations()):
                yield from self._parts_of_file(number, path)

    def _parts_of_file(self, number: int, path: Location) -> Iterator[Part]:
        if isinstance(path, BucketPath) or self.form.group is not iter or not path.is_file():
            yield Part(number, str(path))
        elif path.suffix == ".jsonl":
            for start, stop, before in parts_of_lines(path, _PART_LINES):
                yield Part(number, str(path), start, stop, before)
        elif path.suffix == ".parquet":
            rows = _num_rows(path)
            for start in range(0, max(rows, 1), _PART_ROWS):
                yield Part(number, str(path), start, start + _PART_ROWS)
        else:
            yield Part(number, str(path))

    def open(self, part: Part) -> Container:
        """Open a part. Raises FileNotFoundError without its file, and ValueError for an unknown suffix."""
        if self.is_folder:
            return open_image_folder(self.path)
        if self.is_table_of_hub:
            return open_hub(part, skip_columns=self.form.skip_columns)
        return open_file(part, skip_columns=self.form.skip_columns)


def _facts(path: Location) -> DataFile:
    if isinstance(path, BucketPath):
        version = hashlib.sha256(version_in_bucket(path.url).encode()).digest()
        return path.url, path.size(), int.from_bytes(version[:7]), 0
    info = path.stat()
    return str(path), info.st_size, info.st_mtime_ns, info.st_ctime_ns


def _num_rows(path: Path) -> int:
    """Return the rows of a Parquet file; 0 for a broken one, which is refused when it is read."""
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(path).num_rows
    except Exception:  # broken bytes cause a dozen exception types
        return 0
