"""Measure the accuracy of the oracle under noise and blur, and its speed: `python benchmarks/oracle.py`."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_t2i.shapes.oracle import oracle_scores
from rlhf_t2i.shapes.scenes import all_scenes, render

NUM_IMAGES = 1_000


def noisy(std: float) -> Callable[[Tensor], Tensor]:
    """Return a function that adds Gaussian noise of this standard deviation and clamps to [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    return lambda images: (images + std * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def blurred(sigma: float) -> Callable[[Tensor], Tensor]:
    """Return a function that applies a Gaussian blur of `sigma` pixels."""
    radius = int(4 * sigma) + 1
    kernel = torch.exp(-(torch.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1).expand(3, 1, 1, -1)

    def blur(images: Tensor) -> Tensor:
        padded = F.pad(images, (radius,) * 4, mode="replicate")
        return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)

    return blur


def main() -> None:
    """Print a table of pass rate / mean graded score, and the speed."""
    torch.set_num_threads(1)
    distortions: dict[str, Callable[[Tensor], Tensor]] = {
        "clean": lambda images: images,
        **{f"noise {std}": noisy(std) for std in (0.05, 0.1, 0.2)},
        **{f"blur {sigma}": blurred(sigma) for sigma in (0.7, 0.9, 1.2)},
    }
    lines = ["| | " + " | ".join(distortions) + " |", "|---" * (len(distortions) + 1) + "|"]
    seconds, scored = 0.0, 0
    for tier in ("one", "count", "relation"):
        rng = np.random.default_rng(0)
        every = all_scenes(tier)
        scenes = [every[i] for i in rng.integers(len(every), size=NUM_IMAGES)]
        images, prompts = render(scenes, rng=rng), [scene.prompt for scene in scenes]
        cells: list[str] = []
        for distort in distortions.values():
            start = time.perf_counter()
            scores = oracle_scores(distort(images), prompts)
            seconds, scored = seconds + time.perf_counter() - start, scored + NUM_IMAGES
            cells.append(f"{scores.passed.float().mean():.3f} / {scores.graded.mean():.3f}")
        lines.append(f"| {tier} | " + " | ".join(cells) + " |")
    lines.append(f"\n{scored / seconds:.0f} images/s on one core")
    print("\n".join(lines))  # noqa: T201


if __name__ == "__main__":
    main()
