"""One process, or DDP: each process holds the full network, and gradients are averaged."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rlhf_t2i.distributed.types import STEP, UNREAD, step_of, tensors_of


class Replicated:
    """`Engine` for one process or DDP."""

    is_sharded = False

    def __init__(
        self,
        accelerator: Accelerator,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        max_gradient_norm: float,
    ) -> None:
        self._accelerator, self._module, self._max_norm = accelerator, network, max_gradient_norm
        # DDP would broadcast quantised weights as plain tensors; each process has loaded the same ones.
        quantized = [name for name, p in network.named_parameters() if type(p) is not nn.Parameter]
        # It would also wait for gradients of layers whose outputs nothing reads, which have none on any process.
        unread = [name for name, _ in network.named_parameters() if name.startswith(getattr(network, UNREAD, ()))]
        network._ddp_params_and_buffers_to_ignore = quantized + unread  # pyright: ignore[reportArgumentType]
        self.network, self._optimizer = accelerator.prepare(network, optimizer)
        self._parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.weights: Mapping[str, Tensor] = {name: p.data for name, p in self._parameters.items()}

    def shard_frozen(self, module: nn.Module) -> nn.Module:
        return module

    @contextmanager
    def accumulating(self, *, last: bool) -> Iterator[None]:
        if last:
            yield
            return
        with self._accelerator.no_sync(self.network):
            yield

    def backward(self, loss: Tensor) -> None:
        # Gradient checkpointing calls the network again, which must not start another exchange of gradients.
        with self._accelerator.no_sync(self.network):
            self._accelerator.backward(loss)

    def gradients(self) -> dict[str, Tensor | None]:
        return {name: parameter.grad for name, parameter in self._parameters.items()}

    def clear_gradients(self) -> None:
        """Forget the gradients of an optimiser step that was not finished."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def optimizer_step(self, learning_rate: float) -> tuple[float, bool]:
        _set_learning_rate(self._optimizer, learning_rate)
        norm = float(self._accelerator.clip_grad_norm_(self._parameters.values(), self._max_norm) or 0)
        # With fp16 the scaler skips the step itself, and lowers its scale only if it is called.
        if math.isfinite(norm) or self._accelerator.scaler is not None:
            self._optimizer.step()
        skipped = not math.isfinite(norm) or self._accelerator.optimizer_step_was_skipped
        self._optimizer.zero_grad()
        return norm, skipped

    @contextmanager
    def gathered_network(self) -> Iterator[nn.Module]:
        yield self._module

    def gather_weight(self, name: str, shard: Tensor) -> Tensor:
        del name
        return shard

    def shard_of(self, name: str, weight: Tensor) -> Tensor:
        del name
        return weight

    def optimizer_state(self, name: str) -> dict[str, Tensor]:
        return tensors_of(self._torch_optimizer.state.get(self._parameters[name], {}))

    @torch.no_grad()
    def load(self, name: str, weight: Tensor, optimizer_state: Mapping[str, Tensor]) -> None:
        parameter = self._parameters[name]
        parameter.copy_(weight)
        if optimizer_state:
            moments = {k: _laid_out_as(parameter, moment) for k, moment in optimizer_state.items() if k != STEP}
            step = step_of(optimizer_state)
            if self._torch_optimizer.defaults.get("fused"):  # the kernel takes all of it from one device
                step = {key: torch.as_tensor(count).to(parameter.device) for key, count in step.items()}
            self._torch_optimizer.state[parameter] = {**step, **moments}

    @property
    def _torch_optimizer(self) -> torch.optim.Optimizer:
        """The optimiser without accelerate's wrapper."""
        return getattr(self._optimizer, "optimizer", self._optimizer)


def _laid_out_as(parameter: Tensor, moment: Tensor) -> Tensor:
    """Return a moment on the device and, for a step in one kernel, which reads memory in order, in the layout."""
    if moment.shape != parameter.shape:  # of an optimiser in 8 bits
        return moment.to(parameter.device)
    found = torch.empty_strided(parameter.shape, parameter.stride(), dtype=moment.dtype, device=parameter.device)
    return found.copy_(moment)


def _set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
