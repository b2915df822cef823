"""Particles with weights: how a crowd of half-painted images is steered towards reward. Pure maths, in log space.

Feynman-Kac steering (arXiv:2501.06848) draws from p(image) * exp(strength * reward(image)). Along the way each
particle is weighed by potentials, guesses of how well it will end, whose product over a whole path must be
exp(strength * reward): the last potential makes up for whatever the guesses said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

PotentialName = Literal["difference", "max", "sum"]


@dataclass(frozen=True, slots=True)
class Particles:
    """What each of the K particles of P prompts carries besides its latents, in float64."""

    log_weights: Float[Tensor, "P K"]
    """Since the last resampling; -inf for a particle that has lost."""
    log_product: Float[Tensor, "P K"]
    """Of all potentials that its path has passed, whether or not they were spent on a resampling."""
    memory: Float[Tensor, "P K"]
    """Of the rewards of its path what its potential needs: the last, the highest, or the sum."""


def new_particles(num_prompts: int, num_particles: int, *, potential: PotentialName) -> Particles:
    """Particles that have seen no reward yet."""
    zeros = torch.zeros(num_prompts, num_particles, dtype=torch.float64)
    return Particles(zeros, zeros, torch.full_like(zeros, -torch.inf) if potential == "max" else zeros)


def weigh(
    particles: Particles, rewards: Float[Tensor, "P K"], *, potential: PotentialName, strength: float
) -> Particles:
    """Multiply the weights with the potential of a reward that was guessed on the way (arXiv:2501.06848, section 3).

        difference   log G = strength * (r - last r)          the first r is compared with 0
        max          log G = strength * max(r, r before)
        sum          log G = strength * (r + all r before)

    A particle whose reward is no finite number gets weight 0. What is not spent by `resample` stays in the weights.
    """
    finite = rewards.isfinite()
    r = torch.where(finite, rewards, 0.0).to(torch.float64)
    match potential:
        case "difference":
            memory, log_potential = r, strength * (r - particles.memory)
        case "max":
            memory = torch.maximum(r, particles.memory)
            log_potential = strength * memory
        case "sum":
            memory = particles.memory + r
            log_potential = strength * memory
    log_weights = torch.where(finite, particles.log_weights + log_potential, -torch.inf)
    return Particles(log_weights, particles.log_product + log_potential, memory)


def weigh_finished(particles: Particles, rewards: Float[Tensor, "P K"], *, strength: float) -> Particles:
    """The last potential, of the finished images: it makes the product of a path's potentials what it must be.

    log G = strength * r - sum of all log G before
    """
    finite = rewards.isfinite()
    log_product = strength * torch.where(finite, rewards, 0.0).to(torch.float64)
    log_weights = particles.log_weights + log_product - particles.log_product
    return replace(particles, log_weights=torch.where(finite, log_weights, -torch.inf), log_product=log_product)


def effective_sample_size(log_weights: Float[Tensor, "P K"]) -> Float[Tensor, " P"]:
    """1 / sum(w^2) with w = softmax(log_weights): K if all particles agree, 1 if one rules."""
    return torch.exp(-torch.logsumexp(2 * log_weights.log_softmax(dim=1), dim=1))


def systematic_resample(log_weights: Float[Tensor, " K"], *, generator: torch.Generator) -> Int[Tensor, " K"]:
    """The parent of each new particle, in ascending order: particle i has K * w_i children, rounded up or down.

    One uniform number u is drawn; child k takes the first particle whose running sum of K * w exceeds k + u. Equal
    weights give each particle exactly one child, itself.
    """
    weights = (log_weights.double() - log_weights.double().max()).exp()
    running = weights.cumsum(0)
    num = len(weights)
    offset = torch.rand(1, generator=generator).double()  # of float32, so that k + u is exact
    places = (torch.arange(num, dtype=torch.float64) + offset).to(running.device)
    return torch.searchsorted(running * num / running[-1], places, right=True)


def resample(
    particles: Particles, *, chosen: Bool[Tensor, " P"], generators: Sequence[torch.Generator]
) -> tuple[Particles, Int[Tensor, "P K"]]:
    """Let heavy particles take the places of light ones in the `chosen` prompts; also returns everyone's parent.

    There all weights are equal afterwards. The other prompts keep their particles and their weights. Each prompt has
    its own generator.
    """
    parents = torch.arange(particles.log_weights.shape[1]).expand_as(particles.log_weights).clone()
    for p in chosen.nonzero().flatten().tolist():
        parents[p] = systematic_resample(particles.log_weights[p], generator=generators[p])
    return (
        Particles(
            torch.where(chosen[:, None], 0.0, particles.log_weights),
            particles.log_product.gather(1, parents),
            particles.memory.gather(1, parents),
        ),
        parents,
    )
