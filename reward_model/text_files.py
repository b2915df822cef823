"""Reading of JSON and YAML from strangers: bounded in size, depth and length of numbers, which must be finite.

Every fault is a ValueError of one line. Without the bounds a file of kilobytes can take minutes or gigabytes, or end in
a RecursionError, here or wherever its values are used next.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import yaml
from yaml.composer import ComposerError

MAX_DEPTH = 100
"""Most lists and objects within one another."""
MAX_DIGITS = 300
"""Most digits of a whole number: those of more are beyond all floats."""
_MAX_BYTES = 64 * 2**20
"""Largest file of JSON or YAML that is read as a whole."""


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file; ValueError, naming the file, for anything else."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}; it must be a JSON object: {{...}}.")
    return found


def read_json(path: Path, *, allow_nan: bool = False) -> Any:
    """Return the JSON value of a file; ValueError, naming the file, if it has none or is beyond the bounds."""
    try:
        return parse_json(_text(path), allow_nan=allow_nan)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error


def parse_json(
    text: str, *, make_object: Callable[[list[tuple[str, Any]]], Any] | None = None, allow_nan: bool = False
) -> Any:
    """Return the JSON value of a text; `make_object` gets the keys and values of each object.

    With `allow_nan`, NaN and infinities, as Python's json writes them, are read as what they are. Raises
    json.JSONDecodeError for other text, and ValueError for values beyond the bounds.
    """
    try:
        if text.startswith("\ufeff"):
            raise json.JSONDecodeError("Unexpected UTF-8 BOM (decode using utf-8-sig)", text, 0)
        value = _decoder(make_object, allow_nan).decode(text)
    except RecursionError:
        raise ValueError(f"its values are nested more than {MAX_DEPTH} deep") from None
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(value)
    return value


@lru_cache(maxsize=8)  # to make one takes as long as to parse a short text
def _decoder(make_object: Callable[[list[tuple[str, Any]]], Any] | None, allow_nan: bool) -> json.JSONDecoder:
    return json.JSONDecoder(
        object_pairs_hook=make_object,
        parse_int=_whole,
        parse_float=float if allow_nan else _finite,
        parse_constant=float if allow_nan else _refuse_constant,
    )


def read_yaml(path: Path) -> Any:
    """Return the YAML value of a file; ValueError, naming the file, if it has none or is beyond the bounds."""
    try:
        return yaml.load(_text(path), Loader=SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except ValueError as error:  # a number of thousands of digits
        raise ValueError(f"{path} cannot be read: {error}.") from error


def compose_yaml(path: Path) -> yaml.Node | None:
    """Return the nodes of a YAML file, None if it is empty; ValueError as `read_yaml`."""
    try:
        return yaml.compose(_text(path), Loader=SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error


class SafeLoader(yaml.SafeLoader):
    """PyYAML's safe loader without aliases of lists and mappings, which multiply, and with bounded depth."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            alias = self.peek_event()
            if isinstance(self.anchors.get(alias.anchor), yaml.CollectionNode):
                raise ComposerError(None, None, f"*{alias.anchor} repeats a list", alias.start_mark)
        if self.depth >= MAX_DEPTH:
            mark = self.peek_event().start_mark
            raise ComposerError(None, None, f"values are nested more than {MAX_DEPTH} deep", mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _text(path: Path) -> str:
    if (size := path.stat().st_size) > _MAX_BYTES:
        raise ValueError(f"{path} has {size:,} bytes; it may have at most {_MAX_BYTES:,}.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error.reason} at byte {error.start}.") from error


def _check_depth(value: Any) -> None:
    level: Iterable[Any] = [value]
    for _ in range(MAX_DEPTH + 1):
        parents = [one for one in level if isinstance(one, list | dict)]
        level = [child for one in parents for child in (one.values() if isinstance(one, dict) else one)]
        if not parents:
            return
    raise ValueError(f"its values are nested more than {MAX_DEPTH} deep")


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"the number {text[:20]}... has {len(text):,} digits; at most {MAX_DIGITS} are read")
    return int(text)


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"the number {text[:40]} is beyond all floats")
    return number


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not valid JSON; numbers must be finite")
