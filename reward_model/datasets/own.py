"""The project's own format: one JSON object a line, short enough to be written by hand.

    {"prompt": "a red fox", "winner": "a.png", "loser": "b.png"}
    {"prompt": "a red fox", "winner": "a.png", "loser": "b.png", "rating_gap": 2.0}
    {"prompt": "make the fox red", "image": "fox.png", "winner": "a.png", "loser": "b.png"}
    {"prompt": "a red fox", "tie": ["a.png", "b.png"]}
    {"winner_prompt": "a red fox", "loser_prompt": "a blue fox", "image": "a.png"}
    {"winner_prompt": "a red fox", "loser_prompt": "a blue fox", "winner": "a.png", "loser": "b.png"}
    {"prompt": "a red fox", "image": "a.png", "label": 1}

In the third, the image is the reference that the prompt says how to edit. In the fifth, the image matches the first
prompt better; the fifth and the sixth are what LLaVA-Reward's paper calls hard negatives. Every form may have "tags",
{"tier": "binding", "generator": ["sdxl", "flux"]}, by which an evaluation states accuracies, and an "id" (string or
number) and a "comment" (string), which are not used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from reward_model.datasets.fields import (
    BadRecordError,
    ImageField,
    refuse_unknown_keys,
    shortened,
    take_image,
    take_label,
    take_number,
    take_text,
    take_two_texts,
)
from reward_model.datasets.images import FindImage
from reward_model.datasets.tags import take_tags
from reward_model.types import LabelledImage, PreferencePair, Record

_REMARKS = frozenset({"id", "comment", "tags"})
_KNOWN = _REMARKS | {
    *("prompt", "winner_prompt", "loser_prompt"),
    *("image", "winner", "loser", "tie"),
    *("rating_gap", "label"),
}
_FORMS = (
    "A record has exactly: prompt, winner, loser (and optionally image, rating_gap); or prompt, tie; or winner_prompt, "
    "loser_prompt, image; or winner_prompt, loser_prompt, winner, loser; or prompt, image, label."
)


def own_record(fields: Mapping[str, Any], *, find_image: FindImage, where: str) -> list[Record]:
    """Convert one line to a pair or a labelled image; the set of its keys determines which of the seven forms it is."""
    refuse_unknown_keys(fields, _KNOWN)
    _check_remarks(fields)
    tags = take_tags(fields)

    match sorted(fields.keys() - _REMARKS):
        case ["image", "label", "prompt"]:
            label, image, prompt = take_label(fields), take_image(fields, "image"), take_text(fields, "prompt")
            return [LabelledImage(find_image(image), prompt, label, where, tags)]
        case ["prompt", "tie"]:
            images, prompts = take_two_texts(fields, "tie"), _two_texts(fields, "prompt", "prompt")
        case (
            ["loser", "prompt", "winner"]
            | ["loser", "prompt", "rating_gap", "winner"]
            | ["image", "loser", "prompt", "winner"]
            | ["image", "loser", "prompt", "rating_gap", "winner"]
        ):
            images, prompts = _two_images(fields, "winner", "loser"), _two_texts(fields, "prompt", "prompt")
        case ["image", "loser_prompt", "winner_prompt"]:
            images, prompts = _two_images(fields, "image", "image"), _two_texts(fields, "winner_prompt", "loser_prompt")
        case ["loser", "loser_prompt", "winner", "winner_prompt"]:
            images, prompts = (
                _two_images(fields, "winner", "loser"),
                _two_texts(fields, "winner_prompt", "loser_prompt"),
            )
        case keys:
            raise BadRecordError(f"the keys {shortened(keys)} do not form a record. {_FORMS}")
    gap = _rating_gap(fields)
    winner, loser = map(find_image, images)
    pair = PreferencePair(winner, loser, *prompts, tie="tie" in fields, rating_gap=gap, where=where, tags=tags)
    if not {"image", "winner"} <= fields.keys():
        return [pair]
    reference = find_image(take_image(fields, "image"))
    if not isinstance(reference, Path):
        raise BadRecordError(f"the image to edit lies {reference}; it must be a file of its own.")
    return [replace(pair, reference=reference)]


def _two_texts(fields: Mapping[str, Any], first: str, second: str) -> tuple[str, str]:
    return take_text(fields, first), take_text(fields, second)


def _two_images(fields: Mapping[str, Any], first: str, second: str) -> tuple[ImageField, ImageField]:
    return take_image(fields, first), take_image(fields, second)


def _rating_gap(fields: Mapping[str, Any]) -> float:
    if "rating_gap" not in fields:
        return 0.0
    gap = take_number(fields, "rating_gap")
    if gap <= 0:
        raise BadRecordError(f"'rating_gap' is {gap:g}; it must be above 0. Equally good images form a 'tie'.")
    return gap


def _check_remarks(fields: Mapping[str, Any]) -> None:
    if isinstance(fields.get("id"), dict | list):
        raise BadRecordError(f"'id' is {shortened(fields['id'])}; it must be one string or number.")
    if not isinstance(fields.get("comment", ""), str):
        raise BadRecordError(f"'comment' is {shortened(fields['comment'])}; it must be a string.")
