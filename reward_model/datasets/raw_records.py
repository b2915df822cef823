"""From bytes to JSON objects: records are cut out of a file first, so that a broken one spoils no other."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from reward_model.datasets.fields import BadRecordError, shortened


class RawRecord(NamedTuple):
    """A record as it stands in its file, not yet judged."""

    where: str
    """FILE:LINE, FILE:RECORD n, FILE:ROW n or FILE:NAME OF A MEMBER."""
    source: bytes | Mapping[str, Any]
    """JSON, or the fields of a table's row."""

    def fields(self) -> Mapping[str, Any]:
        """Its named fields; BadRecordError if there are none."""
        return parse_object(self.source) if isinstance(self.source, bytes) else self.source


def read_json_lines(path: Path) -> list[RawRecord]:
    """The lines of a JSONL file that are not blank, numbered from 1."""
    # Only a line feed ends a line: JSON strings may hold U+2028 and U+0085 as they are, at which str.splitlines cuts.
    lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    return [RawRecord(f"{path}:{number}", line) for number, line in enumerate(lines, start=1) if line.strip()]


def read_json_list(path: Path) -> list[RawRecord]:
    """The elements of a JSON file that is one list, numbered from 1. ValueError if the file as a whole is broken."""
    try:
        elements = list(_elements(path.read_bytes().removeprefix(codecs.BOM_UTF8).decode()))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error.reason} at byte {error.start}. Save it as UTF-8.") from error
    except json.JSONDecodeError as error:
        cause = f"{error.msg}: line {error.lineno}, column {error.colno}, near {_around(error)}"
        raise ValueError(
            f"{path} is not a JSON list: {cause}. A .json file is one list of records in square brackets; "
            f"give a file with one record a line the ending .jsonl."
        ) from error
    except RecursionError as error:
        raise ValueError(f"{path} is no list of records: it is nested too deeply to be read.") from error
    return [RawRecord(f"{path}:RECORD {number}", text.encode()) for number, text in enumerate(elements, start=1)]


def parse_object(source: bytes) -> dict[str, Any]:
    """The JSON object that a record is; stricter than Python's reader, which lets twin keys and NaN pass."""
    try:
        value = json.loads(source.decode(), object_pairs_hook=_refuse_duplicate_keys, parse_constant=_refuse_constant)
    except BadRecordError:
        raise
    except json.JSONDecodeError as error:
        raise BadRecordError(f"not JSON: {error.msg}: column {error.colno}, near {_around(error)}.") from error
    except UnicodeDecodeError as error:
        raise BadRecordError(
            f"not UTF-8: {error.reason} at byte {error.start}: {shortened(source[error.start :])}. Save it as UTF-8."
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested thousands deep
        raise BadRecordError(f"{shortened(source)} cannot be read as JSON: {error}.") from error
    if not isinstance(value, dict):
        raise BadRecordError(f"{shortened(value)} is no record; it must be a JSON object with named fields: {{...}}.")
    return value


def _elements(text: str) -> Iterator[str]:
    """The source of every element of a JSON list: its syntax is checked, its numbers are left as they are."""
    decoder = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str)
    position = _past_blanks(text, 0)
    if not text.startswith("[", position):
        raise json.JSONDecodeError("Expecting '['", text, position)
    position = _past_blanks(text, position + 1)
    closed = text.startswith("]", position)
    while not closed:
        _, end = decoder.raw_decode(text, position)
        yield text[position:end]
        end = _past_blanks(text, end)
        closed = text.startswith("]", end)
        if not closed and not text.startswith(",", end):
            raise json.JSONDecodeError("Expecting ',' or ']'", text, end)
        position = end if closed else _past_blanks(text, end + 1)
    if (rest := _past_blanks(text, position + 1)) != len(text):
        raise json.JSONDecodeError("Expecting the end of the file", text, rest)


def _around(error: json.JSONDecodeError) -> str:
    return shortened(error.doc[max(0, error.pos - 20) : error.pos + 50])


def _past_blanks(text: str, position: int) -> int:
    blanks = re.compile(r"[ \t\r\n]*").match(text, position)
    assert blanks is not None
    return blanks.end()


def _refuse_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in pairs:
        if key in fields:
            both = f"{shortened(fields[key])} and {shortened(value)}"
            raise BadRecordError(f"the key {shortened(key)} stands twice, with {both}; keep one.")
        fields[key] = value
    return fields


def _refuse_constant(name: str) -> NoReturn:
    raise BadRecordError(f"{name} is no JSON; numbers must be finite.")
