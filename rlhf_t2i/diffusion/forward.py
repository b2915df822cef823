"""The forward process, from clean latents to any noise level."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.diffusion.gaussian import per_image
from rlhf_t2i.types import Level


def noise_to(
    clean: Float[Tensor, "B C H W"], level: Level, noise: Float[Tensor, "B C H W"]
) -> Float[Tensor, "B C H W"]:
    """Return alpha * clean + sigma * noise (arXiv:2006.11239, Eq. 4), each image at its own level."""
    return per_image(level.alpha) * clean + per_image(level.sigma) * noise
