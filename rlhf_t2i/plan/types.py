"""What a dry run finds, and the launch that it plans for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

from torch import nn

from rlhf_t2i.distributed.memory import num_bytes
from rlhf_t2i.distributed.processes import Mode, uses_fsdp
from rlhf_t2i.plan.tracker import Counts

_LAUNCHER = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one step of a recipe needs on each process. Sizes are bytes."""

    recipe: str
    model: str
    module: str
    """Module of the diffusion model's family; empty for reward training."""
    mode: Mode
    processes: int
    parts: Mapping[str, tuple[int, int, int | float]]
    """Trained parameters, frozen parameters and bytes of each network."""
    state: Mapping[str, int | float]
    """What is held at all times, by its name."""
    peaks: Mapping[str, int | float]
    """Most bytes on the device in each phase of a step."""
    counts: Mapping[str, Counts]
    """FLOPs and bytes of each phase."""
    images: int
    """Images of a step, over all processes."""
    num_steps: int
    host: int | float
    """Bytes of the weights in main memory while they are loaded, and of what stays there."""
    left_out: tuple[str, ...]
    denoiser_calls: int | float = 0
    """Images that pass through the denoiser, on each process."""
    records: str = ""
    """What a step of reward training takes, in words."""
    assumed: tuple[str, ...] = ()
    """What is not known before a run, as it was taken."""

    @property
    def peak(self) -> int | float:
        return max(self.peaks.values())

    @property
    def flops(self) -> int | float:
        """Floating-point operations of one process in a step."""
        return sum(counts.flops for counts in self.counts.values())

    @property
    def bytes(self) -> int | float:
        return sum(counts.bytes for counts in self.counts.values())


def launched(environment: Mapping[str, str]) -> tuple[Mode, int]:
    """Return the distribution strategy and the number of processes that the launcher's variables configure."""
    processes = int(environment.get("WORLD_SIZE", "1"))
    if environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
        stages: dict[str, Mode] = {"1": "zero1", "2": "zero2", "3": "zero3"}
        return stages[environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")], processes
    if uses_fsdp(environment):
        return "fsdp2", processes
    return ("ddp" if processes > 1 else "single"), processes


@contextmanager
def without_launcher() -> Iterator[None]:
    """Context of a single process, whatever the launcher's variables configure; what it sets in them is undone."""
    with patch.dict(os.environ):
        for name in _LAUNCHER:
            os.environ.pop(name, None)
        yield


def bytes_of(module: nn.Module) -> int:
    """Return the bytes of a network's parameters and buffers."""
    return sum(num_bytes(tensor) for tensor in (*module.parameters(), *module.buffers()))


def bytes_saved(quantization: str, network: nn.Module) -> int | float:
    """Return the bytes that int8 or nf4 saves of a network's frozen linear layers in half precision."""
    layers = [m.weight for m in network.modules() if type(m) is nn.Linear and not m.weight.requires_grad]
    linear, rows = sum(w.numel() for w in layers), sum(len(w) for w in layers)
    kept = linear + 3 * rows if quantization == "int8" else linear * (1 / 2 + 4 / 64)
    return sum(w.nbytes for w in layers) - kept
