"""Evaluation of reward models: metrics on preference files, and published test sets under every rule in use.

Not the reading of preference files themselves, which is in `reward_model.datasets`.
"""

from reward_model.benchmarks.harness import Result, evaluate, score_items
from reward_model.benchmarks.load import BENCHMARK_NAMES, load_benchmarks
from reward_model.benchmarks.tables import to_json, to_markdown
from reward_model.benchmarks.types import Benchmark

__all__ = [
    "BENCHMARK_NAMES",
    "Benchmark",
    "Result",
    "evaluate",
    "load_benchmarks",
    "score_items",
    "to_json",
    "to_markdown",
]
