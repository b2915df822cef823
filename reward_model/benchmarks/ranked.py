"""ImageReward's and HPDv2's test sets: several images of a prompt, which people put in an order with ties.

    {"id": "..", "prompt": "a red fox", "generations": ["images/test/1.webp", ..], "ranking": [1, 2, 2, 5]}
    {"prompt": "a red fox", "image_path": ["00001.jpg", ..], "rank": [0, 1, 1, 2], "raw_annotations": [..]}

The lowest rank is the best one, in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from reward_model.benchmarks.read import (
    complaints_at,
    file_of,
    image_reader,
    records_of,
    require,
    take_list,
    take_ranks,
)
from reward_model.benchmarks.types import Benchmark, Comparison, Item
from reward_model.datasets.fields import take_text

IMAGE_REWARD_RULE = (
    "accuracy_ties_wrong: all pairs of a prompt that people rank differently, every pair counting alike, a tie of the "
    "judge is wrong (ImageReward, arXiv:2304.05977). HPSv2's evaluator reports accuracy_per_prompt of the same pairs."
)
HPDV2_RULE = (
    "agreement_per_prompt: 1 - inversions / pairs, averaged over prompts; what people tie cannot be an inversion "
    "(HPSv2, arXiv:2306.09341). Its evaluator breaks the judge's own ties by position; here they are no inversion."
)


def load_image_reward(path: Path, *, image_root: Path | None) -> list[Benchmark]:
    """ImageReward's `data/test.json`: 466 prompts, 2,720 images, 7,230 pairs, of which people do not tie 6,399."""
    file = file_of(path, "test.json", "data/test.json", benchmark="image_reward")
    keys = ("generations", "ranking")
    return [_load("image_reward", file, keys=keys, rule=IMAGE_REWARD_RULE, image_root=image_root)]


def load_hpdv2(path: Path, *, image_root: Path | None) -> list[Benchmark]:
    """HPDv2's `test.json`, whose images lie in `test/` where they were unpacked."""
    file = file_of(path, "test.json", benchmark="hpdv2")
    unpacked = file.parent / "test"
    root = image_root or (unpacked if unpacked.is_dir() else None)
    return [_load("hpdv2", file, keys=("image_path", "rank"), rule=HPDV2_RULE, image_root=root)]


def _load(name: str, file: Path, *, keys: tuple[str, str], rule: str, image_root: Path | None) -> Benchmark:
    read = image_reader(image_root or file.parent)
    items: list[Item] = []
    comparisons: list[Comparison] = []
    for number, (where, fields) in enumerate(records_of(file)):
        with complaints_at(where):
            require(fields, "prompt", *keys)
            prompt, names = take_text(fields, "prompt"), take_list(fields, keys[0])
            ranks = take_ranks(fields, keys[1], length=len(names))
            comparisons += compare_all(ranks, start=len(items))
            items += [Item(read(name, keys[0]), prompt, group=str(number)) for name in names]
    return Benchmark(name=name, rule=rule, items=items, comparisons=comparisons)


def compare_all(ranks: Sequence[float], *, start: int) -> list[Comparison]:
    """Every pair of ranked items, of which the first is at `start` in its benchmark."""
    places = range(start, start + len(ranks))
    pairs = combinations(zip(places, ranks, strict=True), 2)
    return [Comparison(i, j, 1 if a < b else -1 if a > b else 0) for (i, a), (j, b) in pairs]
