"""Stable Diffusion 1.x and 2.x: any `StableDiffusionPipeline` folder or Hub id, with noise or v prediction."""

# diffusers and transformers have no usable types.
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from diffusers import StableDiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.models.autoencoder import Autoencoder
from rlhf_t2i.models.family import latent_size
from rlhf_t2i.models.guidance import ClassifierFree
from rlhf_t2i.models.levels import DiffusionLevels
from rlhf_t2i.models.lora import ATTENTION
from rlhf_t2i.models.text_encoders import TextEncoder


class StableDiffusion(ClassifierFree):
    """One text encoder, and a U-Net that is told of its states."""

    pipeline_class: ClassVar[type[Any]] = StableDiffusionPipeline
    title: ClassVar[str] = "Stable Diffusion"
    tag: ClassVar[str] = "stable-diffusion"
    is_flow: ClassVar[bool] = False
    component: ClassVar[Literal["unet", "transformer"]] = "unet"
    lora_targets: ClassVar[Sequence[str]] = ATTENTION

    def __init__(
        self, pipeline: Any, *, device: torch.device, dtype: torch.dtype, resolution: int | None = None
    ) -> None:
        """Take a loaded pipeline's parts. Text encoder and autoencoder are held in `dtype`.

        Raises ValueError for a scheduler that `DiffusionLevels` refuses.
        """
        self.levels = DiffusionLevels(pipeline.scheduler.config, device=device)
        self.text_encoders = [TextEncoder(pipeline.tokenizer, pipeline.text_encoder, device=device, dtype=dtype)]
        self.autoencoder = Autoencoder(
            pipeline.vae, pixels_per_latent=pipeline.vae_scale_factor, device=device, dtype=dtype
        )
        self.network: Any = pipeline.unet
        size = latent_size(resolution, self.network.config.sample_size, scale=pipeline.vae_scale_factor)
        self.latent_shape = (self.network.config.in_channels, *size)
        with torch.no_grad():
            self.empty = self.read([""])

    def read(self, prompts: Sequence[str]) -> Float[Tensor, "B L D"]:
        """The text encoder's states."""
        [encoder] = self.text_encoders
        tokens, mask = encoder.tokens(prompts)
        uses_mask = getattr(encoder.model.config, "use_attention_mask", False)
        return encoder.model(tokens, attention_mask=mask if uses_mask else None)[0]

    def denoise(self, network: Any, latents: Tensor, model_time: Tensor, conditioning: Tensor) -> Tensor:
        """What the U-Net puts out, without guidance."""
        sample, text = latents.to(self.network.dtype), conditioning.to(self.network.dtype)
        return network(sample, model_time, text, return_dict=False)[0].float()
