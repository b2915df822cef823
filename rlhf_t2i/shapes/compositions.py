"""Compositions: images of one to five things whose prompts a bag of words cannot tell apart, to test reward models.

The tiers, each with what a loser gets wrong:

    one        "a red circle on a blue background"                            colour, shape or background
    attribute  "a red circle and a green square on a blue background"         colour or shape of one thing
    binding    the same                                                       the two colours are swapped
    binding3   "a red circle and a green square and a yellow triangle on ..." two of three colours are swapped
    count      "four red circles on a blue background"                        one thing more or less, of one to five
    relation   "a red circle left of a green square on a blue background"     the two things are on the other sides
    negation   "a red circle not left of a green square on ..."               it is left of it

Images are drawn as those of `scenes`, whose grammar and numbers do not depend on this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.shapes.names import TOY_RESOLUTION
from rlhf_t2i.shapes.scenes import BACKGROUNDS, COLOURS, MIRRORED, RELATIONS, SHAPES, Split, Thing, draw

Tier = Literal["one", "attribute", "binding", "binding3", "count", "relation", "negation"]
TIERS: tuple[Tier, ...] = get_args(Tier)
NUMBERS = ("a", "two", "three", "four", "five")
"""Word for each number of things."""
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
"""Words of a detailed caption for the third of the image in which a thing's centre is."""
WORDS = (*NUMBERS, *ROWS, *COLUMNS, "and", "not")
"""Words of prompts and captions that the grammar of `scenes` does not have all of."""


@dataclass(frozen=True, slots=True)
class Composition:
    """The content of a prompt."""

    things: tuple[Thing, ...]
    """One to three different things, or one to five equal ones."""
    background: str
    relation: str | None = None
    """Relation of the first of two things to the second."""
    negated: bool = False
    """True: the relation does not hold, but another one does."""
    large: bool = False
    """True for a single thing as large as in `scenes`; things that are counted have one size, whatever their number."""

    @property
    def prompt(self) -> str:
        first = self.things[0]
        if self.relation:
            second = self.things[1]
            relation = f"{'not ' * self.negated}{self.relation}"
            subject = f"a {first.colour} {first.shape} {relation} a {second.colour} {second.shape}"
        elif self.is_count:
            number = len(self.things)
            subject = f"{NUMBERS[number - 1]} {first.colour} {first.shape}{'s' * (number > 1)}"
        else:
            subject = " and ".join(f"a {thing.colour} {thing.shape}" for thing in self.things)
        return f"{subject} on a {self.background} background"

    @property
    def is_count(self) -> bool:
        """True if all things are equal."""
        return self.relation is None and len(set(self.things)) == 1

    @property
    def held_out(self) -> bool:
        """True for the quarter of all compositions that no model was trained on.

        Swapped colours and exchanged things do not change it: a near miss of those kinds is as new as the prompt.
        """
        words = sum(COLOURS.index(thing.colour) + SHAPES.index(thing.shape) for thing in self.things)
        axis = ("left of", "right of").count(self.relation or "")
        return (words + BACKGROUNDS.index(self.background) + len(self.things) + axis) % 4 == 0


def random_composition(tier: Tier, rng: np.random.Generator, *, split: Split = "all") -> Composition:
    """Return a random composition of a tier: its colours, shapes, background, number or relation."""
    while True:
        number = {"one": 1, "binding3": 3, "count": int(rng.integers(1, 6))}.get(tier, 2)
        colours, shapes = (rng.permutation(words) for words in (COLOURS, SHAPES))
        if tier in ("relation", "negation"):  # the two may have one shape
            shapes = rng.choice(SHAPES, 2)
        things = tuple(Thing(str(c), str(s)) for c, s in zip(colours, shapes, strict=False))
        things = (things[0],) * number if tier in ("one", "count") else things[:number]
        free = [ground for ground in BACKGROUNDS if ground not in {thing.colour for thing in things}]
        found = Composition(things, str(rng.choice(free)), large=tier == "one")
        if tier in ("relation", "negation"):
            found = replace(found, relation=str(rng.choice([*RELATIONS])), negated=tier == "negation")
        if split == "all" or found.held_out == (split == "held-out"):
            return found


def near_miss(composition: Composition, tier: Tier, rng: np.random.Generator) -> Composition:
    """Return a composition that is wrong for the prompt in the one respect of the tier."""
    things = list(composition.things)
    match tier:
        case "relation":
            assert composition.relation
            return replace(composition, relation=MIRRORED[composition.relation])
        case "negation":
            return replace(composition, negated=False)
        case "count":
            steps = [step for step in (-1, 1) if 1 <= len(things) + step <= len(NUMBERS)]
            return replace(composition, things=(things[0],) * (len(things) + int(rng.choice(steps))))
        case "binding" | "binding3":
            i, j = rng.choice(len(things), 2, replace=False)
            first, second = things[i], things[j]
            things[i], things[j] = Thing(second.colour, first.shape), Thing(first.colour, second.shape)
            return replace(composition, things=tuple(things))
        case "one" | "attribute":
            return _wrong_attribute(composition, rng, background=tier == "one")


