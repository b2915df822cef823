"""The size of generated images, which the options resolution, height and width give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SIZE_OPTIONS = ("resolution", "height", "width")


def image_size(options: Mapping[str, Any]) -> int | tuple[int, int] | None:
    """Return the side of square images in pixels, or their height and width; None is the model's native size.

    `options` may lack one, as those of older runs do. Raises ValueError for height or width alone, and for both beside
    a resolution.
    """
    resolution, height, width = (options.get(name) for name in SIZE_OPTIONS)
    if height is None and width is None:
        return resolution
    if height is None or width is None:
        given, missing = ("height", "width") if width is None else ("width", "height")
        raise ValueError(
            f"{given} is {options[given]} and {missing} is null; give both, or resolution alone for square images."
        )
    if resolution is not None:
        raise ValueError(
            f"resolution is {resolution}, height {height} and width {width}; give resolution for square images, or "
            f"height and width, with the other null."
        )
    return height, width
