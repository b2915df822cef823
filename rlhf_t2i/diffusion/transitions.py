"""Reverse steps: from a model's prediction to the distribution of the next latent."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.diffusion.gaussian import per_image
from rlhf_t2i.types import Level, Prediction, Transition


def ddim(
    latents: Float[Tensor, "B C H W"],
    prediction: Prediction,
    level: Level,
    next_level: Level,
    *,
    eta: float,
) -> Transition:
    """One DDIM step with eta times the noise of the DDPM posterior (arXiv:2010.02502, Eq. 12 and 16).

        std  = eta * (sigma' / sigma) * sqrt(1 - (alpha / alpha')^2)
        mean = alpha' clean + sqrt(sigma'^2 - std^2) noise

    Primes mark the next level. eta = 0 is the deterministic sampler, eta = 1 the ancestral one.
    A schedule that ends at sigma' = 0 ends with a deterministic step whatever eta is.
    """
    del latents  # both parts of them are in the prediction
    shrink = (1 - (level.alpha / next_level.alpha) ** 2).clamp_min(0).sqrt()
    std = eta * next_level.sigma / level.sigma * shrink
    direction = (next_level.sigma**2 - std**2).clamp_min(0).sqrt()
    return Transition(
        per_image(next_level.alpha) * prediction.clean + per_image(direction) * prediction.noise,
        std,
    )
