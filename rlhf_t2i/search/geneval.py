"""GenEval's prompts and the folders its scorer reads (Ghosh et al., arXiv:2310.11513).

A prompt file has one JSON object a line: `tag`, `prompt`, `include` (objects that must be there, each with `class`,
`count`, and perhaps `color` and `position`, a relation to an earlier object) and perhaps `exclude` (with a count that
must not be reached). The scorer, with its object detector, is another project's; it reads a folder for each prompt:

    00000/metadata.jsonl       the prompt's line, as it was
    00000/samples/0000.png     its images
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_t2i.files import write_atomically
from rlhf_t2i.prompts import load_prompts


@dataclass(frozen=True, slots=True)
class Wanted:
    """Objects that must be in an image, or in `exclude` must not."""

    name: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None
    """A relation such as "left of", and which of the included objects it is to."""


@dataclass(frozen=True, slots=True)
class GenevalPrompt:
    """One line of GenEval."""

    tag: str
    prompt: str
    include: tuple[Wanted, ...]
    exclude: tuple[Wanted, ...]
    line: Mapping[str, Any]
    """As the scorer wants it back."""


def load_geneval(path: Path) -> list[GenevalPrompt]:
    """Read a GenEval prompt file; ValueError, naming the line, for one that its scorer could not use."""
    load_prompts(str(path))  # what it says of files that are missing, empty, not UTF-8 or not JSON
    lines = path.read_text(encoding="utf-8").removeprefix("\ufeff").split("\n")
    return [_prompt(json.loads(line), f"{path}:{n}") for n, line in enumerate(lines, start=1) if line.strip()]


def metadata_of(source: str, prompts: list[str]) -> list[dict[str, Any]]:
    """What is written beside the images of each prompt: its line if the source is GenEval's, else just the prompt."""
    path = Path(source)
    if source != "shapes" and path.suffix == ".jsonl" and '"include"' in path.read_text(encoding="utf-8"):
        return [dict(row.line) for row in load_geneval(path)]
    return [{"prompt": prompt} for prompt in prompts]


def write_metadata(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Make a prompt's folder: its line, and room for its images."""
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "metadata.jsonl", json.dumps(dict(metadata)))


def _prompt(row: Any, where: str) -> GenevalPrompt:
    match row:
        case {"tag": str(tag), "prompt": str(prompt), "include": [*include]}:
            pass
        case _:
            raise ValueError(f"{where} is no line of GenEval: it needs tag, prompt and a list under include.")
    exclude = row.get("exclude", [])
    if not isinstance(exclude, list):
        raise ValueError(f"{where} has {exclude!r} under exclude; it must be a list, or be left out.")
    included = tuple(_wanted(item, f"{where}, include {i}", before=i) for i, item in enumerate(include))
    excluded = tuple(_wanted(item, f"{where}, exclude {i}", before=0) for i, item in enumerate(exclude))
    return GenevalPrompt(tag, prompt, included, excluded, row)


def _wanted(item: Any, where: str, *, before: int) -> Wanted:
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
            return Wanted(name, count, color)
        case [str(relation), int(other)] if 0 <= other < before:
            return Wanted(name, count, color, (relation, other))
        case position:
            raise ValueError(
                f"{where} has the position {position!r}; it must be a relation and the number of an object before it, "
                f'such as ["left of", 0].'
            )
