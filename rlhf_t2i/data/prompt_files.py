"""Files and data sets of prompts, read as rows: each has a text under "prompt", and may have other fields.

.txt              one prompt a line
.jsonl            one JSON object a line (GenEval's prompts are such a file)
.json             one list of texts or of objects
.csv              comma-separated, with the names of the columns in the first line
.parquet          a table
hf:ID@SPLIT       a data set on the Hub, or a folder that `datasets` can load
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from reward_model.datasets.fields import BadRecordError, shortened
from reward_model.datasets.parquet import read_hub_dataset, read_parquet
from reward_model.datasets.raw_records import RawRecord, parse_object, parse_value, read_json_lines, read_json_list
from rlhf_t2i.prompt_rows import Prompt, as_row

HUB_PREFIX = "hf:"
SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".parquet")

_NOT_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]|\r(?!\n)")
"""Control characters, halves of a surrogate pair, and a carriage return that no line feed follows."""


def read_rows(source: str) -> list[Prompt]:
    """Return the rows of a file, whose suffix decides its format, or of a data set `hf:ID@SPLIT`.

    A prompt is the text under "prompt" without surrounding blanks; a row with an "image", a path relative to the file,
    is an `EditPrompt`. Its metadata are all fields as they are stored; columns of bytes and images are left out, what
    JSON does not have, such as a date, becomes text, and a null of a table is a missing field. Raises
    FileNotFoundError, or ValueError, with file and line, for an unknown suffix, a row without a prompt, a prompt with
    characters that are no text, and a source that is empty, broken or not UTF-8.
    """
    if source.startswith(HUB_PREFIX):
        raw: Iterator[RawRecord] = read_hub_dataset(source, skip_columns=(), with_bytes=False)
    else:
        raw = _read_file(source)
    folder = Path() if source.startswith(HUB_PREFIX) else Path(source).parent
    rows = [_row(record, folder) for record in raw]
    if not rows:
        raise ValueError(f"The prompt file {source!r} holds no prompt.")
    return rows


def _read_file(source: str) -> Iterator[RawRecord]:
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no prompt file {source!r}. Give the path of a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file "
            f"(.txt: one prompt a line; the others: a text under 'prompt'), hf:ID@SPLIT for a data set of the Hub, or "
            f"'shapes' or 'words' for the toy world."
        )
    match path.suffix.lower():
        case ".txt":
            return _text_lines(path)
        case ".jsonl":
            return (RawRecord(*line) for line in read_json_lines(path))
        case ".json":
            return (_list_element(element) for element in read_json_list(path))
        case ".csv":
            return _csv_rows(path)
        case ".parquet":
            return read_parquet(path, skip_columns=(), with_bytes=False)
        case suffix:
            raise ValueError(
                f"The prompt file {source!r} has the suffix {suffix!r}; it must be one of {', '.join(SUFFIXES)}."
            )


def _text_lines(path: Path) -> Iterator[RawRecord]:
    for number, line in enumerate(_decoded(path).split("\n"), start=1):
        if line.strip():
            yield RawRecord(f"{path}:{number}", {"prompt": line})


def _list_element(element: RawRecord) -> RawRecord:
    """Return an element of a JSON list with its fields; a text is a prompt without other fields."""
    assert isinstance(element.source, bytes)
    try:
        value = parse_value(element.source)
    except BadRecordError:
        return element  # refused as a row, with its place
    return RawRecord(element.where, {"prompt": value}) if isinstance(value, str) else element


def _csv_rows(path: Path) -> Iterator[RawRecord]:
    """Yield the rows of a CSV file; `where` has the last line of a row whose cells span several."""
    # Only a line feed ends a line, so that the parser refuses a carriage return outside of quotes.
    reader = csv.reader(io.StringIO(_decoded(path), newline="\n"), strict=True, skipinitialspace=True)
    try:
        columns = next(reader, [])
        if columns and columns.count("prompt") != 1:
            raise ValueError(
                f"{path}:1 names {columns.count('prompt')} of {len(columns)} columns 'prompt', not 1: "
                f"{shortened(columns)}. The first line must name the columns, separated by commas."
            )
        for cells in reader:
            if cells and len(cells) != len(columns):
                raise ValueError(
                    f"{path}:{reader.line_num} has {len(cells)} cells; the file has {len(columns)} columns."
                )
            if cells:
                yield RawRecord(f"{path}:{reader.line_num}", dict(zip(columns, cells, strict=True)))
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num} is not CSV: {error}.") from error


def _decoded(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"The prompt file {str(path)!r} is not UTF-8: {error.reason} at byte {error.start}. Save it as UTF-8."
        ) from error


def _row(record: RawRecord, folder: Path) -> Prompt:
    try:
        fields = parse_object(record.source) if isinstance(record.source, bytes) else _as_json(record.source)
    except BadRecordError as error:
        raise ValueError(f"{record.where}: {error}") from error
    if "prompt" not in fields:
        raise ValueError(f"{record.where} has no 'prompt'; its fields are {shortened(list(fields))}.")
    prompt = fields["prompt"]
    if not (isinstance(prompt, str) and prompt.strip()):
        raise ValueError(f"{record.where} has no text under 'prompt': {shortened(prompt)}.")
    prompt = prompt.strip()
    if found := _NOT_TEXT.search(prompt):
        raise ValueError(
            f"{record.where}: character {found.start() + 1} of the prompt {shortened(prompt)} is "
            f"U+{ord(found[0]):04X}, {_named(found[0])}. Remove it."
        )
    return as_row(prompt, fields, folder=folder, where=record.where)


def _as_json(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a row of a table, with texts for values that JSON does not have and without nulls.

    Tables have nulls, at any depth, where a JSON object has no such field.
    """
    return json.loads(json.dumps(dict(row), default=str), object_hook=_without_nulls)


def _without_nulls(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _named(character: str) -> str:
    if character == "\r":
        return "a carriage return without a line feed"
    return "half of a surrogate pair" if character >= "\ud800" else "a control character"
