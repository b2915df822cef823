"""What a check says, and the arithmetic that keeps it from calling chance a warning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, Literal

from rlhf_t2i.training.changes import with_error
from rlhf_t2i.training.metrics import ERROR, Row, by_step, number, reward_names

Config = Mapping[str, Any]

NUM_ERRORS = 3.0
"""Standard errors beyond which a difference is no noise: chance alone gets there once in 740 times, on one side."""
_RECENT = 0.25
"""Part of a run that says how it goes now ..."""
_MIN_RECENT = 4
"""... and the fewest steps that can say so."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check saw."""

    title: str
    """What is so where it is fine, or what is wrong where it is a warning."""
    state: Literal["warning", "fine", "unknown"]
    seen: str
    meaning: str = ""
    remedy: str = ""


def advice(config: Config, *options: tuple[str, str]) -> str:
    """A sentence of what the recipe of this config has settings for."""
    own = [text for setting, text in options if setting in config]
    return f"Try {'; or '.join(own)}." if own else ""


def setting(config: Config, word: str, name: str) -> tuple[str, str]:
    """An option for `advice`: to turn a setting up or down, with what it was."""
    return name, f"{word} --{name} (it was {config.get(name)})"


def change(before: Row, after: Row, name: str) -> float:
    """In standard errors, taken as independent; NaN where they are not known."""
    error = math.hypot(number(before, name + ERROR), number(after, name + ERROR))
    return (number(after, name) - number(before, name)) / error if error > 0 else math.nan


def has_learnt(rows: Sequence[Row]) -> bool:
    """Whether any evaluated reward rose beyond noise."""
    ends = by_step(rows, "evaluation")
    return any(change(ends[0], ends[-1], name) > NUM_ERRORS for name in reward_names(ends[:1]))


def text(row: Row, name: str) -> str:
    """The mean of a reward with its error."""
    return with_error(number(row, name), number(row, name + ERROR))


def recent(values: Sequence[float]) -> list[float]:
    """The last part of a run; nothing if the run is too short to have one."""
    count = max(_MIN_RECENT, round(_RECENT * len(values)))
    return list(values[-count:]) if len(values) >= _MIN_RECENT else []


def surely_above(values: Sequence[float], bound: float) -> bool:
    """Whether their mean lies above a bound by more than NUM_ERRORS of its standard errors."""
    return fmean(values) - NUM_ERRORS * stdev(values) / len(values) ** 0.5 > bound


def no_nan(value: float) -> float:
    """NaN is worse than any number."""
    return math.inf if math.isnan(value) else value
