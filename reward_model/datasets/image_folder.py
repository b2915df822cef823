"""A folder of images that are labelled by the name of their sub-folder.

    FOLDER/good/*, FOLDER/bad/*         or         FOLDER/safe/*, FOLDER/unsafe/*

The prompt of a.png is the text of a.txt beside it, or empty.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from reward_model.datasets.fields import take_text
from reward_model.datasets.images import FindImage, text_beside
from reward_model.datasets.raw_records import RawRecord
from reward_model.types import LabelledImage, Record

_LABELS = {"good": 1, "safe": 1, "bad": 0, "unsafe": 0}


def read_image_folder(folder: Path) -> Iterator[RawRecord]:
    """Yield every file of the sub-folders that is not a .txt, in the order of their names.

    Raises FileNotFoundError if the folder does not exist, and ValueError for a sub-folder with another name.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    for kind in sorted(path for path in folder.iterdir() if path.is_dir()):
        if kind.name not in _LABELS:
            raise ValueError(f"{kind} is not a known class; sub-folders must be named {', '.join(_LABELS)}.")
        for file in sorted(kind.iterdir()):
            if file.suffix != ".txt":
                yield RawRecord(str(file), {"image": str(file.relative_to(folder)), "class": kind.name})


def folder_record(fields: Mapping[str, Any], *, find_image: FindImage, where: str) -> list[Record]:
    """Convert one image to a labelled image; the label is that of its sub-folder."""
    file = find_image(take_text(fields, "image"))
    return [LabelledImage(file, text_beside(file), _LABELS[fields["class"]], where)]
