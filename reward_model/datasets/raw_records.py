"""Splitting of JSON and JSONL files into raw records before they are parsed, so that one broken record spoils no other.

Python's json module parses all of a file or nothing, and accepts duplicate keys and NaN, which are refused here.
"""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from reward_model.datasets.fields import BadRecordError, shortened
from reward_model.datasets.json_list import JSONListError, split_list
from reward_model.locations import Location
from reward_model.text_files import parse_json

_MAX_LINE = 64 * 2**20
"""Longest line. A file with holes can claim any length at no cost."""


class RawRecord(NamedTuple):
    """A record as it is stored, not yet checked."""

    where: str
    """FILE:LINE, FILE:RECORD n, FILE:ROW n, or FILE:MEMBER of an archive."""
    source: bytes | Mapping[str, Any]
    """JSON source, or the fields of a row of a table."""
    block: int = -1
    """Number of the row group whose images can only be read together; -1 if each image can be read alone."""

    def fields(self) -> Mapping[str, Any]:
        """Return the named fields; raises BadRecordError if the source is not a JSON object."""
        return parse_object(self.source) if isinstance(self.source, bytes) else self.source


def read_json_lines(
    path: Location, *, start: int = 0, stop: int | None = None, num_before: int = 0
) -> Iterator[RawRecord]:
    """Yield the non-blank lines of a JSONL file, numbered from 1. Raises ValueError for a line of over 64 MiB.

    Those from byte `start` up to byte `stop`, if only these are wanted; `num_before` is the number of lines before.
    """
    with path.open("rb") as file:
        file.seek(start)
        number, left = num_before, math.inf if stop is None else stop - start
        # Only a line feed ends a line: JSON strings may contain U+2028 and U+0085, at which str.splitlines splits.
        while left > 0 and (line := file.readline(_MAX_LINE + 1)):
            number += 1
            left -= len(line)
            if len(line) > _MAX_LINE:
                raise ValueError(f"{path}:{number} has more than {_MAX_LINE:,} bytes; a line is one record.")
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield RawRecord(f"{path}:{number}", line.removesuffix(b"\n"))


def parts_of_lines(path: Path, size: int) -> Iterator[tuple[int, int | None, int]]:
    """Yield parts of a file of lines, of about `size` bytes: first byte, the one behind the last, and lines before.

    The last part ends with the file, and begins no later than a line of over 64 MiB.
    """
    start = num_before = num_lines = at = 0
    with path.open("rb") as file:
        while chunk := file.read(size):
            at += len(chunk)
            num_lines += chunk.count(b"\n")
            rest = b"" if chunk.endswith(b"\n") else file.readline(_MAX_LINE)
            at += len(rest)
            if len(rest) == _MAX_LINE:
                break
            num_lines += rest.endswith(b"\n")
            yield start, at, num_before
            start, num_before = at, num_lines
        else:
            if at:
                return
    yield start, None, num_before


def read_json_list(path: Location) -> Iterator[RawRecord]:
    """Yield the elements of a JSON file that is one list, numbered from 1. Raises ValueError where it is not."""
    try:
        with path.open("rb") as file:
            for number, element in enumerate(split_list(file), start=1):
                yield RawRecord(f"{path}:RECORD {number}", element.encode())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error.reason} at byte {error.start}. Save it as UTF-8.") from error
    except JSONListError as error:
        raise ValueError(
            f"{path} is not a JSON list: {error}. A .json file must be one list of records in square brackets; "
            f"give a file with one record a line the suffix .jsonl."
        ) from error
    except RecursionError as error:
        raise ValueError(f"{path} is not a list of records: its values are nested too deeply.") from error


def parse_object(source: bytes) -> dict[str, Any]:
    """Return the JSON object of a record; raises BadRecordError for invalid JSON, duplicate keys, and NaN."""
    value = parse_value(source)
    if not isinstance(value, dict):
        raise BadRecordError(
            f"{shortened(value)} is not a record; it must be a JSON object with named fields: {{...}}."
        )
    return value


def parse_value(source: bytes) -> Any:
    """Return the JSON value of a record; raises BadRecordError for invalid JSON, duplicate keys, and NaN."""
    try:
        return parse_json(source.decode(), make_object=_refuse_duplicate_keys)
    except BadRecordError:
        raise
    except json.JSONDecodeError as error:
        raise BadRecordError(f"not JSON: {error.msg}: column {error.colno}, near {_excerpt(error)}.") from error
    except UnicodeDecodeError as error:
        raise BadRecordError(
            f"not UTF-8: {error.reason} at byte {error.start}: {shortened(source[error.start :])}. Save it as UTF-8."
        ) from error
    except ValueError as error:  # a number of hundreds of digits, hundreds of nested brackets
        raise BadRecordError(f"{shortened(source)} cannot be parsed as JSON: {error}.") from error


def _excerpt(error: json.JSONDecodeError) -> str:
    return shortened(error.doc[max(0, error.pos - 20) : error.pos + 50])


def _refuse_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in pairs:
        if key in fields:
            both = f"{shortened(fields[key])} and {shortened(value)}"
            raise BadRecordError(f"the key {shortened(key)} is given twice, with {both}; keep one.")
        fields[key] = value
    return fields
