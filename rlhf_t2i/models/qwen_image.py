"""Qwen-Image and Qwen-Image-2512: any `QwenImagePipeline` folder or Hub id; a flow model."""

# diffusers has no usable types.
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import QwenImagePipeline
from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.distributed.types import UNREAD
from rlhf_t2i.models.autoencoder import Autoencoder, latent_size
from rlhf_t2i.models.base import DiffusionPolicy
from rlhf_t2i.models.flux import PATCH, packed, unpacked
from rlhf_t2i.models.levels import FlowLevels, shift_for
from rlhf_t2i.models.lora import JOINT_ATTENTION
from rlhf_t2i.models.text_encoders import TextEncoder, real_tokens
from rlhf_t2i.types import Conditioning, Resolution

MAX_TOKENS, OWN_PIXELS = 512, 1024
"""Longest prompt of the stock pipeline in tokens, with the end of its template, and default side of an image."""
CHUNK = 128
"""The rows of text in a forward pass are a multiple of this, so that few batches differ in length."""


class QwenImage(DiffusionPolicy):
    """A language model that reads the prompt in a template, and a transformer with two streams.

    Guidance takes a second pass, with a prompt of one blank; each token of the result gets the norm that it has without
    guidance.
    """

    pipeline_class = QwenImagePipeline
    title = "Qwen-Image"
    tag = "qwen-image"
    is_flow = True
    component = "transformer"
    lora_targets = JOINT_ATTENTION
    mlp_targets = ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")

    def load_parts(self, pipeline: Any, resolution: Resolution | None) -> None:
        """Set the parts; ValueError for an unsupported scheduler, text encoder or distilled transformer."""
        config, scale, scheduler = self.network.config, pipeline.vae_scale_factor, pipeline.scheduler.config
        if config.guidance_embeds:
            raise ValueError("The model's transformer takes its guidance scale as an input, which is not supported.")
        self.patch = PATCH
        height, width = latent_size(resolution or OWN_PIXELS, 0, scale=scale, patch=PATCH)
        self.latent_shape = (config.in_channels // PATCH**2, height, width)
        num_patches = (height // PATCH) * (width // PATCH)
        self.levels = FlowLevels(scheduler, device=self.device, shift=shift_for(num_patches, scheduler), even=True)
        self._skipped: int = pipeline.prompt_template_encode_start_idx
        encoder = TextEncoder(
            pipeline.tokenizer, pipeline.text_encoder, device=self.device, dtype=self.dtype,
            max_length=self._skipped + MAX_TOKENS, template=pipeline.prompt_template_encode.format,
        )  # fmt: skip
        found, expected = encoder.model.config.get_text_config().hidden_size, config.joint_attention_dim
        if found != expected:
            raise ValueError(f"The model's text encoder has width {found}; its transformer takes one of {expected}.")
        last = f"transformer_blocks.{config.num_layers - 1}"
        setattr(self.network, UNREAD, (f"{last}.attn.to_add_out.", f"{last}.txt_mlp."))  # the last states of the text
        self.text_encoders = [encoder]
        self.autoencoder = FrameAutoencoder(pipeline.vae, pixels_per_latent=scale, device=self.device, dtype=self.dtype)

    def encode_unconditional(self) -> Conditioning:
        return self.encode_prompts([" "])

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Return the last hidden states, without those of the template before the prompt."""
        [encoder] = self.text_encoders
        ids, mask = encoder.tokens(prompts)
        states = encoder.model(
            input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False, logits_to_keep=1
        ).hidden_states[-1]
        return real_tokens(states, mask, length=MAX_TOKENS, skip=self._skipped)

    def combined(self, unconditional: Tensor, conditional: Tensor, guidance_scale: float) -> Tensor:
        """Return the guided output; each of its tokens has the norm of the conditional one."""
        guided = packed(super().combined(unconditional, conditional, guidance_scale))
        norms = packed(conditional).norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
        return unpacked(guided * norms, *conditional.shape[2:])

    @classmethod
    def stock_arguments(cls, guidance_scale: float) -> dict[str, Any]:
        return {"true_cfg_scale": guidance_scale, "negative_prompt": " "}

    def denoise(self, latents: Tensor, model_time: Tensor, conditioning: Conditioning) -> Tensor:
        assert conditioning.mask is not None
        dtype, (height, width) = self.network.dtype, latents.shape[2:]
        length = -(-int(conditioning.mask.sum(dim=1).max()) // CHUNK) * CHUNK
        velocity = self.denoiser(
            hidden_states=packed(latents.to(dtype)), encoder_hidden_states=conditioning.states[:, :length].to(dtype),
            encoder_hidden_states_mask=conditioning.mask[:, :length], timestep=model_time / 1000, return_dict=False,
            img_shapes=[[(1, height // PATCH, width // PATCH)]] * len(latents),
        )[0]  # fmt: skip
        return unpacked(velocity.float(), height, width)


class FrameAutoencoder(Autoencoder):
    """An autoencoder of videos, for one frame."""

    def run_decoder(self, encoded: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 3 Y X"]:
        """Decode as the network's own `decode`, which also clamps, so that saturated pixels would have no gradient."""
        self.vae.clear_cache()
        frame = self.vae.post_quant_conv(encoded.unsqueeze(2))
        images = self.vae.decoder(frame, feat_cache=self.vae._feat_map, feat_idx=[0])
        self.vae.clear_cache()
        return images.squeeze(2)

    def run_encoder(
        self, images: Float[Tensor, "B 3 Y X"], generators: Sequence[torch.Generator] | None
    ) -> Float[Tensor, "B C H W"]:
        return super().run_encoder(images.unsqueeze(2), generators).squeeze(2)
