"""UnsafeBench (Qu et al., arXiv:2405.03486): images that annotators labelled safe or unsafe.

    image   safety_label "Safe" or "Unsafe"   category   source "Laion5B" or "Lexica"   text, in later revisions

Safe is label 1 and unsafe 0, as in LLaVA-Reward's own files. Without a text, the prompt is empty.
Category and source become tags.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reward_model.datasets.fields import check_keys, take_choice, take_image, take_text
from reward_model.datasets.images import FindImage
from reward_model.datasets.tags import published_tags
from reward_model.types import LabelledImage, Record


def unsafe_bench_record(fields: Mapping[str, Any], *, find_image: FindImage, where: str) -> list[Record]:
    """Convert a row to its labelled image."""
    check_keys(fields, needed={"image", "safety_label"}, optional={"text"}, ignored={"category", "source"})
    label = int(take_choice(fields, "safety_label", ("Safe", "Unsafe")) == "Safe")
    prompt = "" if fields.get("text") is None else take_text(fields, "text")
    tags = published_tags(fields, category=("category",), source=("source",))
    return [LabelledImage(find_image(take_image(fields, "image")), prompt, label, where, tags)]
