"""Exponential moving averages (EMA) of the trained weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

Decay = Callable[[int], float]
"""Decay of an average at its n-th update, n from 1: the weight of its old value, in [0, 1]."""


def decay_after_a_start(most: float) -> Decay | None:
    """Return the decay min(most, (1 + n) / (10 + n)), which forgets the initial weights quickly; None if `most` is 0.

    Raises ValueError if `most` is not in [0, 1).
    """
    if not 0 <= most < 1:
        raise ValueError(f"ema_decay is {most}; it must be in [0, 1).")
    return (lambda n: min(most, (1 + n) / (10 + n))) if most else None


def rising_decay(*, start: int, rise: float, most: float) -> Decay:
    """Return the decay clamp(rise * (n - start), 0, most), which rises linearly after update `start`."""
    return lambda n: min(max(n - start, 0) * rise, most)


class MovingAverage:
    """Moving average of weights by name: average <- decay(n) * average + (1 - decay(n)) * weights at update n.

    With `decay=None` it is off: it stores nothing, and the average is the weights themselves.
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
        """Context in which the weights are replaced by their average; they are restored exactly on exit."""
        with exchanged(weights, self.average):
            yield

    def state_dict(self) -> dict[str, int]:
        """Return the number of updates; a checkpoint stores the average itself beside the weights."""
        return {"num_updates": self.num_updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.num_updates = int(state["num_updates"])


@contextmanager
def exchanged(weights: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Context in which the weights named in `values` have those values; they are restored exactly on exit."""
    own = {name: weights[name].detach().clone() for name in values}
    copy_weights(values, into=weights)
    try:
        yield
    finally:
        copy_weights(own, into=weights)


def lora_at_scale(weights: Mapping[str, Tensor], scale: float) -> AbstractContextManager[None]:
    """Context in which LoRA adapters contribute `scale` times as much, as in evaluation and export."""
    from rlhf_t2i.models.lora import lora_scaled  # takes seconds

    return exchanged(weights, lora_scaled(weights, scale) if scale != 1 else {})


@torch.no_grad()
def copy_weights(values: Mapping[str, Tensor], *, into: Mapping[str, Tensor]) -> None:
    """Give the weights named in `values` those values."""
    for name, value in values.items():
        into[name].copy_(value)
