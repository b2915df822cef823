"""Checks of the arguments of statistics: columns of numbers with one dimension and one length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float64
from numpy.typing import ArrayLike

Floats = Float64[np.ndarray, " N"]


class UndefinedMetricError(ValueError):
    """The arguments are valid, but the metric is undefined for them (0/0)."""


def columns_of(**named: ArrayLike) -> list[Floats]:
    """Return the arguments as float64 arrays (N,). Raises ValueError, with the name, unless all are finite."""
    columns = {name: np.asarray(values, dtype=np.float64) for name, values in named.items()}
    common_length(columns)
    for name, column in columns.items():
        if not (finite := np.isfinite(column)).all():
            row = int(np.argmin(finite))
            raise ValueError(f"{name}[{row}] is {column[row]}; every value must be finite.")
    return list(columns.values())


def labelled_columns(*, labels: ArrayLike, **named: ArrayLike) -> tuple[Floats, Floats]:
    """Return one column and its labels, which must be 0 or 1."""
    column, label = columns_of(**named, labels=labels)
    require_values(label, (0, 1), name="labels")
    return column, label


def common_length(columns: Mapping[str, Any]) -> int:
    """Return the length of the columns. Raises ValueError unless they have one dimension and the same length > 0."""
    for name, column in columns.items():
        if column.ndim != 1:
            raise ValueError(f"{name} has shape {column.shape}; it must have one dimension.")
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) != 1:
        sizes = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise ValueError(f"Columns must have the same length, but {sizes or 'there are none'}.")
    length = next(iter(lengths.values()))
    if not length:
        raise UndefinedMetricError(f"There is nothing to count: no {' and no '.join(columns)}.")
    return length


def require_values(column: Floats, allowed: tuple[int, ...], *, name: str) -> None:
    """Raise ValueError for the first value that is not one of `allowed`."""
    unknown = np.logical_and.reduce([column != value for value in allowed])
    if unknown.any():
        row = int(np.argmax(unknown))
        raise ValueError(f"{name}[{row}] is {column[row]:g}; it must be one of {', '.join(map(str, allowed))}.")


def require_probabilities(column: Floats, *, name: str) -> None:
    """Raise ValueError for the first value outside of [0, 1]."""
    outside = (column < 0) | (column > 1)
    if outside.any():
        row = int(np.argmax(outside))
        raise ValueError(f"{name}[{row}] is {column[row]}; a probability lies in [0, 1].")
