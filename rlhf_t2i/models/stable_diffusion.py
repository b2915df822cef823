"""Stable Diffusion 1.x and 2.x: any `StableDiffusionPipeline` folder or Hub id, with noise or v prediction."""

# diffusers has no usable types.
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers import StableDiffusionPipeline
from torch import Tensor

from rlhf_t2i.models.autoencoder import Autoencoder, latent_size
from rlhf_t2i.models.base import DiffusionPolicy
from rlhf_t2i.models.levels import DiffusionLevels
from rlhf_t2i.models.lora import ATTENTION
from rlhf_t2i.models.text_encoders import TextEncoder
from rlhf_t2i.types import Conditioning, Resolution


class StableDiffusion(DiffusionPolicy):
    """One text encoder, and a U-Net conditioned on its hidden states."""

    pipeline_class = StableDiffusionPipeline
    title = "Stable Diffusion"
    tag = "stable-diffusion"
    is_flow = False
    component = "unet"
    lora_targets = ATTENTION

    def load_parts(self, pipeline: Any, resolution: Resolution | None) -> None:
        """Set the parts; ValueError for a scheduler that `DiffusionLevels` does not support."""
        self.levels = DiffusionLevels(pipeline.scheduler.config, device=self.device)
        encoder = TextEncoder(pipeline.tokenizer, pipeline.text_encoder, device=self.device, dtype=self.dtype)
        self.text_encoders = [encoder]
        self.autoencoder = Autoencoder(
            pipeline.vae, pixels_per_latent=pipeline.vae_scale_factor, device=self.device, dtype=self.dtype
        )
        size = latent_size(resolution, self.network.config.sample_size, scale=pipeline.vae_scale_factor)
        self.latent_shape = (self.network.config.in_channels, *size)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        [encoder] = self.text_encoders
        tokens, mask = encoder.tokens(prompts)
        uses_mask = getattr(encoder.model.config, "use_attention_mask", False)
        return Conditioning(encoder.model(tokens, attention_mask=mask if uses_mask else None)[0])

    def denoise(self, latents: Tensor, model_time: Tensor, conditioning: Conditioning) -> Tensor:
        dtype = self.network.dtype
        return self.denoiser(latents.to(dtype), model_time, conditioning.states.to(dtype), return_dict=False)[0].float()
