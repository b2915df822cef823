"""Denoising errors of a policy on existing images."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.diffusion.forward import noise_to
from rlhf_t2i.losses import denoising_mse
from rlhf_t2i.types import Conditioning, Level, Policy, Prediction


def denoising_errors(
    policy: Policy,
    clean: Float[Tensor, "B C H W"],
    noise: Float[Tensor, "B C H W"],
    level: Level,
    conditioning: Conditioning,
) -> Float[Tensor, " B"]:
    """Return the mean squared error of the network's output for each clean latent, noised to its level.

    The error is in the network's own parameterisation, without guidance, as in its pre-training. Converted to noise,
    the error of a v model would almost vanish near pure noise, and these levels would contribute no gradient.
    """
    prediction = policy.predict(noise_to(clean, level, noise), level, conditioning, guidance_scale=1.0)
    return denoising_mse(policy.to_output(prediction, level), policy.to_output(Prediction(clean, noise), level))
