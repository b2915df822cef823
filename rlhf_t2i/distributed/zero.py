"""DeepSpeed ZeRO (Rajbhandari et al., arXiv:1910.02054): sharded optimiser state, gradients and weights."""

# DeepSpeed has no usable types.
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from rlhf_t2i.distributed.fsdp import fully_sharded
from rlhf_t2i.distributed.types import MOMENTS

_AUTO = (None, "auto")


def fill_config(
    config: Mapping[str, Any], *, max_gradient_norm: float, mixed_precision: str, microbatch_size: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return DeepSpeed's config with the recipe's settings in it, and those that were missing or `auto`.

    DeepSpeed's own values for `auto` differ from the recipe's: it would clip gradients to 1.0. Raises ValueError, with
    both values, where the two disagree.
    """
    config = {name: dict(value) if isinstance(value, Mapping) else value for name, value in config.items()}
    zero = config.setdefault("zero_optimization", {})
    required = {
        "gradient_clipping": (config, max_gradient_norm, "the recipe's max_gradient_norm"),
        "gradient_accumulation_steps": (config, 1, "1, because a recipe splits its batches by microbatch_size"),
        "train_micro_batch_size_per_gpu": (config, microbatch_size, "the recipe's microbatch_size"),
    }
    if zero.get("stage") == 3:
        required["stage3_param_persistence_threshold"] = (zero, 0, "0, so that every weight is sharded")
    filled: dict[str, Any] = {}
    for name, (section, value, meaning) in required.items():
        if section.get(name) in _AUTO:
            section[name] = filled[name] = value
        if float(section[name]) != float(value):
            raise ValueError(
                f"DeepSpeed's config has {name}: {section[name]}; it must be {meaning}: {value}. Change one of them, "
                f"or remove {name} from DeepSpeed's config."
            )
    for name in ("optimizer", "scheduler"):
        if name in config:
            raise ValueError(
                f"DeepSpeed's config has a section {name!r}, which the recipe's settings replace. Remove it."
            )
    if mixed_precision == "fp16":
        raise ValueError("mixed_precision fp16 is not supported with DeepSpeed; use bf16 or no.")
    # Weights stay in float32 and autocast computes in bfloat16, as without DeepSpeed.
    for name in ("bf16", "fp16"):
        config[name] = {"enabled": False}
    if mixed_precision == "bf16":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    config.pop("train_batch_size", None)
    config["zero_allow_untested_optimizer"] = True
    config["zero_force_ds_cpu_optimizer"] = config.get("zero_force_ds_cpu_optimizer", torch.cuda.is_available())
    return config, filled


class Zero:
    """`Engine` for ZeRO-1 (sharded optimiser state), ZeRO-2 (gradients too) and ZeRO-3 (weights too)."""

    def __init__(self, accelerator: Accelerator, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._module = network
        self.network, _ = accelerator.prepare(network, optimizer)
        self._engine: Any = self.network
        self.is_sharded = self._engine.zero_optimization_stage() == 3
        self._parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.weights: Mapping[str, Tensor] = {
            name: p.ds_tensor.data if self.is_sharded else p.data for name, p in self._parameters.items()
        }

    def shard_frozen(self, module: nn.Module) -> nn.Module:
        # DeepSpeed shards only the network of its optimiser, so torch shards the frozen one.
        return fully_sharded(module) if self.is_sharded else module

    @contextmanager
    def accumulating(self, *, last: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def gradients(self) -> dict[str, Tensor | None]:
        from deepspeed import utils  # takes seconds

        read: Any = utils.safe_get_full_grad
        return {name: read(parameter) for name, parameter in self._parameters.items()}

    def optimizer_step(self, learning_rate: float) -> tuple[float, bool]:
        for group in self._zero.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        norm = float(self._zero._global_grad_norm)
        return norm, bool(self._zero.overflow) or not math.isfinite(norm)

    @contextmanager
    def gathered_network(self) -> Iterator[nn.Module]:
        if not self.is_sharded:
            yield self._module
            return
        import deepspeed  # takes seconds
        from trl.models.utils import add_hooks, remove_hooks

        with deepspeed.zero.GatheredParameters(list(self._module.parameters())):
            remove_hooks(self._engine)
            try:
                yield self._module
            finally:
                add_hooks(self._engine)

    def gather_weight(self, name: str, shard: Tensor) -> Tensor:
        if not self.is_sharded:
            return shard
        shards = [torch.empty_like(shard) for _ in range(dist.get_world_size())]
        dist.all_gather(shards, shard.contiguous())
        shape = self._parameters[name].ds_shape
        return torch.cat(shards)[: shape.numel()].view(shape)

    def shard_of(self, name: str, weight: Tensor) -> Tensor:
        if not self.is_sharded:
            return weight
        own = self.weights[name]
        padded = weight.new_zeros(len(own) * dist.get_world_size())
        padded[: weight.numel()] = weight.flatten()
        return padded.view(-1, len(own))[dist.get_rank()].to(own)

    def optimizer_state(self, name: str) -> dict[str, Tensor]:
        from deepspeed import utils  # takes seconds

        state = self._zero.optimizer.state.get(self._flat[0], {})
        if not state:
            return {}
        read: Any = utils.safe_get_full_optimizer_state
        moments = {key: read(self._parameters[name], key) for key in MOMENTS}
        return {"step": torch.as_tensor(state["step"], dtype=torch.float32), **moments}

    @torch.no_grad()
    def load(self, name: str, weight: Tensor, optimizer_state: Mapping[str, Tensor]) -> None:
        from deepspeed import utils  # takes seconds

        parameter, shard = self._parameters[name], self.shard_of(name, weight)
        self.weights[name].copy_(shard)
        write_weight = utils.safe_set_local_fp32_param if self.is_sharded else utils.safe_set_full_fp32_param
        write_state = utils.safe_set_local_optimizer_state if self.is_sharded else utils.safe_set_full_optimizer_state
        write_weight(parameter, shard)
        if optimizer_state:
            self._begin_optimizer_state(optimizer_state["step"])
            for key in MOMENTS:
                write_state(parameter, self.shard_of(name, optimizer_state[key]), key)

    @property
    def _zero(self) -> Any:
        """DeepSpeed's optimiser, which wraps AdamW."""
        return self._engine.optimizer

    @property
    def _flat(self) -> list[Tensor]:
        """The flat tensors that AdamW updates: this process's shard of all trained weights."""
        return (
            self._zero.fp32_partitioned_groups_flat if self.is_sharded else self._zero.single_partition_of_fp32_groups
        )

    def _begin_optimizer_state(self, step: Tensor) -> None:
        """Create AdamW's state, which it creates itself only in its first step."""
        for flat in self._flat:
            if not self._zero.optimizer.state.get(flat):
                moments = {key: torch.zeros_like(flat) for key in MOMENTS}
                self._zero.optimizer.state[flat] = {"step": step.clone(), **moments}
        if not self.is_sharded:
            self._zero._lazy_init_hp_params_optimizer_state()
