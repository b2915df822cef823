"""Stable Diffusion XL: any `StableDiffusionXLPipeline` folder or Hub id, with noise or v prediction."""

# diffusers has no usable types.
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from rlhf_t2i.models.autoencoder import Autoencoder, latent_size
from rlhf_t2i.models.base import DiffusionPolicy
from rlhf_t2i.models.levels import DiffusionLevels
from rlhf_t2i.models.lora import ATTENTION
from rlhf_t2i.models.text_encoders import TextEncoder
from rlhf_t2i.types import Conditioning, Resolution


class StableDiffusionXL(DiffusionPolicy):
    """Two text encoders, and a U-Net conditioned on their hidden states, a pooled embedding and the image size."""

    pipeline_class = StableDiffusionXLPipeline
    title = "Stable Diffusion XL"
    tag = "stable-diffusion-xl"
    is_flow = False
    component = "unet"
    lora_targets = ATTENTION

    def load_parts(self, pipeline: Any, resolution: Resolution | None) -> None:
        """Set the parts; in float16 the autoencoder stays float32 if its config has `force_upcast`, as in diffusers.

        Raises ValueError for a scheduler that `DiffusionLevels` does not support, for a refiner (one text encoder) and
        for a distilled U-Net, which takes the guidance scale as an input.
        """
        if pipeline.text_encoder is None:
            raise ValueError("The model is an SDXL refiner, with one text encoder; give the base model.")
        if self.network.config.time_cond_proj_dim is not None:
            raise ValueError(
                "The U-Net takes its guidance scale as an input, as distilled ones do (LCM); give the base model."
            )
        self.levels = DiffusionLevels(pipeline.scheduler.config, device=self.device)
        self.text_encoders = [
            TextEncoder(tokenizer, model, device=self.device, dtype=self.dtype)
            for tokenizer, model in (
                (pipeline.tokenizer, pipeline.text_encoder),
                (pipeline.tokenizer_2, pipeline.text_encoder_2),
            )
        ]
        overflows = self.dtype == torch.float16 and pipeline.vae.config.get("force_upcast", False)
        self.autoencoder = Autoencoder(
            pipeline.vae, pixels_per_latent=pipeline.vae_scale_factor, device=self.device,
            dtype=torch.float32 if overflows else self.dtype,
        )  # fmt: skip
        size = latent_size(resolution, self.network.config.sample_size, scale=pipeline.vae_scale_factor)
        self.latent_shape = (self.network.config.in_channels, *size)
        self._zeros_if_empty: bool = pipeline.config.force_zeros_for_empty_prompt

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Concatenate both encoders' hidden states along their width; the second encoder's output is the pooled one."""
        first, _ = self.text_encoders[0].penultimate(prompts)
        second, pooled = self.text_encoders[1].penultimate(prompts)
        return Conditioning(torch.cat([first, second], dim=-1), pooled)

    def encode_unconditional(self) -> Conditioning:
        """Return zeros or the encoded empty prompt, as the pipeline's `force_zeros_for_empty_prompt` says."""
        empty = self.encode_prompts([""])
        if not self._zeros_if_empty:
            return empty
        return Conditioning(**{name: torch.zeros_like(part) for name, part in empty.parts.items()})

    def denoise(self, latents: Tensor, model_time: Tensor, conditioning: Conditioning) -> Tensor:
        """Run the U-Net; its size conditioning is that of an image of the latents' size, neither scaled nor cropped."""
        dtype, given = self.network.dtype, conditioning.to(self.network.dtype)
        height, width = (side * self.autoencoder.pixels_per_latent for side in latents.shape[2:])
        size = latents.new_tensor([[height, width, 0, 0, height, width]], dtype=dtype).expand(len(latents), -1)
        added = {"text_embeds": given.pooled, "time_ids": size}
        return self.denoiser(
            latents.to(dtype), model_time, given.states, added_cond_kwargs=added, return_dict=False
        )[0].float()  # fmt: skip
