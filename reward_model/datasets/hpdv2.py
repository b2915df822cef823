"""HPDv2 (Wu et al., arXiv:2306.09341): human choices among images of many models.

train.json  {"prompt": "a red fox", "file_path": ["a.jpg", "b.jpg"], "human_preference": [1, 0]}    1 is preferred
test.json   {"prompt": "a red fox", "image_path": ["a.jpg", "b.jpg", "c.jpg"], "rank": [1, 3, 2],
             "raw_annotations": [...]}                               the averaged ranking; a lower rank is better
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reward_model.datasets.fields import (
    BadRecordError,
    as_image,
    as_number,
    check_keys,
    shortened,
    take_list,
    take_text,
)
from reward_model.datasets.images import FindImage
from reward_model.datasets.ratings import pairs_from_ratings
from reward_model.types import PreferencePair, Record


def hpdv2_record(fields: Mapping[str, Any], *, find_image: FindImage, where: str) -> list[Record]:
    """Convert an element of train.json to its pair, or an element of test.json to all pairs of its images."""
    key = "file_path" if "file_path" in fields else "image_path"
    annotation = "rank" if "rank" in fields else "human_preference"
    check_keys(fields, needed={"prompt", key, annotation}, ignored={"raw_annotations", "user_hash"})
    prompt = take_text(fields, "prompt")
    images = [as_image(value, key) for value in take_list(fields, key)]
    numbers = [as_number(value, annotation) for value in take_list(fields, annotation)]
    if len(images) != len(numbers):
        raise BadRecordError(
            f"{key!r} has {len(images)} elements and {annotation!r} has {len(numbers)}; they must be as many."
        )
    if annotation == "rank":
        ranks = [-number for number in numbers]
        return pairs_from_ratings(images, ranks, prompt, find_image=find_image, where=where)
    if numbers not in ([1, 0], [0, 1]):
        raise BadRecordError(f"'human_preference' is {shortened(fields[annotation])}; it must be [1, 0] or [0, 1].")
    first, second = (find_image(image) for image in images)
    winner, loser = (first, second) if numbers == [1, 0] else (second, first)
    return [PreferencePair(winner, loser, prompt, prompt, where=where)]
