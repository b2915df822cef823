"""Records as an Arrow table, mapped into memory, so that a million take no memory of a process."""

# pyarrow has no usable types.
# pyright: reportAttributeAccessIssue=false, reportUnknownMemberType=false, reportPrivateImportUsage=false
# pyright: reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, overload

import numpy as np
import pyarrow as pa

from reward_model.datasets.keys import prompt_key, text_key
from reward_model.datasets.scratch import cache_folder, filled, slices, taken
from reward_model.stored_images import ImageSource, StoredImage
from reward_model.types import LabelledImage, PreferencePair, Record

_IMAGE = pa.struct([("file", pa.string()), ("start", pa.int64()), ("size", pa.int64()), ("column", pa.string())])
SCHEMA = pa.schema([
    ("winner", _IMAGE),  # the image of a label
    ("loser", _IMAGE),  # null of a label
    ("winner_prompt", pa.string()),
    ("loser_prompt", pa.string()),  # null if it is the winner's
    ("label", pa.int8()),  # null of a pair
    ("tie", pa.bool_()),
    ("rating_gap", pa.float64()),
    ("reference", pa.string()),  # path of the image that was edited
    ("where", pa.string()),
    ("tags", pa.string()),  # JSON; null without tags
    ("block", pa.int64()),  # rows of one block have images that are read together; -1 is none
    # 64 bits that stand for a text or an image, so that a start computes no hash; those of a label twice
    *((f"{side}_{what}", pa.uint64()) for what in ("prompt_key", "words", "image_key") for side in ("winner", "loser")),
])  # fmt: skip
_OF_RECORDS = SCHEMA.names[: SCHEMA.get_field_index("block")]
"""Columns that make a record."""
_ROWS = 2**13
"""Records that are in memory at once in a pass over a table."""


class TableWriter:
    """Writes records to an Arrow stream: a file, or a buffer."""

    def __init__(self, sink: Any) -> None:
        self._writer, self._rows = pa.ipc.new_stream(sink, SCHEMA), list[tuple[Any, ...]]()
        self.count = 0

    def add(self, record: Record, *, block: int = -1) -> None:
        """Append a record."""
        self._rows.append((*_row(record), block))
        self.count += 1
        if len(self._rows) == _ROWS:
            self._flush()

    def write(self, records: Iterable[Record]) -> None:
        """Append records, of which there are no more."""
        for record in records:
            self.add(record)
        self.close()

    def close(self) -> None:
        """Write the rest."""
        self._flush()
        self._writer.close()

    def append(self, batches: Iterable[pa.RecordBatch]) -> None:
        """Append what another writer wrote."""
        self._flush()
        for batch in batches:
            self._writer.write_batch(batch)
            self.count += len(batch)

    def _flush(self) -> None:
        if self._rows:
            columns = [list(column) for column in zip(*self._rows, strict=True)]
            columns += _keys(columns)
            arrays = [_array(c, field.type) for c, field in zip(columns, SCHEMA, strict=True)]
            self._writer.write_batch(pa.record_batch(arrays, schema=SCHEMA))
            self._rows.clear()


def _keys(columns: Sequence[list[Any]]) -> list[list[int]]:
    """Return the keys of the prompts, of their words and of the images of some rows, of each side."""
    winners, losers, prompts, loser_prompts = columns[:4]
    found = list[list[int]]()
    for key_of in (text_key, prompt_key):
        keys = [key_of(prompt) for prompt in prompts]
        other = zip(keys, loser_prompts, strict=True)
        found += [keys, [key if prompt is None else key_of(prompt) for key, prompt in other]]
    images = [_image_key(image) for image in winners]
    other = zip(images, losers, strict=True)
    return [*found, images, [key if image is None else _image_key(image) for key, image in other]]


def _image_key(image: tuple[Any, ...]) -> int:
    file, start, size, column = image
    return text_key(file if start is None else f"{file}\0{start}\0{size}\0{column}")


