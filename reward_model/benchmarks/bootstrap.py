"""Confidence intervals by the bootstrap, and Wilson's for a fraction.

The bootstrap is not `scipy.stats.bootstrap`, which cannot redraw: a statistic of labels is undefined on a resample of
one class only.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest

from reward_model.benchmarks.columns import UndefinedMetricError, common_length


def bootstrap_interval(
    statistic: Callable[..., float],
    *columns: ArrayLike,
    num_resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Return the ends of the percentile bootstrap interval of a statistic (Efron, 1979).

    Rows are drawn with replacement, the same rows from every column; rows must be independent of each other. A resample
    on which the statistic raises ValueError (such as one class only) is drawn again, with at most `num_resamples`
    redraws in total. `level`, in (0, 1), is the coverage.

    Two limits: without any error in the data, the interval has width 0, unlike Wilson's. And statistics that
    chance makes larger (calibration error and tie-optimised accuracy on few rows) are larger still on resamples: the
    interval is too high.

    Raises UndefinedMetricError if the statistic is undefined on the data, for fewer than 2 rows, or after too many
    redraws; ValueError for other arguments.
    """
    arrays = [np.asarray(column) for column in columns]
    num_rows = common_length({f"column {i}": array for i, array in enumerate(arrays)})
    if num_resamples < 1 or not 0 < level < 1:
        raise ValueError(f"num_resamples is {num_resamples} and level {level}; they must be >= 1 and within (0, 1).")
    if num_rows < 2:
        raise UndefinedMetricError(f"An interval needs at least 2 rows; there is {num_rows}.")
    statistic(*arrays)  # an error on the data themselves must not be hidden by redraws

    rng = np.random.default_rng(seed)
    values: list[float] = []
    num_draws = 0
    while len(values) < num_resamples:
        if num_draws == 2 * num_resamples:
            raise UndefinedMetricError(f"{num_draws - len(values)} of {num_draws} resamples are undefined.")
        rows = rng.integers(num_rows, size=num_rows)
        num_draws += 1
        try:
            values.append(statistic(*(array[rows] for array in arrays)))
        except ValueError:
            continue
    if not np.isfinite(values).all():
        raise ValueError("The statistic is not finite on a resample; it should raise ValueError where it is undefined.")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def wilson_interval(count: int, total: int) -> tuple[float, float]:
    """Return the ends of Wilson's 95 % score interval (1927) of the fraction count / total; total > 0."""
    ends = binomtest(count, total).proportion_ci(method="wilson")
    return float(ends.low), float(ends.high)
