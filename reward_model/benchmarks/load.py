"""From what a user writes (`mj_bench:data/MJ-Bench`) to test sets; the one place that knows which there are."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from reward_model.benchmarks.types import Benchmark

BenchmarkName = Literal[
    "tifa160", "mj_bench", "unsafe_bench", "image_reward", "hpdv2", "hpdv3", "pick_a_pic", "genai_bench"
]
NAMES: tuple[str, ...] = get_args(BenchmarkName)


def load_benchmarks(specification: str, *, image_root: Path | None = None) -> list[Benchmark]:
    """The test sets of one NAME:PATH, each picture opened once.

    PATH is a folder in the layout that the benchmark is published in, or its annotation file. Relative image paths
    start at `image_root`, by default where the annotations are. A bad record raises BadRecordError.
    """
    name, colon, path = specification.partition(":")
    if not colon or not path or name not in NAMES:
        raise ValueError(
            f"There is no benchmark {specification!r}; write NAME:PATH, NAME being one of {', '.join(NAMES)}."
        )
    return _load(name, Path(path), image_root)


def _load(name: str, path: Path, image_root: Path | None) -> list[Benchmark]:
    from reward_model.benchmarks import genai_bench, hpdv3, mj_bench, pick_a_pic, ranked, tifa160, unsafe_bench

    match name:
        case "tifa160":
            return tifa160.load_tifa160(path, image_root=image_root)
        case "mj_bench":
            return mj_bench.load_mj_bench(path, image_root=image_root)
        case "unsafe_bench":
            return unsafe_bench.load_unsafe_bench(path, image_root=image_root)
        case "image_reward":
            return ranked.load_image_reward(path, image_root=image_root)
        case "hpdv2":
            return ranked.load_hpdv2(path, image_root=image_root)
        case "hpdv3":
            return hpdv3.load_hpdv3(path, image_root=image_root)
        case "pick_a_pic":
            return pick_a_pic.load_pick_a_pic(path, image_root=image_root)
        case "genai_bench":
            return genai_bench.load_genai_bench(path, image_root=image_root)
        case other:
            raise AssertionError(other)
