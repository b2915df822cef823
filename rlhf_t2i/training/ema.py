"""Moving averages of what learns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Decay = Callable[[int], float]
"""What share of an average stays at its n-th update, n from 1."""


def decay_after_a_start(most: float) -> Decay | None:
    """A decay that is lower while few updates have been seen, min(most, (1 + n) / (10 + n)): the start is forgotten.

    0 is off. ValueError for a decay outside [0, 1).
    """
    if not 0 <= most < 1:
        raise ValueError(f"The decay of the average is {most}; it must be in [0, 1).")
    return (lambda n: min(most, (1 + n) / (10 + n))) if most else None


def rising_decay(*, start: int, rise: float, most: float) -> Decay:
    """0 up to update `start`, then `rise` more with each, up to `most`."""
    return lambda n: min(max(n - start, 0) * rise, most)


class MovingAverage:
    """average <- decay(n) * average + (1 - decay(n)) * weights, at the n-th `update`.

    Without a decay it is off, and holds nothing: the average is the weights.
    """

    def __init__(self, weights: Mapping[str, Tensor], *, decay: Decay | None) -> None:
        """Start from the weights."""
        self.decay, self.num_updates = decay, 0
        kept = weights if decay else {}
        self.average = {name: weight.detach().clone() for name, weight in kept.items()}

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor]) -> None:
        """Move the average towards the weights."""
        self.num_updates += 1
        if self.decay is None:
            return
        decay = self.decay(self.num_updates)
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
