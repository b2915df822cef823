"""An exponential moving average of what learns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class ExponentialMovingAverage:
    """average <- decay * average + (1 - decay) * weights, at every `update`.

    A decay of 0 is off: the average is the weights. While few updates have been seen the decay is lower,
    (1 + n) / (10 + n), so that the start is forgotten.
    """

    def __init__(self, weights: Mapping[str, Tensor], *, decay: float) -> None:
        """Start from the weights; ValueError for a decay outside [0, 1)."""
        if not 0 <= decay < 1:
            raise ValueError(f"The decay of the average is {decay}; it must be in [0, 1).")
        self.decay, self.num_updates = decay, 0
        kept = weights if decay else {}
        self.average = {name: weight.detach().clone() for name, weight in kept.items()}

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor]) -> None:
        """Move the average towards the weights."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        for name, average in self.average.items():
            average.lerp_(weights[name].detach(), 1 - decay)

    @contextmanager
    def applied(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Within it the weights have their averages; afterwards their own values again, to the bit."""
        with exchanged(weights, self.average):
            yield

    def state_dict(self) -> dict[str, int]:
        """Without the average, which a checkpoint keeps beside the weights."""
        return {"num_updates": self.num_updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.num_updates = int(state["num_updates"])


@contextmanager
def exchanged(weights: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it the weights that `values` names have those values; afterwards their own again, to the bit."""
    own = {name: weights[name].detach().clone() for name in values}
    _copy(values, into=weights)
    try:
        yield
    finally:
        _copy(own, into=weights)


@torch.no_grad()
def _copy(values: Mapping[str, Tensor], *, into: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        into[name].copy_(value)
