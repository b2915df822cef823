"""The frozen autoencoder between images and latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.diffusion.gaussian import randn
from rlhf_t2i.types import Resolution


class Autoencoder:
    """A frozen autoencoder, and the scale of the latents that the denoiser works on.

        latents = (encoded - shift) * scale

    shift and scale are one number, or one per channel.
    """

    def __init__(self, vae: Any, *, pixels_per_latent: int, device: torch.device, dtype: torch.dtype) -> None:
        """Hold the weights and compute in `dtype`."""
        self.vae: Any = vae.requires_grad_(False).to(device, dtype).eval()
        self.pixels_per_latent, self.device, self.dtype = pixels_per_latent, device, dtype
        self.scale, self.shift = self.scale_and_shift()

    def decode(self, latents: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 3 Y X"]:
        """Return float32 images with a nominal range of [0, 1], not clamped."""
        encoded = latents / self.scale
        if self.shift is not None:
            encoded = encoded + self.shift
        return self.run_decoder(encoded.to(self.dtype)).float() / 2 + 0.5

    def encode(
        self, images: Float[Tensor, "B 3 Y X"], *, generators: Sequence[torch.Generator] | None = None
    ) -> Float[Tensor, "B C H W"]:
        """Return float32 latents of images in [0, 1].

        A Gaussian autoencoder returns its mean or, with generators that each serve an equal share of the images, a
        draw. A tiny autoencoder is deterministic.
        """
        encoded = self.run_encoder((2 * images - 1).to(self.device, self.dtype), generators)
        return (encoded if self.shift is None else encoded - self.shift) * self.scale

    # --- what an autoencoder with latents of another layout overrides ---

    def run_decoder(self, encoded: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 3 Y X"]:
        """Return images with a nominal range of [-1, 1], not clamped."""
        return self.vae.decode(encoded, return_dict=False)[0]

    def run_encoder(
        self, images: Float[Tensor, "B 3 ..."], generators: Sequence[torch.Generator] | None
    ) -> Float[Tensor, "B C ..."]:
        """Return what the network makes of images in [-1, 1], in float32: its mean, or a draw."""
        found = self.vae.encode(images, return_dict=False)[0]
        if isinstance(found, Tensor):
            return found.float()
        if generators is None:
            return found.mean.float()
        return found.mean.float() + found.std.float() * randn(
            found.mean.shape, generators=generators, device=self.device
        )

    def scale_and_shift(self) -> tuple[float | Tensor, float | Tensor | None]:
        """Return the numbers of the config: one factor each, or from the mean and std of each channel."""
        config = self.vae.config
        scaling, mean, std = config.get("scaling_factor", 1.0), config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return scaling, config.get("shift_factor") or None
        mean, std = (torch.tensor(values, device=self.device).view(1, -1, 1, 1) for values in (mean, std))
        return scaling / std, mean

    @property
    def settings(self) -> list[Any]:
        """Everything besides the weights that the output depends on, for a fingerprint."""
        config = self.vae.config
        named = ("latents_mean", "latents_std", "shift_factor", "batch_norm_eps")
        return [config.get("scaling_factor"), *([name, config[name]] for name in named if config.get(name))]


def latent_size(
    resolution: Resolution | None, own: int | Sequence[int], *, scale: int, patch: int = 1,
    max_patches: int | None = None,
) -> tuple[int, int]:  # fmt: skip
    """Return height and width of the latents of images of `resolution` pixels; None is the model's `own` latent size.

    `scale` is pixels per latent, `patch` latents per token, `max_patches` the most tokens along a side; None is no
    limit. Raises ValueError, naming a near size that works, for sides that are not multiples of scale * patch or above
    the limit.
    """
    if resolution is None:
        return (own, own) if isinstance(own, int) else (own[0], own[1])
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    unit = scale * patch
    counts = [max(1, round(side / unit)) for side in (height, width)]
    near = [unit * min(count, max_patches or count) for count in counts]
    if near != [height, width]:
        square, limit = isinstance(resolution, int), f", at most {max_patches * unit}" if max_patches else ""
        raise ValueError(
            f"{'resolution' if square else 'height x width'} is {resolution if square else f'{height} x {width}'}; "
            f"for this model it must be a multiple of {unit}{limit}, such as "
            f"{near[0] if square else f'{near[0]} x {near[1]}'}."
        )
    return height // scale, width // scale
