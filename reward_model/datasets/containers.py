"""Containers of records of any format: JSON, JSONL, Parquet, tar, TFRecord, the Hub, and folders of such files."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from reward_model.datasets.image_folder import read_image_folder
from reward_model.datasets.parquet import read_hub_dataset, read_parquet
from reward_model.datasets.raw_records import RawRecord, read_json_lines, read_json_list
from reward_model.datasets.tar import TarShard
from reward_model.datasets.tfrecord import read_tfrecord
from reward_model.stored_images import StoredImage

SUFFIXES = (".jsonl", ".json", ".parquet", ".tar", ".tfrecord")


class Container(NamedTuple):
    """One file of a data set, or one split of a data set on the Hub."""

    root: Path
    """Folder that relative image paths start from, unless the user gives an image_root."""
    records: Iterable[RawRecord]
    find_member: Callable[[str], StoredImage] | None = None
    """Returns where a member of the same archive lies, by its name; None if the container is not an archive."""


def open_containers(path: str, *, is_image_folder: bool, skip_columns: Collection[str]) -> Iterator[Container]:
    """Yield the containers of a path: one file, every file of a folder in the order of their names, or hf:ID@SPLIT.

    Raises FileNotFoundError if the file does not exist, and ValueError for an unknown suffix or a mixed folder.
    """
    if path.startswith("hf:"):
        yield Container(Path(), read_hub_dataset(path, skip_columns=skip_columns))
        return
    location = Path(path)
    if is_image_folder:
        yield Container(location, read_image_folder(location))
        return
    for file in data_files(path):
        yield _open_file(file, skip_columns)


def _open_file(path: Path, skip_columns: Collection[str]) -> Container:
    if not path.is_file():
        raise FileNotFoundError(f"There is no data file {path}.")
    match path.suffix:
        case ".jsonl":
            return Container(path.parent, read_json_lines(path))
        case ".json":
            return Container(path.parent, read_json_list(path))
        case ".parquet":
            return Container(path.parent, read_parquet(path, skip_columns=skip_columns))
        case ".tar":
            shard = TarShard(path)
            return Container(path.parent, shard.samples(), shard.find_member)
        case ".tfrecord":
            return Container(path.parent, read_tfrecord(path, skip_columns=skip_columns))
        case other:
            raise ValueError(
                f"{path} has the suffix {other!r}; it must be one of {', '.join(SUFFIXES)}, or a folder of such files."
            )


def data_files(path: str) -> list[Path]:
    """Return the file, or the files of the folder in the order of their names. Raises ValueError for a mixed folder."""
    folder = Path(path)
    if not folder.is_dir():
        return [folder]
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())
    suffixes = sorted({path.suffix for path in files})
    if len(suffixes) != 1:
        found = f"{' and '.join(suffixes)} files" if suffixes else f"no file with the suffix {', '.join(SUFFIXES)}"
        raise ValueError(f"The folder {folder} contains {found}; all of its data files must have one suffix.")
    return files