def _array(values: list[Any], kind: pa.DataType) -> pa.Array:
    if kind != _IMAGE:
        return pa.array(values, kind)
    parts = list(zip(*((None,) * 4 if value is None else value for value in values), strict=True))
    arrays = [pa.array(part, field.type) for part, field in zip(parts, _IMAGE, strict=True)]
    return pa.StructArray.from_arrays(arrays, fields=list(_IMAGE), mask=pa.array([v is None for v in values]))


class RecordTable(Sequence[Record]):
    """A sequence of records that are made when they are asked for."""

    def __init__(
        self, parts: Sequence[pa.RecordBatch], rows: np.ndarray | None = None, sources: np.ndarray | None = None
    ) -> None:
        """Take the rows of all parts, or the given ones of them in this order; `sources` are those of the parts."""
        self._parts, self._rows = parts, rows
        self._sources = np.zeros(len(parts), np.int64) if sources is None else sources
        self._starts = np.cumsum([0, *map(len, parts)])

    @classmethod
    def open(cls, path: Path) -> Self:
        """Map a file that a `TableWriter` wrote."""
        return cls(list(pa.ipc.open_stream(pa.memory_map(str(path)))))

    @classmethod
    def from_buffer(cls, sink: pa.BufferOutputStream) -> Self:
        """Return the table that a `TableWriter` wrote to a buffer."""
        return cls(list(pa.ipc.open_stream(sink.getvalue())))

    @classmethod
    def of(cls, records: Iterable[Record]) -> RecordTable:
        """Return records as a table in memory; a table as it is."""
        if isinstance(records, RecordTable):
            return records
        sink = pa.BufferOutputStream()
        TableWriter(sink).write(records)
        return cls.from_buffer(sink)

    @classmethod
    def in_file(cls, records: Iterable[Record]) -> RecordTable:
        """Return records as a table in a file of the cache folder of `datasets`, which is gone with it."""
        with tempfile.NamedTemporaryFile(dir=cache_folder()) as file, pa.OSFile(file.name, "wb") as sink:
            TableWriter(sink).write(records)
            sink.flush()
            return cls.open(Path(file.name))

    @staticmethod
    def concatenate(tables: Sequence[RecordTable]) -> RecordTable:
        """Return the records of all tables one after the other, each a source of its own, without a copy of them."""
        starts = np.cumsum([0, *(table._starts[-1] for table in tables)])
        sources = np.repeat(np.arange(len(tables)), [len(table._parts) for table in tables])
        parts = [part for table in tables for part in table._parts]
        if all(table._rows is None for table in tables):
            return RecordTable(parts, None, sources)
        rows = (start + part for start, table in zip(starts, tables, strict=False) for part in table._row_parts())
        return RecordTable(parts, filled(rows, sum(map(len, tables))), sources)

    def __len__(self) -> int:
        return int(self._starts[-1]) if self._rows is None else len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> RecordTable: ...
    def __getitem__(self, index: int | slice) -> Record | RecordTable:
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        row = index % len(self) if self._rows is None else self._rows[index]
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        return _record(self._parts[part].select(_OF_RECORDS).slice(row - self._starts[part], 1).to_pylist()[0])

    def __iter__(self) -> Iterator[Record]:
        for batch in self.batches():
            yield from map(_record, batch.to_pylist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        return f"RecordTable of {len(self):,} records"

    def select(self, rows: np.ndarray) -> RecordTable:
        """Return some rows, in this order, without a copy of the records."""
        return RecordTable(self._parts, rows if self._rows is None else taken(self._rows, rows), self._sources)

    def sources(self) -> np.ndarray:
        """Return which of the tables that were concatenated each record is of, from 0, (N,)."""
        return filled((self._sources[self._parts_of(rows)] for rows in self._row_parts()), len(self))

    def batches(self, *columns: str) -> Iterator[pa.RecordBatch]:
        """Yield the rows, or some columns of them, in order and in parts that are in memory one at a time."""
        names = list(columns) or _OF_RECORDS
        if self._rows is None:
            yield from (part.select(names) for part in self._parts)
            return
        for rows in self._row_parts():
            part_of = self._parts_of(rows)
            for run in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(part_of)) + 1):
                part = part_of[run[0]]
                yield self._parts[part].select(names).take(pa.array(rows[run] - self._starts[part]))

    def column(self, name: str, *, null: Any = None) -> np.ndarray:
        """Return a column of numbers; `null` replaces missing ones."""
        kind = SCHEMA.field(name).type.to_pandas_dtype()
        return filled(self.column_parts(name, null=null), len(self), kind)

    def column_parts(self, name: str, *, null: Any = None) -> Iterator[np.ndarray]:
        """Yield a column of numbers in parts; `null` replaces missing ones."""
        for batch in self.batches(name):
            part = batch.column(0)
            yield (part if null is None else part.fill_null(null)).to_numpy(zero_copy_only=False)

    def first_of_each_kind(self) -> RecordTable:
        """Return the first label, the first tie and the first pair that is none, in their order."""
        first, start = [-1, -1, -1], 0
        for label, tie in zip(self.column_parts("label", null=-1), self.column_parts("tie"), strict=True):
            for kind, mask in enumerate((label >= 0, tie, ~((label >= 0) | tie))):
                if first[kind] < 0 and mask.any():
                    first[kind] = start + int(mask.argmax())
            if min(first) >= 0:
                break
            start += len(label)
        return self.select(np.array(sorted(row for row in first if row >= 0), np.int64))

    def texts(self, name: str, rows: np.ndarray) -> Iterator[str]:
        """Yield a column of texts of some rows."""
        for batch in self.select(rows).batches(name):
            yield from batch.column(0).to_pylist()

    def prompts(self) -> Iterator[tuple[list[str], list[str | None]]]:
        """Yield the winners' prompts, or those of labels, and the losers' where they differ, in parts."""
        for batch in self.batches("winner_prompt", "loser_prompt"):
            yield batch.column(0).to_pylist(), batch.column(1).to_pylist()

    def _row_parts(self) -> Iterator[np.ndarray]:
        """Yield the numbers of the rows among those of all parts."""
        for part in slices(len(self)):
            yield np.arange(part.start, part.stop) if self._rows is None else self._rows[part]

    def _parts_of(self, rows: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._starts, rows, side="right") - 1


