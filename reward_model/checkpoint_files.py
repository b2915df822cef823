"""Checkpoint folders of a reward model's training: sealed when they are complete, and checked before they are used."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

_SEAL = "complete.json"
STATE = "trainer_state.json"
"""The file in which transformers' trainer names the checkpoint with the best weights so far."""


def seal(folder: Path) -> None:
    """Write the hashes of a finished checkpoint's files, last of all; a checkpoint without them is incomplete."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _SEAL)
    part = folder / (_SEAL + ".part")
    part.write_text(json.dumps({str(path.relative_to(folder)): _sha256(path) for path in files}, indent=1))
    os.replace(part, folder / _SEAL)


def newest_checkpoint(folder: Path, *, report: Callable[[str], object]) -> Path | None:
    """Return the newest checkpoint that is whole, and whose best weights so far are; None if there is none.

    Calls `report` with the reason for each one that is passed over.
    """
    found = [path for path in folder.glob("checkpoint-*") if path.name.partition("-")[2].isdigit()]
    for path in sorted(found, key=lambda p: int(p.name.partition("-")[2]), reverse=True):
        if fault := _fault(path) or _fault_of_best(path):
            report(f"Skipped the checkpoint {path}: {fault}.")
        else:
            return path
    return None


def _fault(path: Path) -> str | None:
    """Return what is wrong with the files of a checkpoint, or None."""
    try:
        sealed = json.loads((path / _SEAL).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"it has no {_SEAL}, so it is incomplete"
    except (OSError, ValueError):
        sealed = None
    if not isinstance(sealed, dict):
        return f"its {_SEAL} cannot be read"
    for name, sha256 in sealed.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if _sha256(path / name) != sha256:
            return f"{name} does not match its checksum"
    return None


def _fault_of_best(path: Path) -> str | None:
    """Return what is wrong with the checkpoint of the best weights that a whole checkpoint refers to, or None."""
    state = json.loads((path / STATE).read_text(encoding="utf-8")) if (path / STATE).is_file() else {}
    best = state.get("best_model_checkpoint")
    if best is None or (name := Path(best).name) == path.name:
        return None
    fault = _fault(path.parent / name)
    return fault and f"the best weights so far are in {name}, and {fault}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
