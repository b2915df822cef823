"""From the files of a published test set to its records, and from what a record calls an image to one that opens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reward_model.benchmarks.types import Image
from reward_model.datasets.fields import BadRecordError, shortened
from reward_model.datasets.images import MAX_PIXELS, FindImage, flaw_of_content, image_finder
from reward_model.datasets.parquet import read_parquet
from reward_model.datasets.raw_records import parse_object, read_json_lines, read_json_list

Fields = Mapping[str, Any]


def file_of(path: Path, *names: str, benchmark: str) -> Path:
    """The annotation file that a user means: the path itself, or the first of `names` in that folder."""
    return files_of(path, *names, benchmark=benchmark)[0]


def files_of(path: Path, *names: str, benchmark: str) -> list[Path]:
    """The same for names that may stand for several parts of one table ("data/test-*.parquet"), in their order."""
    if path.is_file():
        return [path]
    for name in names if path.is_dir() else ():
        if found := sorted(path.glob(name)):
            return found
    kind = "folder that holds none of" if path.is_dir() else "path that does not exist; it may be a file or hold"
    raise FileNotFoundError(f"{benchmark}: {path} is a {kind} {', '.join(names)}.")


def records_of(*paths: Path) -> Iterator[tuple[str, Fields]]:
    """Each record of .json lists, .jsonl or .parquet files, after where it stands; ValueError if one holds none."""
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
            raise ValueError(f"{path} ends in {other!r}; possible are .json (a list), .jsonl and .parquet.")
    for raw in found:
        with complaints_at(raw.where):
            fields = raw.fields()
        yield raw.where, fields


def object_of(path: Path) -> dict[str, Any]:
    """The one JSON object that a file is."""
    with complaints_at(str(path)):
        return parse_object(path.read_bytes())


@contextmanager
def complaints_at(where: str) -> Iterator[None]:
    """Put a place before what is wrong there: `with complaints_at("test.json:RECORD 3"): ...`."""
    try:
        yield
    except BadRecordError as error:
        raise BadRecordError(f"{where}: {error}") from error


def require(fields: Fields, *keys: str) -> None:
    """BadRecordError unless all keys are there. Others may be too: published files carry more than is used here."""
    if missing := [key for key in keys if key not in fields]:
        raise BadRecordError(
            f"{', '.join(missing)} missing; the record has {shortened(sorted(fields))}. Is this the right benchmark?"
        )


def take_list(fields: Fields, key: str, *, length: int | None = None) -> Sequence[Any]:
    """The list under a key, as long as it must be."""
    value = fields[key]
    if not isinstance(value, list) or not value or (length is not None and len(value) != length):
        wanted = "a list that is not empty" if length is None else f"a list of {length}"
        raise BadRecordError(f"{key!r} is {shortened(value)}; it must be {wanted}.")
    return value


def take_ranks(fields: Fields, key: str, *, length: int) -> list[float]:
    """Whole or broken numbers, the lowest of which is best."""
    ranks = take_list(fields, key, length=length)
    if not all(type(rank) in (int, float) for rank in ranks):
        raise BadRecordError(f"{key!r} is {shortened(ranks)}; it must be a list of numbers.")
    return [float(rank) for rank in ranks]


class Images:
    """Images as the files have them: a path, the bytes themselves, or both as `datasets` stores them."""

    def __init__(self, find: FindImage) -> None:
        self.find = find

    def __call__(self, value: object, key: str) -> Image:
        """An image that was opened once; BadRecordError if it is none."""
        match value:
            case str():
                return self.find(value)
            case bytes():
                return _checked(value, key)
            case {"bytes": bytes() as inside}:
                return _checked(inside, key)
            case {"path": str() as name}:
                return self.find(name)
            case _:
                raise BadRecordError(f"{key!r} is {shortened(value)}; it must be a path or the bytes of an image.")


def image_reader(root: Path) -> Images:
    """A reader of images whose relative paths start at `root`."""
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder {root}, where the images should be.")
    return Images(image_finder(root, unpack_to=root))  # bytes are kept as they are, so nothing is unpacked


def _checked(data: bytes, key: str) -> bytes:
    if flaw := flaw_of_content(data, max_pixels=MAX_PIXELS):
        raise BadRecordError(f"the image under {key!r} {flaw}")
    return data
