"""TIFA160: 160 prompts painted by five models and rated from 1 to 5, twice.

By TIFA's authors (arXiv:2303.11897), two raters an image: `human_annotations.json` or
`human_annotations_with_scores.json`, which also holds the scores of other judges.

    {"coco_1_mini_dalle": {"text_id": "coco_1", "image_path": "coco_1_mini_dalle.jpg", "text": "a red fox",
                           "human_scores": [5, 4], "human_avg": 4.5}}

Again for DSG (arXiv:2310.18235), mostly five raters: `dsg_tifa160_anns.csv`, one row a rating, with `tifa160.json`,
which has the same keys as above without the ratings. The CSV calls the models by other names.
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

from reward_model.benchmarks.read import Fields, complaints_at, image_reader, object_of, require, take_ranks
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
    """One benchmark for each of the two sets of ratings that a folder holds; FileNotFoundError if it holds none."""
    found: list[Benchmark] = []
    for name in ORIGINAL:
        if (path / name).is_file() and not found:
            known = object_of(path / name)
            found.append(
                _benchmark("tifa160-original", path / name, known, _own_ratings(path / name, known), image_root)
            )
    if (path / DSG_RATINGS).is_file() and (path / DSG_ITEMS).is_file():
        known = object_of(path / DSG_ITEMS)
        ratings = _dsg_ratings(path / DSG_RATINGS, known)
        found.append(_benchmark("tifa160-dsg", path / DSG_ITEMS, known, ratings, image_root))
    if not found:
        raise FileNotFoundError(
            f"tifa160: {path} must be a folder with {' or '.join(ORIGINAL)}, or with {DSG_ITEMS} and {DSG_RATINGS}, or "
            f"with all of these."
        )
    return found


def _own_ratings(file: Path, known: dict[str, Any]) -> dict[str, list[float]]:
    ratings: dict[str, list[float]] = {}
    for key, fields in known.items():
        with complaints_at(f"{file}:{key}"):
            require(fields, "human_scores")
            ratings[key] = _rating_list(fields)
    return ratings


def _rating_list(fields: Fields) -> list[float]:
    scores = fields["human_scores"]
    return take_ranks(fields, "human_scores", length=len(scores) if isinstance(scores, list) else 1)


def _dsg_ratings(file: Path, known: dict[str, Any]) -> dict[str, list[float]]:
    ratings: dict[str, list[float]] = defaultdict(list)
    with file.open(newline="", encoding="utf-8") as lines:
        for number, row in enumerate(csv.DictReader(lines), start=2):
            with complaints_at(f"{file}:{number}"):
                require(row, "model_type", "source_id", "answer")
                if row["model_type"] not in MODELS:
                    raise BadRecordError(f"'model_type' is {row['model_type']!r}; known are {', '.join(MODELS)}.")
                key = f"{row['source_id']}_{MODELS[row['model_type']]}"
                if key not in known:
                    raise BadRecordError(f"rates {key!r}, of which {DSG_ITEMS} knows nothing.")
                ratings[key].append(_likert(row["answer"]))
    return ratings


def _likert(text: str) -> float:
    try:
        rating = float(text)
    except (TypeError, ValueError):
        rating = math.nan
    if not 1 <= rating <= 5:
        raise BadRecordError(f"'answer' is {shortened(text)}; it must be a rating from 1 to 5.")
    return rating


def _benchmark(
    name: str, file: Path, known: dict[str, Any], ratings: dict[str, list[float]], image_root: Path | None
) -> Benchmark:
    read = image_reader(image_root or file.parent)
    items: list[Item] = []
    for key, fields in known.items():
        with complaints_at(f"{file}:{key}"):
            require(fields, "text_id", "image_path", "text")
            text_id = take_text(fields, "text_id")
            if key not in ratings:
                raise BadRecordError("nobody rated it.")
            model = key.removeprefix(f"{text_id}_")
            tags = {"source": [text_id.partition("_")[0]], "model": [model]}
            items.append(Item(read(fields["image_path"], "image_path"), take_text(fields, "text"), text_id, tags))
    means = [fmean(ratings[key]) for key in known]
    raters = sorted({len(ratings[key]) for key in known})
    note = f"{' to '.join(map(str, dict.fromkeys((raters[0], raters[-1]))))} ratings an image."
    return Benchmark(name=name, rule=RULE, items=items, ratings=means, notes=[note])
