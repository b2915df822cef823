"""Files that hold rows, whatever the rows mean: JSON, JSONL, Parquet, tar, TFRecord, the Hub, and folders of those."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from reward_model.datasets.image_folder import read_image_folder
from reward_model.datasets.parquet import read_hub_dataset, read_parquet
from reward_model.datasets.raw_records import RawRecord, read_json_lines, read_json_list
from reward_model.datasets.tar import TarShard
from reward_model.datasets.tfrecord import read_tfrecord

ENDINGS = (".jsonl", ".json", ".parquet", ".tar", ".tfrecord")


class Container(NamedTuple):
    """One file of a data set, or all of one on the Hub."""

    root: Path
    """Where relative image paths start, unless the user says otherwise."""
    rows: Iterable[RawRecord]
    member: Callable[[str], bytes] | None = None
    """The content of an image that lies in the same archive."""


def open_containers(place: str, *, is_image_folder: bool, skip_columns: Collection[str]) -> Iterator[Container]:
    """The containers of a place: a file, a folder of files of one kind, or hf:ID@SPLIT."""
    if place.startswith("hf:"):
        yield Container(Path(), read_hub_dataset(place.removeprefix("hf:"), skip_columns=skip_columns))
        return
    path = Path(place)
    if is_image_folder:
        yield Container(path, read_image_folder(path))
        return
    for file in _files_of(path) if path.is_dir() else [path]:
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
            return Container(path.parent, shard.samples(), shard.content)
        case ".tfrecord":
            return Container(path.parent, read_tfrecord(path, skip_columns=skip_columns))
        case other:
            raise ValueError(f"{path} ends in {other!r}; possible are {', '.join(ENDINGS)}, and folders of them.")


def _files_of(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.iterdir() if path.suffix in ENDINGS and path.is_file())
    kinds = sorted({path.suffix for path in files})
    if len(kinds) != 1:
        found = f"holds {' and '.join(kinds)} files" if kinds else f"holds no file that ends in {', '.join(ENDINGS)}"
        raise ValueError(f"The folder {folder} {found}; give one with files of one kind, or name the files.")
    return files
