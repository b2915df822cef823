"""Stable Diffusion 3 and 3.5: any `StableDiffusion3Pipeline` folder or Hub id; a flow model."""

# diffusers and transformers have no usable types.
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline
from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.models.autoencoder import Autoencoder
from rlhf_t2i.models.family import latent_size
from rlhf_t2i.models.guidance import ClassifierFree
from rlhf_t2i.models.levels import FlowLevels, shift_for
from rlhf_t2i.models.lora import JOINT_ATTENTION
from rlhf_t2i.models.text_encoders import TextEncoder, with_summary, without_summary

T5_TOKENS = 256
"""What the stock pipeline gives to T5, which could read more."""


class StableDiffusion3(ClassifierFree):
    """Two CLIPs and, if the folder has it, a T5; and a transformer that is told of their states and of a summary."""

    pipeline_class: ClassVar[type[Any]] = StableDiffusion3Pipeline
    title: ClassVar[str] = "Stable Diffusion 3"
    tag: ClassVar[str] = "stable-diffusion-3"
    is_flow: ClassVar[bool] = True
    component: ClassVar[Literal["unet", "transformer"]] = "transformer"
    lora_targets: ClassVar[Sequence[str]] = JOINT_ATTENTION

    def __init__(
        self, pipeline: Any, *, device: torch.device, dtype: torch.dtype, resolution: int | None = None
    ) -> None:
        """Take a loaded pipeline's parts. Text encoders and autoencoder are held in `dtype`.

        Raises ValueError for a scheduler that `FlowLevels` refuses.
        """
        self.network: Any = pipeline.transformer
        config, encoder_of = self.network.config, partial(TextEncoder, device=device, dtype=dtype)
        height, width = latent_size(
            resolution, config.sample_size, scale=pipeline.vae_scale_factor, patch=config.patch_size
        )
        self.latent_shape = (config.in_channels, height, width)
        num_patches = (height // config.patch_size) * (width // config.patch_size)
        self.levels = FlowLevels(
            pipeline.scheduler.config, device=device, shift=shift_for(num_patches, pipeline.scheduler.config)
        )
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
            pipeline.vae, pixels_per_latent=pipeline.vae_scale_factor, device=device, dtype=dtype
        )
        with torch.no_grad():
            self.empty = self.read([""])

    def read(self, prompts: Sequence[str]) -> Float[Tensor, "B L D"]:
        """Both CLIPs' states side by side, T5's after them (zeros without it), and the CLIPs' summaries."""
        (first, summary), (second, other) = (encoder.penultimate(prompts) for encoder in self._clips)
        width = self.network.config.joint_attention_dim
        clips = torch.cat([first, second], dim=-1)
        clips = F.pad(clips, (0, width - clips.shape[-1]))
        if self._t5 is None:
            more = clips.new_zeros(len(prompts), T5_TOKENS, width)
        else:
            more = self._t5.model(self._t5.tokens(prompts)[0])[0].to(clips.dtype)
        return with_summary(torch.cat([clips, more], dim=1), torch.cat([summary, other], dim=-1))

    def denoise(self, network: Any, latents: Tensor, model_time: Tensor, conditioning: Tensor) -> Tensor:
        """The velocity, without guidance."""
        config, dtype = self.network.config, self.network.dtype
        text, summary = without_summary(
            conditioning.to(dtype), width=config.joint_attention_dim, summary_width=config.pooled_projection_dim
        )
        return network(
            hidden_states=latents.to(dtype), timestep=model_time, encoder_hidden_states=text,
            pooled_projections=summary, return_dict=False,
        )[0].float()  # fmt: skip
