"""What a training writes beside its results: it must not end the training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def report_or_warning(write: Callable[[Path], Path], folder: Path, *, say: Callable[[str], object]) -> Path | None:
    """Return the path of the report that `write` makes of a run folder; if it raises, `say` a warning and return None.

    Any exception counts: damaged files of earlier evaluations fail in images, templates and charts, in as many ways.
    """
    try:
        return write(folder)
    except Exception as error:
        say(f"WARNING: the report could not be written ({type(error).__name__}: {error}).")
        return None
