"""Pick-a-Pic v1 and v2 (Kirstain et al., arXiv:2305.01569): pairs of images, labelled by the users who requested them.

    caption   jpg_0, jpg_1   label_0, label_1   has_label   are_different   model_0, model_1   and others, not used

The table contains the images as JPEG files. The labels are 1 and 0, 0 and 1, or 0.5 and 0.5, which is a tie.
The models become the tag `generator`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reward_model.datasets.fields import (
    BadRecordError,
    NoPreferenceError,
    check_keys,
    shortened,
    take_image,
    take_number,
    take_text,
)
from reward_model.datasets.images import FindImage
from reward_model.datasets.tags import published_tags
from reward_model.types import PreferencePair, Record

_IGNORED = {
    *("best_image_uid", "created_at", "image_0_uid", "image_0_url", "image_1_uid", "image_1_url"),
    *("model_0", "model_1", "ranking_id", "user_id", "num_example_per_prompt", "__index_level_0__"),
}


def pick_a_pic_record(fields: Mapping[str, Any], *, find_image: FindImage, where: str) -> list[Record]:
    """Convert a row to its pair. Raises NoPreferenceError without a label or with two equal images."""
    if not {"jpg_0", "jpg_1"} & {*fields} and "image_0_uid" in fields:
        raise BadRecordError(
            "jpg_0 and jpg_1 are missing: this is the variant without images; use the one with images."
        )
    check_keys(
        fields,
        needed={"caption", "jpg_0", "jpg_1", "label_0", "label_1"},
        optional={"has_label", "are_different"},
        ignored=_IGNORED,
    )
    for flag in ("has_label", "are_different"):
        value = fields.get(flag, True)
        if not isinstance(value, bool):
            raise BadRecordError(f"{flag!r} is {shortened(value)}; it must be true or false.")
        if not value:
            raise NoPreferenceError(f"{flag} is false")
    labels = take_number(fields, "label_0"), take_number(fields, "label_1")
    if labels not in ((1, 0), (0, 1), (0.5, 0.5)):
        raise BadRecordError(
            f"'label_0' and 'label_1' are {labels[0]:g} and {labels[1]:g}; they must be 1 and 0, 0 and 1, or both 0.5."
        )
    prompt = take_text(fields, "caption")
    first, second = find_image(take_image(fields, "jpg_0")), find_image(take_image(fields, "jpg_1"))
    winner, loser = (second, first) if labels == (0, 1) else (first, second)
    tags = published_tags(fields, generator=("model_0", "model_1"))
    return [PreferencePair(winner, loser, prompt, prompt, tie=labels == (0.5, 0.5), where=where, tags=tags)]