def _row(record: Record) -> tuple[Any, ...]:
    tags = json.dumps(record.tags, ensure_ascii=False, separators=(",", ":")) if record.tags else None
    if isinstance(record, LabelledImage):
        return _image_row(record.image), None, record.prompt, None, record.label, False, 0.0, None, record.where, tags
    loser_prompt = None if record.loser_prompt == record.winner_prompt else record.loser_prompt
    images, prompts = (_image_row(record.winner), _image_row(record.loser)), (record.winner_prompt, loser_prompt)
    reference = None if record.reference is None else str(record.reference)
    return *images, *prompts, None, record.tie, record.rating_gap, reference, record.where, tags


def _image_row(image: ImageSource) -> tuple[str | int | None, ...]:
    return (
        (str(image), None, None, None)
        if isinstance(image, Path)
        else (image.file, image.start, image.size, image.column)
    )


def _record(row: dict[str, Any]) -> Record:
    winner, prompt = _image(row["winner"]), row["winner_prompt"]
    tags = {} if row["tags"] is None else {by: tuple(values) for by, values in json.loads(row["tags"]).items()}
    if row["label"] is not None:
        return LabelledImage(winner, prompt, row["label"], row["where"], tags)
    loser_prompt = prompt if row["loser_prompt"] is None else row["loser_prompt"]
    reference = None if row["reference"] is None else Path(row["reference"])
    kind = {"tie": row["tie"], "rating_gap": row["rating_gap"], "where": row["where"], "reference": reference}
    return PreferencePair(winner, _image(row["loser"]), prompt, loser_prompt, **kind, tags=tags)


def _image(row: dict[str, Any]) -> ImageSource:
    return Path(row["file"]) if row["start"] is None else StoredImage(**row)
