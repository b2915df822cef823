"""Sizes that the pages of a Parquet file state. Its footer may lie about them; the decompressor believes the pages."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from reward_model.locations import Location

_FIRST_READ, _LARGEST_HEADER = 1 << 10, 1 << 24
"""Bytes of a page's header, which may hold statistics: those read first, and as many as Arrow accepts."""
_PADDING = 100
"""Bytes that Arrow reads beyond the stated end of a column in files of old writers (PARQUET-816)."""
_PREFIXES = 7
"""Encoding DELTA_BYTE_ARRAY: a text is stored as the length of what it shares with the one before, and the rest."""
_DICTIONARY = 7
_ENCODING = {5: 2, _DICTIONARY: 2, 8: 4}
"""Fields of PageHeader that describe a data page, a dictionary and a data page of version 2; in each, the field of its
encoding. Field 1 of each is the number of values."""


class _Page(NamedTuple):
    num_bytes: int
    """Bytes once it is decompressed."""
    num_stored_bytes: int
    is_dictionary: bool
    num_values: int
    encoding: int


@dataclass
class ColumnPages:
    """What the pages of one column state, in all row groups."""

    path: str
    is_list: bool
    """True if a row can have many values."""
    kind: str
    """Physical type, such as BYTE_ARRAY."""
    fixed_length: int
    """Bytes of each value of FIXED_LEN_BYTE_ARRAY."""
    num_values: int = 0
    num_bytes: int = 0
    """Bytes of all pages once they are decompressed."""
    largest_dictionary: int = 0
    largest_of_prefixes: int = 0
    """Bytes of the largest page in which texts share their starts; 0 without one."""

    def largest_batch(self, rows: int) -> int:
        """Return the bytes that `rows` rows may take in memory beyond those of the pages: values that share bytes."""
        if self.kind == "FIXED_LEN_BYTE_ARRAY":
            shared = self.fixed_length
        else:
            shared = max(self.largest_dictionary, self.largest_of_prefixes) if self.kind == "BYTE_ARRAY" else 0
        return shared * (self.num_values if self.is_list else min(rows, self.num_values))


def read_pages(path: Location, metadata: Any, columns: Collection[str]) -> list[ColumnPages]:
    """Return what the pages of some columns state, read from the header of each page, as the footer places them.

    Raises ValueError for a header that is not one, by the definitions of parquet.thrift.
    """
    found: list[ColumnPages] = []
    with path.open("rb") as file:
        for index in range(metadata.num_columns):
            column = metadata.schema.column(index)
            if column.path.partition(".")[0] not in columns:
                continue
            pages = ColumnPages(column.path, column.max_repetition_level > 0, column.physical_type, column.length)
            for group in range(metadata.num_row_groups):
                chunk = metadata.row_group(group).column(index)
                for page in _pages(file, *_place(chunk)) if chunk.num_values else ():
                    _add(pages, page)
            found.append(pages)
    return found


def _place(chunk: Any) -> tuple[int, int]:
    """Return the first byte of a column in a row group, and the number of its bytes."""
    starts = [chunk.data_page_offset, chunk.dictionary_page_offset or chunk.data_page_offset]
    return min(starts), chunk.total_compressed_size


def _add(pages: ColumnPages, page: _Page) -> None:
    pages.num_bytes += page.num_bytes
    if page.is_dictionary:
        pages.largest_dictionary = max(pages.largest_dictionary, page.num_bytes)
    else:
        pages.num_values += page.num_values
    if page.encoding == _PREFIXES:
        pages.largest_of_prefixes = max(pages.largest_of_prefixes, page.num_bytes)


def _pages(file: BinaryIO, start: int, size: int) -> Iterator[_Page]:
    """Yield the pages from byte `start` on; the header of each is followed by as many bytes as it states."""
    at, end = start, start + size
    while at < end + _PADDING:
        try:
            header, length = _read_header(file, at)
            page = _page(header)
        except ValueError as error:
            if at >= end:
                return
            raise ValueError(f"byte {at:,} does not begin a page: {error}") from error
        yield page
        at += length + page.num_stored_bytes


def _read_header(file: BinaryIO, at: int) -> tuple[dict[int, Any], int]:
    """Return the fields of the PageHeader at a byte, by their numbers, and its length."""
    size = _FIRST_READ
    while True:
        file.seek(at)
        reader = _CompactReader(file.read(size))
        try:
            header = reader.struct()
            break
        except IndexError as error:
            if len(reader.data) < size or size == _LARGEST_HEADER:
                raise ValueError(
                    "the file ends in its header" if size < _LARGEST_HEADER else "its header is too long"
                ) from error
            size = min(4 * size, _LARGEST_HEADER)
    return header, reader.at


def _page(header: Mapping[int, Any]) -> _Page:
    """Return what a PageHeader states; ValueError if it lacks something or states a negative number."""
    field = next((field for field in _ENCODING if field in header), None)
    try:
        values, encoding = (header[field][1], header[field][_ENCODING[field]]) if field else (0, 0)  # 0: an index
        page = _Page(header[2], header[3], field == _DICTIONARY, values, encoding)
        if min(page.num_bytes, page.num_stored_bytes, page.num_values) < 0:
            raise ValueError(f"it states {page}")
    except (KeyError, TypeError) as error:
        raise ValueError("it does not state its bytes, values and encoding") from error
    return page


class _CompactReader:
    """Reader of a struct in Thrift's compact protocol; IndexError where the bytes end, ValueError for a foreign type.

    The header of a page has no lists, sets and maps.
    """

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Return the fields of a struct by their numbers; texts are left out."""
        if depth > 8:
            raise ValueError("its structs are nested too deeply")
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._integer()
            fields[number] = self._value(head & 15, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        match kind:
            case 1 | 2:
                return kind == 1
            case 3:
                return self._byte()
            case 4 | 5 | 6:
                return self._integer()
            case 7:
                return self._skip(8)
            case 8:
                return self._skip(self._varint())
            case 12:
                return self.struct(depth + 1)
            case _:
                raise ValueError(f"it has a field of type {kind}")

    def _byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("it has a number of over ten bytes")

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _skip(self, count: int) -> None:
        self.at += count
        if self.at > len(self.data):
            raise IndexError(self.at)
