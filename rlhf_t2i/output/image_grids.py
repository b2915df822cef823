"""Image grids: many images of one size in one PNG, with a file of captions beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from rlhf_t2i.output.files import write_atomically

NUM_COLUMNS = 8
"""Images in each row of a grid."""


def save_image_grid(path: Path, images: Float[Tensor, "B 3 Y X"], *, num_columns: int = NUM_COLUMNS) -> None:
    """Write images in [0, 1] as one PNG, row by row; empty cells of the last row are white."""
    count, channels, height, width = images.shape
    num_rows = -(-count // num_columns)
    grid = torch.ones(num_rows * num_columns, channels, height, width)
    grid[:count] = images.clamp(0, 1).cpu()
    grid = grid.unflatten(0, (num_rows, num_columns)).permute(0, 3, 1, 4, 2)
    pixels = (grid.reshape(num_rows * height, num_columns * width, channels) * 255).round()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.numpy().astype(np.uint8)).save(path)


def save_captions(path: Path, prompts: Sequence[str], seeds: Sequence[int]) -> None:
    """Write the prompt and seed of each cell of the grids beside it, and the number of columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    captions = {"prompts": list(prompts), "seeds": list(seeds), "columns": NUM_COLUMNS}
    write_atomically(path, json.dumps(captions, indent=1))
