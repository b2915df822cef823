"""The rows of a run's metrics.jsonl: read, ordered, summed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Points = list[tuple[float, float, float]]
"""(step, value, standard error or 0), from left to right."""

ERROR = "/standard_error"
"""What follows the name of a reward in the key of its standard error."""


def read_metrics(folder: Path) -> list[Row]:
    """The rows of a run so far, without a last line that a killed process left half-written.

    Raises ValueError for a broken line anywhere else.
    """
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}:{number} is not JSON: {line[:80]}") from error
    return rows


def by_step(rows: Sequence[Row], kind: str) -> list[Row]:
    """Rows of one kind in order; where a resumed run has repeated a step, the repetition counts."""
    of_step = {row["step"]: row for row in rows if row["kind"] == kind}
    return [of_step[step] for step in sorted(of_step)]


def reward_names(evaluations: Sequence[Row]) -> list[str]:
    """The rewards that these evaluations asked, in their order."""
    return list(dict.fromkeys(key.removesuffix(ERROR) for row in evaluations for key in row if key.endswith(ERROR)))


def trained_rewards(rows: Sequence[Row]) -> list[str]:
    """The rewards that the run learns from; none for one that learns from people's preferences."""
    keys = [key for row in by_step(rows, "train") for key in row if key.startswith("rewards/")]
    return [key.removeprefix("rewards/") for key in dict.fromkeys(keys)]


def number(row: Row, key: str) -> float:
    """What a row says under a key; NaN if nothing, or no number."""
    return float(value) if isinstance(value := row.get(key), int | float) else math.nan


def points(rows: Sequence[Row], key: str, *, error: str | None = None) -> Points:
    """What can be drawn of a key; its errors are under `error`, or where those of rewards are."""
    found = ((float(row["step"]), number(row, key), number(row, error or key + ERROR)) for row in rows)
    return [(x, y, e if math.isfinite(e) else 0.0) for x, y, e in found if math.isfinite(y)]


def time_split(rows: Sequence[Row]) -> dict[str, float]:
    """Seconds of each activity; what no training row claims is evaluation, start-up and logging."""
    names = dict.fromkeys(key for row in rows for key in row if key.startswith("seconds/"))
    split = {key.removeprefix("seconds/"): math.fsum(row.get(key, 0.0) for row in rows) for key in names}
    elapsed = max((float(row["elapsed"]) for row in rows), default=0.0)
    return {**split, "evaluation and the rest": max(0.0, elapsed - sum(split.values()))}


def total(rows: Sequence[Row], key: str) -> int:
    """The sum over all rows that know `key`."""
    return sum(row.get(key, 0) for row in rows)
