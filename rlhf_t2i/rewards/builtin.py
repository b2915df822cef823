"""Rewards that need no model: the oracle of the built-in world, and the size of an image as JPEG."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from rlhf_t2i.shapes import oracle


def oracle_graded(images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> Float[Tensor, " B"]:
    """The oracle's graded score in [0, 1]; ValueError for a prompt outside the built-in world."""
    return oracle.judge(images, prompts).graded


def oracle_pass(images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> Float[Tensor, " B"]:
    """1 where the oracle finds every condition of the prompt fulfilled, else 0."""
    return oracle.judge(images, prompts).passed.float()


def jpeg_compressibility(images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> Float[Tensor, " B"]:
    """Minus the size in kilobytes as JPEG of quality 95 (DDPO, arXiv:2305.13301, section 5): plain images win."""
    del prompts
    return torch.tensor([-_jpeg_bytes(image) / 1000 for image in images])


def jpeg_incompressibility(images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> Float[Tensor, " B"]:
    """The size in kilobytes as JPEG of quality 95: busy images win."""
    return -jpeg_compressibility(images, prompts)


def _jpeg_bytes(image: Float[Tensor, "3 Y X"]) -> int:
    pixels = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).cpu().numpy())).save(buffer, format="JPEG", quality=95)
    return buffer.tell()
