"""Stop when a reward that is not trained on no longer rises, and keep the weights with which it was best."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class EarlyStop:
    """The best evaluation so far, and how many have followed that were no better."""

    def __init__(self, reward: str, *, patience: int) -> None:
        self.reward, self.patience = reward, patience
        self.best, self.best_step, self.num_since = -math.inf, -1, 0
        self.weights: dict[str, Tensor] = {}

    @property
    def is_due(self) -> bool:
        """Whether `patience` evaluations in a row were no better than the best."""
        return self.num_since >= self.patience

    @torch.no_grad()
    def update(self, step: int, value: float, weights: Mapping[str, Tensor]) -> None:
        """Take note of an evaluation of these weights; they are copied if it is the best."""
        self.num_since += 1
        if value > self.best:
            self.best, self.best_step, self.num_since = value, step, 0
            self.weights.update({name: weight.detach().clone() for name, weight in weights.items()})

    def state_dict(self) -> dict[str, Any]:
        """Without the weights, which a checkpoint keeps beside the others."""
        return {"best": self.best, "best_step": self.best_step, "num_since": self.num_since}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best, self.best_step, self.num_since = state["best"], state["best_step"], state["num_since"]
