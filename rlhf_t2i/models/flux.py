"""FLUX.1 dev and schnell: any `FluxPipeline` folder or Hub id; a flow model that is told of its guidance."""

# diffusers and transformers have no usable types.
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from diffusers import FluxPipeline
from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.models.autoencoder import Autoencoder
from rlhf_t2i.models.family import latent_size
from rlhf_t2i.models.levels import FlowLevels, shift_for
from rlhf_t2i.models.lora import JOINT_ATTENTION
from rlhf_t2i.models.text_encoders import TextEncoder, with_summary, without_summary

T5_TOKENS, PATCH = 512, 2
"""What the stock pipeline gives to T5, and the side of the squares of latents that are a token each."""
OWN_SIZE = 128
"""Latents on each side of the images that the stock pipeline paints; the transformer's config does not say."""


class Flux:
    """A CLIP for a summary, a T5 for states, and a transformer that is told of both, and of guidance if distilled."""

    pipeline_class: ClassVar[type[Any]] = FluxPipeline
    title: ClassVar[str] = "FLUX.1"
    tag: ClassVar[str] = "flux"
    is_flow: ClassVar[bool] = True
    guidance_when_off: ClassVar[float] = 1.0
    component: ClassVar[Literal["unet", "transformer"]] = "transformer"
    lora_targets: ClassVar[Sequence[str]] = JOINT_ATTENTION
    is_told_guidance: ClassVar[bool] = True

    def __init__(
        self, pipeline: Any, *, device: torch.device, dtype: torch.dtype, resolution: int | None = None
    ) -> None:
        """Take a loaded pipeline's parts. Text encoders and autoencoder are held in `dtype`.

        Raises ValueError for a scheduler that `FlowLevels` refuses.
        """
        self.network: Any = pipeline.transformer
        scale, scheduler = pipeline.vae_scale_factor, pipeline.scheduler.config
        height, width = latent_size(resolution, OWN_SIZE, scale=scale, patch=PATCH)
        self.latent_shape = (self.network.config.in_channels // PATCH**2, height, width)
        num_patches = (height // PATCH) * (width // PATCH)
        self.levels = FlowLevels(scheduler, device=device, shift=shift_for(num_patches, scheduler), even=True)
        self._clip = TextEncoder(pipeline.tokenizer, pipeline.text_encoder, device=device, dtype=dtype)
        self._t5 = TextEncoder(
            pipeline.tokenizer_2, pipeline.text_encoder_2, device=device, dtype=dtype, max_length=T5_TOKENS
        )
        self.text_encoders = [self._clip, self._t5]
        self.autoencoder = Autoencoder(pipeline.vae, pixels_per_latent=scale, device=device, dtype=dtype)

    def read(self, prompts: Sequence[str]) -> Float[Tensor, "B L D"]:
        """T5's states, and CLIP's summary."""
        states = self._t5.model(self._t5.tokens(prompts)[0])[0]
        return with_summary(states, self._clip.model(self._clip.tokens(prompts)[0]).pooler_output)

    def output(
        self,
        network: Any,
        latents: Float[Tensor, "B C H W"],
        model_time: Float[Tensor, " B"],
        conditioning: Float[Tensor, "B L D"],
        *,
        guidance_scale: float,
    ) -> Float[Tensor, "B C H W"]:
        """The velocity. A distilled model (dev) is told of the scale, and asked once whatever it is.

        Raises ValueError for a scale above 1 and a model that knows no guidance (schnell).
        """
        config, dtype = self.network.config, self.network.dtype
        if guidance_scale > 1 and not config.guidance_embeds:
            raise ValueError(
                f"guidance_scale is {guidance_scale}; this model (FLUX.1 schnell) knows none: set it to 1."
            )
        text, summary = without_summary(
            conditioning.to(dtype), width=config.joint_attention_dim, summary_width=config.pooled_projection_dim
        )
        told = latents.new_full((len(latents),), guidance_scale) if config.guidance_embeds else None
        velocity = network(
            hidden_states=packed(latents.to(dtype)), timestep=model_time / 1000, guidance=told,
            pooled_projections=summary, encoder_hidden_states=text, return_dict=False,
            txt_ids=latents.new_zeros(text.shape[1], 3), img_ids=self._places(latents),
        )[0]  # fmt: skip
        return unpacked(velocity.float(), *latents.shape[2:])

    def _places(self, latents: Tensor) -> Float[Tensor, "N 3"]:
        """Row and column of each token of an image."""
        rows, columns = (torch.arange(size // PATCH, device=latents.device) for size in latents.shape[2:])
        grid = torch.cartesian_prod(rows, columns).to(latents.dtype)
        return torch.cat([torch.zeros_like(grid[:, :1]), grid], dim=1)


def packed(latents: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N P"]:
    """Squares of latents as tokens, row after row; of each its channels, and of each channel its latents."""
    return torch.nn.functional.pixel_unshuffle(latents, PATCH).flatten(2).transpose(1, 2)


def unpacked(tokens: Float[Tensor, "B N P"], height: int, width: int) -> Float[Tensor, "B C H W"]:
    """What `packed` was given."""
    squares = tokens.transpose(1, 2).unflatten(2, (height // PATCH, width // PATCH))
    return torch.nn.functional.pixel_shuffle(squares, PATCH)
