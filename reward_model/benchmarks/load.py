"""The table of benchmarks, and the loading of NAME:PATH, such as mj_bench:data/MJ-Bench."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Literal, get_args

from reward_model.benchmarks.types import Benchmark

BenchmarkName = Literal[
    "tifa160",
    "mj_bench",
    "unsafe_bench",
    "image_reward",
    "hpdv2",
    "hpdv3",
    "hpdv3_plus_plus",
    "pick_a_pic",
    "genai_bench",
    "genai_bench_tiger",
    "mmrb2",
]
BENCHMARK_NAMES: tuple[str, ...] = get_args(BenchmarkName)
MODULES = {"image_reward": "ranked", "hpdv2": "ranked", "hpdv3_plus_plus": "hpdv3"}
"""Module of this package with the function `load_NAME`, where it has another name."""


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
    module = import_module(f"reward_model.benchmarks.{MODULES.get(name, name)}")
    return getattr(module, f"load_{name}")(path, image_root=image_root)
