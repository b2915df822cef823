"""Paths in options: `~` is the home folder, and a path in a file of options may be relative to that file."""

from __future__ import annotations

import re
from pathlib import Path

_TERM = re.compile(r"(?P<before>\s*['\"]?(?:[\w/]+:(?!//))?)(?P<path>[^,:='\"(]+)")
"""One of several comma-separated PATH, FORMAT:PATH or NAME:PATH=WEIGHT, up to the end of the path."""


def resolve_paths(text: str, *, folder: Path | None = None) -> str:
    """Return an option's text with `~` expanded in each path of a comma-separated list, also in NAME:PATH.

    With `folder`, that of a file of options, a path which exists relative to it is taken from there. Other texts, such
    as names and Hub ids, stay.
    """

    def resolved(term: re.Match[str]) -> str:
        path = term["path"]
        if path.startswith("~"):
            path = str(Path(path).expanduser())
        elif folder is not None and path.strip() and not Path(path).is_absolute() and (folder / path.strip()).exists():
            path = str(folder / path.strip())
        return term["before"] + path

    return ",".join(_TERM.sub(resolved, term, count=1) for term in text.split(","))
