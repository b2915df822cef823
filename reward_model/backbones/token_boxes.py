"""The part of an image that each visual token comes from, for maps of the attention to them.

A box is (top, left, bottom, right) in fractions of the image's height and width. It reaches beyond [0, 1] where an
image was padded; a token that comes from no part, such as a separator, has a box of nan. A vision tower mixes all
patches, so a box is where a token was cut, and not all that it depends on.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from reward_model.images import centred_offsets

Area = tuple[float, float, float, float]
"""A box: top, left, bottom, right."""
WHOLE: Area = (0.0, 0.0, 1.0, 1.0)


@runtime_checkable
class HasTokenBoxes(Protocol):
    """A backbone that knows where its visual tokens lie; others have no maps of attention."""

    def token_boxes(self, height: int, width: int) -> Float[Tensor, "V 4"]:
        """Return the box of each visual token of an image of this size in pixels, in the order of the tokens."""
        ...


def grid_boxes(rows: int, columns: int, area: Area = WHOLE) -> Float[Tensor, "R C 4"]:
    """Return the boxes of a grid of equal cells that covers an area."""
    top, left, bottom, right = area
    y = torch.linspace(top, bottom, rows + 1, dtype=torch.float64)
    x = torch.linspace(left, right, columns + 1, dtype=torch.float64)
    sides = (y[:-1, None], x[None, :-1], y[1:, None], x[None, 1:])
    return torch.stack([side.expand(rows, columns) for side in sides], dim=-1).float()


def with_line_ends(boxes: Float[Tensor, "R C 4"]) -> Float[Tensor, "V 4"]:
    """Return the boxes line by line, with a token of no place at the end of each line."""
    return torch.cat([boxes, nowhere(len(boxes))[:, None]], dim=1).flatten(0, 1)


def nowhere(count: int) -> Float[Tensor, "{count} 4"]:
    """Return the boxes of tokens that come from no part of the image."""
    return torch.full((count, 4), torch.nan)


def padded_area(size: tuple[int, int], padded: tuple[int, int]) -> Area:
    """Return the area of an image of a size (height, width) after `images.pad_to`, in fractions of the image."""
    (height, width), (top, left) = size, centred_offsets(size, padded)
    return -top / height, -left / width, (padded[0] - top) / height, (padded[1] - left) / width
