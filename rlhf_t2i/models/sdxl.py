"""Stable Diffusion XL: any `StableDiffusionXLPipeline` folder or Hub id, with noise or v prediction."""

# diffusers and transformers have no usable types.
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from diffusers import StableDiffusionXLPipeline
from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.models.autoencoder import Autoencoder
from rlhf_t2i.models.family import latent_size
from rlhf_t2i.models.guidance import ClassifierFree
from rlhf_t2i.models.levels import DiffusionLevels
from rlhf_t2i.models.lora import ATTENTION
from rlhf_t2i.models.text_encoders import TextEncoder, with_summary, without_summary


class StableDiffusionXL(ClassifierFree):
    """Two text encoders, and a U-Net that is told of their states, of a summary, and of the image's size."""

    pipeline_class: ClassVar[type[Any]] = StableDiffusionXLPipeline
    title: ClassVar[str] = "Stable Diffusion XL"
    tag: ClassVar[str] = "stable-diffusion-xl"
    is_flow: ClassVar[bool] = False
    component: ClassVar[Literal["unet", "transformer"]] = "unet"
    lora_targets: ClassVar[Sequence[str]] = ATTENTION

    def __init__(
        self, pipeline: Any, *, device: torch.device, dtype: torch.dtype, resolution: int | None = None
    ) -> None:
        """Take a loaded pipeline's parts. Text encoders and autoencoder are held in `dtype`.

        In float16 the autoencoder is held in float32 if its config says that it overflows, as the stock pipeline does.
        Raises ValueError for a scheduler that `DiffusionLevels` refuses, for a pipeline without its first text encoder
        (a refiner) and for one that is told of its guidance (a distilled model).
        """
        if pipeline.text_encoder is None:
            raise ValueError("The model is a refiner of images, with one text encoder; give the base model.")
        self.network: Any = pipeline.unet
        if self.network.config.time_cond_proj_dim is not None:
            raise ValueError("The U-Net is told of its guidance, as distilled ones are (LCM); give the base model.")
        self.levels = DiffusionLevels(pipeline.scheduler.config, device=device)
        self.text_encoders = [
            TextEncoder(pipeline.tokenizer, pipeline.text_encoder, device=device, dtype=dtype),
            TextEncoder(pipeline.tokenizer_2, pipeline.text_encoder_2, device=device, dtype=dtype),
        ]
        overflows = dtype == torch.float16 and pipeline.vae.config.get("force_upcast", False)
        self.autoencoder = Autoencoder(
            pipeline.vae, pixels_per_latent=pipeline.vae_scale_factor, device=device,
            dtype=torch.float32 if overflows else dtype,
        )  # fmt: skip
        size = latent_size(resolution, self.network.config.sample_size, scale=pipeline.vae_scale_factor)
        self.latent_shape = (self.network.config.in_channels, *size)
        with torch.no_grad():
            empty = self.read([""])
        self.empty = torch.zeros_like(empty) if pipeline.config.force_zeros_for_empty_prompt else empty

    def read(self, prompts: Sequence[str]) -> Float[Tensor, "B L D"]:
        """Both encoders' states side by side, as many rows as there are tokens; and the second one's summary."""
        first, _ = self.text_encoders[0].penultimate(prompts)
        second, summary = self.text_encoders[1].penultimate(prompts)
        return with_summary(torch.cat([first, second], dim=-1), summary)

    def denoise(self, network: Any, latents: Tensor, model_time: Tensor, conditioning: Tensor) -> Tensor:
        """What the U-Net puts out, without guidance."""
        dtype = self.network.dtype
        text, summary = without_summary(
            conditioning.to(dtype),
            width=self.network.config.cross_attention_dim,
            summary_width=self.text_encoders[1].model.config.projection_dim,
        )
        told = {"text_embeds": summary, "time_ids": self._size.to(dtype).expand(len(latents), -1)}
        sample = latents.to(dtype)
        return network(sample, model_time, text, added_cond_kwargs=told, return_dict=False)[0].float()

    @property
    def _size(self) -> Float[Tensor, "1 6"]:
        """An image of the model's own size that was neither scaled nor cut: original size, crop, target size."""
        _, *size = self.latent_shape
        height, width = (pixels * self.autoencoder.pixels_per_latent for pixels in size)
        return torch.tensor([[height, width, 0.0, 0.0, height, width]], device=self.autoencoder.device)
