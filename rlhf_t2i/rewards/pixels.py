"""Images in 8 bits, as rewards that are not networks of torch take them."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor


def to_uint8(images: Float[Tensor, "*B 3 Y X"]) -> UInt8[np.ndarray, "*B Y X 3"]:
    """Return images with pixels in [0, 1] rounded to 8 bits, as in a file; values outside are clamped."""
    pixels = (images.detach().float().clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    return np.ascontiguousarray(pixels.movedim(-3, -1).numpy())


def to_pil(image: Float[Tensor, "3 Y X"]) -> Image.Image:
    """Convert an image with pixels in [0, 1] to PIL, rounded to 8 bits; values outside are clamped."""
    return Image.fromarray(to_uint8(image))
