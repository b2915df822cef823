"""Memory of each process for a trained network, computed from its size and the distribution strategy."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf_t2i.distributed.processes import Mode

FLOAT32 = 4
BUCKET = 500_000_000
"""Elements of DeepSpeed's default `reduce_bucket_size`, which it allocates however few parameters are trained."""
LIVE = 1_000_000_000
"""Elements that ZeRO-3 may keep gathered (`stage3_max_live_parameters`, `stage3_max_reuse_distance`)."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Size of a trained network and how it is distributed. Counts are elements of the full network."""

    mode: Mode
    processes: int
    trainable: int
    """Trained parameters. They, their gradients and the optimiser's state are float32."""
    frozen: int = 0
    """Other parameters of the same network, such as those under LoRA adapters."""
    frozen_width: int | float = FLOAT32
    """Bytes of each frozen parameter, on average."""
    block: int = 0
    """Elements that FSDP2 has gathered at once: `gathered_by_fsdp`."""
    offload: bool = False
    """ZeRO-3 with float32 weights, gradients and moments in main memory (deepspeed_zero3_offload.yaml)."""
    num_averages: int = 0
    """Moving averages of the trained weights."""
    num_moments: int | float = 2
    """Optimiser state of each trained parameter in float32 numbers: two for Adam, one for SGD with momentum."""
    reference: bool = False
    """A frozen copy of the full network in float32."""
    accumulates: bool = True
    """True if an optimiser step has several microbatches."""
    gather_for_sampling: bool = True
    bucket: int = BUCKET
    """DeepSpeed's reduce_bucket_size, in elements."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on the device of one process."""

    weights: float
    master: float
    """DeepSpeed's own float32 copy of this process's shard, also of weights that are float32."""
    gradients: float
    moments: float
    averages: float
    replaced: float
    """Copy of the trained weights while an average is evaluated in their place."""
    reference: float
    buffers: float
    """Buffers for gradient exchange: DDP's second copy, DeepSpeed's bucket and its flat copy, FSDP2's blocks."""
    gathered: float
    """Weights of other processes in a forward or backward pass."""
    gathered_for_sampling: float
    step: float
    """Temporary memory of the optimiser step: the square root of the second moment, and ZeRO's flat gradients."""
    persistent_buffers: float
    """Part of gradients and buffers that is never freed (DDP, ZeRO-3)."""
    others: float = 0.0
    """Reward models, text encoders and the autoencoder."""
    activations: float = 0.0
    sampling_activations: float = 0.0
    host: float = 0.0
    """Offloaded to main memory."""

    @property
    def persistent(self) -> float:
        """Bytes in use at all times after the first optimiser step."""
        state = self.weights + self.master + self.moments + self.averages + self.reference
        return state + self.persistent_buffers + self.others

    @property
    def sampling(self) -> float:
        """Bytes in use during sampling."""
        return self.persistent + self.gathered_for_sampling + self.sampling_activations + self.replaced

    @property
    def backward(self) -> float:
        """Bytes in use in the backward pass of the second microbatch, which adds to existing gradients."""
        exchanged = self.gradients + self.buffers - self.persistent_buffers
        return self.persistent + exchanged + self.gathered + self.activations

    @property
    def optimizer_step(self) -> float:
        """Bytes in use in the optimiser step."""
        return self.persistent + self.step

    @property
    def peak(self) -> float:
        """Maximum over all phases, in bytes."""
        return max(self.sampling, self.backward, self.optimizer_step)


def num_bytes(parameter: Tensor) -> int:
    """Return the bytes of a parameter; the scales of a quantised one are part of it."""
    if (state := getattr(parameter, "quant_state", None)) is not None:  # of bitsandbytes
        return parameter.nbytes + state.absmax.nbytes
    if hasattr(parameter, "__tensor_flatten__"):  # of torchao
        names, _ = parameter.__tensor_flatten__()  # pyright: ignore[reportAttributeAccessIssue]
        return sum(getattr(parameter, name).nbytes for name in names)
    return parameter.nbytes


