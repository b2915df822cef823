"""Interface of all distribution strategies."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's moments of each weight; its state also has the number of steps."""
STEP = "step"
"""Key of the number of steps in an optimiser's state of a weight; the other keys of torch's have the weight's shape."""

UNREAD = "unread_layers"
"""Attribute of a network with the beginnings of the names of layers whose outputs nothing reads, if it has any."""


def tensors_of(state: Mapping[str, Tensor | int | None]) -> dict[str, Tensor]:
    """Return the part of an optimiser's state of a weight that exists: SGD without momentum has None."""
    return {key: torch.as_tensor(value) for key, value in state.items() if value is not None}


def step_of(state: Mapping[str, Tensor]) -> dict[str, Tensor | int]:
    """Return a copy of the number of steps in an optimiser's state, which SGD does not count.

    torch's optimisers count in a float32 tensor, those of bitsandbytes in an integer.
    """
    if STEP not in state:
        return {}
    step = state[STEP]
    return {STEP: step.clone() if step.is_floating_point() else int(step)}


@runtime_checkable
class Engine(Protocol):
    """A trained network and its optimiser on the processes.

    All methods are collective: every process must call them, equally often.
    """

    network: nn.Module
    """The network to call. If `is_sharded`, every process must call it equally often."""
    weights: Mapping[str, Tensor]
    """This process's shard of each trained weight, by name. Writing to it changes the network."""
    is_sharded: bool
    """True if each process holds only a shard of each weight."""

    def shard_frozen(self, module: nn.Module) -> nn.Module:
        """Return a frozen network held in the same way as the trained one: complete, or sharded."""
        ...

    def accumulating(self, *, last: bool) -> AbstractContextManager[None]:
        """Context of a forward and backward pass; only the `last` one of an optimiser step exchanges gradients."""
        ...

    def backward(self, loss: Tensor) -> None: ...

    def gradients(self) -> Mapping[str, Tensor | None]:
        """Return the gradient of each trained weight before an optimiser step, as far as this process has it."""
        ...

    def optimizer_step(self, learning_rate: float) -> tuple[float, bool]:
        """Take one step of the optimiser with the gradients averaged over processes, clipped to the maximum norm.

        Returns their norm before clipping, and True if all processes skipped the step because it is not finite.
        """
        ...

    def gathered_network(self) -> AbstractContextManager[nn.Module]:
        """Context with a network that has all weights on this process, to call any number of times without gradient."""
        ...

    def gather_weight(self, name: str, shard: Tensor) -> Tensor:
        """Return the full weight, or another tensor of its shape, from the shards of all processes."""
        ...

    def shard_of(self, name: str, weight: Tensor) -> Tensor:
        """Return this process's shard of a full weight."""
        ...

    def optimizer_state(self, name: str) -> dict[str, Tensor]:
        """Return the optimiser's full state of a weight, MOMENTS and `step` for Adam; empty before the first step."""
        ...

    def load(self, name: str, weight: Tensor, optimizer_state: Mapping[str, Tensor]) -> None:
        """Load a full weight and its `optimizer_state`."""
        ...
