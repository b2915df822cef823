"""How good a judge is on published test sets: one harness, every rule by name."""

from reward_model.benchmarks.harness import Result, ask, measure
from reward_model.benchmarks.load import NAMES, load_benchmarks
from reward_model.benchmarks.tables import to_json, to_markdown
from reward_model.benchmarks.types import Benchmark

__all__ = ["NAMES", "Benchmark", "Result", "ask", "load_benchmarks", "measure", "to_json", "to_markdown"]
