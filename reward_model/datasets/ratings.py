"""Conversion of ratings of several images of one prompt to pairs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from reward_model.datasets.fields import ImageField, NoPreferenceError, shortened
from reward_model.datasets.images import FindImage
from reward_model.types import PreferencePair, Record, Tags


def pairs_from_ratings(
    images: Sequence[ImageField],
    ratings: Sequence[float],
    prompt: str,
    *,
    find_image: FindImage,
    where: str,
    tags: Tags | None = None,
) -> list[Record]:
    """Return a pair for every two images with different ratings; its rating gap is their difference.

    Higher is better: pass negative ranks. Two images with the same rating give no pair, as in the training data of
    LLaVA-Reward (arXiv:2507.21391). Raises NoPreferenceError if there is one image only, or all ratings are the same.
    """
    if len(images) < 2:
        raise NoPreferenceError(f"there is only one image of the prompt {shortened(prompt)}")
    if len(set(ratings)) == 1:
        raise NoPreferenceError("all images of the prompt are rated the same")
    files = [find_image(image) for image in images]
    pairs: list[Record] = []
    for one, other in combinations(range(len(files)), 2):
        if ratings[one] != ratings[other]:
            better, worse = (one, other) if ratings[one] > ratings[other] else (other, one)
            gap = ratings[better] - ratings[worse]
            pairs.append(
                PreferencePair(
                    files[better], files[worse], prompt, prompt, rating_gap=float(gap), where=where, tags=tags or {}
                )
            )
    return pairs
