"""Z-Image and Z-Image-Turbo: any `ZImagePipeline` folder or Hub id; a flow model."""

# diffusers and transformers have no usable types.
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from diffusers import ZImagePipeline
from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.models.autoencoder import Autoencoder
from rlhf_t2i.models.family import latent_size
from rlhf_t2i.models.guidance import ClassifierFree
from rlhf_t2i.models.levels import FlowLevels, shift_for
from rlhf_t2i.models.lora import ATTENTION
from rlhf_t2i.models.text_encoders import TextEncoder

MAX_TOKENS, PATCH = 512, 2
"""What the stock pipeline lets the text encoder read, and the side of the squares of latents that are a token each."""
OWN_PIXELS = 1024
"""On each side of the images that the stock pipeline paints; the transformer's config does not say."""


class ZImage(ClassifierFree):
    """A language model that reads the prompt as a chat, and one stream of image and words.

    The stock pipeline's guidance_scale is one less than that of others: 0 is off.
    """

    pipeline_class: ClassVar[type[Any]] = ZImagePipeline
    title: ClassVar[str] = "Z-Image"
    tag: ClassVar[str] = "z-image"
    is_flow: ClassVar[bool] = True
    guidance_when_off: ClassVar[float] = 0.0
    component: ClassVar[Literal["unet", "transformer"]] = "transformer"
    lora_targets: ClassVar[Sequence[str]] = tuple(f"attention.{name}" for name in ATTENTION)

    def __init__(
        self, pipeline: Any, *, device: torch.device, dtype: torch.dtype, resolution: int | None = None
    ) -> None:
        """Take a loaded pipeline's parts. Text encoder and autoencoder are held in `dtype`.

        Raises ValueError for a scheduler that `FlowLevels` refuses.
        """
        self.network: Any = pipeline.transformer
        scale, scheduler = pipeline.vae_scale_factor, pipeline.scheduler.config
        height, width = latent_size(resolution or OWN_PIXELS, 0, scale=scale, patch=PATCH)
        self.latent_shape = (self.network.config.in_channels, height, width)
        num_patches = (height // PATCH) * (width // PATCH)
        self.levels = FlowLevels(scheduler, device=device, shift=shift_for(num_patches, scheduler), even=True)
        tokenizer = pipeline.tokenizer
        self._reader = TextEncoder(
            tokenizer, pipeline.text_encoder, device=device, dtype=dtype,
            max_length=min(MAX_TOKENS, tokenizer.model_max_length), wrap=partial(as_chat, tokenizer),
        )  # fmt: skip
        self.text_encoders = [self._reader]
        self.autoencoder = Autoencoder(pipeline.vae, pixels_per_latent=scale, device=device, dtype=dtype)
        with torch.no_grad():
            self.empty = self.read([""])

    def read(self, prompts: Sequence[str]) -> Float[Tensor, "B L D"]:
        """The states before the last layer, those of real tokens first; the last column is 1 for these, else 0."""
        ids, mask = self._reader.tokens(prompts)
        states = self._reader.model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
        length = self._reader.max_length
        rows = [F.pad(row[real], (0, 1), value=1.0) for row, real in zip(states, mask.bool(), strict=True)]
        return torch.stack([F.pad(row, (0, 0, 0, length - len(row))) for row in rows])

    def denoise(self, network: Any, latents: Tensor, model_time: Tensor, conditioning: Tensor) -> Tensor:
        """The velocity, without guidance. The network's own time and direction run from noise to image."""
        dtype = self.network.dtype
        counts = (conditioning[..., -1] > 0).sum(dim=1).tolist()
        words = [row[:count, :-1] for row, count in zip(conditioning.to(dtype), counts, strict=True)]
        images = list(latents.to(dtype).unsqueeze(2))
        found = network(images, (1000 - model_time) / 1000, words, return_dict=False)[0]
        return -torch.stack(found).squeeze(2).float()


def as_chat(tokenizer: Any, prompt: str) -> str:
    """What the language model is given: the prompt as a user's message, and the start of an answer."""
    message = {"role": "user", "content": prompt}
    return tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True, enable_thinking=True)
