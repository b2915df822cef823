"""Rewards for any recipe, and the contents of its run folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

REDNESS = "tests.runs:redness"
REDNESS_OF_ROWS = "tests.runs:RednessOfRows()"
FLAT = "tests.runs:flat"


def as_for_toy_models(**options: Any) -> dict[str, Any]:
    """Options of a recipe that trains, with the defaults that only models of the toy world have."""
    return {
        "prompts": "shapes", "evaluation_prompts": "shapes", "lora_rank": None, "guidance_scale": 1.0,
        "num_evaluation_steps": None, "microbatch_size": 64, "gradient_checkpointing": False, **options,
    }  # fmt: skip


def redness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """How red images are: any model learns it within a few steps."""
    return images[:, 0].mean(dim=(1, 2)) - images[:, 1:].mean(dim=(1, 2, 3))


def channel(images: Tensor, prompts: Sequence[str], *, index: int, scale: float = 1.0) -> Tensor:
    """The mean of one colour channel."""
    return scale * images[:, index].mean(dim=(1, 2))


class RednessOfRows:
    """`redness`, of prompts whose rows have reached the reward: each has its prompt in capitals as `text`."""

    required_fields = ("text",)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: list[dict[str, Any]]) -> Tensor:
        assert [row["text"] for row in metadata] == [prompt.upper() for prompt in prompts]
        return redness(images, prompts)


def write_rows(path: Path, prompts: Sequence[str]) -> Path:
    """Write a .jsonl file of prompts that `RednessOfRows` can score."""
    path.write_text("".join(json.dumps({"prompt": prompt, "text": prompt.upper()}) + "\n" for prompt in prompts))
    return path


def flat(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The same reward for every image."""
    return images.new_full((len(images),), 0.1)


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl of one kind, "train" or "evaluation"."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in lines if row["kind"] == kind]


def lora_weights(folder: Path) -> dict[str, Tensor]:
    """The exported LoRA."""
    return load_file(folder / "lora" / "pytorch_lora_weights.safetensors")


def unet_weights(folder: Path) -> dict[str, Tensor]:
    """The exported U-Net."""
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def weights(folder: Path, step: int = 3) -> dict[str, Tensor]:
    """The trained weights in a checkpoint."""
    from rlhf_t2i.distributed.state import stored_weights

    return stored_weights(folder / "checkpoints" / f"step_{step:06d}")


def state(folder: Path, step: int = 3) -> tuple[dict[str, Tensor], Any]:
    """The content of a checkpoint: the tensors of the sharded files, and the rest."""
    checkpoint = folder / "checkpoints" / f"step_{step:06d}"
    tensors: dict[str, Tensor] = {}
    for path in checkpoint.glob("weights-*"):
        tensors |= load_file(path)
    return tensors, torch.load(checkpoint / "extra.pt", weights_only=True)


def assert_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor], *, atol: float = 0.0) -> None:
    """Assert that tensors have the same names and values."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert_close(tensor, other[name], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def sampled_by_diffusers(model: str, weights: Sequence[Path], prompts: Sequence[str], folder: Path) -> list[Tensor]:
    """Images of the prompts from each of the exported weights, by a script that imports diffusers only."""
    output, lines = folder / "images.pt", folder / "sampled_prompts.txt"
    lines.write_text("\n".join(prompts))
    script = str(Path(__file__).parent / "plain_diffusers.py")
    command = [sys.executable, script, model, str(output), str(lines), *map(str, weights)]
    subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": ""}, check=True, capture_output=True)
    return torch.load(output, weights_only=True)
