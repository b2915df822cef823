"""FLUX.1 dev and schnell: any `FluxPipeline` folder or Hub id; a flow model that takes guidance as an input."""

# diffusers has no usable types.
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import FluxPipeline
from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.models.autoencoder import Autoencoder, latent_size
from rlhf_t2i.models.base import DiffusionPolicy
from rlhf_t2i.models.levels import FlowLevels, shift_for
from rlhf_t2i.models.lora import JOINT_ATTENTION
from rlhf_t2i.models.text_encoders import TextEncoder
from rlhf_t2i.types import Conditioning, Resolution

T5_TOKENS, PATCH = 512, 2
"""Length of T5's input in the stock pipeline, and the side in latents of the square that is one token."""
OWN_SIZE = 128
"""Default side of an image in latents, from the stock pipeline; the transformer's config does not have it."""


class Flux(DiffusionPolicy):
    """A CLIP for the pooled embedding, a T5 for hidden states, and a transformer conditioned on both.

    FLUX.1 dev is distilled: it takes the guidance scale as an input. FLUX.1 schnell has no guidance.
    """

    pipeline_class = FluxPipeline
    title = "FLUX.1"
    tag = "flux"
    is_flow = True
    component = "transformer"
    lora_targets = JOINT_ATTENTION
    mlp_targets = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp")
    embeds_guidance = True

    def load_parts(self, pipeline: Any, resolution: Resolution | None) -> None:
        """Set the parts; ValueError for a scheduler that `FlowLevels` does not support."""
        scale, scheduler = pipeline.vae_scale_factor, pipeline.scheduler.config
        height, width = latent_size(resolution, OWN_SIZE, scale=scale, patch=PATCH)
        self.latent_shape = (self.network.config.in_channels // PATCH**2, height, width)
        self.patch = PATCH
        num_patches = (height // PATCH) * (width // PATCH)
        self.levels = FlowLevels(scheduler, device=self.device, shift=shift_for(num_patches, scheduler), even=True)
        self._clip = TextEncoder(pipeline.tokenizer, pipeline.text_encoder, device=self.device, dtype=self.dtype)
        self._t5 = TextEncoder(
            pipeline.tokenizer_2, pipeline.text_encoder_2, device=self.device, dtype=self.dtype, max_length=T5_TOKENS
        )
        self.text_encoders = [self._clip, self._t5]
        self.autoencoder = Autoencoder(pipeline.vae, pixels_per_latent=scale, device=self.device, dtype=self.dtype)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        states = self._t5.model(self._t5.tokens(prompts)[0])[0]
        return Conditioning(states, self._clip.model(self._clip.tokens(prompts)[0]).pooler_output)

    def guided(
        self,
        latents: Float[Tensor, "B C H W"],
        model_time: Float[Tensor, " B"],
        conditioning: Conditioning,
        *,
        guidance_scale: float,
    ) -> Float[Tensor, "B C H W"]:
        """Return the velocity; the scale is an input of the network, so one forward pass serves any scale.

        Raises ValueError for a scale above 1 and a model without guidance (schnell).
        """
        config, dtype = self.network.config, self.network.dtype
        if guidance_scale > 1 and not config.guidance_embeds:
            raise ValueError(
                f"guidance_scale is {guidance_scale}; this model (FLUX.1 schnell) has no guidance: set it to 1."
            )
        given = conditioning.to(dtype)
        guidance = latents.new_full((len(latents),), guidance_scale) if config.guidance_embeds else None
        velocity = self.denoiser(
            hidden_states=packed(latents.to(dtype)), timestep=model_time / 1000, guidance=guidance,
            pooled_projections=given.pooled, encoder_hidden_states=given.states, return_dict=False,
            txt_ids=latents.new_zeros(given.states.shape[1], 3), img_ids=_positions(latents),
        )[0]  # fmt: skip
        return unpacked(velocity.float(), *latents.shape[2:])

    def denoise(self, latents: Tensor, model_time: Tensor, conditioning: Conditioning) -> Tensor:
        return self.guided(latents, model_time, conditioning, guidance_scale=1.0)


def _positions(latents: Float[Tensor, "B C H W"]) -> Float[Tensor, "N 3"]:
    """Return the position of each image token: 0, row, column."""
    rows, columns = (torch.arange(size // PATCH, device=latents.device) for size in latents.shape[2:])
    grid = torch.cartesian_prod(rows, columns).to(latents.dtype)
    return torch.cat([torch.zeros_like(grid[:, :1]), grid], dim=1)


def packed(latents: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N P"]:
    """Return squares of latents as tokens in row order; within a token channels come first, then pixels."""
    return torch.nn.functional.pixel_unshuffle(latents, PATCH).flatten(2).transpose(1, 2)


def unpacked(tokens: Float[Tensor, "B N P"], height: int, width: int) -> Float[Tensor, "B C H W"]:
    """Return the latents of `packed` tokens."""
    squares = tokens.transpose(1, 2).unflatten(2, (height // PATCH, width // PATCH))
    return torch.nn.functional.pixel_shuffle(squares, PATCH)
