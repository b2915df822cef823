"""Containers of records of any format: JSON, JSONL, Parquet, tar, TFRecord, the Hub, and folders of such files."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from reward_model.datasets.image_folder import read_image_folder
from reward_model.datasets.parquet import read_hub_dataset, read_parquet
from reward_model.datasets.raw_records import RawRecord, read_json_lines, read_json_list
from reward_model.datasets.tar import TarShard
from reward_model.datasets.tfrecord import read_tfrecord
from reward_model.locations import BucketPath, Location, location
from reward_model.stored_images import StoredImage

SUFFIXES = (".jsonl", ".json", ".parquet", ".tar", ".tfrecord")


class Part(NamedTuple):
    """A file of a source, or some of its lines or rows."""

    number: int
    """Number of the file within the source."""
    path: str
    """Path of the file, or hf:ID@SPLIT."""
    start: int = 0
    stop: int | None = None
    """First byte of lines, or first row of a table, and the one behind the last; None is the end."""
    num_before: int = 0
    """Lines of the file before `start`."""


class Container(NamedTuple):
    """A part that is open."""

    root: Location
    """Folder that relative image paths start from, unless the user gives an image_root."""
    records: Iterable[RawRecord]
    find_member: Callable[[str], StoredImage] | None = None
    """Returns where a member of the same archive lies, by its name; None if the container is not an archive."""


def open_hub(part: Part, *, skip_columns: Collection[str]) -> Container:
    """Open rows of hf:ID@SPLIT, as `datasets` loads it."""
    rows = range(part.start, part.start if part.stop is None else part.stop)
    return Container(Path(), read_hub_dataset(part.path, skip_columns=skip_columns, rows=rows))


def open_image_folder(path: str) -> Container:
    """Open a folder of images."""
    return Container(Path(path), read_image_folder(Path(path)))


def open_file(part: Part, *, skip_columns: Collection[str]) -> Container:
    """Open a data file. Raises FileNotFoundError if there is none, and ValueError for an unknown suffix."""
    path = location(part.path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no data file {path}.")
    match path.suffix:
        case ".jsonl":
            lines = read_json_lines(path, start=part.start, stop=part.stop, num_before=part.num_before)
            return Container(path.parent, lines)
        case ".json":
            return Container(path.parent, read_json_list(path))
        case ".parquet":
            rows = None if part.stop is None else range(part.start, part.stop)
            return Container(path.parent, read_parquet(path, skip_columns=skip_columns, rows=rows))
        case ".tar":
            shard = TarShard(path)
            return Container(path.parent, shard.samples(), shard.find_member)
        case ".tfrecord":
            return Container(path.parent, read_tfrecord(path, skip_columns=skip_columns))
        case other:
            raise ValueError(
                f"{path} has the suffix {other!r}; it must be one of {', '.join(SUFFIXES)}, or a folder of such files."
            )


def data_files(path: str) -> list[Location]:
    """Return the file, or the files of the folder in the order of their names. Raises ValueError for a mixed folder."""
    folder = location(path)
    if folder.suffix in SUFFIXES and isinstance(folder, BucketPath):  # a folder needs a request more
        return [folder]
    if not folder.is_dir():
        return [folder]
    found = [path for path in folder.iterdir() if path.suffix in SUFFIXES]
    files = sorted((path for path in found if isinstance(path, BucketPath) or path.is_file()), key=str)
    suffixes = sorted({path.suffix for path in files})
    if len(suffixes) != 1:
        found = f"{' and '.join(suffixes)} files" if suffixes else f"no file with the suffix {', '.join(SUFFIXES)}"
        raise ValueError(f"The folder {folder} contains {found}; all of its data files must have one suffix.")
    return files
