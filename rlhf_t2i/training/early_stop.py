"""Early stopping on a held-out reward, with a copy of the best weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class EarlyStop:
    """Best evaluation of a reward so far, its weights, and the number of evaluations since.

    It is due after `patience` evaluations in a row without a new best.
    """

    def __init__(self, reward: str, *, patience: int) -> None:
        self.reward, self.patience = reward, patience
        self.best, self.best_step, self.num_since = -math.inf, -1, 0
        self.weights: dict[str, Tensor] = {}

    @property
    def is_due(self) -> bool:
        """True after `patience` evaluations in a row without a new best."""
        return self.num_since >= self.patience

    @torch.no_grad()
    def update(self, step: int, value: float, weights: Mapping[str, Tensor]) -> None:
        """Record the mean reward of an evaluation; copy the weights if it is the best so far."""
        self.num_since += 1
        if value > self.best:
            self.best, self.best_step, self.num_since = value, step, 0
            self.weights.update({name: weight.detach().clone() for name, weight in weights.items()})

    def state_dict(self) -> dict[str, Any]:
        """Return all but the weights, which a checkpoint stores beside the trained ones."""
        return {"best": self.best, "best_step": self.best_step, "num_since": self.num_since}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best, self.best_step, self.num_since = state["best"], state["best_step"], state["num_since"]
