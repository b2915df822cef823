"""Results of benchmarks as Markdown and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from reward_model.benchmarks.harness import Result
from reward_model.benchmarks.metrics import Metric, to_rows

_NUM_DOMAINS = 12
"""Number of domains of each benchmark in the Markdown, those with the lowest accuracy; the JSON has all."""


def to_markdown(name: str, results: Sequence[Result]) -> str:
    """Return the results of the reward model `name` as Markdown: for each benchmark its rule, metrics and domains."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )  # no autoescape: Markdown
    environment.filters |= {"value": _value, "interval": _interval, "cell": _cell}
    template = environment.get_template("tables.md.jinja")
    return template.render(name=name, results=results, num_domains=_NUM_DOMAINS)


def to_json(name: str, results: Sequence[Result], *, settings: dict[str, Any]) -> str:
    """Return the results of the reward model `name` as JSON, with the settings; undefined numbers are null."""
    benchmarks = {
        result.benchmark.name: {
            "rule": result.benchmark.rule,
            "notes": list(result.benchmark.notes),
            "items": len(result.benchmark.items),
            "metrics": to_rows(result.metrics),
            "domains": [{"by": d.by, "domain": d.value, **to_rows([d.accuracy])[0]} for d in result.domains],
        }
        for result in results
    }
    content = {"reward": name, "settings": settings, "benchmarks": benchmarks}
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _cell(text: str) -> str:
    """Return a text of a data set in one line, with | escaped."""
    return " ".join(text.split()).replace("|", "\\|")


def _value(metric: Metric) -> str:
    return "-" if math.isnan(metric.value) else f"{metric.value:z.4f}"


def _interval(metric: Metric) -> str:
    return "-" if metric.low is None or metric.high is None else f"{metric.low:z.4f} to {metric.high:z.4f}"
