"""ImageRewardDB (Xu et al., arXiv:2304.05977): experts rated and ranked several images of each prompt.

As published, one row an image, in metadata-SPLIT.parquet and in the JSON of each zip; here shortened:

    {"image_path": "images/train/train_1/x.webp", "prompt_id": "001324-0093", "prompt": "a red fox",
     "classification": "Animals", "image_amount_in_total": 9, "rank": 3, "overall_rating": 6,
     "image_text_alignment_rating": 6, "fidelity_rating": 6}

and as its loading script makes them: the same with `image`; one row a prompt, with lists (`8k_group`); or one row a
pair, {"prompt_id", "prompt", "classification", "img_better", "img_worse"} (`8k_pair`). And as the test set of
ImageReward's repository, by rank alone: {"id": "x", "prompt": "a red fox", "generations": ["a.webp", "b.webp"],
"ranking": [1, 2]}.

Ratings are whole numbers from 1 (bad) to 7 (good), ranks begin with 1, the best, and may be shared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any, Literal

from reward_model.datasets.fields import (
    BadRecordError,
    check_keys,
    image_of,
    number_of,
    shortened,
    take_image,
    take_list,
    take_text,
)
from reward_model.datasets.images import FindImage
from reward_model.datasets.ratings import pairs_from_ratings
from reward_model.datasets.raw_records import RawRecord
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
    """The pairs of a prompt by one of its ratings, or the one pair of a row that is one."""
    if "img_better" in fields or "img_worse" in fields:
        check_keys(fields, needed={"prompt", "img_better", "img_worse"}, ignored=_EXTRAS)
        if perspective != "rank":
            raise BadRecordError(f"img_better and img_worse are by rank; they do not say which has more {perspective}.")
        winner, loser = (find_image(take_image(fields, key)) for key in ("img_better", "img_worse"))
        prompt = take_text(fields, "prompt")
        return [PreferencePair(winner, loser, prompt, prompt, where=where)]

    key, rating = _image_key(fields), RATING_OF[perspective]
    if key == "generations" and perspective != "rank":
        raise BadRecordError(f"generations have a ranking only; it does not say which has more {perspective}.")
    rating = "ranking" if key == "generations" else rating
    check_keys(fields, needed={"prompt", key, rating}, ignored=_EXTRAS)
    images = [image_of(value, key) for value in take_list(fields, key)]
    ratings = [_rating(value, rating) for value in take_list(fields, rating)]
    if len(images) != len(ratings):
        raise BadRecordError(f"{key!r} has {len(images)} elements and {rating!r} {len(ratings)}; each needs one.")
    total = fields.get("image_amount_in_total", len(images))
    if total != len(images):
        raise BadRecordError(
            f"'image_amount_in_total' is {shortened(total)}, where {len(images)} rows of the prompt follow each "
            f"other. Rows of a prompt must stand together, as published."
        )
    prompt = take_text(fields, "prompt")
    return pairs_from_ratings(images, ratings, prompt, find_image=find_image, where=where)


def by_prompt(rows: Iterable[RawRecord]) -> Iterator[RawRecord]:
    """One row for each prompt, with lists: rows of single images that follow each other and share a prompt_id."""
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
            # Two values where a text or a number must stand: refused in its turn, showing both.
            merged[uneven] = [row.get(uneven) for row in columns]
        last = f" to {members[-1].where.rpartition(':')[2]}" if len(members) > 1 else ""
        yield RawRecord(f"{members[0].where}{last}", merged)


def _prompt_id(row: RawRecord) -> str | None:
    """Of a row of one image; None for any other row, and for one that is refused in its turn."""
    try:
        fields = row.fields()
    except BadRecordError:
        return None
    prompt_id, image = fields.get("prompt_id"), fields.get(_image_key(fields))
    return prompt_id if isinstance(prompt_id, str) and not isinstance(image, list | None) else None


def _image_key(fields: Mapping[str, Any]) -> str:
    return next((key for key in ("generations", "image_path") if key in fields), "image")


def _rating(value: object, key: str) -> float:
    """Ranks are turned round, so that more is better for each perspective."""
    number, ranked = number_of(value, key), key in ("rank", "ranking")
    if not number.is_integer() or not 1 <= number <= (float("inf") if ranked else 7):
        limits = "from 1, the best, upwards" if ranked else "from 1 to 7"
        raise BadRecordError(f"{key!r} is {shortened(value)}; it must be a whole number {limits}.")
    return -number if ranked else number
