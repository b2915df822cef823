"""Atomic writes, flushing to disk, and checksums of files."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Set
from pathlib import Path

_IS_WINDOWS = sys.platform == "win32"


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's text; at every moment, also if the process is killed, the file has the old or the new text."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    flush(part)
    part.replace(path)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Wait until a file or folder is written to disk; Windows cannot wait for a folder."""
    if _IS_WINDOWS and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if _IS_WINDOWS else os.O_RDONLY)  # Windows flushes only what can be written
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_all_but(kept: Set[str], folder: Path) -> None:
    """Remove what a folder holds, except for some names in it."""
    for path in folder.iterdir():
        if path.is_dir() and path.name not in kept:
            shutil.rmtree(path, ignore_errors=True)
        elif path.name not in kept:
            path.unlink(missing_ok=True)


def check_links(folder: Path) -> None:
    """Raise ValueError for a symbolic link in a folder that leads out of it, to what would be published with it.

    The links of a model in the cache of the Hub lead to the blobs of the same model.
    """
    real = folder.resolve()
    root = real.parent.parent if real.parent.name == "snapshots" else real
    for path in folder.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            raise ValueError(f"{path} is a link to {path.resolve()}, outside of {folder}; it is not published.")


def path_from(folder: Path, text: str) -> str | None:
    """Return a relative path, taken from `folder`, without needless parts; None if nothing exists there."""
    path = Path(text.strip())
    try:
        if not text.strip() or path.is_absolute() or not (folder / path).exists():
            return None
        short = os.path.normpath(folder / path)
        return short if os.path.exists(short) and os.path.samefile(short, folder / path) else str(folder / path)
    except (OSError, ValueError):  # too long, or with a NUL
        return None
