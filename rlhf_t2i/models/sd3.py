"""Stable Diffusion 3 and 3.5: any `StableDiffusion3Pipeline` folder or Hub id; a flow model."""

# diffusers has no usable types.
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from rlhf_t2i.models.autoencoder import Autoencoder, latent_size
from rlhf_t2i.models.base import DiffusionPolicy
from rlhf_t2i.models.levels import FlowLevels, shift_for
from rlhf_t2i.models.lora import JOINT_ATTENTION
from rlhf_t2i.models.text_encoders import TextEncoder
from rlhf_t2i.types import Conditioning, Resolution

T5_TOKENS = 256
"""Length of T5's input in the stock pipeline; the encoder itself takes more."""


class StableDiffusion3(DiffusionPolicy):
    """Two CLIPs, an optional T5, and a transformer conditioned on their hidden states and a pooled embedding."""

    pipeline_class = StableDiffusion3Pipeline
    title = "Stable Diffusion 3"
    tag = "stable-diffusion-3"
    is_flow = True
    component = "transformer"
    lora_targets = JOINT_ATTENTION
    mlp_targets = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")

    def load_parts(self, pipeline: Any, resolution: Resolution | None) -> None:
        """Set the parts; ValueError for a scheduler that `FlowLevels` does not support."""
        config, scheduler = self.network.config, pipeline.scheduler.config
        height, width = latent_size(
            resolution, config.sample_size, scale=pipeline.vae_scale_factor, patch=config.patch_size,
            max_patches=config.pos_embed_max_size,
        )  # fmt: skip
        self.latent_shape = (config.in_channels, height, width)
        self.patch = config.patch_size
        num_patches = (height // config.patch_size) * (width // config.patch_size)
        self.levels = FlowLevels(scheduler, device=self.device, shift=shift_for(num_patches, scheduler))
        encoder_of = partial(TextEncoder, device=self.device, dtype=self.dtype)
        length = pipeline.tokenizer.model_max_length
        self._clips = [
            encoder_of(tokenizer, model, max_length=length)
            for tokenizer, model in (
                (pipeline.tokenizer, pipeline.text_encoder),
                (pipeline.tokenizer_2, pipeline.text_encoder_2),
            )
        ]
        self._t5 = None
        if pipeline.text_encoder_3 is not None:
            self._t5 = encoder_of(pipeline.tokenizer_3, pipeline.text_encoder_3, max_length=T5_TOKENS)
        self.text_encoders = [*self._clips, *([self._t5] if self._t5 else [])]
        self.autoencoder = Autoencoder(
            pipeline.vae, pixels_per_latent=pipeline.vae_scale_factor, device=self.device, dtype=self.dtype
        )

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Concatenate the CLIPs' hidden states along their width and T5's (zeros without T5) along the tokens."""
        (first, first_pooled), (second, second_pooled) = (encoder.penultimate(prompts) for encoder in self._clips)
        width = self.network.config.joint_attention_dim
        clips = torch.cat([first, second], dim=-1)
        clips = F.pad(clips, (0, width - clips.shape[-1]))
        if self._t5 is None:
            t5 = clips.new_zeros(len(prompts), T5_TOKENS, width)
        else:
            t5 = self._t5.model(self._t5.tokens(prompts)[0])[0].to(clips.dtype)
        return Conditioning(torch.cat([clips, t5], dim=1), torch.cat([first_pooled, second_pooled], dim=-1))

    def denoise(self, latents: Tensor, model_time: Tensor, conditioning: Conditioning) -> Tensor:
        given = conditioning.to(self.network.dtype)
        return self.denoiser(
            hidden_states=latents.to(self.network.dtype), timestep=model_time, encoder_hidden_states=given.states,
            pooled_projections=given.pooled, return_dict=False,
        )[0].float()  # fmt: skip
