"""FSDP2 (torch's `fully_shard`): weights, gradients and optimiser state are sharded, and gathered block by block."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from rlhf_t2i.distributed.types import STEP, step_of, tensors_of


def fully_sharded(network: nn.Module) -> Any:
    """Shard each block in diffusers' `_no_split_modules`, then the rest; return the same network.

    Collective, and so is each forward pass of the network afterwards.
    """
    mesh = _mesh(network)
    blocks = set(getattr(network, "_no_split_modules", None) or ())
    for module in reversed(list(network.modules())):  # inner modules before outer ones
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh)
    return fully_shard(network, mesh=mesh)


def _mesh(network: nn.Module) -> DeviceMesh:
    return init_device_mesh(next(network.parameters()).device.type, (dist.get_world_size(),))


class FullySharded:
    """`Engine` for FSDP2. It calls torch directly because accelerate's FSDP does not support the CPU."""

    is_sharded = True

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer, *, max_gradient_norm: float) -> None:
        """Shard the network; `optimizer` must not have taken a step, and gets the sharded weights."""
        self._max_norm = max_gradient_norm
        self._mesh = _mesh(network)
        self.network: Any = fully_sharded(network)
        self._parameters = {n: cast(DTensor, p) for n, p in network.named_parameters() if p.requires_grad}
        self.weights: Mapping[str, Tensor] = {name: p._local_tensor for name, p in self._parameters.items()}
        self._optimizer = optimizer
        [group] = optimizer.param_groups
        group["params"] = list(self._parameters.values())

    def shard_frozen(self, module: nn.Module) -> nn.Module:
        return fully_sharded(module)

    @contextmanager
    def accumulating(self, *, last: bool) -> Iterator[None]:
        self.network.set_requires_gradient_sync(last)
        try:
            yield
        finally:
            self.network.set_requires_gradient_sync(True)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def gradients(self) -> dict[str, Tensor | None]:
        gradients = {name: cast(DTensor | None, parameter.grad) for name, parameter in self._parameters.items()}
        return {name: None if gradient is None else gradient.to_local() for name, gradient in gradients.items()}

    def optimizer_step(self, learning_rate: float) -> tuple[float, bool]:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        total = nn.utils.clip_grad_norm_(self._parameters.values(), self._max_norm)
        norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
        if math.isfinite(norm):
            self._optimizer.step()
        self._optimizer.zero_grad()
        return norm, not math.isfinite(norm)

    @contextmanager
    def gathered_network(self) -> Iterator[nn.Module]:
        shards = [module for module in self.network.modules() if isinstance(module, FSDPModule)]
        for shard in shards:
            shard.set_reshard_after_forward(False, recurse=False)
            shard.unshard()
        try:
            yield self.network
        finally:
            for shard in shards:
                shard.reshard()
                shard.set_reshard_after_forward(shard is not self.network, recurse=False)

    def gather_weight(self, name: str, shard: Tensor) -> Tensor:
        like = self._parameters[name]
        return DTensor.from_local(
            shard, self._mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        ).full_tensor()

    def shard_of(self, name: str, weight: Tensor) -> Tensor:
        return self._sharded(name, weight).to_local()

    def _sharded(self, name: str, weight: Tensor) -> DTensor:
        like = self._parameters[name]
        return distribute_tensor(weight.to(like.device, like.dtype), self._mesh, like.placements)

    def optimizer_state(self, name: str) -> dict[str, Tensor]:
        state = tensors_of(self._optimizer.state.get(self._parameters[name], {}))
        return {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in state.items()}

    @torch.no_grad()
    def load(self, name: str, weight: Tensor, optimizer_state: Mapping[str, Tensor]) -> None:
        self.weights[name].copy_(self.shard_of(name, weight))
        if optimizer_state:
            moments = {k: self._sharded(name, moment) for k, moment in optimizer_state.items() if k != STEP}
            self._optimizer.state[self._parameters[name]] = {**step_of(optimizer_state), **moments}
