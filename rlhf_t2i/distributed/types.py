"""What all ways to spread a network over processes have in common."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What Adam remembers of each weight, beside how many steps it has taken."""


@runtime_checkable
class Engine(Protocol):
    """A network that learns and its AdamW, spread over the processes.

    All methods but `gathered_network`'s body are collective: each process calls them, equally often.
    """

    network: nn.Module
    """What to call. Where it is in parts (`is_sharded`), each process must call it equally often."""
    weights: Mapping[str, Tensor]
    """This process's part of each trained weight, by name. Live: what is written into it is what the network uses."""
    is_sharded: bool
    """Whether a process holds only a part of the weights."""

    def shard_frozen(self, module: nn.Module) -> nn.Module:
        """Another network, which does not learn, held as this one is: whole, or in parts."""
        ...

    def accumulating(self, *, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward passes: only after the last one before `descend` are gradients exchanged."""
        ...

    def backward(self, loss: Tensor) -> None: ...

    def optimizer_step(self, learning_rate: float) -> tuple[float, bool]:
        """One step of AdamW along the gradients averaged over processes: their norm before clipping, and whether it was
        left out, on all processes, because the norm is not finite."""
        ...

    def gathered_network(self) -> AbstractContextManager[nn.Module]:
        """Within it, this process has all weights in the network that it yields, and may call it as often as it likes,
        without gradient."""
        ...

    def gather_weight(self, name: str, shard: Tensor) -> Tensor:
        """The weight (or what is shaped like it) of which each process gives its part."""
        ...

    def shard_of(self, name: str, weight: Tensor) -> Tensor:
        """This process's part of a whole."""
        ...

    def optimizer_state(self, name: str) -> dict[str, Tensor]:
        """What AdamW remembers of a weight, whole: MOMENTS and `step`; empty before the first step."""
        ...

    def load(self, name: str, weight: Tensor, optimizer_state: Mapping[str, Tensor]) -> None:
        """Take up a whole weight and what `optimizer_state` said of it."""
        ...
