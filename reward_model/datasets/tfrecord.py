"""TFRecord files of `tf.train.Example` messages, read without TensorFlow.

    file    = (length: uint64, checksum of length: uint32, an Example of that length, its checksum: uint32)*
    Example = {features: {feature: map from a name to bytes_list, float_list or int64_list}}

Numbers are little-endian, checksums are masked CRC-32C, and both are compared.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection, Iterator
from itertools import islice
from typing import Any, BinaryIO

import numpy as np

from reward_model.datasets.raw_records import RawRecord
from reward_model.locations import Location
from reward_model.stored_images import MAX_BYTES, StoredImage

Wire = Iterator[tuple[int, int | memoryview]]
"""The fields of a protobuf message: number, and a varint or the bytes of the value."""

_MAX_VALUES = 1 << 20
"""Most features and values of an Example together: as Python objects they take up to 40 times their bytes."""


def read_tfrecord(path: Location, *, skip_columns: Collection[str]) -> Iterator[RawRecord]:
    """Yield the Examples of a TFRecord file, numbered from 1, without the features `skip_columns`.

    A feature with one value gives this value, one with several a list. Bytes that are UTF-8 become strings, and others
    a `StoredImage`: their place in the file.

    Raises ValueError, with the number of the Example, if the file is broken.
    """
    number = 0
    with path.open("rb") as file:
        while head := file.read(12):
            number += 1
            start = file.tell()
            try:
                content = _content(file, head)
                fields = _example(content, skip_columns)
            except (ValueError, IndexError, struct.error) as error:
                raise ValueError(f"{path}:RECORD {number} is not an Example of a TFRecord: {error}.") from error
            yield RawRecord(
                f"{path}:RECORD {number}", {key: _stored(v, path, content, start) for key, v in fields.items()}
            )


def masked_crc32c(data: bytes) -> int:
    """Return CRC-32C (Castagnoli) as TFRecord stores it: rotated right by 15 bits, plus 0xa282ead8."""
    from google_crc32c import value

    crc = value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _stored(value: Any, path: Location, content: bytes, start: int) -> Any:
    """Return a value with the place in the file of its bytes, which are views of the Example that starts there."""
    match value:
        case list():
            return [_stored(one, path, content, start) for one in value]
        case memoryview():
            first, base = (np.frombuffer(data, np.uint8).ctypes.data for data in (value, content))
            return StoredImage(str(path), start + first - base, len(value))
        case _:
            return value


def _content(file: BinaryIO, head: bytes) -> bytes:
    if len(head) < 12:
        raise ValueError(f"the file ends after {len(head)} of the 12 bytes of a header")
    length, check = struct.unpack("<QI", head)
    _compare(check, head[:8], "length")
    if length > MAX_BYTES:
        raise ValueError(f"its length is {length:,} bytes; an Example may have at most {MAX_BYTES:,}")
    left = os.fstat(file.fileno()).st_size - file.tell()
    if left < length + 4:
        raise ValueError(
            f"the file ends {left:,} bytes after its header, which announces {length:,} and a checksum of 4"
        )
    content, (check,) = file.read(length), struct.unpack("<I", file.read(4))
    _compare(check, content, "content")
    return content


def _compare(check: int, data: bytes, name: str) -> None:
    if check != (right := masked_crc32c(data)):
        raise ValueError(f"the checksum of its {name} is {check:#x}, not {right:#x}")


def _example(data: bytes, skip_columns: Collection[str]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    left = _MAX_VALUES
    for features in _messages(memoryview(data), 1):
        for entry in _messages(features, 1):
            name = b"".join(_messages(entry, 1)).decode()
            if name not in skip_columns:
                all_values = (value for feature in _messages(entry, 2) for value in _values(feature))
                values = list(islice(all_values, left))
                left -= len(values) + 1
                fields[name] = values[0] if len(values) == 1 else values
            if left <= 0:
                raise ValueError(f"it has more than {_MAX_VALUES:,} features and values")
    return fields


def _values(feature: memoryview) -> Iterator[Any]:
    for kind, values in _wire(feature):
        if not isinstance(values, memoryview):
            raise ValueError(f"a list of values is the number {values}")
        for _, value in _wire(values):
            match kind, value:
                case 1, memoryview():
                    yield _text_or_bytes(value)
                case 2, memoryview():  # one, or many that are packed
                    yield from (number for (number,) in struct.iter_unpack("<f", value))
                case 3, memoryview():
                    yield from map(_signed, _varints(value))
                case 3, int():
                    yield _signed(value)
                case _:
                    raise ValueError(f"a value of kind {kind} is {value!r:.40}")


def _messages(data: memoryview, number: int) -> Iterator[memoryview]:
    for found, value in _wire(data):
        if found == number:
            if not isinstance(value, memoryview):
                raise ValueError(f"field {number} is the number {value}; it must be a message")
            yield value


def _wire(data: memoryview) -> Wire:
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        match tag & 7:
            case 0:
                value, position = _varint(data, position)
                yield tag >> 3, value
                continue
            case 1 | 5 as kind:
                size = 8 if kind == 1 else 4
            case 2:
                size, position = _varint(data, position)
            case kind:
                raise ValueError(f"wire type {kind} is unknown")
        if position + size > len(data):
            raise ValueError(f"a field of {size} bytes has {len(data) - position}")
        yield tag >> 3, data[position : position + size]
        position += size


def _varints(data: memoryview) -> Iterator[int]:
    position = 0
    while position < len(data):
        value, position = _varint(data, position)
        yield value


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while data[position] & 0x80:
        if shift > 56:
            raise ValueError("a varint has more than 10 bytes")
        value |= (data[position] & 0x7F) << shift
        position, shift = position + 1, shift + 7
    return value | data[position] << shift, position + 1


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _text_or_bytes(value: memoryview) -> str | memoryview:
    try:
        return str(value, "utf-8")
    except UnicodeDecodeError:
        return value
