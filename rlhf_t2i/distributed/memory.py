"""How many bytes each process needs for what learns: on paper, from numbers alone."""

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
"""Elements of DeepSpeed's `reduce_bucket_size`, which it allocates whole, however few parameters learn."""
LIVE = 1_000_000_000
"""Elements that ZeRO-3 may keep gathered (`stage3_max_live_parameters`, `stage3_max_reuse_distance`)."""


@dataclass(frozen=True, kw_only=True)
class Learning:
    """A network that learns, and how it is spread. Counts are elements of the whole network."""

    mode: Mode
    processes: int
    trainable: int
    """Parameters that learn. They, their gradients and what AdamW remembers are float32."""
    frozen: int = 0
    """The other parameters of the same network, such as those under adapters."""
    frozen_width: int = FLOAT32
    """Bytes of each of these."""
    block: int = 0
    """Elements that FSDP2 holds gathered at once: `gathered_by_fsdp`."""
    offload: bool = False
    """ZeRO-3 with float32 weights, gradients and moments in main memory (deepspeed_zero3_offload.yaml)."""
    num_averages: int = 0
    """Moving averages of what learns."""
    reference: bool = False
    """A frozen copy of the whole network in float32."""
    accumulates: bool = True
    """Several microbatches make one optimiser step."""
    gather_for_sampling: bool = True
    bucket: int = BUCKET
    """DeepSpeed's reduce_bucket_size, in elements."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on the device of one process."""

    weights: float
    master: float
    """DeepSpeed's own float32 copy of this process's part: also of weights that are float32."""
    gradients: float
    moments: float
    averages: float
    set_aside: float
    """The trained weights, while an average paints in their place."""
    reference: float
    buffers: float
    """To exchange gradients: DDP's second copy of them, DeepSpeed's bucket and its flat copy, FSDP2's blocks."""
    gathered: float
    """Weights of other processes, in a forward or backward pass."""
    gathered_for_sampling: float
    step: float
    """Beside gradients, in the optimiser's step: the square root of the second moment, and ZeRO's flat gradients."""
    persistent_buffers: float
    """What of gradients and buffers is never given back (DDP, ZeRO-3)."""
    others: float = 0.0
    """Judges, text encoders and the autoencoder."""
    activations: float = 0.0
    sampling_activations: float = 0.0
    host: float = 0.0
    """In main memory, offloaded."""

    @property
    def standing(self) -> float:
        """What is there at all times, from the first optimiser step on."""
        state = self.weights + self.master + self.moments + self.averages + self.reference
        return state + self.persistent_buffers + self.others

    @property
    def painting(self) -> float:
        """While painting."""
        return self.standing + self.gathered_for_sampling + self.sampling_activations + self.set_aside

    @property
    def updating(self) -> float:
        """In the backward pass of the second microbatch, when gradients are there already."""
        exchanged = self.gradients + self.buffers - self.persistent_buffers
        return self.standing + exchanged + self.gathered + self.activations

    @property
    def stepping(self) -> float:
        """In the optimiser's step."""
        return self.standing + self.step

    @property
    def peak(self) -> float:
        """The most of all phases."""
        return max(self.painting, self.updating, self.stepping)


def memory_of(
    learning: Learning, *, activations: float = 0.0, sampling_activations: float = 0.0, others: float = 0.0
) -> Memory:
    """Memory of one of N processes, with t = 4 bytes x trainable and f = width x frozen (arXiv:1910.02054, Table 1).

        mode     weights    master  gradients         moments  buffers
        single   t + f      0       t                 2t       0
        ddp      t + f      0       t                 2t       t
        zero1    t + f      t/N     t                 2t/N     bucket
        zero2    t + f      t/N     t/N               2t/N     bucket + what is in it once more
        zero3    (t + f)/N  t/N     t/N               2t/N     bucket + what is in it once more
        fsdp2    (t + f)/N  0       t (t/N without    2t/N     twice what is gathered
                                    accumulation)

    The paper counts weights, gradients and moments; the rest is how DeepSpeed 0.19 and torch 2.13 go about it: ZeRO
    copies its part even where weights are float32 already (stage_1_and_2.py, stage3.py: `_create_fp32_partitions`),
    and allocates its bucket whole; DDP without gradient_as_bucket_view keeps each gradient twice; FSDP2 keeps whole
    gradients until the last microbatch is exchanged.
    """
    n, mode = learning.processes, learning.mode
    zero, is_sharded = mode in ("zero1", "zero2", "zero3"), mode in ("zero3", "fsdp2")
    t, f = float(FLOAT32 * learning.trainable), float(learning.frozen_width * learning.frozen)
    share = t / n if mode not in ("single", "ddp") else t
    device = 0.0 if learning.offload else 1.0
    width = (t + f) / max(learning.trainable + learning.frozen, 1)
    bucket = float(FLOAT32 * learning.bucket)
    flat_copy = FLOAT32 * min(learning.trainable, learning.bucket)
    gradients = {
        "zero2": share, "zero3": share * device, "fsdp2": t if learning.accumulates else share,
    }.get(mode, t)  # fmt: skip
    buffers = {
        "ddp": t, "zero1": bucket, "zero2": bucket + flat_copy, "zero3": bucket + flat_copy,
        "fsdp2": 2 * width * learning.block,
    }.get(mode, 0.0)  # fmt: skip
    gathered = {
        "zero3": width * min(learning.trainable + learning.frozen, LIVE), "fsdp2": width * learning.block,
    }.get(mode, 0.0)  # fmt: skip
    whole = t + f if learning.gather_for_sampling else gathered
    own = t / n if is_sharded else t
    return Memory(
        weights=(t + f) / n if is_sharded else t + f,
        master=share * device if zero else 0.0,
        gradients=gradients,
        moments=2 * share * device,
        averages=own * learning.num_averages,
        set_aside=own * min(learning.num_averages, 1),
        reference=FLOAT32 * (learning.trainable + learning.frozen) / (n if is_sharded else 1) * learning.reference,
        buffers=buffers,
        gathered=gathered,
        gathered_for_sampling=whole if is_sharded else 0.0,
        step=device * (3 if mode in ("zero1", "zero2") else 1 if mode == "zero3" else 2) * share,
        persistent_buffers={"ddp": t, "zero3": bucket + share * device}.get(mode, 0.0),
        others=others,
        activations=activations,
        sampling_activations=sampling_activations,
        host=4 * share if learning.offload else 0.0,
    )


def gathered_by_fsdp(network: nn.Module) -> int:
    """Elements that FSDP2 has gathered at once: those outside all blocks, a block in use, and the next one."""
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
    """Bytes that autograd keeps of a forward pass until the backward pass, beside weights and buffers.

    Each storage counts once. Under FakeTensorMode, where the network was built too, nothing is computed. Of what is
    checkpointed, only the inputs count.
    """
    own = {tensor.untyped_storage()._cdata for tensor in _state(network)}
    kept: dict[int, torch.UntypedStorage] = {}

    def look(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
        result = forward()
    del result
    return sum(storage.nbytes() for storage in kept.values())


def peak_bytes(network: nn.Module, step: Callable[[], Any]) -> int:
    """The most bytes of tensors that are alive at once in `step`, beside weights, their gradients and buffers.

    Gradients are made first, as in the second microbatch. Under FakeTensorMode, where the network was built too,
    nothing is computed: temporary tensors count as an eager run makes them, not what a kernel uses inside.
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
    """Within it, each new storage counts until it is let go of."""

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
