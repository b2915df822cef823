"""SANA and SANA-1.5: any `SanaPipeline` folder or Hub id; a flow model with linear attention."""

# diffusers has no usable types.
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline
from torch import Tensor

from rlhf_t2i.models.autoencoder import Autoencoder, latent_size
from rlhf_t2i.models.base import DiffusionPolicy
from rlhf_t2i.models.levels import FlowLevels
from rlhf_t2i.models.lora import ATTENTION
from rlhf_t2i.models.text_encoders import TextEncoder
from rlhf_t2i.types import Conditioning, Resolution

MAX_TOKENS = 300
"""Rows of text that the transformer gets in the stock pipeline: the first one and the last 299."""
INSTRUCTION = "\n".join(inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default)
"""Complex human instruction, which the stock pipeline puts before every prompt but the unconditional one."""


class Sana(DiffusionPolicy):
    """A Gemma 2 that reads an instruction and the prompt, and a transformer over the latents of a DC-AE.

    Checkpoints are saved with a multistep solver, whose steps have no density; Euler steps take its place.
    """

    pipeline_class = SanaPipeline
    title = "SANA"
    tag = "sana"
    is_flow = True
    component = "transformer"
    lora_targets = ATTENTION
    mlp_targets = ("ff.conv_inverted", "ff.conv_point")
    replaces_solver = True

    @classmethod
    def stock_arguments(cls, guidance_scale: float) -> dict[str, Any]:
        return {"guidance_scale": guidance_scale, "use_resolution_binning": False}

    def load_parts(self, pipeline: Any, resolution: Resolution | None) -> None:
        """Set the parts.

        Raises ValueError for a scheduler without flow levels, a text encoder of another width, and a distilled
        transformer, which takes the guidance scale as an input.
        """
        config, scale = self.network.config, pipeline.vae_scale_factor
        if config.guidance_embeds:
            raise ValueError(
                "The transformer takes its guidance scale as an input, as that of SANA-Sprint; give the base model."
            )
        self.patch = config.patch_size
        size = latent_size(resolution, config.sample_size, scale=scale, patch=self.patch)
        self.latent_shape = (config.in_channels, *size)
        scheduler = pipeline.scheduler.config
        if scheduler.get("use_flow_sigmas"):
            total = scheduler["num_train_timesteps"]
            scheduler = FlowMatchEulerDiscreteScheduler(total, shift=scheduler["flow_shift"]).config
        self.levels = FlowLevels(scheduler, device=self.device, shift=1.0)
        tokenizer = pipeline.tokenizer
        tokenizer.padding_side = "right"
        encoder_of = partial(TextEncoder, tokenizer, pipeline.text_encoder, device=self.device, dtype=self.dtype)
        length = len(tokenizer.encode(INSTRUCTION)) + MAX_TOKENS - 2
        instructed = encoder_of(max_length=length, template=lambda prompt: INSTRUCTION + _as_trained(prompt))
        self._plain = encoder_of(max_length=MAX_TOKENS, template=_as_trained)
        found, expected = self._plain.model.config.hidden_size, config.caption_channels
        if found != expected:
            raise ValueError(f"The model's text encoder has width {found}; its transformer takes one of {expected}.")
        self.text_encoders = [instructed]
        self.autoencoder = Autoencoder(pipeline.vae, pixels_per_latent=scale, device=self.device, dtype=self.dtype)

    def leave_out_instruction(self) -> None:
        self.text_encoders = [self._plain]

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Return the hidden states of the first token and of the last ones, of which padding is masked."""
        [encoder] = self.text_encoders
        found = _encoded(encoder, prompts)
        rows = torch.cat([torch.zeros(1, dtype=torch.int64), torch.arange(1 - MAX_TOKENS, 0)])
        assert found.mask is not None
        return Conditioning(found.states[:, rows], mask=found.mask[:, rows])

    def encode_unconditional(self) -> Conditioning:
        """Return the empty prompt, encoded without the instruction."""
        return _encoded(self._plain, [""])

    def denoise(self, latents: Tensor, model_time: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the velocity; a transformer that also predicts a variance has it in a second half of its channels."""
        dtype, given = self.network.dtype, conditioning.to(self.network.dtype)
        output = self.denoiser(
            latents.to(dtype), encoder_hidden_states=given.states, encoder_attention_mask=given.mask,
            timestep=model_time * self.network.config.timestep_scale, return_dict=False,
        )[0]  # fmt: skip
        return output[:, : self.latent_shape[0]].float()


def _as_trained(prompt: str) -> str:
    return prompt.lower().strip()


def _encoded(encoder: TextEncoder, prompts: Sequence[str]) -> Conditioning:
    ids, mask = encoder.tokens(prompts)
    return Conditioning(encoder.model(ids, attention_mask=mask)[0], mask=mask.bool())
