"""GenEval prompt files and the image folders that its scorer expects (Ghosh et al., arXiv:2310.11513).

A prompt file has one JSON object per line: `tag`, `prompt`, `include` (objects that must be in the image, each with
`class`, `count` and optionally `color` and `position`, a relation to an earlier object) and optionally `exclude` (with
a count that must not be reached). The scorer and its object detector are a separate project; it expects one folder per
prompt:

    00000/metadata.jsonl       the line of the prompt, unchanged
    00000/samples/0000.png     its images
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_t2i.data.prompt_files import read_rows
from rlhf_t2i.output.files import write_atomically
from rlhf_t2i.output.run_folder import PROMPT_METADATA, SEARCH_SAMPLES
from rlhf_t2i.prompts import Prompt, metadata_of


@dataclass(frozen=True, slots=True)
class ObjectCondition:
    """A number of objects of one class that must be in an image (or, under `exclude`, must not)."""

    name: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None
    """A relation such as "left of", and the index of the included object that it refers to."""


@dataclass(frozen=True, slots=True)
class GenevalPrompt:
    """One line of a GenEval prompt file."""

    tag: str
    prompt: str
    include: tuple[ObjectCondition, ...]
    exclude: tuple[ObjectCondition, ...]
    line: Mapping[str, Any]
    """The parsed line, which the scorer expects back unchanged."""


def load_geneval(path: Path) -> list[GenevalPrompt]:
    """Read a GenEval prompt file; ValueError, with the line number, for a line that its scorer could not use."""
    return [_prompt(row.metadata, row.where) for row in read_rows(str(path))]


def rows_to_write(prompts: Sequence[str]) -> list[dict[str, Any]]:
    """Return the metadata to write beside the images of each prompt, its row.

    Raises ValueError, with its place, for a row with `include` that GenEval's scorer could not use.
    """
    rows = metadata_of(prompts)
    for prompt, row in zip(prompts, rows, strict=True):
        if "include" in row:
            _prompt(row, prompt.where if isinstance(prompt, Prompt) else repr(prompt))
    return rows


def write_metadata(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Make the folder of a prompt, with its metadata and an empty folder for its images."""
    (folder / SEARCH_SAMPLES).mkdir(parents=True, exist_ok=True)
    write_atomically(folder / PROMPT_METADATA, json.dumps(dict(metadata)))


def _prompt(row: Any, where: str) -> GenevalPrompt:
    match row:
        case {"tag": str(tag), "prompt": str(prompt), "include": [*include]}:
            pass
        case _:
            raise ValueError(f"{where} is not a line of GenEval: it needs tag, prompt and a list under include.")
    exclude = row.get("exclude", [])
    if not isinstance(exclude, list):
        raise ValueError(f"{where} has {exclude!r} under exclude; it must be a list, or be left out.")
    included = tuple(_condition(item, f"{where}, include {i}", before=i) for i, item in enumerate(include))
    excluded = tuple(_condition(item, f"{where}, exclude {i}", before=0) for i, item in enumerate(exclude))
    return GenevalPrompt(tag, prompt, included, excluded, row)


def _condition(item: Any, where: str, *, before: int) -> ObjectCondition:
    match item:
        case {"class": str(name), "count": int(count)} if count >= 1:
            pass
        case _:
            raise ValueError(f"{where} is {item!r}; it needs a class and a count of at least 1.")
    color = item.get("color")
    if not isinstance(color, str | None):
        raise ValueError(f"{where} has the color {color!r}; it must be a word.")
    match item.get("position"):
        case None:
            return ObjectCondition(name, count, color)
        case [str(relation), int(other)] if 0 <= other < before:
            return ObjectCondition(name, count, color, (relation, other))
        case position:
            raise ValueError(
                f"{where} has the position {position!r}; it must be a relation and the index of an earlier object, "
                f'such as ["left of", 0].'
            )
