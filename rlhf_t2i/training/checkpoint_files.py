"""Save so that a crash at any moment leaves a whole checkpoint behind, and find it again.

A checkpoint is a folder `step_000120`. It is written under another name, every file is flushed to the disk, a manifest
with checksums comes last, and only then does it get its name. Whatever has the name and fits its manifest is good.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from rlhf_t2i.files import flush, sha256_of

_MANIFEST = "manifest.json"


def checkpoint_name(step: int) -> str:
    """The folder of the checkpoint after `step` steps."""
    return f"step_{step:06d}"


def checkpoint_step(path: Path) -> int:
    """How many steps had been done when a checkpoint was written."""
    return int(path.name.removeprefix("step_"))


def begin(folder: Path, step: int) -> Path:
    """An empty folder to write a checkpoint's files into; nothing counts until `commit`.

    What earlier attempts left half-written is removed.
    """
    part = folder / f"{checkpoint_name(step)}.part"
    for leftover in folder.glob("step_*.part"):
        shutil.rmtree(leftover)
    part.mkdir(parents=True)
    return part


def commit(part: Path, *, keep: int) -> Path:
    """Make a written folder a checkpoint, and remove all but the `keep` newest."""
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


def newest_whole(folder: Path, *, report: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that fits its manifest; each one passed over is reported with the reason."""
    for path in _checkpoints(folder):
        if fault := _fault(path):
            report(f"Skipped the checkpoint {path}: {fault}.")
        else:
            return path
    return None


def _checkpoints(folder: Path) -> list[Path]:
    """All that has a checkpoint's name, newest first."""
    found = [p for p in folder.glob("step_*") if p.is_dir() and p.name[5:].isdigit()]
    return sorted(found, key=checkpoint_step, reverse=True)


def _fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest: dict[str, str] = json.loads((path / _MANIFEST).read_text())
    except FileNotFoundError:
        return "it has no manifest, so it was never finished"
    except (json.JSONDecodeError, UnicodeDecodeError):
        return "its manifest cannot be read"
    if not isinstance(manifest, dict):
        return "its manifest cannot be read"
    for name, checksum in manifest.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if sha256_of(path / name) != checksum:
            return f"{name} is not what was written"
    return None
