"""What a run says at its start: who holds what, and how much memory that takes."""

from __future__ import annotations

from typing import Any

from torch import nn

from rlhf_t2i.distributed.memory import Learning, Memory, gathered_by_fsdp, memory_of
from rlhf_t2i.distributed.processes import Mode

_NAMES = {
    "single": "one process", "ddp": "DDP", "zero1": "DeepSpeed ZeRO-1", "zero2": "DeepSpeed ZeRO-2",
    "zero3": "DeepSpeed ZeRO-3", "fsdp2": "FSDP2",
}  # fmt: skip


def learning_of(
    network: nn.Module, mode: Mode, *, processes: int, num_averages: int = 0, reference: bool = False
) -> Learning:
    """How a network, before it is spread, will be held."""
    frozen = [p for p in network.parameters() if not p.requires_grad]
    trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return Learning(
        mode=mode,
        processes=processes,
        trainable=trainable,
        frozen=sum(p.numel() for p in frozen),
        frozen_width=max((p.element_size() for p in frozen), default=4),
        block=gathered_by_fsdp(network) if mode == "fsdp2" else 0,
        num_averages=num_averages,
        reference=reference,
    )


def placement_config(learning: Learning, *, precision: str, microbatch_size: int) -> dict[str, Any]:
    """For run.json; bytes are of one process, computed."""
    memory = memory_of(learning)
    return {
        "mode": learning.mode,
        "processes": learning.processes,
        "mixed_precision": precision,
        "microbatch_size": microbatch_size,
        "trainable_parameters": learning.trainable,
        "frozen_parameters": learning.frozen,
        "bytes_per_process": {name: round(value) for name, value in _parts(memory).items()},
    }


def placement_table(learning: Learning, *, precision: str, microbatch_size: int) -> str:
    """A few lines for people. Activations, judges, text encoder and autoencoder come on top."""
    n, parts = learning.processes, _parts(memory_of(learning))
    listed = ", ".join(f"{name} {_size(value)}" for name, value in parts.items() if value)
    total = learning.trainable + learning.frozen
    return "\n".join(
        [
            f"spread      {_NAMES[learning.mode]}" + (f" over {n} processes" if n > 1 else ""),
            f"precision   {precision if precision != 'no' else 'float32'}; what learns is float32",
            f"microbatch  {microbatch_size} x {n} = {microbatch_size * n} images in one pass",
            f"learns      {learning.trainable:,} of the denoiser's {total:,} parameters",
            f"memory      {_size(sum(parts.values()))} on each process, before activations and judges",
            f"            {listed}",
        ]
    )


def _parts(memory: Memory) -> dict[str, float]:
    return {
        "weights": memory.weights + memory.master,
        "averages": memory.averages,
        "reference": memory.reference,
        "gradients": memory.gradients,
        "optimizer": memory.moments,
        "buffers": memory.buffers,
        "gathered": max(memory.gathered, memory.gathered_for_sampling),
    }


def _size(number: float) -> str:
    """12.3 GB, in powers of ten."""
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"
