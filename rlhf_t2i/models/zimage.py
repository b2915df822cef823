"""Z-Image and Z-Image-Turbo: any `ZImagePipeline` folder or Hub id; a flow model."""

# diffusers has no usable types.
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers import ZImagePipeline
from torch import Tensor

from rlhf_t2i.models.autoencoder import Autoencoder, latent_size
from rlhf_t2i.models.base import DiffusionPolicy
from rlhf_t2i.models.levels import FlowLevels, shift_for
from rlhf_t2i.models.lora import ATTENTION
from rlhf_t2i.models.text_encoders import TextEncoder, as_chat, real_tokens
from rlhf_t2i.types import Conditioning, Resolution

MAX_TOKENS, PATCH = 512, 2
"""Longest prompt of the stock pipeline in tokens, and the side in latents of the square that is one token."""
OWN_PIXELS = 1024
"""Default side of an image in pixels, from the stock pipeline; the transformer's config does not have it."""


class ZImage(DiffusionPolicy):
    """A language model that encodes the prompt as a chat turn, and a transformer over image and text tokens.

    The stock pipeline's guidance_scale is one less than that of other families: 0 is off.
    """

    pipeline_class = ZImagePipeline
    title = "Z-Image"
    tag = "z-image"
    is_flow = True
    component = "transformer"
    lora_targets = tuple(f"attention.{name}" for name in ATTENTION)
    mlp_targets = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")

    def load_parts(self, pipeline: Any, resolution: Resolution | None) -> None:
        """Set the parts; ValueError for a scheduler that `FlowLevels` does not support."""
        scale, scheduler = pipeline.vae_scale_factor, pipeline.scheduler.config
        longest = min(self.network.config.axes_lens[1:])
        height, width = latent_size(resolution or OWN_PIXELS, 0, scale=scale, patch=PATCH, max_patches=longest)
        self.latent_shape = (self.network.config.in_channels, height, width)
        self.patch = PATCH
        num_patches = (height // PATCH) * (width // PATCH)
        self.levels = FlowLevels(scheduler, device=self.device, shift=shift_for(num_patches, scheduler), even=True)
        tokenizer = pipeline.tokenizer
        encoder = TextEncoder(
            tokenizer, pipeline.text_encoder, device=self.device, dtype=self.dtype,
            max_length=min(MAX_TOKENS, tokenizer.model_max_length), template=partial(as_chat, tokenizer, thinks=True),
        )  # fmt: skip
        self.text_encoders = [encoder]
        self.autoencoder = Autoencoder(pipeline.vae, pixels_per_latent=scale, device=self.device, dtype=self.dtype)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Return the hidden states before the last layer; the rows of real tokens come first, then zeros."""
        [encoder] = self.text_encoders
        ids, mask = encoder.tokens(prompts)
        states = encoder.model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
        return real_tokens(states, mask, length=encoder.max_length)

    @classmethod
    def stock_arguments(cls, guidance_scale: float) -> dict[str, Any]:
        return {"guidance_scale": guidance_scale - 1}

    def denoise(self, latents: Tensor, model_time: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the velocity; the network's own time and direction run from noise to image."""
        assert conditioning.mask is not None
        dtype = self.network.dtype
        text = [row[real] for row, real in zip(conditioning.states.to(dtype), conditioning.mask, strict=True)]
        images = list(latents.to(dtype).unsqueeze(2))
        output = self.denoiser(images, (1000 - model_time) / 1000, text, return_dict=False)[0]
        return -torch.stack(output).squeeze(2).float()
