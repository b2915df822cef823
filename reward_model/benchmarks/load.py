"""The table of benchmarks, and the loading of NAME:PATH, such as mj_bench:data/MJ-Bench."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from reward_model.benchmarks.types import Benchmark

BenchmarkName = Literal[
    "tifa160", "mj_bench", "unsafe_bench", "image_reward", "hpdv2", "hpdv3", "pick_a_pic", "genai_bench"
]
BENCHMARK_NAMES: tuple[str, ...] = get_args(BenchmarkName)


def load_benchmarks(specification: str, *, image_root: Path | None = None) -> list[Benchmark]:
    """Load the test sets of NAME:PATH and check each of their images.

    PATH is a folder in the published layout of the benchmark, or its annotation file. Relative image paths start from
    `image_root`, by default the folder of the annotations.

    Raises ValueError for an unknown name, FileNotFoundError if the annotations are missing, and BadRecordError, with
    the file and record, for an invalid record.
    """
    name, colon, path = specification.partition(":")
    if not colon or not path or name not in BENCHMARK_NAMES:
        raise ValueError(
            f"There is no benchmark {specification!r}; write NAME:PATH, with NAME one of {', '.join(BENCHMARK_NAMES)}."
        )
    return _load(name, Path(path), image_root)


def _load(name: str, path: Path, image_root: Path | None) -> list[Benchmark]:
    from reward_model.benchmarks import genai_bench, hpdv3, mj_bench, pick_a_pic, ranked, tifa160, unsafe_bench

    match name:
        case "tifa160":
            load = tifa160.load_tifa160
        case "mj_bench":
            load = mj_bench.load_mj_bench
        case "unsafe_bench":
            load = unsafe_bench.load_unsafe_bench
        case "image_reward":
            load = ranked.load_image_reward
        case "hpdv2":
            load = ranked.load_hpdv2
        case "hpdv3":
            load = hpdv3.load_hpdv3
        case "pick_a_pic":
            load = pick_a_pic.load_pick_a_pic
        case "genai_bench":
            load = genai_bench.load_genai_bench
        case other:
            raise AssertionError(other)
    return load(path, image_root=image_root)
