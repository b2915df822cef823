"""Rows of GenEval's prompt file (Ghosh et al., arXiv:2310.11513), one JSON object a line.

`tag`, `prompt`, `include` (objects that must be in the image, each with `class`, `count` and optionally `color` and
`position`, a relation to an earlier object) and optionally `exclude` (with a count that must not be reached).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CLASSES = tuple(
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, "  # noqa: SIM905
    "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, "
    "handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, "
    "surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, "
    "broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, "
    "computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, "
    "clock, vase, scissors, teddy bear, hair drier, toothbrush".split(", ")
)
"""GenEval's names of the classes of COCO, in COCO's order."""
NAMES_IN_COCO = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}
"""Classes that COCO, and so a detector, names otherwise."""
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")


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
    """What one row asks for."""

    tag: str
    include: tuple[ObjectCondition, ...]
    exclude: tuple[ObjectCondition, ...]


def parse_row(row: Mapping[str, Any]) -> GenevalPrompt:
    """Return what a row asks for; ValueError for a row that GenEval's scorer could not use."""
    match row:
        case {"tag": str(tag), "prompt": str(), "include": [_, *_] as include}:
            pass
        case _:
            raise ValueError(
                f"it is not a line of GenEval, which has tag, prompt and a list of objects under include; its fields "
                f"are {', '.join(map(repr, row))}."
            )
    exclude = row.get("exclude") or []
    if not isinstance(exclude, list):
        raise ValueError(f"it has {exclude!r} under exclude; it must be a list, or be left out.")
    included = tuple(_condition(item, f"include {i}", before=i) for i, item in enumerate(include))
    excluded = tuple(_condition(item, f"exclude {i}", before=0) for i, item in enumerate(exclude))
    return GenevalPrompt(tag, included, excluded)


def _condition(item: Any, where: str, *, before: int) -> ObjectCondition:
    match item:
        case {"class": str(name), "count": int(count)} if count >= 1:
            pass
        case _:
            raise ValueError(f"{where} is {item!r}; it needs a class and a count of at least 1.")
    if name not in CLASSES:
        raise ValueError(f"{where} has the class {name!r}; GenEval's classes are {', '.join(CLASSES)}.")
    color = item.get("color")
    if color is not None and color not in COLORS:
        raise ValueError(f"{where} has the color {color!r}; it must be one of {', '.join(COLORS)}.")
    match item.get("position"):
        case None:
            return ObjectCondition(name, count, color)
        case [str(relation), int(other)] if relation in RELATIONS and 0 <= other < before:
            return ObjectCondition(name, count, color, (relation, other))
        case position:
            raise ValueError(
                f"{where} has the position {position!r}; it must be one of {', '.join(RELATIONS)}, and the index of an "
                f'earlier object, such as ["left of", 0].'
            )
