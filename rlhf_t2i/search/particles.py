"""Particle weights, potentials and resampling of Feynman-Kac steering, in log space.

FK steering (arXiv:2501.06848) samples from p(image) * exp(strength * reward(image)). During sampling each particle is
weighted by potentials, which estimate its final reward. Their product over a path must be exp(strength * reward): the
last potential corrects the earlier estimates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

PotentialName = Literal["difference", "max", "sum"]


@dataclass(frozen=True, slots=True)
class Particles:
    """The weights of K particles for each of P prompts, in float64."""

    log_weights: Float[Tensor, "P K"]
    """Log-weight since the last resampling; -inf after a reward that was not finite."""
    log_product: Float[Tensor, "P K"]
    """Log of the product of all potentials along the path, across resamplings."""
    path_reward: Float[Tensor, "P K"]
    """Statistic of the rewards along the path that the potential needs: the last, the highest, or the sum."""


def new_particles(
    num_prompts: int, num_particles: int, *, potential: PotentialName, initial_max: float = -math.inf
) -> Particles:
    """Return particles with equal weights, before any reward.

    `initial_max` is what the potential "max" compares the first reward with. The paper defines the highest reward so
    far, as -inf gives it; the authors' code begins at 0, so that negative rewards do not matter.
    """
    zeros = torch.zeros(num_prompts, num_particles, dtype=torch.float64)
    return Particles(zeros, zeros, torch.full_like(zeros, initial_max) if potential == "max" else zeros)


def reweight(
    particles: Particles, rewards: Float[Tensor, "P K"], *, potential: PotentialName, strength: float
) -> Particles:
    """Multiply the weights by the potential of an intermediate reward r (arXiv:2501.06848, section 3).

        difference   log G = strength * (r - last r)          the first r is compared with 0
        max          log G = strength * max(r, all r before)
        sum          log G = strength * (r + all r before)

    A particle whose reward is not finite gets weight 0. Weights that `resample` does not reset are kept.
    """
    finite = rewards.isfinite()
    r = torch.where(finite, rewards, 0.0).to(torch.float64)
    match potential:
        case "difference":
            path_reward, log_potential = r, strength * (r - particles.path_reward)
        case "max":
            path_reward = torch.maximum(r, particles.path_reward)
            log_potential = strength * path_reward
        case "sum":
            path_reward = particles.path_reward + r
            log_potential = strength * path_reward
    log_weights = torch.where(finite, particles.log_weights + log_potential, -torch.inf)
    return Particles(log_weights, particles.log_product + log_potential, path_reward)


def reweight_finished(particles: Particles, rewards: Float[Tensor, "P K"], *, strength: float) -> Particles:
    """Multiply the weights by the last potential, which makes the product over a path exp(strength * r).

    log G = strength * r - sum of all log G before
    """
    finite = rewards.isfinite()
    log_product = strength * torch.where(finite, rewards, 0.0).to(torch.float64)
    log_weights = particles.log_weights + log_product - particles.log_product
    return replace(particles, log_weights=torch.where(finite, log_weights, -torch.inf), log_product=log_product)


def effective_sample_size(log_weights: Float[Tensor, "P K"]) -> Float[Tensor, " P"]:
    """Return 1 / sum(w^2) with w = softmax(log_weights): K for equal weights, 1 if one particle has all weight."""
    return torch.exp(-torch.logsumexp(2 * log_weights.log_softmax(dim=1), dim=1))


def systematic_resample(log_weights: Float[Tensor, " K"], *, generator: torch.Generator) -> Int[Tensor, " K"]:
    """Return the parent of each new particle, in ascending order: particle i has K * w_i children, rounded up or down.

    One uniform number u is drawn; child k takes the first particle whose cumulative sum of K * w exceeds k + u. Equal
    weights give each particle exactly one child, itself.
    """
    weights = (log_weights.double() - log_weights.double().max()).exp()
    cumulative = weights.cumsum(0)
    num = len(weights)
    offset = torch.rand(1, generator=generator).double()  # of float32, so that k + u is exact
    places = (torch.arange(num, dtype=torch.float64) + offset).to(cumulative.device)
    return torch.searchsorted(cumulative * num / cumulative[-1], places, right=True)


def resample(
    particles: Particles, *, chosen: Bool[Tensor, " P"], generators: Sequence[torch.Generator]
) -> tuple[Particles, Int[Tensor, "P K"]]:
    """Resample the particles of the `chosen` prompts; return the particles and the parent of each.

    Resampled particles have equal weights. Those of other prompts are unchanged. Each prompt has its own generator.
    """
    parents = torch.arange(particles.log_weights.shape[1]).expand_as(particles.log_weights).clone()
    for p in chosen.nonzero().flatten().tolist():
        parents[p] = systematic_resample(particles.log_weights[p], generator=generators[p])
    return (
        Particles(
            torch.where(chosen[:, None], 0.0, particles.log_weights),
            particles.log_product.gather(1, parents),
            particles.path_reward.gather(1, parents),
        ),
        parents,
    )
