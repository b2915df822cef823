"""Rewards that any recipe climbs, and what a run folder says of the climb."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

REDNESS = "tests.runs:redness"
FLAT = "tests.runs:flat"


def redness(images: Tensor, prompts: list[str]) -> Tensor:
    return images[:, 0].mean(dim=(1, 2)) - images[:, 1:].mean(dim=(1, 2, 3))


def flat(images: Tensor, prompts: list[str]) -> Tensor:
    return images.new_full((len(images),), 0.1)


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in lines if row["kind"] == kind]


def lora_weights(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "lora" / "pytorch_lora_weights.safetensors")


def state(folder: Path, step: int = 3) -> tuple[dict[str, Tensor], Any]:
    """The content of a checkpoint: the tensors of the sharded files, and the rest."""
    import torch
    from safetensors.torch import load_file

    checkpoint = folder / "checkpoints" / f"step_{step:06d}"
    tensors: dict[str, Tensor] = {}
    for path in checkpoint.glob("weights-*"):
        tensors |= load_file(path)
    return tensors, torch.load(checkpoint / "extra.pt", weights_only=True)
