"""The true reward of the built-in world: it looks at any image and says whether it shows the prompt.

It knows nothing of how an image was made. Pixels become the nearest colour of the palette, connected pixels
of one colour become components, and each component is laid over a circle, a square and a triangle of its own
bounding box. The scores on a prompt then has two sides:

    passed   every condition holds: background, number of things, each colour, each shape, relation, no mess
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
"""Images of another size are brought to this width and height before they are looked at."""
_MIN_AREA = 12
"""Pixels of the smallest component that counts as a thing; a smaller one is mess."""

_NAMES = tuple(PALETTE)
_COLOURS = torch.tensor([PALETTE[name] for name in _NAMES])


@dataclass(frozen=True, slots=True)
class Component:
    """One connected patch of one colour that is not the background."""

    colour: str
    overlap: dict[str, float]
    """Intersection over union with each shape, drawn to fill the patch's bounding box."""
    centre: tuple[float, float]
    """(x, y) in pixels, y down."""
    aspect: float
    """Longer side of the bounding box over the shorter one, >= 1."""
    area: int


@dataclass(frozen=True, slots=True)
class Detection:
    """What the oracle sees in one image, before it is asked anything."""

    background: str
    background_share: float
    """Share of the border that has the background's colour."""
    components: tuple[Component, ...]
    mess: float
    """Share of the image that is neither background nor part of a thing."""
    purity: float
    """How close pixels are to the colour they were taken for: 1 = exactly, 0 = half-way to another."""


@dataclass(frozen=True, slots=True)
class OracleScores:
    """How well images show their prompts."""

    graded: Float[Tensor, " B"]
    """In [0, 1]: > 0.9 for a clean image of the prompt, < 0.5 with any word wrong."""
    passed: Bool[Tensor, " B"]


