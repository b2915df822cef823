"""TIFA160: images of 160 prompts by five models, with two independent sets of ratings from 1 to 5.

TIFA's ratings (arXiv:2303.11897), two an image: `human_annotations.json`, or `human_annotations_with_scores.json`,
which also has the scores of other models.

    {"coco_1_mini_dalle": {"text_id": "coco_1", "image_path": "coco_1_mini_dalle.jpg", "text": "a red fox",
                           "human_scores": [5, 4], "human_avg": 4.5}}

DSG's ratings (arXiv:2310.18235), mostly five an image: `dsg_tifa160_anns.csv`, one row a rating, with `tifa160.json`,
which has the keys above without the ratings. The CSV has other names for the models.
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

from reward_model.benchmarks.read import Fields, image_taker, located_errors, read_object, require_keys, take_numbers
from reward_model.benchmarks.types import Benchmark, Item
from reward_model.datasets.fields import BadRecordError, shortened, take_text

ORIGINAL = ("human_annotations.json", "human_annotations_with_scores.json")
DSG_RATINGS, DSG_ITEMS = "dsg_tifa160_anns.csv", "tifa160.json"
MODELS = {
    "mini-dalle": "mini_dalle",
    "vq-diffusion": "vq_diffusion",
    "sd1dot1": "stable_diffusion_v1_1",
    "sd1dot5": "stable_diffusion_v1_5",
    "sd2dot1": "stable_diffusion_v2_1",
}
RULE = (
    "pearson, kendall_tau_b and pairwise_accuracy_tie_optimised over all images, not grouped by prompt, against the "
    "mean rating (VQAScore, arXiv:2404.01291). TIFA's notebook prints Pearson's correlation under the name Spearman."
)


def load_tifa160(path: Path, *, image_root: Path | None) -> list[Benchmark]:
    """Load one benchmark for each set of ratings in a folder. Raises FileNotFoundError if there is none."""
    found: list[Benchmark] = []
    for name in ORIGINAL:
        if (path / name).is_file() and not found:
            records = read_object(path / name)
            found.append(
                _benchmark(
                    "tifa160-original", path / name, records, _original_ratings(path / name, records), image_root
                )
            )
    if (path / DSG_RATINGS).is_file() and (path / DSG_ITEMS).is_file():
        records = read_object(path / DSG_ITEMS)
        ratings = _dsg_ratings(path / DSG_RATINGS, records)
        found.append(_benchmark("tifa160-dsg", path / DSG_ITEMS, records, ratings, image_root))
    if not found:
        raise FileNotFoundError(
            f"tifa160: {path} must be a folder with {' or '.join(ORIGINAL)}, or with {DSG_ITEMS} and {DSG_RATINGS}, or "
            f"with all of these."
        )
    return found


def _original_ratings(file: Path, records: dict[str, Any]) -> dict[str, list[float]]:
    ratings: dict[str, list[float]] = {}
    for key, fields in records.items():
        with located_errors(f"{file}:{key}"):
            require_keys(fields, "human_scores")
            ratings[key] = _rating_list(fields)
    return ratings


def _rating_list(fields: Fields) -> list[float]:
    scores = fields["human_scores"]
    return take_numbers(fields, "human_scores", length=len(scores) if isinstance(scores, list) else 1)


def _dsg_ratings(file: Path, records: dict[str, Any]) -> dict[str, list[float]]:
    ratings: dict[str, list[float]] = defaultdict(list)
    with file.open(newline="", encoding="utf-8") as lines:
        for number, row in enumerate(csv.DictReader(lines), start=2):
            with located_errors(f"{file}:{number}"):
                require_keys(row, "model_type", "source_id", "answer")
                if row["model_type"] not in MODELS:
                    raise BadRecordError(f"'model_type' is {row['model_type']!r}; known are {', '.join(MODELS)}.")
                key = f"{row['source_id']}_{MODELS[row['model_type']]}"
                if key not in records:
                    raise BadRecordError(f"the image {key!r} is not in {DSG_ITEMS}.")
                ratings[key].append(_parse_rating(row["answer"]))
    return ratings


def _parse_rating(text: str) -> float:
    try:
        rating = float(text)
    except (TypeError, ValueError):
        rating = math.nan
    if not 1 <= rating <= 5:
        raise BadRecordError(f"'answer' is {shortened(text)}; it must be a rating from 1 to 5.")
    return rating


def _benchmark(
    name: str, file: Path, records: dict[str, Any], ratings: dict[str, list[float]], image_root: Path | None
) -> Benchmark:
    take_image = image_taker(image_root or file.parent)
    items: list[Item] = []
    for key, fields in records.items():
        with located_errors(f"{file}:{key}"):
            require_keys(fields, "text_id", "image_path", "text")
            text_id = take_text(fields, "text_id")
            if key not in ratings:
                raise BadRecordError("there is no rating.")
            model = key.removeprefix(f"{text_id}_")
            tags = {"source": [text_id.partition("_")[0]], "model": [model]}
            items.append(Item(take_image(fields["image_path"], "image_path"), take_text(fields, "text"), text_id, tags))
    means = [fmean(ratings[key]) for key in records]
    raters = sorted({len(ratings[key]) for key in records})
    note = f"{' to '.join(map(str, dict.fromkeys((raters[0], raters[-1]))))} ratings an image."
    return Benchmark(name=name, rule=RULE, items=items, ratings=means, notes=[note])
