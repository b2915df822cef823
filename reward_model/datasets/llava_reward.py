"""The JSON files of LLaVA-Reward's authors (arXiv:2507.21391): one list of pairs or of labelled images.

    {"prompt_id": "x", "prompt": "a red fox", "chosen_path": "a.png", "c_rate": 7, "reject_path": "b.png", "r_rate": 4}
    {"path": "a.png", "label": 1, "prompt": "a red fox", "safety_label": "Safe", "category": "None", "source": "Lexica"}

Label 1 means good or safe. The authors' files have absolute paths of their machines, which `image_prefix` OLD=NEW
replaces by yours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from reward_model.datasets.fields import (
    BadRecordError,
    refuse_unknown_keys,
    shortened,
    take_image,
    take_label,
    take_number,
    take_text,
    take_two_texts,
)
from reward_model.datasets.images import FindImage
from reward_model.datasets.tags import published_tags
from reward_model.types import LabelledImage, PreferencePair, Record

_PAIR = frozenset({"prompt", "chosen_path", "reject_path"})
_PAIR_EXTRAS = frozenset({"prompt_id", "c_rate", "r_rate"})
_LABELLED = frozenset({"path", "label", "prompt"})
_LABELLED_EXTRAS = frozenset({"safety_label", "category", "source", "prompt_id", "id", "text"})


def llava_reward_record(fields: Mapping[str, Any], *, find_image: FindImage, where: str) -> list[Record]:
    """Convert one element of the list to a pair or a labelled image."""
    if "path" in fields or "label" in fields:
        _check_keys(fields, needed=_LABELLED, extras=_LABELLED_EXTRAS)
        label, prompt, image = take_label(fields), take_text(fields, "prompt"), take_image(fields, "path")
        tags = published_tags(fields, category=("category",), source=("source",))
        return [LabelledImage(find_image(image), prompt, label, where, tags)]

    _check_keys(fields, needed=_PAIR, extras=_PAIR_EXTRAS)
    if isinstance(fields["prompt"], list):
        winner_prompt, loser_prompt = take_two_texts(fields, "prompt")
    else:
        winner_prompt = loser_prompt = take_text(fields, "prompt")
    chosen, rejected = take_image(fields, "chosen_path"), take_image(fields, "reject_path")
    gap = _rating_gap(fields)
    winner, loser = find_image(chosen), find_image(rejected)
    tie, rating_gap = gap == 0, gap or 0.0
    return [PreferencePair(winner, loser, winner_prompt, loser_prompt, tie=tie, rating_gap=rating_gap, where=where)]


def _check_keys(fields: Mapping[str, Any], *, needed: frozenset[str], extras: frozenset[str]) -> None:
    refuse_unknown_keys(fields, needed | extras)
    if missing := needed - fields.keys():
        raise BadRecordError(f"{', '.join(sorted(missing))} missing in {shortened(dict(fields))}.")


def _rating_gap(fields: Mapping[str, Any]) -> float | None:
    """Return the rating of the chosen minus that of the rejected image, >= 0; None without ratings."""
    match "c_rate" in fields, "r_rate" in fields:
        case False, False:
            return None
        case True, True:
            gap = take_number(fields, "c_rate") - take_number(fields, "r_rate")
        case _:
            raise BadRecordError("only one of 'c_rate' and 'r_rate' is given; give both or neither.")
    if gap < 0 or math.isinf(gap):
        raise BadRecordError(
            f"'c_rate' is {shortened(fields['c_rate'])} and 'r_rate' is {shortened(fields['r_rate'])}; "
            f"the chosen image must have at least the rating of the rejected one, with a finite gap."
        )
    return gap
