"""From latents to images and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.diffusion.gaussian import randn


class Autoencoder:
    """A frozen autoencoder, and the scale on which a denoiser sees its latents.

        latents = (encoded - shift) * scale

    shift and scale are numbers, or one of each for every channel.
    """

    def __init__(self, vae: Any, *, pixels_per_latent: int, device: torch.device, dtype: torch.dtype) -> None:
        """It is held and computes in `dtype`."""
        self.vae: Any = vae.requires_grad_(False).to(device, dtype).eval()
        self.pixels_per_latent, self.device, self.dtype = pixels_per_latent, device, dtype
        self.scale, self.shift = _scale_and_shift(vae.config, device=device)

    def decode(self, latents: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 3 Y X"]:
        """Images around [0, 1], not clamped."""
        encoded = latents / self.scale
        if self.shift is not None:
            encoded = encoded + self.shift
        return self.vae.decode(encoded.to(self.dtype), return_dict=False)[0].float() / 2 + 0.5

    def encode(
        self, images: Float[Tensor, "B 3 Y X"], *, generators: Sequence[torch.Generator] | None = None
    ) -> Float[Tensor, "B C H W"]:
        """The latents that `decode` makes images of, in float32.

        Of a Gaussian autoencoder their mean or, with generators that share the images equally, a draw. A tiny
        autoencoder has but one answer.
        """
        found = self.vae.encode((2 * images - 1).to(self.device, self.dtype), return_dict=False)[0]
        if isinstance(found, Tensor):
            encoded = found.float()
        else:
            encoded = found.mean.float()
            if generators is not None:
                encoded = encoded + found.std.float() * randn(encoded.shape, generators=generators, device=self.device)
        return (encoded if self.shift is None else encoded - self.shift) * self.scale

    @property
    def settings(self) -> list[Any]:
        """All that its answers depend on beside its weights."""
        config = self.vae.config
        named = ("latents_mean", "latents_std", "shift_factor")
        return [config.scaling_factor, *([name, config[name]] for name in named if config.get(name))]


def _scale_and_shift(config: Any, *, device: torch.device) -> tuple[float | Tensor, float | Tensor | None]:
    """From what an autoencoder's own config says: its factors or, if it has them, mean and std of each channel."""
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return config.scaling_factor, config.get("shift_factor") or None
    mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (mean, std))
    return config.scaling_factor / std, mean