def _wrong_attribute(composition: Composition, rng: np.random.Generator, *, background: bool) -> Composition:
    """Return the composition with another colour or shape of one thing, or another background."""
    shown = {composition.background, *(thing.colour for thing in composition.things)}
    respect = rng.choice(["colour", "shape", "background"] if background else ["colour", "shape"])
    if respect == "background":
        return replace(composition, background=str(rng.choice([b for b in BACKGROUNDS if b not in shown])))
    things = list(composition.things)
    i = int(rng.integers(len(things)))
    colour, shape = things[i].colour, things[i].shape
    if respect == "colour":
        colour = str(rng.choice([one for one in COLOURS if one not in shown]))
    else:
        shape = str(rng.choice([one for one in SHAPES if one != shape]))
    things[i] = Thing(colour, shape)
    return replace(composition, things=tuple(things))


# --- drawing --------------------------------------------------------------------------------------


def random_layout(composition: Composition, rng: np.random.Generator) -> np.ndarray:
    """Return random centres and radii (n, 3) of the things, as fractions of the image width."""
    number = len(composition.things)
    if composition.large:
        radius = rng.uniform(0.22, 0.34)
        return np.array([[*rng.uniform(radius + 0.04, 0.96 - radius, 2), radius]])
    if composition.is_count:  # in different cells of a grid of 3 x 3
        cells = rng.choice(9, number, replace=False)
        centres = (np.stack([cells % 3, cells // 3], axis=1) + 0.5) / 3 + rng.uniform(-0.015, 0.015, (number, 2))
        return np.concatenate([centres, rng.uniform(0.125, 0.135, (number, 1))], axis=1)
    relation = composition.relation
    if composition.negated:
        relation = str(rng.choice([other for other in RELATIONS if other != relation]))
    while True:
        radii = rng.uniform(0.135, 0.165, number)
        centres = rng.uniform(radii[:, None] + 0.03, 0.97 - radii[:, None], (number, 2))
        gaps = np.abs(centres[:, None] - centres[None]).max(-1) - radii[:, None] - radii[None]
        if (gaps[np.triu_indices(number, 1)] < 0.05).any():
            continue
        if relation:
            direction = np.array(RELATIONS[relation])
            along, across = centres[0] - centres[1] if direction[0] else (centres[0] - centres[1])[::-1]
            if along * direction.sum() < 0.3 or abs(across) > 0.6 * abs(along):
                continue
        return np.concatenate([centres, radii[:, None]], axis=1)


def draw_compositions(
    compositions: Sequence[Composition], layouts: Sequence[np.ndarray], *, rng: np.random.Generator
) -> Float[Tensor, "B 3 Y X"]:
    """Draw each composition in its layout, in random shades; RGB in [0, 1]."""
    images = np.empty((len(compositions), 3, TOY_RESOLUTION, TOY_RESOLUTION), dtype=np.float32)
    for image, composition, layout in zip(images, compositions, layouts, strict=True):
        shade = rng.uniform(-0.04, 0.04, len(composition.things) + 1)
        image[:] = draw(composition.things, composition.background, layout, shade=shade)
    return torch.from_numpy(images.clip(0, 1))


# --- captions -------------------------------------------------------------------------------------


def detailed_caption(composition: Composition, layout: np.ndarray, rng: np.random.Generator) -> str:
    """Return a caption that names each thing with its place, in random order: "top left red circle and ...".

    Half of all captions name the place of a thing before its colour and shape, half behind them.
    """
    parts = []
    for i in rng.permutation(len(layout)):
        thing, (column, row) = composition.things[i], np.clip((layout[i, :2] * 3).astype(int), 0, 2)
        words = [f"{thing.colour} {thing.shape}", f"{ROWS[row]} {COLUMNS[column]}"]
        parts.append(" ".join(words if rng.random() < 0.5 else words[::-1]))
    return f"{' and '.join(parts)} on a {composition.background} background"


def true_statements(composition: Composition) -> list[str]:
    """Return the prompts of training that are true of a composition without a negated relation."""
    assert not composition.negated
    found = [composition]
    if composition.relation:
        exchanged = replace(composition, things=composition.things[::-1], relation=MIRRORED[composition.relation])
        found.append(exchanged)
        for one in (composition, exchanged):
            others = [other for other in RELATIONS if other != one.relation]
            found += [replace(one, relation=other, negated=True) for other in others]
        found += [replace(one, relation=None) for one in (composition, exchanged)]
    elif not composition.is_count:
        found = [replace(composition, things=order) for order in permutations(composition.things)]
    return [one.prompt for one in found if not one.held_out]
