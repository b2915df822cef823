"""ImageRewardDB (Xu et al., arXiv:2304.05977): several images of each prompt, rated and ranked by experts.

As published, one row an image, in metadata-SPLIT.parquet and in the JSON of each zip (shortened):

    {"image_path": "images/train/train_1/x.webp", "prompt_id": "001324-0093", "prompt": "a red fox",
     "classification": "Animals", "image_amount_in_total": 9, "rank": 3, "overall_rating": 6,
     "image_text_alignment_rating": 6, "fidelity_rating": 6}

As its loading script returns it: the same with `image`; one row a prompt, with lists (`8k_group`); or one row a pair,
{"prompt_id", "prompt", "classification", "img_better", "img_worse"} (`8k_pair`). As the test set of ImageReward's
repository, with ranks only: {"id": "x", "prompt": "a red fox", "generations": ["a.webp", "b.webp"], "ranking": [1, 2]}.

Ratings are integers from 1 (bad) to 7 (good). Ranks start from 1, the best, and may be shared. The
classification becomes the tag `category`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any, Literal

from reward_model.datasets.fields import (
    BadRecordError,
    as_image,
    as_number,
    check_keys,
    shortened,
    take_image,
    take_list,
    take_text,
)
from reward_model.datasets.images import FindImage
from reward_model.datasets.ratings import pairs_from_ratings
from reward_model.datasets.raw_records import RawRecord
from reward_model.datasets.tags import published_tags
from reward_model.types import PreferencePair, Record

Perspective = Literal["alignment", "fidelity", "overall", "rank"]
RATING_OF: Mapping[str, str] = {
    "alignment": "image_text_alignment_rating",
    "fidelity": "fidelity_rating",
    "overall": "overall_rating",
    "rank": "rank",
}
_EXTRAS = {*RATING_OF.values(), "prompt_id", "classification", "image_amount_in_total", "image", "image_path", "id"}


def image_reward_record(
    fields: Mapping[str, Any], *, find_image: FindImage, where: str, perspective: Perspective
) -> list[Record]:
    """Convert the images of a prompt to pairs by one of their ratings, or a row of `8k_pair` to its pair."""
    tags = published_tags(fields, category=("classification",))
    if "img_better" in fields or "img_worse" in fields:
        check_keys(fields, needed={"prompt", "img_better", "img_worse"}, ignored=_EXTRAS)
        if perspective != "rank":
            raise BadRecordError(f"img_better and img_worse are given by rank, not by {perspective}.")
        winner, loser = (find_image(take_image(fields, key)) for key in ("img_better", "img_worse"))
        prompt = take_text(fields, "prompt")
        return [PreferencePair(winner, loser, prompt, prompt, where=where, tags=tags)]

    key, rating = _image_key(fields), RATING_OF[perspective]
    if key == "generations" and perspective != "rank":
        raise BadRecordError(f"generations have a ranking only, and no ratings of {perspective}.")
    rating = "ranking" if key == "generations" else rating
    check_keys(fields, needed={"prompt", key, rating}, ignored=_EXTRAS)
    images = [as_image(value, key) for value in take_list(fields, key)]
    ratings = [_rating(value, rating) for value in take_list(fields, rating)]
    if len(images) != len(ratings):
        raise BadRecordError(
            f"{key!r} has {len(images)} elements and {rating!r} has {len(ratings)}; they must be as many."
        )
    total = fields.get("image_amount_in_total", len(images))
    if total != len(images):
        raise BadRecordError(
            f"'image_amount_in_total' is {shortened(total)}, but there are {len(images)} consecutive rows of the "
            f"prompt. The rows of a prompt must be consecutive, as published."
        )
    prompt = take_text(fields, "prompt")
    return pairs_from_ratings(images, ratings, prompt, find_image=find_image, where=where, tags=tags)


def group_by_prompt(rows: Iterable[RawRecord]) -> Iterator[RawRecord]:
    """Merge consecutive rows of single images with the same prompt_id into one raw record of lists per prompt."""
    for prompt_id, group in groupby(rows, key=_prompt_id):
        members = list(group)
        if prompt_id is None:
            yield from members
            continue
        columns = [member.fields() for member in members]
        first = columns[0]
        merged: dict[str, Any] = {**first}
        for key in {*first} & {*RATING_OF.values(), "image", "image_path"}:
            merged[key] = [row.get(key) for row in columns]
        constant = ("prompt", "image_amount_in_total")
        uneven = next((key for key in constant for row in columns if row.get(key) != first.get(key)), None)
        if uneven is not None:
            # A list in place of a string or a number is refused on conversion, with all values in the message.
            merged[uneven] = [row.get(uneven) for row in columns]
        last = f" to {members[-1].where.rpartition(':')[2]}" if len(members) > 1 else ""
        yield RawRecord(f"{members[0].where}{last}", merged)


def _prompt_id(row: RawRecord) -> str | None:
    """Return the prompt_id of a row of one image; None for any other row, and for a row that cannot be parsed."""
    try:
        fields = row.fields()
    except BadRecordError:
        return None
    prompt_id, image = fields.get("prompt_id"), fields.get(_image_key(fields))
    return prompt_id if isinstance(prompt_id, str) and not isinstance(image, list | None) else None


def _image_key(fields: Mapping[str, Any]) -> str:
    return next((key for key in ("generations", "image_path") if key in fields), "image")


def _rating(value: object, key: str) -> float:
    """Return a rating, or a rank with its sign changed, so that higher is better for both."""
    number, ranked = as_number(value, key), key in ("rank", "ranking")
    if not number.is_integer() or not 1 <= number <= (float("inf") if ranked else 7):
        limits = "from 1, the best, upwards" if ranked else "from 1 to 7"
        raise BadRecordError(f"{key!r} is {shortened(value)}; it must be an integer {limits}.")
    return -number if ranked else number
