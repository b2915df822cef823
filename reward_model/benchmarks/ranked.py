"""ImageReward's and HPDv2's test sets: several images of each prompt, ranked with ties.

    {"id": "..", "prompt": "a red fox", "generations": ["images/test/1.webp", ..], "ranking": [1, 2, 2, 5]}
    {"prompt": "a red fox", "image_path": ["00001.jpg", ..], "rank": [0, 1, 1, 2], "raw_annotations": [..]}

The lowest rank is the best in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from reward_model.benchmarks.read import (
    find_file,
    image_taker,
    located_errors,
    read_records,
    require_keys,
    take_numbers,
    take_values,
)
from reward_model.benchmarks.types import Benchmark, Comparison, Item
from reward_model.datasets.fields import take_text

IMAGE_REWARD_RULE = (
    "accuracy_ties_wrong: all pairs of a prompt with different ranks, each with the same weight; tied scores are wrong "
    "(ImageReward, arXiv:2304.05977). HPSv2's evaluator reports accuracy_per_prompt of the same pairs."
)
HPDV2_RULE = (
    "agreement_per_prompt: 1 - inversions / pairs, averaged over prompts; equal ranks are never an inversion (HPSv2, "
    "arXiv:2306.09341). Its evaluator breaks ties of the scores by position; here they are not an inversion."
)


def load_image_reward(path: Path, *, image_root: Path | None) -> list[Benchmark]:
    """Load ImageReward's `data/test.json`: 466 prompts, 2,720 images, 7,230 pairs, 6,399 of them not tied."""
    file = find_file(path, "test.json", "data/test.json", benchmark="image_reward")
    keys = ("generations", "ranking")
    return [_load("image_reward", file, keys=keys, rule=IMAGE_REWARD_RULE, image_root=image_root)]


def load_hpdv2(path: Path, *, image_root: Path | None) -> list[Benchmark]:
    """Load HPDv2's `test.json`, whose images are in `test/` or beside it."""
    file = find_file(path, "test.json", benchmark="hpdv2")
    unpacked = file.parent / "test"
    root = image_root or (unpacked if unpacked.is_dir() else None)
    return [_load("hpdv2", file, keys=("image_path", "rank"), rule=HPDV2_RULE, image_root=root)]


def _load(name: str, file: Path, *, keys: tuple[str, str], rule: str, image_root: Path | None) -> Benchmark:
    take_image = image_taker(image_root or file.parent)
    items: list[Item] = []
    comparisons: list[Comparison] = []
    for number, (where, fields) in enumerate(read_records(file)):
        with located_errors(where):
            require_keys(fields, "prompt", *keys)
            prompt, names = take_text(fields, "prompt"), take_values(fields, keys[0])
            ranks = take_numbers(fields, keys[1], length=len(names))
            comparisons += all_comparisons(ranks, start=len(items))
            items += [Item(take_image(name, keys[0]), prompt, group=str(number)) for name in names]
    return Benchmark(name=name, rule=rule, items=items, comparisons=comparisons)


def all_comparisons(ranks: Sequence[float], *, start: int) -> list[Comparison]:
    """Return all pairs of ranked items, whose indices in the benchmark begin with `start`."""
    indices = range(start, start + len(ranks))
    pairs = combinations(zip(indices, ranks, strict=True), 2)
    return [Comparison(i, j, 1 if a < b else -1 if a > b else 0) for (i, a), (j, b) in pairs]
