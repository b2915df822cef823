"""Checkpoint folders that survive a crash at any moment.

A checkpoint is a folder `step_000120`. It is written as `step_000120.part`, every file is flushed to disk, a manifest
with checksums is written last, and only then is the folder renamed. A folder with the final name that matches its
manifest is complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from reward_model.text_files import read_json
from rlhf_t2i.output.files import flush, sha256_of

_MANIFEST = "manifest.json"
OWED_EVALUATION = "owed_evaluation"
"""Empty file in a checkpoint of which `owes_evaluation` is true."""


def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint after `step` training steps."""
    return f"step_{step:06d}"


def checkpoint_step(path: Path) -> int:
    """Return the number of training steps finished when a checkpoint was written."""
    return int(path.name.removeprefix("step_"))


def owes_evaluation(checkpoint: Path | None) -> bool:
    """Return True for a checkpoint that was written before the evaluation after its step."""
    return checkpoint is not None and (checkpoint / OWED_EVALUATION).is_file()


def begin(folder: Path, step: int) -> Path:
    """Create and return an empty folder for a checkpoint's files, which `commit` makes a checkpoint.

    Incomplete folders of earlier attempts are removed.
    """
    part = folder / f"{checkpoint_name(step)}.part"
    for leftover in folder.glob("step_*.part"):
        shutil.rmtree(leftover)
    part.mkdir(parents=True)
    return part


def commit(part: Path, *, keep: int) -> Path:
    """Turn a folder into a checkpoint and return its path; remove all but the `keep` newest."""
    files = sorted(path for path in part.rglob("*") if path.is_file())
    manifest = {str(path.relative_to(part)): sha256_of(path) for path in files}
    (part / _MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in [*part.rglob("*"), part]:
        flush(path)
    target = part.with_suffix("")
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)
    flush(target.parent)
    others = [path for path in _checkpoints(target.parent) if path != target]
    for old in others[keep - 1 :]:
        shutil.rmtree(old)
    return target


def newest_complete(folder: Path, *, report: Callable[[str], None]) -> Path | None:
    """Return the newest complete checkpoint, or None; call `report` with the reason for each one skipped."""
    for path in _checkpoints(folder):
        if fault := _fault(path):
            report(f"Skipped the checkpoint {path}: {fault}.")
        else:
            return path
    return None


def _checkpoints(folder: Path) -> list[Path]:
    """Return all folders named like a checkpoint, newest first."""
    found = [p for p in folder.glob("step_*") if p.is_dir() and p.name[5:].isdigit()]
    return sorted(found, key=checkpoint_step, reverse=True)


def _fault(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None."""
    try:
        manifest: dict[str, str] = read_json(path / _MANIFEST)
    except FileNotFoundError:
        return "it has no manifest, so it is incomplete"
    except ValueError:
        return "its manifest cannot be read"
    if not isinstance(manifest, dict):
        return "its manifest cannot be read"
    for name, checksum in manifest.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if sha256_of(path / name) != checksum:
            return f"{name} does not match its checksum"
    return None
