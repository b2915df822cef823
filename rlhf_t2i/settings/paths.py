"""Paths in options: `~` is the home folder, and a path in a file of options may be relative to that file."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_t2i.output.files import path_from
from rlhf_t2i.rewards.table import reward_names
from rlhf_t2i.rewards.terms import join_terms, parse_terms

_FORMAT = re.compile(r"\s*(?:[\w/]+(?:=[^:]*)?:(?!//))?")
"""FORMAT: or NAME: before a path."""
_WITH_PATH = {name.removesuffix("PATH") for name in reward_names() if name.endswith(":PATH")}


@dataclass(frozen=True, slots=True)
class Inputs:
    """Marker in the type of a text: an existing file or folder, PATH or FORMAT:PATH, or several of them."""

    several: bool = False
    """True for a comma-separated list."""
    names: tuple[str, ...] = ()
    """Texts that name something else, such as what is built in, and are never paths."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """Marker in the type of a text OLD=NEW: the beginning of paths that are written down, and an existing folder."""


@dataclass(frozen=True, slots=True)
class Rewards:
    """Marker in the type of a text: comma-separated NAME or NAME=WEIGHT of rewards."""

    names: tuple[str, ...] = ()
    """The names that its help lists."""
    several: bool = True
    """False for the name of one reward, without quotes or weight."""


def resolve_paths(text: str, kind: Any = None, *, folder: Path | None = None) -> str:
    """Return an option's text with `~` expanded where a path begins.

    With `folder`, that of a file of options, a path which exists relative to it is taken from there. Other texts, such
    as names and Hub ids, stay. `kind` is the marker in the option's type, None for a text of another kind. Raises
    ValueError for rewards that `parse_terms` refuses.
    """
    match kind:
        case Inputs(several, names):
            parts = text.split(",") if several else [text]
            return ",".join(part if part.strip() in names else _input(part, names, folder) for part in parts)
        case Prefix():
            old, equals, new = text.partition("=")
            return _path(old) + equals + _path(new, folder)
        case Rewards(several=False):
            return _reward(text, folder)
        case Rewards():
            terms = [(name, _reward(name, folder), weight) for name, weight in parse_terms(text)]
            if all(name == resolved for name, resolved, _ in terms):
                return text
            return ",".join(
                join_terms([name]) + (f"={weight}" if weight is not None else "") for _, name, weight in terms
            )
        case _:
            return _path(text)


def _reward(name: str, folder: Path | None) -> str:
    """Return NAME:PATH or file.py:function with its path resolved; other names stay."""
    before, colon, after = name.partition(":")
    if before + colon in _WITH_PATH:
        is_whole = folder is not None and path_from(folder, after) is not None
        path, bracket, arguments = (after, "", "") if is_whole else after.partition("(")
        return before + colon + _path(path, folder) + bracket + arguments
    return _path(before, folder) + colon + after if before.endswith(".py") and colon else name


def _input(text: str, names: tuple[str, ...], folder: Path | None) -> str:
    form = _FORMAT.match(text)
    before = form[0] if form and (folder is None or path_from(folder, text) is None) else ""
    if before.strip() == "hf:":
        return text
    path = _path(text.removeprefix(before), folder)
    return before + (f"./{path}" if path in names else path)


def _path(text: str, folder: Path | None = None) -> str:
    """Return one path with `~` expanded, or taken from the folder if it exists there."""
    if text.startswith("~"):
        return os.path.expanduser(text)
    return text if folder is None else path_from(folder, text) or text
