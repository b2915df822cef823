"""Reading of the files of published test sets, with the file and record in every error, and checks of their images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reward_model.benchmarks.types import Image
from reward_model.datasets.fields import BadRecordError, shortened
from reward_model.datasets.images import ImageFinder, flaw_of_image
from reward_model.datasets.parquet import read_parquet
from reward_model.datasets.raw_records import parse_object, read_json_lines, read_json_list
from reward_model.stored_images import ImageSource, StoredImage

_MAX_OBJECT = 256 * 2**20
"""Bytes of a JSON object, which is read as a whole; lists of records are split as they are read."""
Fields = Mapping[str, Any]
TakeImage = Callable[[object, str], Image]
"""Returns the image of a field's value; the field's name is for the message of BadRecordError."""


def find_file(path: Path, *names: str, benchmark: str) -> Path:
    """Return the annotation file: the path itself, or the first of `names` that is in this folder."""
    return find_files(path, *names, benchmark=benchmark)[0]


def find_files(path: Path, *names: str, benchmark: str) -> list[Path]:
    """Return the path itself, or the files of the first pattern in `names` ("data/test-*.parquet") with any, sorted.

    Raises FileNotFoundError if there is none.
    """
    if path.is_file():
        return [path]
    for name in names if path.is_dir() else ():
        if found := sorted(path.glob(name)):
            return found
    problem = "is a folder without any of" if path.is_dir() else "does not exist; it must be a file, or a folder with"
    raise FileNotFoundError(f"{benchmark}: {path} {problem} {', '.join(names)}.")


def read_records(*paths: Path) -> Iterator[tuple[str, Fields]]:
    """Yield (where, fields) of each record of .json lists, .jsonl and .parquet files.

    Raises ValueError if a file has no record or another suffix.
    """
    for path in paths:
        number = 0
        for number, record in enumerate(_records(path), start=1):  # noqa: B007
            yield record
        if not number:
            raise ValueError(f"{path} contains no record.")


def _records(path: Path) -> Iterator[tuple[str, Fields]]:
    match path.suffix:
        case ".json":
            found = read_json_list(path)
        case ".jsonl":
            found = read_json_lines(path)
        case ".parquet":
            found = read_parquet(path, skip_columns=())
        case other:
            raise ValueError(f"{path} has the suffix {other!r}; it must be .json (a list), .jsonl or .parquet.")
    for raw in found:
        with located_errors(raw.where):
            fields = raw.fields()
        yield raw.where, fields


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file. Raises BadRecordError beyond 256 MiB: it is read as a whole."""
    if (size := path.stat().st_size) > _MAX_OBJECT:
        raise BadRecordError(f"{path} has {size:,} bytes; one JSON object may have at most {_MAX_OBJECT:,}.")
    with located_errors(str(path)):
        return parse_object(path.read_bytes())


@contextmanager
def located_errors(where: str) -> Iterator[None]:
    """Put the location before the message of a BadRecordError: `with located_errors("test.json:RECORD 3"): ...`."""
    try:
        yield
    except BadRecordError as error:
        raise BadRecordError(f"{where}: {error}") from error


def require_keys(fields: Fields, *keys: str) -> None:
    """Raise BadRecordError unless all keys exist. Other keys are accepted: published files have more than is used."""
    if missing := [key for key in keys if key not in fields]:
        raise BadRecordError(
            f"{', '.join(missing)} missing; the record has {shortened(sorted(fields))}. Is this the right benchmark?"
        )


def take_values(fields: Fields, key: str, *, length: int | None = None) -> Sequence[Any]:
    """Return the non-empty list under a key, which must have the given length."""
    value = fields[key]
    if not isinstance(value, list) or not value or (length is not None and len(value) != length):
        expected = "a list that is not empty" if length is None else f"a list of {length}"
        raise BadRecordError(f"{key!r} is {shortened(value)}; it must be {expected}.")
    return value


def take_numbers(fields: Fields, key: str, *, length: int) -> list[float]:
    """Return the list of numbers under a key, such as ranks or ratings."""
    numbers = take_values(fields, key, length=length)
    if not all(type(number) in (int, float) for number in numbers):
        raise BadRecordError(f"{key!r} is {shortened(numbers)}; it must be a list of numbers.")
    return [float(number) for number in numbers]


def image_taker(root: Path) -> TakeImage:
    """Return a function that checks images, given as a path from `root`, or as a place within the data file.

    Raises FileNotFoundError if the folder does not exist.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder {root} for the images.")
    find = ImageFinder(root)

    def take_image(value: object, key: str) -> Image:
        match value:
            case str() | StoredImage():
                return _checked(find(value), key)
            case {"path": str() as name}:
                return _checked(find(name), key)
            case _:
                raise BadRecordError(f"{key!r} is {shortened(value)}; it must be a path or the bytes of an image.")

    return take_image


def _checked(image: ImageSource, key: str) -> ImageSource:
    if flaw := flaw_of_image(image):
        raise BadRecordError(f"{key!r}: {flaw}")
    return image