def oracle_scores(images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> OracleScores:
    """Look at each image and compare it with its prompt.

    Raises ValueError for a prompt outside the grammar of `scenes.py`, or if there are not as many prompts as images.
    """
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images came with {len(prompts)} prompts.")
    scores_of_tier = [_score(s, parse_prompt(p)) for s, p in zip(detect(images), prompts, strict=True)]
    return OracleScores(
        torch.tensor([graded for graded, _ in scores_of_tier], dtype=torch.float32),
        torch.tensor([passed for _, passed in scores_of_tier], dtype=torch.bool),
    )


def shows_something(images: Float[Tensor, "B 3 Y X"]) -> Bool[Tensor, " B"]:
    """Whether an image passes for *some* prompt of the grammar: the drawing is sharp, whatever was asked."""
    return torch.tensor([scene is not None for scene in recognise(images)], dtype=torch.bool)


def recognise(images: Float[Tensor, "B 3 Y X"]) -> list[Scene | None]:
    """The scene that each image shows, in one of its wordings; None where no prompt of the grammar would pass."""
    return [_shown(detection) for detection in detect(images)]


# --- looking --------------------------------------------------------------------------------------


def detect(images: Float[Tensor, "B 3 Y X"]) -> list[Detection]:
    """Describe each image without knowing its prompt."""
    if not len(images):
        return []
    pixels = images.detach().float().cpu().clamp(0, 1)
    if pixels.shape[-2:] != (SIZE, SIZE):
        pixels = F.interpolate(pixels, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
    labels, purity = _nearest_colours(pixels)
    border = torch.cat([labels[:, 0], labels[:, -1], labels[:, 1:-1, 0], labels[:, 1:-1, -1]], 1)
    shares = F.one_hot(border, len(_NAMES)).float().mean(1)
    share, background = shares.max(1)
    planes = F.one_hot(labels, len(_NAMES)).permute(0, 3, 1, 2).bool()
    planes[torch.arange(len(labels)), background] = False
    components, mess = _components(planes.numpy())
    return [
        Detection(_NAMES[b], s, tuple(c), m, p)
        for b, s, c, m, p in zip(background.tolist(), share.tolist(), components, mess, purity.tolist(), strict=True)
    ]


def _nearest_colours(
    pixels: Float[Tensor, "B 3 Y X"],
) -> tuple[Tensor, Float[Tensor, " B"]]:
    """The palette index of each pixel, and each image's purity.

    Blends along an edge look like a third colour (red on white has a gray rim). A colour therefore counts as present
    only where it fills some 3x3 patch, and every pixel then goes to the nearest present colour: a rim is split in half.
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
    """The connected patches of each image's foreground planes (B, colours, Y, X), and its share of mess."""
    num_images, num_colours, height, width = planes.shape
    in_plane = np.zeros((3, 3, 3), dtype=bool)
    in_plane[1] = ndimage.generate_binary_structure(2, 1)
    labelled: Any = ndimage.label(planes.reshape(-1, height, width), in_plane)
    labels, count = labelled
    found: list[list[Component]] = [[] for _ in range(num_images)]
    tidy = np.zeros(num_images)
    if count:
        boxes: list[Any] = ndimage.find_objects(labels)
        areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
        kept = [i for i in range(count) if areas[i] >= _MIN_AREA]
        masks = [labels[box][0] == i + 1 for i in kept if (box := boxes[i])]
        for i, mask, overlap in zip(kept, masks, _overlaps(masks), strict=True):
            plane, rows, columns = boxes[i]
            image, colour = divmod(plane.start, num_colours)
            sides = sorted(mask.shape)
            centre = ((columns.start + columns.stop) / 2, (rows.start + rows.stop) / 2)
            found[image].append(Component(_NAMES[colour], overlap, centre, sides[1] / sides[0], int(areas[i])))
            tidy[image] += areas[i]
    foreground = planes.sum((1, 2, 3))
    return found, ((foreground - tidy) / (height * width)).tolist()


def _overlaps(masks: Sequence[np.ndarray]) -> list[dict[str, float]]:
    """Intersection over union of each mask with each shape, drawn in the same pixels to fill the same box."""
    found = []
    for mask in masks:
        ious = []
        for top, side in ((0, 0), (1, 0), (0, 1), (1, 1)):
            grown = np.pad(mask, ((top, 0), (side, side)))
            templates = _templates(*grown.shape)
            ious.append((grown & templates).sum((1, 2)) / (grown | templates).sum((1, 2)))
        found.append(dict(zip(SHAPES, np.max(ious, axis=0).tolist(), strict=True)))
    return found


@cache
def _templates(height: int, width: int) -> np.ndarray:
    """(shapes, height, width): the pixels that each shape covers at least half of if it fills the box."""
    y, x = np.meshgrid(*((np.arange(n * 8) + 0.5) / (n * 8) * 2 - 1 for n in (height, width)), indexing="ij")
    drawn = {
        "circle": np.hypot(x, y) <= 1,
        "square": np.ones_like(x, dtype=bool),
        "triangle": np.abs(x) <= (y + 1) / 2,
    }
    masks = np.stack([drawn[shape] for shape in SHAPES])
    return masks.reshape(len(SHAPES), height, 8, width, 8).mean((2, 4)) >= 0.5


# --- comparing ------------------------------------------------------------------------------------

_WRONG = 0.35
"""What one wrong word leaves of the graded score."""


def _ramp(value: float, low: float, high: float) -> float:
    return min(max((value - low) / (high - low), 0.0), 1.0)


def _shape_quality(component: Component, shape: str) -> float:
    """1 for a clean drawing of `shape`, 0 for one of another shape."""
    mine = component.overlap[shape]
    other = max(value for name, value in component.overlap.items() if name != shape)
    upright = 1 - _ramp(component.aspect, 1.45, 2.0)
    return _ramp(mine - other, -0.02, 0.05) * _ramp(mine, 0.5, 0.7) * upright


def _shape_passes(component: Component, shape: str) -> bool:
    mine = component.overlap[shape]
    other = max(value for name, value in component.overlap.items() if name != shape)
    return mine >= 0.7 and mine > other and component.aspect <= 1.5


def _relation_quality(first: Component, second: Component, relation: str) -> float:
    """1 if the first lies clearly in the asked direction of the second, 0 if it does not."""
    x, y = first.centre[0] - second.centre[0], first.centre[1] - second.centre[1]
    to_x, to_y = RELATIONS[relation]
    along, across = x * to_x + y * to_y, abs(x * to_y) + abs(y * to_x)
    return _ramp(along - across, -3.0, 2.0)


def _score(detection: Detection, scene: Scene) -> tuple[float, bool]:
    """The graded score and whether every condition holds."""
    right_ground = detection.background == scene.background
    ground = _ramp(detection.background_share, 0.6, 0.9) if right_ground else 0.0
    clean = (1 - _ramp(detection.mess, 0.01, 0.15)) * _ramp(detection.purity, 0.1, 0.5)
    things, seen = scene.things, detection.components
    count = 1.0 if len(things) == len(seen) else 0.0
    orders = permutations(seen[:4], min(len(seen[:4]), len(things)))
    quality, passes = max(_match(order, scene) for order in orders)
    terms = [ground, clean, count]
    graded = quality
    for term in terms:
        graded *= _WRONG + (1 - _WRONG) * term
    passed = passes and ground >= 0.8 and clean >= 0.7 and count == 1.0
    return graded, passed


def _match(seen: Sequence[Component], scene: Scene) -> tuple[float, bool]:
    """How well components, taken in this order, are the scene's things: quality and pass.

    A thing that is not there has neither its colour nor its shape, and lies nowhere.
    """
    missing = len(scene.things) - len(seen)
    quality, passes = _WRONG ** (2 * missing), missing == 0
    for component, thing in zip(seen, scene.things, strict=False):
        colour = component.colour == thing.colour
        shape = _shape_quality(component, thing.shape)
        quality *= (1.0 if colour else _WRONG) * (_WRONG + (1 - _WRONG) * shape)
        passes = passes and colour and _shape_passes(component, thing.shape)
    if scene.relation is not None:
        relation = _relation_quality(seen[0], seen[1], scene.relation) if len(seen) == 2 else 0.0
        quality *= _WRONG + (1 - _WRONG) * relation
        passes = passes and relation >= 0.8
    return quality, passes


def _shown(detection: Detection) -> Scene | None:
    """A scene of the grammar that passes, if any does: try the one that the image itself suggests."""
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
