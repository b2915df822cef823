"""How well a policy finds the noise in images that are there already."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.diffusion.forward import noise_to
from rlhf_t2i.losses import denoising_mse
from rlhf_t2i.types import Level, Policy, Prediction


def denoising_errors(
    policy: Policy,
    clean: Float[Tensor, "B C H W"],
    noise: Float[Tensor, "B C H W"],
    level: Level,
    conditioning: Float[Tensor, "B L D"],
) -> Float[Tensor, " B"]:
    """How far the model's output is from the right one, for each clean latent that is brought to a level of noise.

    In the model's own terms, as it was trained: a noise model is asked for the noise, a v model for v, without
    guidance. Near pure noise a v model's noise has next to no error, and these levels would teach it nothing.
    """
    prediction = policy.predict(noise_to(clean, level, noise), level, conditioning, guidance_scale=1.0)
    return denoising_mse(policy.output(prediction, level), policy.output(Prediction(clean, noise), level))
