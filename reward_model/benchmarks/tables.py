"""Results of benchmarks as Markdown for people and as JSON for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from reward_model.benchmarks.harness import Result
from reward_model.benchmarks.metrics import Metric

_SHOWN = 12
"""Domains of each benchmark in the Markdown: the worst; the JSON holds all."""


def to_markdown(judge: str, results: Sequence[Result]) -> str:
    """A table for each benchmark, its rule and its notes, then the domains where the judge is worst."""
    lines = [f"# {judge}", "", "Intervals hold 95 % of resamples, which draw whole prompts."]
    for result in results:
        benchmark = result.benchmark
        lines += ["", f"## {benchmark.name}", "", f"Published rule: {benchmark.rule}", *_listed(benchmark.notes), ""]
        lines += ["| metric | value | 95 % interval | of | rule |", "|---|---|---|---|---|"]
        lines += [
            f"| {metric.name} | {_value(metric)} | {_interval(metric)} | {metric.count:,} | {metric.note} |"
            for metric in result.metrics
        ]
        if result.domains:
            lines += ["", f"Worst of {len(result.domains)} domains:", ""]
            lines += ["| by | value | accuracy | 95 % interval | of |", "|---|---|---|---|---|"]
            lines += [
                f"| {d.by} | {_cell(d.value)} | {_value(d.accuracy)} | {_interval(d.accuracy)} | {d.accuracy.count:,} |"
                for d in result.domains[:_SHOWN]
            ]
    return "\n".join(lines) + "\n"


def to_json(judge: str, results: Sequence[Result], *, settings: dict[str, Any]) -> str:
    """Everything, with what it was measured with; a number that is undefined is null."""
    found = {
        result.benchmark.name: {
            "rule": result.benchmark.rule,
            "notes": list(result.benchmark.notes),
            "items": len(result.benchmark.items),
            "metrics": [_plain(metric) for metric in result.metrics],
            "domains": [{"by": d.by, "domain": d.value, **_plain(d.accuracy)} for d in result.domains],
        }
        for result in results
    }
    return (
        json.dumps({"llava_reward": judge, "settings": settings, "benchmarks": found}, indent=1, allow_nan=False) + "\n"
    )


def _plain(metric: Metric) -> dict[str, Any]:
    return {**asdict(metric), "value": None if math.isnan(metric.value) else metric.value}


def _cell(text: str) -> str:
    """What a data set calls something, without what would end a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _value(metric: Metric) -> str:
    return "-" if math.isnan(metric.value) else f"{metric.value:.4f}"


def _interval(metric: Metric) -> str:
    return "-" if metric.low is None or metric.high is None else f"{metric.low:.4f} to {metric.high:.4f}"


def _listed(notes: Sequence[str]) -> list[str]:
    return ["", *[f"- {note}" for note in notes]] if notes else []
