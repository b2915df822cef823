"""HPDv3 and HPDv3++ (Ma et al., arXiv:2508.03789): pairs whose first image is preferred.

    {"prompt": "a red fox", "path1": "a.jpg", "path2": "b.jpg", "confidence": 0.97, "choice_dist": [17, 2],
     "model1": "flux", "model2": "real_images"}

`confidence` may be null, or the string "null"; it is checked and not used. The models become the tag `generator`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reward_model.datasets.fields import BadRecordError, check_keys, shortened, take_image, take_number, take_text
from reward_model.datasets.images import FindImage
from reward_model.datasets.tags import published_tags
from reward_model.types import PreferencePair, Record


def hpdv3_record(fields: Mapping[str, Any], *, find_image: FindImage, where: str) -> list[Record]:
    """Convert an element to its pair; path1 is the winner."""
    check_keys(
        fields,
        needed={"prompt", "path1", "path2"},
        optional={"confidence"},
        ignored={"choice_dist", "model1", "model2"},
    )
    if fields.get("confidence") not in (None, "null"):
        confidence = take_number(fields, "confidence")
        if not 0 <= confidence <= 1:
            raise BadRecordError(f"'confidence' is {shortened(fields['confidence'])}; it must be null or in [0, 1].")
    prompt = take_text(fields, "prompt")
    winner, loser = (find_image(take_image(fields, key)) for key in ("path1", "path2"))
    tags = published_tags(fields, generator=("model1", "model2"))
    return [PreferencePair(winner, loser, prompt, prompt, where=where, tags=tags)]
