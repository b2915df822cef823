"""Scores: from what a reward returns to one float32 number for each image."""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def as_scores(result: Any, *, count: int, device: torch.device) -> Float[Tensor, " B"]:
    """Return what a reward returned for `count` images as float32 numbers on a device, with their gradient.

    They are a copy, as a reward may use the memory of its result again. Raises TypeError or ValueError, whose text
    completes "The reward returned", for anything but a tensor, array or list of `count` real numbers.
    """
    if isinstance(result, list):
        return _stacked(result, count=count, device=device)
    if isinstance(result, np.ndarray) and result.dtype.kind in "biuf":
        result = torch.from_numpy(result.astype(np.float64))
    if not isinstance(result, Tensor):
        raise TypeError(f"{_kind(result)}; {_rule(count)}")
    if tuple(result.shape) != (count,):
        raise ValueError(f"shape {tuple(result.shape)} for {count} images; it must return ({count},)")
    if result.is_complex():
        raise TypeError(f"{result.dtype}; {_rule(count)}")
    return result.to(device, torch.float32, copy=True)


def _stacked(items: list[Any], *, count: int, device: torch.device) -> Tensor:
    """Return the scores of a list of numbers, or of tensors that hold one number each."""
    for item in items:
        is_number = isinstance(item, Real | np.bool_) or (isinstance(item, Tensor) and item.dim() == 0)
        if not is_number or (isinstance(item, Tensor) and item.is_complex()):
            raise TypeError(f"a list with {_kind(item)}; {_rule(count)}")
    if len(items) != count:
        raise ValueError(f"a list of length {len(items)} for {count} images; it must return {count} numbers")
    tensors = [item if isinstance(item, Tensor) else torch.tensor(float(item), dtype=torch.float64) for item in items]
    return torch.stack([tensor.to(device, torch.float32) for tensor in tensors])


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype}"
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def _rule(count: int) -> str:
    return f"it must return one number for each image, as a tensor, an array or a list of length {count}"
