"""Aspect-ratio buckets: a few image sizes of about equal area, so that images keep nearly their shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from reward_model.image_files import upright_size
from reward_model.stored_images import ImageSource

MAX_RATIO = 2.0
"""Longest side over shortest side of a bucket."""


def aspect_buckets(image_size: tuple[int, int], step: int, *, unit: int) -> list[tuple[int, int]]:
    """Return heights and widths of buckets, `image_size` first: sides are multiples of `step`, the area is at most its.

        short = floor(area / long / step) * step      for each long with long <= 2 * short

    1024 x 1024 and 64 give the sizes that SDXL was trained at (arXiv:2307.01952, appendix I). Raises ValueError for a
    step that is no multiple of `unit`, what the model cuts images into, and for one that leaves `image_size` alone.
    """
    if step % unit:
        near = unit * max(1, round(step / unit))
        raise ValueError(
            f"aspect_bucket_step is {step}; for this model it must be a multiple of {unit}, such as {near}."
        )
    area, found = math.prod(image_size), [image_size]
    first = math.ceil(math.sqrt(area) / step)
    for long in range(first * step, max(image_size) * 2, step):
        short = area // long // step * step
        if 0 < short <= long <= MAX_RATIO * short:
            found += [(short, long), (long, short)]
    found = list(dict.fromkeys(found))
    if len(found) == 1:
        height, width = image_size
        raise ValueError(
            f"aspect_bucket_step is {step}; at {height} x {width} pixels it leaves no other bucket. It must be "
            f"smaller, such as {unit}."
        )
    return found


def bucket_of(sizes: Sequence[tuple[int, int]], buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the bucket whose aspect ratio is nearest to the geometric mean of those of images of these sizes.

    Ratios are compared by their logarithms, so that a size and its transpose have transposed buckets.
    """
    ratio = sum(math.log(height / width) for height, width in sizes) / len(sizes)
    return min(buckets, key=lambda bucket: abs(math.log(bucket[0] / bucket[1]) - ratio))


class Buckets:
    """The buckets of a model, and the sizes of images, which are read when they are needed."""

    def __init__(self, sizes: Sequence[tuple[int, int]]) -> None:
        self.sizes = sizes
        self._upright_size = lru_cache(maxsize=100_000)(upright_size)

    def size_of(self, *images: ImageSource) -> tuple[int, int]:
        """Return height and width of the bucket that these images share."""
        if len(self.sizes) == 1:
            return self.sizes[0]
        return bucket_of([self._upright_size(image) for image in images], self.sizes)

    def groups(self, pairs: Sequence[tuple[ImageSource, ImageSource]]) -> list[list[int]]:
        """Return the rows of `pairs` of each bucket that has any, in the order of the buckets."""
        rows: dict[tuple[int, int], list[int]] = {size: [] for size in self.sizes}
        for row, pair in enumerate(pairs):
            rows[self.size_of(*pair)].append(row)
        return [found for found in rows.values() if found]
