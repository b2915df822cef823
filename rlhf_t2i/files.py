"""Files that are replaced whole, flushed to the disk and identified by their checksum."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's text; whoever reads it, or is killed while writing, finds the old text or the new one, whole."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    flush(part)
    part.replace(path)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
