"""Summary of what each process holds and of its memory, printed and recorded when a run starts."""

from __future__ import annotations

from typing import Any

from torch import nn

from reward_model.quantization import num_elements
from rlhf_t2i.distributed.memory import Layout, Memory, gathered_by_fsdp, memory_of, num_bytes
from rlhf_t2i.distributed.processes import Mode

_NAMES = {
    "single": "one process", "ddp": "DDP", "zero1": "DeepSpeed ZeRO-1", "zero2": "DeepSpeed ZeRO-2",
    "zero3": "DeepSpeed ZeRO-3", "fsdp2": "FSDP2",
}  # fmt: skip


def layout_of(
    network: nn.Module,
    mode: Mode,
    *,
    processes: int,
    num_averages: int = 0,
    reference: bool = False,
    num_moments: int | float = 2,
) -> Layout:
    """Return how a network that is not yet distributed will be held."""
    frozen = [p for p in network.parameters() if not p.requires_grad]
    num_frozen = sum(map(num_elements, frozen))
    trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return Layout(
        mode=mode,
        processes=processes,
        trainable=trainable,
        frozen=num_frozen,
        frozen_width=sum(map(num_bytes, frozen)) / num_frozen if frozen else 4,
        block=gathered_by_fsdp(network) if mode == "fsdp2" else 0,
        num_averages=num_averages,
        reference=reference,
        num_moments=num_moments,
    )


def placement_config(layout: Layout, *, precision: str, microbatch_size: int) -> dict[str, Any]:
    """Return the summary for run.json; bytes are computed, for one process."""
    memory = memory_of(layout)
    return {
        "mode": layout.mode,
        "processes": layout.processes,
        "mixed_precision": precision,
        "microbatch_size": microbatch_size,
        "trainable_parameters": layout.trainable,
        "frozen_parameters": layout.frozen,
        "bytes_per_process": {name: round(value) for name, value in _parts(memory).items()},
    }


def placement_table(layout: Layout, *, precision: str, microbatch_size: int) -> str:
    """Return the summary as text. Activations, reward models, text encoders and autoencoder are not included."""
    n, parts = layout.processes, _parts(memory_of(layout))
    listed = ", ".join(f"{name} {_size(value)}" for name, value in parts.items() if value)
    total = layout.trainable + layout.frozen
    return "\n".join(
        [
            f"strategy    {_NAMES[layout.mode]}" + (f" over {n} processes" if n > 1 else ""),
            f"precision   {precision if precision != 'no' else 'float32'}; trained weights are float32",
            f"microbatch  {microbatch_size} x {n} = {microbatch_size * n} images in one forward pass",
            f"trained     {layout.trainable:,} of the denoiser's {total:,} parameters",
            f"memory      {_size(sum(parts.values()))} on each process, without activations and reward models",
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
    """Format bytes as in "12.3 GB", in powers of ten."""
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"
