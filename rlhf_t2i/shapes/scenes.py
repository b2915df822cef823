"""Scenes of the toy world, their prompts, and drawings of them.

A scene is one or more coloured shapes on a plain background. The grammar of prompts has three tiers:

    one       "a red circle on a blue background"
    count     "two red circles on a blue background"              (two or three)
    relation  "a red circle above a green square on a blue background"

Every prompt belongs to one of two fixed sets: `training` prompts, and `held-out` prompts, whose combinations of words
no toy model was trained on, although each word occurs often in training.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.shapes.names import TOY_RESOLUTION

Tier = Literal["one", "count", "relation"]
Split = Literal["training", "held-out", "all"]

PALETTE: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.12, 0.12),
    "green": (0.10, 0.62, 0.20),
    "blue": (0.12, 0.25, 0.85),
    "yellow": (0.95, 0.85, 0.10),
    "black": (0.05, 0.05, 0.05),
    "white": (0.96, 0.96, 0.96),
    "gray": (0.50, 0.50, 0.50),
}
"""RGB in [0, 1] of every colour. All of them can be backgrounds; the first four can also be colours of things."""

COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "triangle")
BACKGROUNDS = tuple(PALETTE)
COUNTS = {"two": 2, "three": 3}
RELATIONS: dict[str, tuple[int, int]] = {
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
"""Direction from the second thing to the first: (x, y) with y pointing down."""
MIRRORED = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
"""The same relation with the two things exchanged."""


@dataclass(frozen=True, slots=True)
class Thing:
    """A thing of a scene: its colour and its shape."""

    colour: str
    shape: str


@dataclass(frozen=True, slots=True)
class Scene:
    """The content of a prompt: things, background and relation."""

    things: tuple[Thing, ...]
    background: str
    relation: str | None = None
    """Relation of the first of two things to the second; None for the other tiers."""

    @property
    def tier(self) -> Tier:
        if self.relation is not None:
            return "relation"
        return "one" if len(self.things) == 1 else "count"

    @property
    def prompt(self) -> str:
        ground = f"on a {self.background} background"
        first = self.things[0]
        match self.tier:
            case "one":
                return f"a {first.colour} {first.shape} {ground}"
            case "count":
                number = {count: word for word, count in COUNTS.items()}[len(self.things)]
                return f"{number} {first.colour} {first.shape}s {ground}"
            case "relation":
                second = self.things[1]
                return f"a {first.colour} {first.shape} {self.relation} a {second.colour} {second.shape} {ground}"

    @property
    def held_out(self) -> bool:
        """True if no toy model was trained on this combination.

        A Latin-square rule holds out a quarter of all combinations, so evenly that each pair of words (a colour with a
        shape, a shape with a background, ...) still occurs in training.
        """
        # Both prompts of the same image belong to the same set.
        scene = self.mirrored if self.relation in ("right of", "below") else self
        first, last, relation = scene.things[0], scene.things[-1], scene.relation
        kind = len(self.things) - 1 if relation is None else ("left of", "above").index(relation)
        words = _index(first) + (2 * _index(last) if relation else 0) + BACKGROUNDS.index(self.background)
        return (words + kind) % 4 == 0

    @property
    def mirrored(self) -> Scene:
        """The same scene with its two things exchanged; the scene itself if it has no relation."""
        return replace(self, things=self.things[::-1], relation=MIRRORED[self.relation]) if self.relation else self


def _index(thing: Thing) -> int:
    return COLOURS.index(thing.colour) + SHAPES.index(thing.shape)


_ONE = re.compile(rf"an? ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})")
_COUNT = re.compile(rf"({'|'.join(COUNTS)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})s")
_RELATION = re.compile(rf"{_ONE.pattern} ({'|'.join(RELATIONS)}) {_ONE.pattern}")
_GROUND = re.compile(rf"(.+) on an? ({'|'.join(BACKGROUNDS)}) background")


def parse_prompt(prompt: str) -> Scene:
    """Return the scene of a prompt; ValueError for a prompt outside the grammar or with an invisible thing."""
    scene = _parsed(prompt.strip().lower())
    if scene is None:
        raise ValueError(
            f"The prompt {prompt!r} is not in the grammar of the toy world. Valid are "
            f"'a red circle on a blue background', 'two red circles on a blue background' and "
            f"'a red circle above a green square on a blue background', with the colours {', '.join(COLOURS)}, the "
            f"shapes {', '.join(SHAPES)}, the relations {', '.join(RELATIONS)} and the backgrounds "
            f"{', '.join(BACKGROUNDS)}."
        )
    if scene.background in {thing.colour for thing in scene.things}:
        raise ValueError(
            f"The prompt {prompt!r} has a thing in the colour of its background, which would be invisible."
        )
    return scene


def _parsed(prompt: str) -> Scene | None:
    if ground := _GROUND.fullmatch(prompt):
        subject, background = ground.groups()
        if one := _ONE.fullmatch(subject):
            return Scene((Thing(one[1], one[2]),), background)
        if count := _COUNT.fullmatch(subject):
            return Scene((Thing(count[2], count[3]),) * COUNTS[count[1]], background)
        if two := _RELATION.fullmatch(subject):
            return Scene((Thing(two[1], two[2]), Thing(two[4], two[5])), background, two[3])
    return None


def all_scenes(tier: Tier, split: Split = "all") -> list[Scene]:
    """Return every scene of a tier in a fixed order: 72 of tier `one`, 144 of `count`, 2,160 of `relation`."""
    things = [Thing(colour, shape) for colour, shape in product(COLOURS, SHAPES)]
    match tier:
        case "one":
            subjects: list[tuple[tuple[Thing, ...], str | None]] = [((t,), None) for t in things]
        case "count":
            subjects = [((t,) * n, None) for t, n in product(things, COUNTS.values())]
        case "relation":
            pairs = [(a, b) for a, b in product(things, things) if a.colour != b.colour]
            subjects = [(pair, relation) for pair, relation in product(pairs, RELATIONS)]
    scenes = [
        Scene(subject, background, relation)
        for (subject, relation), background in product(subjects, BACKGROUNDS)
        if background not in {thing.colour for thing in subject}
    ]
    return [s for s in scenes if split == "all" or s.held_out == (split == "held-out")]


def all_prompts(split: Split, tiers: Sequence[Tier] = ("one",)) -> list[str]:
    """Return the prompts of a split, ordered by tier."""
    if unknown := set(tiers) - set(get_args(Tier)):
        raise ValueError(f"Unknown tiers {sorted(unknown)}; there are {', '.join(get_args(Tier))}.")
    return [scene.prompt for tier in tiers for scene in all_scenes(tier, split)]


# --- drawing --------------------------------------------------------------------------------------


def _layout(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Return random centres and radii (n, 3) of the things, as fractions of the image width."""
    if len(scene.things) == 1:
        radius = rng.uniform(0.22, 0.34)
        return np.array([[*rng.uniform(radius + 0.04, 0.96 - radius, 2), radius]])
    while True:
        radii = rng.uniform(0.155, 0.195, len(scene.things))
        centres = rng.uniform(radii[:, None] + 0.03, 0.97 - radii[:, None], (len(radii), 2))
        gaps = np.abs(centres[:, None] - centres[None]).max(-1) - radii[:, None] - radii[None]
        if (gaps[np.triu_indices(len(radii), 1)] < 0.05).any():
            continue
        if scene.relation is not None:
            direction = np.array(RELATIONS[scene.relation])
            along, across = centres[0] - centres[1] if direction[0] else (centres[0] - centres[1])[::-1]
            if along * direction.sum() < 0.3 or abs(across) > 0.6 * abs(along):
                continue
        return np.concatenate([centres, radii[:, None]], axis=1)


