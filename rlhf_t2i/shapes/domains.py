"""Domains: the same image in another rendering, to test whether a reward model carries over without new labels."""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Domain = Literal["flat", "outlined", "textured", "photo", "rotated"]
DOMAINS: tuple[Domain, ...] = get_args(Domain)
"""flat       unchanged
outlined   dark lines along every edge
textured   stripes of random direction and period over everything
photo      blurred, with a vignette, another exposure and noise
rotated    all hues turned by 15 to 25 degrees, to one side or the other
"""

Images = Float[Tensor, "B 3 Y X"]


def restyle(images: Images, domain: Domain, *, rng: np.random.Generator) -> Images:
    """Return the images, with RGB in [0, 1], in a domain."""
    match domain:
        case "flat":
            return images
        case "outlined":
            padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
            contrast = (F.max_pool2d(padded, 3, stride=1) + F.max_pool2d(-padded, 3, stride=1)).amax(1, keepdim=True)
            return images * (1 - 0.85 * (contrast > 0.3).float())
        case "textured":
            return (images * (1 + 0.25 * _stripes(len(images), images.shape[-1], rng))).clamp(0, 1)
        case "photo":
            return _photographed(images, rng)
        case "rotated":
            return _with_turned_hues(images, rng)


def _numbers(low: float, high: float, count: int, rng: np.random.Generator) -> Tensor:
    """Return random numbers (count, 1, 1, 1)."""
    return torch.from_numpy(rng.uniform(low, high, (count, 1, 1, 1)).astype(np.float32))


def _stripes(count: int, size: int, rng: np.random.Generator) -> Float[Tensor, "B 1 Y X"]:
    """Return sine waves in [-1, 1] of random direction, period (3 to 6 pixels) and phase."""
    grid = torch.arange(size, dtype=torch.float32)
    angle, period, phase = (_numbers(*ends, count, rng) for ends in ((0.0, math.pi), (3.0, 6.0), (0.0, 2 * math.pi)))
    along = grid[None, :] * angle.cos() + grid[:, None] * angle.sin()
    return torch.sin(2 * math.pi * along / period + phase)


def _photographed(images: Images, rng: np.random.Generator) -> Images:
    count, size = len(images), images.shape[-1]
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    mixed = images + _numbers(0.5, 1.0, count, rng) * (blurred - images)
    grid = torch.linspace(-1, 1, size)
    vignette = 1 - _numbers(0.1, 0.4, count, rng) * (grid[None, :] ** 2 + grid[:, None] ** 2) / 2
    noise = torch.from_numpy(rng.normal(size=images.shape).astype(np.float32))
    exposure = _numbers(0.8, 1.15, count, rng)
    return (mixed * vignette * exposure + _numbers(0.02, 0.07, count, rng) * noise).clamp(0, 1)


def _with_turned_hues(images: Images, rng: np.random.Generator) -> Images:
    """Rotate RGB around the gray axis (Rodrigues' formula with the axis (1, 1, 1) / sqrt(3))."""
    angle = _numbers(15.0, 25.0, len(images), rng) * torch.from_numpy(rng.choice([-1.0, 1.0], (len(images), 1, 1, 1)))
    angle = angle.float() * math.pi / 180
    along_axis = images.mean(1, keepdim=True)
    cross = (images.roll(1, 1) - images.roll(-1, 1)) / math.sqrt(3)  # axis x image
    turned = images * angle.cos() + cross * angle.sin() + along_axis * (1 - angle.cos())
    return turned.clamp(0, 1)
