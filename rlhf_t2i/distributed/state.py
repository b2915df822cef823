"""Weights and optimiser state on disk: full tensors by name, which any strategy and number of processes can load."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlhf_t2i.distributed.types import Engine

Copies = Mapping[str, MutableMapping[str, Tensor]]
"""Further values of the trained weights, such as averages: this process's shards, by name of the copy and weight."""
WEIGHT = "weight"


def write_state(engine: Engine, copies: Copies, folder: Path, *, rank: int, num_processes: int) -> None:
    """Write this process's share of the weights, of the optimiser's state and of the copies. Collective.

    Weights are gathered one at a time and each is written by one process, so that none holds more than its share. Keys
    are `weight/NAME`, `COPY/NAME` and, for Adam, `exp_avg/NAME`, `exp_avg_sq/NAME` and `step/NAME`. Raises OSError and
    SafetensorError.
    """
    share: dict[str, Tensor] = {}
    for index, (name, shard) in enumerate(engine.weights.items()):
        found = {WEIGHT: engine.gather_weight(name, shard), **engine.optimizer_state(name)}
        found |= {copy: engine.gather_weight(name, shards[name]) for copy, shards in copies.items() if name in shards}
        if index % num_processes == rank:
            share |= {f"{key}/{name}": _on_host(tensor) for key, tensor in found.items()}
    save_file(share, folder / f"weights-{rank + 1:05d}-of-{num_processes:05d}.safetensors")


def read_state(engine: Engine, copies: Copies, folder: Path) -> None:
    """Load what `write_state` wrote, on any number of processes. Collective.

    Raises ValueError if the trained weights have other names.
    """
    with ExitStack() as stack:
        files = [
            stack.enter_context(safe_open(path, framework="pt"))
            for path in sorted(folder.glob("weights-*.safetensors"))
        ]
        file_of = {key: file for file in files for key in file.keys()}  # noqa: SIM118  # not a dict
        stored: dict[str, list[str]] = {}
        for key in file_of:
            kind, _, name = key.partition("/")
            stored.setdefault(name, []).append(kind)
        if stored.keys() != engine.weights.keys():
            raise ValueError(f"The checkpoint {folder} is of another model: its trained weights have other names.")
        for name in engine.weights:
            found = {kind: file_of[f"{kind}/{name}"].get_tensor(f"{kind}/{name}") for kind in stored[name]}
            engine.load(name, found.pop(WEIGHT), {k: v for k, v in found.items() if k not in copies})
            for copy, shards in copies.items():
                if copy in found:
                    shards[name] = engine.shard_of(name, found[copy]).to(engine.weights[name].device, copy=True)


def gather_weights(engine: Engine, *, keep: bool) -> dict[str, Tensor]:
    """Return the full trained weights in main memory, or nothing on processes that do not `keep` them. Collective."""
    weights: dict[str, Tensor] = {}
    for name, shard in engine.weights.items():
        weight = engine.gather_weight(name, shard)
        if keep:
            weights[name] = _on_host(weight)
    return weights


def _on_host(tensor: Tensor) -> Tensor:
    """Return a copy in main memory, in the plain layout, which alone a file can hold."""
    return tensor.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)


def stored_weights(folder: Path) -> dict[str, Tensor]:
    """Return the full trained weights of a checkpoint; empty if the folder is not a checkpoint."""
    weights: dict[str, Tensor] = {}
    for path in sorted(folder.glob("weights-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = [key for key in file.keys() if key.startswith(f"{WEIGHT}/")]  # noqa: SIM118
            weights |= {key.removeprefix(f"{WEIGHT}/"): file.get_tensor(key) for key in names}
    return weights