def _signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Return the distance to the outline, negative inside; x and y are relative to the centre, y pointing down."""
    match shape:
        case "circle":
            return np.hypot(x, y) - radius
        case "square":
            return np.maximum(np.abs(x), np.abs(y)) - 0.9 * radius
        case "triangle":
            # Apex up: height 1.8 r, base 2 r, both legs at the same slope.
            leg = (1.8 * np.abs(x) - (y + 0.9 * radius)) / np.hypot(1.8, 1.0)
            return np.maximum(leg, y - 0.9 * radius)
        case _:
            raise ValueError(f"Unknown shape {shape!r}; there are {', '.join(SHAPES)}.")


def draw(
    things: Sequence[Thing], background: str, layout: np.ndarray, *, shade: np.ndarray, size: int = TOY_RESOLUTION
) -> np.ndarray:
    """Return an anti-aliased drawing (3, size, size), RGB in about [0, 1]; later things cover earlier ones.

    `layout` has the centre and radius of each thing (n, 3), as fractions of the image width; `shade` (n + 1) is added
    to the colour of the background and of each thing.
    """
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size
    y, x = np.meshgrid(grid, grid, indexing="ij")
    image = np.empty((3, size, size), dtype=np.float32)
    image[:] = np.array(PALETTE[background])[:, None, None] + shade[0]
    for thing, (cx, cy, radius), light in zip(things, layout, shade[1:], strict=True):
        distance = _signed_distance(thing.shape, x - cx, y - cy, radius)
        cover = np.clip(0.5 - distance * size, 0, 1)
        colour = np.array(PALETTE[thing.colour])[:, None, None] + light
        image += cover * (colour - image)
    return image


def render(
    scenes: Sequence[Scene], *, rng: np.random.Generator, size: int = TOY_RESOLUTION
) -> Float[Tensor, "B 3 {size} {size}"]:
    """Draw each scene once with random positions and sizes, anti-aliased; RGB in [0, 1]."""
    images = np.empty((len(scenes), 3, size, size), dtype=np.float32)
    for image, scene in zip(images, scenes, strict=True):
        shade = rng.uniform(-0.04, 0.04, len(scene.things) + 1)
        image[:] = draw(scene.things, scene.background, _layout(scene, rng), shade=shade, size=size)
    return torch.from_numpy(images.clip(0, 1))
