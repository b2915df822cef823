"""The result of a check, and statistics that keep random fluctuations from becoming warnings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, Literal

from rlhf_t2i.training.changes import Z_THRESHOLD, with_error
from rlhf_t2i.training.metrics import ERROR, Row, by_step, number, reward_names

Config = Mapping[str, Any]

_RECENT = 0.25
"""Fraction of the training steps that describes the present state of a run."""
_MIN_RECENT = 4
"""Smallest number of training steps that describes it."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check."""

    title: str
    """What holds if the check passes; the problem if it is a warning."""
    state: Literal["warning", "passed", "unknown"]
    observed: str
    """The numbers behind the result."""
    meaning: str = ""
    advice: str = ""
    summary: str = ""
    """What went wrong, in one sentence for the top of the page; empty if the title says it."""


def suggest(config: Config, *options: tuple[str, str]) -> str:
    """Return a sentence with those suggestions, (option, text) each, whose option the recipe has."""
    texts = [text for option, text in options if option in config]
    return f"Try {'; or '.join(texts)}." if texts else ""


def option(config: Config, direction: str, name: str) -> tuple[str, str]:
    """Return a suggestion to change an option, such as ("kl_weight", "a higher --kl_weight (it was 0.1)")."""
    return name, f"{direction} --{name} (it was {config.get(name)})"


def z_score(before: Row, after: Row, name: str) -> float:
    """Return the change of a reward in standard errors of the change, NaN if those are unknown.

    z = (after - before) / sqrt(before_error^2 + after_error^2)
    """
    error = math.hypot(number(before, name + ERROR), number(after, name + ERROR))
    return (number(after, name) - number(before, name)) / error if error > 0 else math.nan


def any_reward_rose(rows: Sequence[Row]) -> bool:
    """Return True if an evaluated reward rose beyond noise between the first and the last evaluation."""
    evaluations = by_step(rows, "evaluation")
    names = reward_names(evaluations[:1])
    return any(z_score(evaluations[0], evaluations[-1], name) > Z_THRESHOLD for name in names)


def mean_text(row: Row, name: str) -> str:
    """Return the mean of a reward with its standard error."""
    return with_error(number(row, name), number(row, name + ERROR))


def recent(values: Sequence[float]) -> list[float]:
    """Return the last quarter of a series, but at least 4 values; empty if there are fewer."""
    count = max(_MIN_RECENT, round(_RECENT * len(values)))
    return list(values[-count:]) if len(values) >= _MIN_RECENT else []


def mean_exceeds(values: Sequence[float], bound: float) -> bool:
    """Return True if the mean of `values` is above `bound` by more than 3 of its standard errors."""
    return fmean(values) - Z_THRESHOLD * stdev(values) / len(values) ** 0.5 > bound


def nan_as_inf(value: float) -> float:
    """Return infinity for NaN, so that NaN compares as the largest error."""
    return math.inf if math.isnan(value) else value
