"""Tiny random pipelines of every family, in the ordinary format of the model they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def save_sdxl(folder: Path, *, prediction_type: str = "epsilon") -> Path:
    """Like SDXL: two CLIPs, size conditioning, noise prediction, saved with an Euler scheduler."""
    import diffusers
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=40,
        attention_head_dim=(2, 4),
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 20,
    )
    diffusers.StableDiffusionXLPipeline(
        vae=autoencoder(scaling_factor=0.13025, force_upcast=True),
        text_encoder=clip(CLIPTextModel, hidden_size=16),
        text_encoder_2=clip(CLIPTextModelWithProjection, hidden_size=24, projection_dim=20),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
            prediction_type=prediction_type,
        ),
    ).save_pretrained(folder)
    return folder


def autoencoder(*, latent_channels: int = 4, **settings: Any) -> Any:
    """Two pixels a latent."""
    import diffusers

    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=latent_channels,
        **settings,
    )


def clip_tokenizer() -> Any:
    """Of the built-in world."""
    from rlhf_t2i.shapes.build import make_tokenizer

    return make_tokenizer()


def clip(kind: Any, *, hidden_size: int, projection_dim: int = 16) -> Any:
    """A text encoder with two layers, so that the last but one has states of its own."""
    from transformers import CLIPTextConfig

    tokenizer = clip_tokenizer()
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=projection_dim,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