def memory_of(
    layout: Layout, *, activations: float = 0.0, sampling_activations: float = 0.0, others: float = 0.0
) -> Memory:
    """Return the memory of one of N processes (arXiv:1910.02054, Table 1).

    With t = 4 bytes x trainable and f = frozen_width x frozen:

        mode     weights    master  gradients         moments  buffers
        single   t + f      0       t                 2t       0
        ddp      t + f      0       t                 2t       t
        zero1    t + f      t/N     t                 2t/N     bucket
        zero2    t + f      t/N     t/N               2t/N     bucket + a flat copy of its contents
        zero3    (t + f)/N  t/N     t/N               2t/N     bucket + a flat copy of its contents
        fsdp2    (t + f)/N  0       t (t/N without    2t/N     twice the gathered weights
                                    accumulation)

    The paper counts weights, gradients and moments; the rest follows DeepSpeed 0.19 and torch 2.13. ZeRO copies its
    shard even if weights are float32 already (stage_1_and_2.py, stage3.py: `_create_fp32_partitions`) and allocates the
    full bucket; DDP without gradient_as_bucket_view keeps each gradient twice; FSDP2 keeps unsharded gradients until
    the last microbatch is exchanged.
    """
    n, mode = layout.processes, layout.mode
    zero, is_sharded = mode in ("zero1", "zero2", "zero3"), mode in ("zero3", "fsdp2")
    t, f = float(FLOAT32 * layout.trainable), float(layout.frozen_width * layout.frozen)
    share = t / n if mode not in ("single", "ddp") else t
    device = 0.0 if layout.offload else 1.0
    width = (t + f) / max(layout.trainable + layout.frozen, 1)
    bucket = float(FLOAT32 * layout.bucket)
    flat_copy = FLOAT32 * min(layout.trainable, layout.bucket)
    gradients = {
        "zero2": share, "zero3": share * device, "fsdp2": t if layout.accumulates else share,
    }.get(mode, t)  # fmt: skip
    buffers = {
        "ddp": t, "zero1": bucket, "zero2": bucket + flat_copy, "zero3": bucket + flat_copy,
        "fsdp2": 2 * width * layout.block,
    }.get(mode, 0.0)  # fmt: skip
    gathered = {
        "zero3": width * min(layout.trainable + layout.frozen, LIVE), "fsdp2": width * layout.block,
    }.get(mode, 0.0)  # fmt: skip
    all_weights = t + f if layout.gather_for_sampling else gathered
    own = t / n if is_sharded else t
    return Memory(
        weights=(t + f) / n if is_sharded else t + f,
        master=share * device if zero else 0.0,
        gradients=gradients,
        moments=layout.num_moments * share * device,
        averages=own * layout.num_averages,
        replaced=own * min(layout.num_averages, 1),
        reference=FLOAT32 * (layout.trainable + layout.frozen) / (n if is_sharded else 1) * layout.reference,
        buffers=buffers,
        gathered=gathered,
        gathered_for_sampling=all_weights if is_sharded else 0.0,
        step=device * (3 if mode in ("zero1", "zero2") else 1 if mode == "zero3" else 2) * share,
        persistent_buffers={"ddp": t, "zero3": bucket + share * device}.get(mode, 0.0),
        others=others,
        activations=activations,
        sampling_activations=sampling_activations,
        host=4 * share if layout.offload else 0.0,
    )


def gathered_by_fsdp(network: nn.Module) -> int:
    """Return the number of elements gathered at once: those outside all blocks, a block in use, and the next block."""
    names = set(getattr(network, "_no_split_modules", None) or ())
    sizes = dict.fromkeys((m for m in network.modules() if type(m).__name__ in names), 0)
    outside = 0
    for name, parameter in network.named_parameters():
        path = name.split(".")[:-1]
        around = [network.get_submodule(".".join(path[:depth])) for depth in range(len(path), 0, -1)]
        block = next((module for module in around if module in sizes), None)
        if block is None:
            outside += parameter.numel()
        else:
            sizes[block] += parameter.numel()
    return outside + sum(sorted(sizes.values())[-2:])


def saved_bytes(network: nn.Module, forward: Callable[[], Any]) -> int:
    """Return the bytes that autograd saves in a forward pass, without weights and buffers.

    Each storage counts once; of checkpointed modules only the inputs count. If the network was built under
    FakeTensorMode and this runs under it, nothing is computed.
    """
    own = {tensor.untyped_storage()._cdata for tensor in _state(network)}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return sum(storage.nbytes() for storage in saved.values())


def peak_bytes(network: nn.Module, step: Callable[[], Any]) -> int:
    """Return the peak bytes of tensors alive at once in `step`, without weights, their gradients and buffers.

    Gradients are allocated first, as in a second microbatch. Temporary tensors of an eager run count, not memory inside
    of kernels. If the network was built under FakeTensorMode and this runs under it, nothing is computed.
    """
    for parameter in network.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    with _Alive(_state(network)) as alive:
        step()
    return alive.peak


def _state(network: nn.Module) -> list[Tensor]:
    parameters = list(network.parameters())
    return [*parameters, *network.buffers(), *(p.grad for p in parameters if p.grad is not None)]


class _Alive(TorchDispatchMode):
    """Context in which each new storage counts until it is freed."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, int] = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if (key := storage._cdata) in self._alive:
            return
        self._alive[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._alive.pop(key, 0)
