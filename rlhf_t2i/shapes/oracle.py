"""The oracle: the true reward of the toy world, computed from pixels by a classical detector.

The detector assigns each pixel the nearest colour of the palette, groups connected pixels of one colour into components
and compares each component with a circle, a square and a triangle that fill its bounding box. An image is scored for a
prompt in two ways:

    passed   every condition holds: background, number of things, each colour, each shape, relation, little clutter
    graded   the product of one quality in [floor, 1] per condition, so that one wrong word costs more than half
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from scipy import ndimage
from torch import Tensor

from rlhf_t2i.shapes.scenes import COLOURS, PALETTE, RELATIONS, SHAPES, Scene, Thing, parse_prompt

SIZE = 32
"""Height and width, in pixels, to which images are resized."""
_MIN_AREA = 12
"""Smallest area in pixels of a component that counts as a thing; a smaller one is clutter."""

_NAMES = tuple(PALETTE)
_COLOURS = torch.tensor([PALETTE[name] for name in _NAMES])


@dataclass(frozen=True, slots=True)
class Component:
    """A connected region of one colour other than the background."""

    colour: str
    overlap: dict[str, float]
    """Intersection over union with each shape that fills the bounding box, in [0, 1]."""
    centre: tuple[float, float]
    """(x, y) in pixels, y down."""
    aspect: float
    """Ratio of the longer to the shorter side of the bounding box, at least 1."""
    area: int
    """In pixels."""


@dataclass(frozen=True, slots=True)
class Detection:
    """The content of one image, independent of a prompt."""

    background: str
    background_fraction: float
    """Fraction of the border pixels that have the colour of the background."""
    components: tuple[Component, ...]
    clutter: float
    """Fraction of the pixels that are neither background nor part of a thing."""
    purity: float
    """Closeness of the pixels to their palette colours: 1 is exact, 0 half-way to another colour."""


@dataclass(frozen=True, slots=True)
class OracleScores:
    """Scores of images for their prompts."""

    graded: Float[Tensor, " B"]
    """In [0, 1]: above 0.9 for a clean image of the prompt, below 0.5 if any word is wrong."""
    passed: Bool[Tensor, " B"]
    """True if every condition of the prompt holds."""


def oracle_scores(images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> OracleScores:
    """Score each image, with pixels in [0, 1], for its prompt.

    Raises ValueError for a prompt outside the grammar of `scenes`, or if there are not as many prompts as images.
    """
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images came with {len(prompts)} prompts.")
    scores = [_score(s, parse_prompt(p)) for s, p in zip(detect(images), prompts, strict=True)]
    return OracleScores(
        torch.tensor([graded for graded, _ in scores], dtype=torch.float32),
        torch.tensor([passed for _, passed in scores], dtype=torch.bool),
    )


def shows_something(images: Float[Tensor, "B 3 Y X"]) -> Bool[Tensor, " B"]:
    """Return True for each image that passes for any prompt of the grammar, that is, for a sharp image of a scene."""
    return torch.tensor([scene is not None for scene in recognise(images)], dtype=torch.bool)


def recognise(images: Float[Tensor, "B 3 Y X"]) -> list[Scene | None]:
    """Return the scene that each image shows; None if it passes for no prompt of the grammar."""
    return [_shown(detection) for detection in detect(images)]


# --- detection ------------------------------------------------------------------------------------


def detect(images: Float[Tensor, "B 3 Y X"]) -> list[Detection]:
    """Return the background and the components of each image, with pixels in [0, 1]."""
    if not len(images):
        return []
    pixels = images.detach().float().cpu().clamp(0, 1)
    if pixels.shape[-2:] != (SIZE, SIZE):
        pixels = F.interpolate(pixels, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
    labels, purity = _nearest_colours(pixels)
    border = torch.cat([labels[:, 0], labels[:, -1], labels[:, 1:-1, 0], labels[:, 1:-1, -1]], 1)
    fractions = F.one_hot(border, len(_NAMES)).float().mean(1)
    fraction, background = fractions.max(1)
    planes = F.one_hot(labels, len(_NAMES)).permute(0, 3, 1, 2).bool()
    planes[torch.arange(len(labels)), background] = False
    components, clutter = _components(planes.numpy())
    return [
        Detection(_NAMES[b], f, tuple(c), m, p)
        for b, f, c, m, p in zip(
            background.tolist(), fraction.tolist(), components, clutter, purity.tolist(), strict=True
        )
    ]


def _nearest_colours(
    pixels: Float[Tensor, "B 3 Y X"],
) -> tuple[Tensor, Float[Tensor, " B"]]:
    """Return the palette index of each pixel, and the purity of each image.

    Blends along an edge resemble a third colour (red on white has a gray rim). A colour therefore counts as present
    only if it fills a 3 x 3 patch, and each pixel is assigned the nearest present colour: a rim is split in half.
    """
    kernel = torch.tensor([1.0, 4.0, 1.0]) / 6
    smooth = F.pad(pixels, (1, 1, 1, 1), mode="replicate")
    smooth = F.conv2d(smooth, (kernel[:, None] * kernel).expand(3, 1, 3, 3), groups=3)
    distance = torch.cdist(smooth.flatten(2).mT, _COLOURS).mT.unflatten(2, pixels.shape[-2:])
    first = F.one_hot(distance.argmin(1), len(_NAMES)).permute(0, 3, 1, 2).float()
    solid = -F.max_pool2d(-first, 3, stride=1)  # 1 where a colour fills a 3x3 patch
    present = solid.sum((2, 3)) >= 3
    present |= first.mean((2, 3)) >= first.mean((2, 3)).amax(1, keepdim=True)
    nearest = distance.masked_fill(~present[..., None, None], torch.inf).min(1)
    inner = nearest.values[:, 1:-1, 1:-1].flatten(1)
    off = torch.quantile(inner, 0.75, dim=1)
    return nearest.indices, (1 - off / 0.4).clamp(0, 1)


def _components(planes: np.ndarray) -> tuple[list[list[Component]], list[float]]:
    """Return the components of the foreground planes (B, colours, Y, X) of each image, and its clutter."""
    num_images, num_colours, height, width = planes.shape
    in_plane = np.zeros((3, 3, 3), dtype=bool)
    in_plane[1] = ndimage.generate_binary_structure(2, 1)
    labelled: Any = ndimage.label(planes.reshape(-1, height, width), in_plane)
    labels, count = labelled
    components: list[list[Component]] = [[] for _ in range(num_images)]
    covered = np.zeros(num_images)
    if count:
        boxes: list[Any] = ndimage.find_objects(labels)
        areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
        large = [i for i in range(count) if areas[i] >= _MIN_AREA]
        masks = [labels[box][0] == i + 1 for i in large if (box := boxes[i])]
        for i, mask, overlap in zip(large, masks, _overlaps(masks), strict=True):
            plane, rows, columns = boxes[i]
            image, colour = divmod(plane.start, num_colours)
            sides = sorted(mask.shape)
            centre = ((columns.start + columns.stop) / 2, (rows.start + rows.stop) / 2)
            components[image].append(Component(_NAMES[colour], overlap, centre, sides[1] / sides[0], int(areas[i])))
            covered[image] += areas[i]
    foreground = planes.sum((1, 2, 3))
    return components, ((foreground - covered) / (height * width)).tolist()


def _overlaps(masks: Sequence[np.ndarray]) -> list[dict[str, float]]:
    """Return the intersection over union of each mask with each shape that fills its bounding box."""
    overlaps = []
    for mask in masks:
        ious = []
        for top, side in ((0, 0), (1, 0), (0, 1), (1, 1)):
            padded = np.pad(mask, ((top, 0), (side, side)))
            templates = _templates(*padded.shape)
            ious.append((padded & templates).sum((1, 2)) / (padded | templates).sum((1, 2)))
        overlaps.append(dict(zip(SHAPES, np.max(ious, axis=0).tolist(), strict=True)))
    return overlaps


@cache
def _templates(height: int, width: int) -> np.ndarray:
    """Return (shapes, height, width): the pixels of which a shape that fills the box covers at least half."""
    y, x = np.meshgrid(*((np.arange(n * 8) + 0.5) / (n * 8) * 2 - 1 for n in (height, width)), indexing="ij")
    drawn = {
        "circle": np.hypot(x, y) <= 1,
        "square": np.ones_like(x, dtype=bool),
        "triangle": np.abs(x) <= (y + 1) / 2,
    }
    masks = np.stack([drawn[shape] for shape in SHAPES])
    return masks.reshape(len(SHAPES), height, 8, width, 8).mean((2, 4)) >= 0.5


# --- scoring --------------------------------------------------------------------------------------

_WRONG = 0.35
"""Factor by which one wrong word multiplies the graded score."""


def _ramp(value: float, low: float, high: float) -> float:
    return min(max((value - low) / (high - low), 0.0), 1.0)


def _shape_quality(component: Component, shape: str) -> float:
    """Return 1 for a clean drawing of `shape`, 0 for one of another shape."""
    own = component.overlap[shape]
    other = max(value for name, value in component.overlap.items() if name != shape)
    upright = 1 - _ramp(component.aspect, 1.45, 2.0)
    return _ramp(own - other, -0.02, 0.05) * _ramp(own, 0.5, 0.7) * upright


def shape_passes(component: Component, shape: str) -> bool:
    """Return True for a drawing of `shape` that is closer to it than to any other."""
    own = component.overlap[shape]
    other = max(value for name, value in component.overlap.items() if name != shape)
    return own >= 0.7 and own > other and component.aspect <= 1.5


def relation_quality(first: Component, second: Component, relation: str) -> float:
    """Return 1 if the first component clearly has this relation to the second, 0 if it does not."""
    x, y = first.centre[0] - second.centre[0], first.centre[1] - second.centre[1]
    to_x, to_y = RELATIONS[relation]
    along, across = x * to_x + y * to_y, abs(x * to_y) + abs(y * to_x)
    return _ramp(along - across, -3.0, 2.0)


def _score(detection: Detection, scene: Scene) -> tuple[float, bool]:
    """Return the graded score, and True if every condition holds."""
    same_background = detection.background == scene.background
    background = _ramp(detection.background_fraction, 0.6, 0.9) if same_background else 0.0
    clean = (1 - _ramp(detection.clutter, 0.01, 0.15)) * _ramp(detection.purity, 0.1, 0.5)
    things, components = scene.things, detection.components
    count = 1.0 if len(things) == len(components) else 0.0
    orders = permutations(components[:4], min(len(components[:4]), len(things)))
    quality, passes = max(_match(order, scene) for order in orders)
    terms = [background, clean, count]
    graded = quality
    for term in terms:
        graded *= _WRONG + (1 - _WRONG) * term
    passed = passes and background >= 0.8 and clean >= 0.7 and count == 1.0
    return graded, passed


def _match(components: Sequence[Component], scene: Scene) -> tuple[float, bool]:
    """Return the quality and pass of components, taken in this order, as the things of a scene.

    A missing thing counts as one of wrong colour and wrong shape, and fails the relation.
    """
    missing = len(scene.things) - len(components)
    quality, passes = _WRONG ** (2 * missing), missing == 0
    for component, thing in zip(components, scene.things, strict=False):
        colour = component.colour == thing.colour
        shape = _shape_quality(component, thing.shape)
        quality *= (1.0 if colour else _WRONG) * (_WRONG + (1 - _WRONG) * shape)
        passes = passes and colour and shape_passes(component, thing.shape)
    if scene.relation is not None:
        relation = relation_quality(components[0], components[1], scene.relation) if len(components) == 2 else 0.0
        quality *= _WRONG + (1 - _WRONG) * relation
        passes = passes and relation >= 0.8
    return quality, passes


def _shown(detection: Detection) -> Scene | None:
    """Return a scene of the grammar for which the image passes, of those that its components suggest."""
    if not 1 <= len(detection.components) <= 3:
        return None
    things = tuple(Thing(c.colour, max(c.overlap, key=lambda shape: c.overlap[shape])) for c in detection.components)
    if not {thing.colour for thing in things} <= set(COLOURS):
        return None  # gray, black and white are backgrounds only
    if len(things) == 2 and things[0].colour != things[1].colour:
        candidates = [Scene(things, detection.background, relation) for relation in RELATIONS]
    elif len(set(things)) == 1:
        candidates = [Scene(things, detection.background)]
    else:
        candidates = []
    return next((scene for scene in candidates if _score(detection, scene)[1]), None)
