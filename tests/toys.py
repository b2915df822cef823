"""A diffusion model whose distributions are known in closed form: an image is one number with a normal distribution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_t2i.diffusion.gaussian import randn
from rlhf_t2i.types import Conditioning, Level, Prediction, Sampler, Schedule

CPU = torch.device("cpu")
SCALE = 1000.0
"""Latents of up to a few hundred become images in [0, 1]."""


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


class GaussianModel:
    """The exact predictor for clean ~ Normal(mean, std^2), for which E[clean | x] is linear in x."""

    def __init__(self, *, mean: float = 0.5, std: float = 0.8) -> None:
        self.mean, self.std = mean, std
        self.rows: list[int] = []
        """Number of images of each forward pass."""

    def schedule(self, num_steps: int) -> Schedule:
        sigma = torch.linspace(0.995, 0.0, num_steps + 1, dtype=torch.float64)
        return Schedule((1 - sigma**2).sqrt().float(), sigma.float(), torch.arange(num_steps + 1).float())

    def initial_noise(self, generators: Sequence[torch.Generator], *, copies: int) -> Tensor:
        return randn((len(generators) * copies, 1, 1, 1), generators=generators, device=CPU)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning(torch.zeros(len(prompts), 1, 1))

    def predict(
        self, latents: Tensor, level: Level, conditioning: Conditioning, *, guidance_scale: float
    ) -> Prediction:
        self.rows.append(len(latents))
        alpha, sigma = (value[:, None, None, None] for value in (level.alpha, level.sigma))
        total = alpha**2 * self.std**2 + sigma**2
        clean = (self.mean * sigma**2 + self.std**2 * alpha * latents) / total
        return Prediction(clean, (latents - alpha * clean) / sigma)

    def num_calls(self, guidance_scale: float) -> int:
        return 2 if guidance_scale > 1 else 1

    def decode(self, latents: Tensor) -> Tensor:
        return (latents / SCALE + 0.5).expand(-1, 3, 1, 1)

    def distribution(self, sampler: Sampler) -> tuple[float, float]:
        """Return mean and variance of a sampler's images: every step is linear, so both can be propagated exactly."""
        mean, variance = 0.0, 1.0
        for step in range(sampler.schedule.num_steps):
            at = torch.tensor([step, step])
            level, next_level = sampler.schedule.at(at), sampler.schedule.at(at + 1)
            x = torch.tensor([0.0, 1.0])[:, None, None, None]
            prediction = self.predict(x, level, self.encode(["", ""]), guidance_scale=1)
            transition = sampler.dynamics(x, prediction, level, next_level)
            intercept, at_one = transition.mean.flatten().double().tolist()
            slope = at_one - intercept
            mean, variance = slope * mean + intercept, slope**2 * variance + float(transition.std[0]) ** 2
        return mean, variance


def number(images: Tensor) -> Tensor:
    """Return the number that each image stands for."""
    return (images.mean(dim=(1, 2, 3)) - 0.5) * SCALE
