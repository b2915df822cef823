"""Stamps of checked data: which files `python -m reward_model.datasets check` read, so that changes are noticed."""

# datasets has no usable types.
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

DataFile = tuple[str, int, int, int]
"""Path of a data file, its size in bytes, and its times of change in ns (of its content, and of its entry)."""


def write_stamp(source: str, files: Sequence[DataFile], *, num_records: int, num_images: int) -> Path:
    """Write that a source was checked and return the file of the stamp."""
    path = _path(source)
    path.parent.mkdir(parents=True, exist_ok=True)
    stamp = {
        "source": source,
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "records": num_records,
        "images": num_images,
        "files": {str(Path(file).resolve()): [size, changed] for file, size, changed, _ in files},
    }
    part = path.with_suffix(".part")
    part.write_text(json.dumps(stamp), encoding="utf-8")
    part.replace(path)
    return path


def read_stamp(source: str) -> dict[str, Any] | None:
    """Return the stamp of a source; None if it was not checked."""
    path = _path(source)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def checked(source: str) -> str:
    """Return a line on whether and when a source was checked."""
    stamp = read_stamp(source)
    if stamp is None:
        return f"data      {source}, whose images were not checked; python -m reward_model.datasets check does it"
    return f"data      {source}, whose {stamp['images']:,} images were checked on {stamp['date']}"


def forget_stamp(source: str) -> None:
    """Remove the stamp of a source, which is about to be checked again."""
    _path(source).unlink(missing_ok=True)


def refuse_changes(source: str, files: Sequence[DataFile]) -> None:
    """Raise ValueError, naming it, for a data file that changed, was added or is missing since a source was checked."""
    stamp = read_stamp(source)
    if stamp is None:
        return
    was = {path: tuple(facts) for path, facts in stamp["files"].items()}
    now = {str(Path(file).resolve()): (size, changed) for file, size, changed, _ in files}
    for path in [*was, *now]:
        if was.get(path) != now.get(path):
            what = "was added" if path not in was else "is missing" if path not in now else "has changed"
            raise ValueError(
                f"{path} {what} since {source} was checked on {stamp['date']}. If that is right, check it again: "
                f"python -m reward_model.datasets check {source}"
            )


def _path(source: str) -> Path:
    """Return the file of a source's stamp; the same for the same path from the same folder."""
    key = f"{Path.cwd()}\0{source}"
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "preferences" / "checked"
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
