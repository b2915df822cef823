"""Reverse steps: from a model's prediction to the distribution of the next latents."""

from __future__ import annotations

import math
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.diffusion.gaussian import per_image
from rlhf_t2i.types import Dynamics, Level, Prediction, Schedule, Transition


def ddim(
    latents: Float[Tensor, "B C H W"],
    prediction: Prediction,
    level: Level,
    next_level: Level,
    *,
    eta: float,
) -> Transition:
    """Return a DDIM step with eta times the noise of the DDPM posterior (arXiv:2010.02502, Eq. 12 and 16).

        std  = eta * (sigma' / sigma) * sqrt(1 - (alpha / alpha')^2)
        mean = alpha' clean + sqrt(sigma'^2 - std^2) noise

    Primes mark the next level. eta = 0 is the deterministic sampler, eta = 1 the ancestral one.
    A step to sigma' = 0 is deterministic whatever eta is. For a flow, eta = 0 is the Euler step; for stochastic steps
    of a flow see `ancestral`.
    """
    del latents  # the prediction has both of their parts
    shrink = (1 - (level.alpha / next_level.alpha) ** 2).clamp_min(0).sqrt()
    return _renoised(prediction, next_level, eta * next_level.sigma / level.sigma * shrink)


def ancestral(
    latents: Float[Tensor, "B C H W"],
    prediction: Prediction,
    level: Level,
    next_level: Level,
    *,
    eta: float,
) -> Transition:
    """Return a step with eta times the noise of the forward process's posterior, for any alpha and sigma.

        std  = eta * (sigma' / sigma) * sqrt(sigma^2 - (alpha / alpha')^2 sigma'^2)
        mean = alpha' clean + sqrt(sigma'^2 - std^2) noise

    With alpha^2 + sigma^2 = 1 this is `ddim`. For a flow with many steps it approaches `flow_sde` with noise_scale =
    sqrt(2) eta; with few steps the noise of the latents still matches the schedule, and the last step is deterministic.
    """
    del latents
    old_noise = level.alpha / next_level.alpha * next_level.sigma
    added = (level.sigma**2 - old_noise**2).clamp_min(0).sqrt()
    return _renoised(prediction, next_level, eta * next_level.sigma / level.sigma * added)


def flow_sde(
    latents: Float[Tensor, "B C H W"],
    prediction: Prediction,
    level: Level,
    next_level: Level,
    *,
    noise_scale: float,
    sigma_cap: float,
) -> Transition:
    """Return a stochastic flow step with the marginals of the Euler ODE (Flow-GRPO, arXiv:2505.05470, Eq. 9).

        dt   = sigma' - sigma                                  (negative: from noise to image)
        g    = noise_scale * sqrt(sigma / (1 - min(sigma, sigma_cap)))
        mean = x + [v + g^2 / (2 sigma) * (x + (1 - sigma) v)] dt      with v = noise - clean
        std  = g * sqrt(-dt)

    noise_scale = 0 is the Euler step, 0.7 the published value. `sigma_cap` (below 1) keeps g finite at sigma = 1; the
    paper's code uses the second sigma of the schedule. The noise of a step to sigma' = 0 stays in the image, because no
    denoising step follows.
    """
    sigma, dt = level.sigma, next_level.sigma - level.sigma
    g = noise_scale * (sigma / (1 - sigma.clamp_max(sigma_cap))).sqrt()
    velocity = prediction.noise - prediction.clean
    # The predicted noise is x + (1 - sigma) v.
    drift = velocity + per_image(g**2 / (2 * sigma)) * prediction.noise
    return Transition(latents + drift * per_image(dt), g * (-dt).sqrt())


def cps(
    latents: Float[Tensor, "B C H W"],
    prediction: Prediction,
    level: Level,
    next_level: Level,
    *,
    noise_scale: float,
) -> Transition:
    """Return a step of coefficients-preserving sampling (arXiv:2509.05952), which replaces noise and adds none.

        std  = sigma' sin(noise_scale pi / 2)
        mean = alpha' clean + sigma' cos(noise_scale pi / 2) noise

    noise_scale = 0 is the Euler step, 1 replaces all noise in every step, 0.8 is common. The noise of the latents
    always matches the schedule, and the last step is deterministic. The replaced noise does not depend on the step
    size: with many steps images lose variance, unlike those of an SDE.
    """
    del latents, level
    return _renoised(prediction, next_level, next_level.sigma * math.sin(noise_scale * math.pi / 2))


def windowed(
    latents: Float[Tensor, "B C H W"],
    prediction: Prediction,
    level: Level,
    next_level: Level,
    *,
    dynamics: Dynamics,
    first: float,
    end: float,
) -> Transition:
    """Return `dynamics` where end < sigma <= first and a deterministic step elsewhere (MixGRPO, arXiv:2507.21802)."""
    noisy = dynamics(latents, prediction, level, next_level)
    plain = ddim(latents, prediction, level, next_level, eta=0.0)
    inside = (level.sigma > end) & (level.sigma <= first)
    return Transition(
        torch.where(inside[:, None, None, None], noisy.mean, plain.mean), torch.where(inside, noisy.std, plain.std)
    )


def stochastic(schedule: Schedule, *, eta: float) -> Dynamics:
    """Return the dynamics of a schedule with eta times the noise of its forward process; eta = 0 is deterministic."""
    match schedule.kind:
        case "diffusion":
            return partial(ddim, eta=eta)
        case "flow":
            return partial(ancestral, eta=eta)


def _renoised(prediction: Prediction, next_level: Level, std: Float[Tensor, " B"]) -> Transition:
    """Return the next level's mix of clean and noise, with noise of standard deviation `std` drawn anew."""
    direction = (next_level.sigma**2 - std**2).clamp_min(0).sqrt()
    return Transition(
        per_image(next_level.alpha) * prediction.clean + per_image(direction) * prediction.noise,
        std,
    )
