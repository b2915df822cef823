"""FLUX.2 klein and klein-base, 4B and 9B: any `Flux2KleinPipeline` folder or Hub id; a flow model."""

# diffusers has no usable types.
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers import Flux2KleinPipeline
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from rlhf_t2i.models.autoencoder import Autoencoder, latent_size
from rlhf_t2i.models.base import DiffusionPolicy
from rlhf_t2i.models.levels import FlowLevels
from rlhf_t2i.models.lora import JOINT_ATTENTION
from rlhf_t2i.models.text_encoders import TextEncoder, as_chat
from rlhf_t2i.types import Conditioning, Resolution

MAX_TOKENS, LAYERS = 512, (9, 18, 27)
"""Length of the text encoder's input, and its layers whose hidden states are the prompt, of the stock pipeline."""
REFERENCE_TIME = 10
"""First coordinate of the position of a reference image's tokens; that of the image which is generated is 0."""
PATCH, OWN_PIXELS = 2, 1024
"""Side in the autoencoder's latents of the square that is one token, and default side of an image in pixels."""


class Flux2(DiffusionPolicy):
    """A language model, and a transformer over all its tokens, padding too, and squares of latents.

    The klein models are distilled to few steps and have no guidance; the base models have classifier-free guidance.
    """

    pipeline_class = Flux2KleinPipeline
    title = "FLUX.2 klein"
    tag = "flux2"
    is_flow = True
    component = "transformer"
    lora_targets = (*JOINT_ATTENTION, "attn.to_qkv_mlp_proj")
    mlp_targets = ("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out")

    def load_parts(self, pipeline: Any, resolution: Resolution | None) -> None:
        """Set the parts; ValueError for a text encoder of another model or an unsupported scheduler."""
        config, scale = self.network.config, pipeline.vae_scale_factor * PATCH
        self.is_distilled: bool = pipeline.config.is_distilled
        height, width = latent_size(resolution or OWN_PIXELS, 0, scale=scale)
        self.latent_shape = (config.in_channels, height, width)
        self.levels = FlowLevels(
            pipeline.scheduler.config, device=self.device, shift=partial(fitted_shift, height * width), even=True
        )
        encoder = TextEncoder(
            pipeline.tokenizer, pipeline.text_encoder, device=self.device, dtype=self.dtype, max_length=MAX_TOKENS,
            template=partial(as_chat, pipeline.tokenizer, thinks=False),
        )  # fmt: skip
        _check_text_encoder(encoder.model.config, width=config.joint_attention_dim)
        self.text_encoders = [encoder]
        self.autoencoder = SquaresAutoencoder(
            pipeline.vae, pixels_per_latent=scale, device=self.device, dtype=self.dtype
        )

    @classmethod
    def target_layers(cls, network: nn.Module, chosen: str | None) -> Sequence[str]:
        """Add the outputs of the single blocks' attention to the presets; only the network knows their names."""
        found = super().target_layers(network, chosen)
        if chosen not in (None, "attention", "attention_mlp"):
            return found
        outputs = [
            n for n, layer in network.named_modules() if n.endswith("attn.to_out") and isinstance(layer, nn.Linear)
        ]
        return [*found, *outputs]

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Return the hidden states of three layers side by side."""
        [encoder] = self.text_encoders
        ids, mask = encoder.tokens(prompts)
        states = encoder.model(
            input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False, logits_to_keep=1
        ).hidden_states
        return Conditioning(torch.cat([states[layer] for layer in LAYERS], dim=-1))

    def guided(
        self,
        latents: Float[Tensor, "B C H W"],
        model_time: Float[Tensor, " B"],
        conditioning: Conditioning,
        *,
        guidance_scale: float,
    ) -> Float[Tensor, "B C H W"]:
        """Return the velocity with classifier-free guidance; ValueError for a scale above 1 and a distilled model."""
        if guidance_scale > 1 and self.is_distilled:
            raise ValueError(
                f"guidance_scale is {guidance_scale}; this model (FLUX.2 klein) is distilled and has no guidance: set "
                f"it to 1, or give a base model such as black-forest-labs/FLUX.2-klein-base-4B."
            )
        return super().guided(latents, model_time, conditioning, guidance_scale=guidance_scale)

    def denoise(self, latents: Tensor, model_time: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the velocity of the tokens of the latents; those of a reference image follow them as more tokens."""
        images = [latents] if conditioning.image is None else [latents, conditioning.image]
        states, dtype, device = conditioning.states.to(self.network.dtype), self.network.dtype, latents.device
        velocity = self.denoiser(
            hidden_states=torch.cat([each.to(dtype).flatten(2) for each in images], dim=2).transpose(1, 2),
            encoder_hidden_states=states,
            img_ids=torch.cat([
                _positions(REFERENCE_TIME * i, each.shape[2], each.shape[3], 1, device=device)
                for i, each in enumerate(images)
            ]),
            txt_ids=_positions(0, 1, 1, states.shape[1], device=device),
            timestep=model_time / 1000, return_dict=False,
        )[0]  # fmt: skip
        own = velocity[:, : latents.shape[2:].numel()]
        return own.float().transpose(1, 2).unflatten(2, latents.shape[2:])


class SquaresAutoencoder(Autoencoder):
    """An autoencoder for a denoiser of squares of its latents: 2 x 2 of them are the channels of one.

    Their mean and variance are the running statistics of its batch norm.
    """

    def run_decoder(self, encoded: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 3 Y X"]:
        return super().run_decoder(pixel_shuffle(encoded, PATCH))

    def run_encoder(
        self, images: Float[Tensor, "B 3 Y X"], generators: Sequence[torch.Generator] | None
    ) -> Float[Tensor, "B C H W"]:
        return pixel_unshuffle(super().run_encoder(images, generators), PATCH)

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        mean, variance = (
            part.float().view(1, -1, 1, 1) for part in (self.vae.bn.running_mean, self.vae.bn.running_var)
        )
        return (variance + self.vae.config.batch_norm_eps).rsqrt(), mean


def _positions(time: int, rows: int, columns: int, tokens: int, *, device: torch.device) -> Tensor:
    """Return the four coordinates of every token of a grid: time, row, column and place in the text."""
    counts = (torch.arange(count, device=device) for count in (rows, columns, tokens))
    return torch.cartesian_prod(torch.full((1,), time, device=device), *counts)


def fitted_shift(num_patches: int, num_steps: int) -> float:
    """Return the shift towards noise of the stock pipeline, for an image of so many patches and so many steps.

    It is linear in the steps, through one line in the patches for 10 steps and one for 200; large images take the
    latter. The constants were fitted by the authors of FLUX.2.
    """
    at_200 = 0.00016927 * num_patches + 0.45666666
    if num_patches > 4300:
        return at_200
    at_10 = 8.73809524e-05 * num_patches + 1.89833333
    return at_200 + (at_200 - at_10) / 190 * (num_steps - 200)


def _check_text_encoder(config: Any, *, width: int) -> None:
    """Raise ValueError for a text encoder whose hidden states are not those that the transformer takes."""
    if config.num_hidden_layers < LAYERS[-1] or config.hidden_size * len(LAYERS) != width:
        raise ValueError(
            f"The model's text encoder has {config.num_hidden_layers} layers of width {config.hidden_size}; its "
            f"transformer takes the layers {', '.join(map(str, LAYERS))} of one of width {width // len(LAYERS)}."
        )
