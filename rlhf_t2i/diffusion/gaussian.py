"""Samples, log-probabilities and KL divergences of Gaussian transitions, in float32."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.types import Transition


def per_image(values: Float[Tensor, " B"]) -> Float[Tensor, "B 1 1 1"]:
    """Reshape one number per image so that it broadcasts over latents."""
    return values[:, None, None, None]


def randn(shape: Sequence[int], *, generators: Sequence[torch.Generator], device: torch.device) -> Float[Tensor, ...]:
    """Draw standard normal numbers of `shape`; each generator fills an equal share of the first dimension.

    They are drawn on the CPU, so that a seed gives the same image on every device and with any number of processes.
    Raises ValueError if the number of images is not a multiple of the number of generators.
    """
    if shape[0] % len(generators):
        raise ValueError(f"{len(generators)} generators cannot share {shape[0]} images equally.")
    noise = torch.empty(*shape)
    for share, generator in zip(noise.chunk(len(generators)), generators, strict=True):
        share.normal_(generator=generator)
    return noise.to(device)


def sample(transition: Transition, *, generators: Sequence[torch.Generator]) -> Float[Tensor, "B C H W"]:
    """Draw the next latents; each generator serves an equal share of the batch."""
    mean = transition.mean
    noise = randn(mean.shape, generators=generators, device=mean.device)
    return mean + per_image(transition.std) * noise


def mean_log_prob(transition: Transition, latents: Float[Tensor, "B C H W"]) -> Float[Tensor, " B"]:
    """Return the log-probability density of `latents`, averaged over latent dimensions.

        log N(x; mean, std^2) = -(x - mean)^2 / (2 std^2) - log(std) - log(2 pi) / 2

    A mean, not a sum: the clip range of DDPO (arXiv:2305.13301) depends on it. A deterministic step (std = 0) has no
    density and gets 0. `latents` get no gradient.
    """
    random = transition.std > 0
    std = per_image(torch.where(random, transition.std, 1.0))
    error = (latents.detach().float() - transition.mean.float()) / std
    log_density = -0.5 * error**2 - std.log() - 0.5 * math.log(2 * math.pi)
    return torch.where(random, log_density.mean(dim=(1, 2, 3)), 0.0)


def normalised_log_ratio(
    log_ratio: Float[Tensor, " B"], transition: Transition, old_mean: Float[Tensor, "B C H W"]
) -> Float[Tensor, " B"]:
    """Return a log-ratio without its bias and on one scale for all steps (GRPO-Guard, arXiv:2510.22319, Eq. 8).

        std * (log_ratio + (mean - old_mean)^2 / (2 std^2))      the square averaged over latent dimensions

    For samples of the old policy, the expectation of log_ratio falls as the mean moves, and falls more for steps with
    less noise: ratios then leave the clip range below and hardly above. With x = old_mean + std noise the result is the
    average of (mean - old_mean) * noise, whose expectation is zero. `log_ratio` is a difference of `mean_log_prob`s;
    deterministic steps get 0.
    """
    random = transition.std > 0
    moved = (transition.mean.float() - old_mean.float()).square().mean(dim=(1, 2, 3))
    bias = moved / (2 * torch.where(random, transition.std, 1.0) ** 2)
    return torch.where(random, transition.std * (log_ratio + bias), 0.0)


def unscaled_log_ratio(log_ratio: Float[Tensor, " B"], transition: Transition) -> Float[Tensor, " B"]:
    """Return a log-ratio of two steps with equal std as the published code of CPS (arXiv:2509.05952) has it.

        2 std^2 log_ratio = (x - old_mean)^2 - (x - mean)^2      the squares averaged over latent dimensions

    Its log-probability is -(x - mean)^2, without the density's division by 2 std^2, so that a step counts the less the
    less noise it has. `log_ratio` is a difference of `mean_log_prob`s.
    """
    return 2 * transition.std**2 * log_ratio


def mean_kl(policy: Transition, reference: Transition) -> Float[Tensor, " B"]:
    """Return KL(policy || reference) of two steps with equal std, averaged over latent dimensions.

    (mean - mean_ref)^2 / (2 std^2)

    The std is that of the step, every factor included. Deterministic steps get 0.
    """
    random = policy.std > 0
    std = per_image(torch.where(random, policy.std, 1.0))
    gap = (policy.mean.float() - reference.mean.float()) / std
    return torch.where(random, 0.5 * (gap**2).mean(dim=(1, 2, 3)), 0.0)
