"""Write and read metrics.jsonl, one row for each training step and evaluation; thresholds for its warnings.

A last row of the kind "export" has the step whose weights are exported, if these are not those of the last step.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_t2i.output.files import write_atomically
from rlhf_t2i.output.run_folder import METRICS

_DAMAGED = f"{METRICS}.damaged"

Row = dict[str, Any]
Points = list[tuple[float, float, float]]
"""(step, value, standard error or 0), from left to right."""

ERROR = "/standard_error"
"""Suffix of the key of a reward's standard error."""

REPLAY_NOISE = 0.1
"""Largest harmless replay_error, in units of clip_range: a tenth does not decide which ratios are clipped."""
SLOW = 0.02
"""ratio_std below which an update is small, in units of clip_range: 50 such updates in one direction reach the clip
range."""
FAST = 10.0
"""ratio_std above which an update is large, in units of clip_range: nearly all ratios are clipped."""
MOSTLY_CLIPPED = 0.8
"""clip_fraction above which most of the sampled (image, step) pairs have no gradient."""


def read_metrics(folder: Path) -> list[Row]:
    """Return the rows of a run; an incomplete last line, left by a killed process, is dropped.

    Raises ValueError for an invalid line anywhere else.
    """
    rows, faults = _read(folder / METRICS)
    if faults and not faults[0].is_last:
        raise ValueError(faults[0].text)
    return rows


class _Fault(NamedTuple):
    """A line of metrics.jsonl that is no row."""

    text: str
    is_last: bool


def _read(path: Path) -> tuple[list[Row], list[_Fault]]:
    """Return the rows of metrics.jsonl, and what is wrong with its other lines."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    rows, faults = list[Row](), list[_Fault]()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and {"kind", "step", "elapsed"} <= row.keys():
            rows.append(row)
        else:
            faults.append(_Fault(f"{path}:{number} is not a row of a run: {line[:80]!r}", number == len(lines)))
    return rows, faults


def by_step(rows: Sequence[Row], kind: str) -> list[Row]:
    """Return the rows of a kind ("train" or "evaluation") by step; of a step repeated after a resume, the last row."""
    of_step = {row["step"]: row for row in rows if row["kind"] == kind}
    return [of_step[step] for step in sorted(of_step)]


def evaluations_to_export(rows: Sequence[Row]) -> list[Row]:
    """Return the evaluations by step up to that of the exported weights: the last one, or what a row "export" names."""
    evaluations = by_step(rows, "evaluation")
    exported = next((row["step"] for row in reversed(rows) if row["kind"] == "export"), math.inf)
    return [row for row in evaluations if row["step"] <= exported]


def reward_names(evaluations: Sequence[Row]) -> list[str]:
    """Return the names of the evaluated rewards, in order."""
    return list(dict.fromkeys(key.removesuffix(ERROR) for row in evaluations for key in row if key.endswith(ERROR)))


def trained_rewards(rows: Sequence[Row]) -> list[str]:
    """Return the names of the rewards trained on; empty if training uses human preferences."""
    keys = [key for row in by_step(rows, "train") for key in row if key.startswith("rewards/")]
    return [key.removeprefix("rewards/") for key in dict.fromkeys(keys)]


def number(row: Row, key: str) -> float:
    """Return the number under a key; NaN if there is none."""
    return float(value) if isinstance(value := row.get(key), int | float) else math.nan


def points(rows: Sequence[Row], key: str, *, error: str | None = None) -> Points:
    """Return a key's values as points; `error` is the key of their standard errors, by default KEY/standard_error."""
    found = ((float(row["step"]), number(row, key), number(row, error or key + ERROR)) for row in rows)
    return [(x, y, e if math.isfinite(e) else 0.0) for x, y, e in found if math.isfinite(y)]


def time_split(rows: Sequence[Row]) -> dict[str, float]:
    """Return the seconds of each part of the run; time outside of training steps is "evaluation and the rest"."""
    names = dict.fromkeys(key for row in rows for key in row if key.startswith("seconds/"))
    split = {key.removeprefix("seconds/"): math.fsum(row.get(key, 0.0) for row in rows) for key in names}
    elapsed = max((float(row["elapsed"]) for row in rows), default=0.0)
    return {**split, "evaluation and the rest": max(0.0, elapsed - sum(split.values()))}


def rate_text(num_images: int, seconds: float) -> list[str]:
    """Return images per second with three digits, as a list of one text; empty if no time was measured."""
    if seconds <= 0:
        return []
    rate = num_images / seconds
    return [f"{rate:.3g} images/s" if rate < 999.5 else f"{rate:,.0f} images/s"]


def total(rows: Sequence[Row], key: str) -> int:
    """Return the sum of a key over all rows that have it."""
    return sum(row.get(key, 0) for row in rows)


class MetricsFile:
    """Append rows to the metrics.jsonl of a run folder, each with its kind ("train" or "evaluation") and step."""

    def __init__(
        self,
        folder: Path,
        *,
        resumed_step: int,
        owes_evaluation: bool = False,
        report: Callable[[str], object] = lambda text: None,
    ) -> None:
        """Open the file of a run that resumes after `resumed_step` steps; later rows and "export" are removed.

        With `owes_evaluation` the evaluation after that step is made again, so its row is removed too. Lines that are
        no rows are removed, and `report` is called with each; a copy of the file keeps those that no crash has cut.
        """
        self.path = folder / METRICS
        rows, faults = _read(self.path) if resumed_step else ([], [])
        for fault in faults:
            cause = "cut by a crash, it is" if fault.is_last else f"{_DAMAGED} keeps it, and it is"
            report(f"{fault.text}; {cause} left out.")
        if any(not fault.is_last for fault in faults):
            shutil.copyfile(self.path, folder / _DAMAGED)
        ends = {"train": resumed_step, "evaluation": resumed_step - owes_evaluation, "export": -1}
        earlier = [row for row in rows if row["step"] <= ends.get(row["kind"], -1)]
        self.elapsed = max((row["elapsed"] for row in earlier), default=0.0)
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in earlier))

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row and flush it to disk."""
        with self.path.open("a") as file:
            file.write(json.dumps(dict(row)) + "\n")
            file.flush()
            os.fsync(file.fileno())


def mean_update_metrics(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Combine the metrics of several optimiser steps: mean gradient norm, total number of skipped updates."""
    return {
        "gradient_norm": sum(step["gradient_norm"] for step in steps) / len(steps),
        "skipped_updates": sum(step["skipped_updates"] for step in steps),
    }
