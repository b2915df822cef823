"""Tiny random pipelines of every family, in the on-disk format of the real models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def save_sd(folder: Path, *, prediction_type: str = "epsilon", scheduler: str = "PNDMScheduler") -> Path:
    """Save a pipeline like SD 1.5 or 2.1: one CLIP, noise or v prediction."""
    import diffusers
    from transformers import CLIPTextModel

    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    diffusers.StableDiffusionPipeline(
        unet=unet,
        vae=autoencoder(),
        text_encoder=clip(CLIPTextModel, hidden_size=16, num_layers=1),
        tokenizer=clip_tokenizer(),
        scheduler=getattr(diffusers, scheduler)(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            set_alpha_to_one=False,
            prediction_type=prediction_type,
            **({"clip_sample": False} if scheduler == "DDIMScheduler" else {"skip_prk_steps": True}),
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def save_sdxl(folder: Path, *, prediction_type: str = "epsilon") -> Path:
    """Save a pipeline like SDXL: two CLIPs, size conditioning, an Euler scheduler."""
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


def save_sd3(folder: Path, *, with_t5: bool = True, dynamic_shift: bool = False) -> Path:
    """Save a pipeline like SD 3.5: two CLIPs, a T5, dual attention in one block, normalised queries and keys."""
    import diffusers
    from transformers import CLIPTextModelWithProjection

    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        joint_attention_dim=48,
        caption_projection_dim=16,
        pooled_projection_dim=36,
        pos_embed_max_size=12,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    shifting = {"use_dynamic_shifting": True, "max_shift": 1.16} if dynamic_shift else {"shift": 3.0}
    diffusers.StableDiffusion3Pipeline(
        vae=autoencoder(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(CLIPTextModelWithProjection, hidden_size=16, projection_dim=16),
        text_encoder_2=clip(CLIPTextModelWithProjection, hidden_size=24, projection_dim=20),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(width=48) if with_t5 else None,
        tokenizer_3=t5_tokenizer() if with_t5 else None,
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**shifting),
    ).save_pretrained(folder)
    return folder


def save_flux(folder: Path, *, is_distilled: bool = True) -> Path:
    """Save a pipeline like FLUX.1 dev, with guidance as an input and a size-dependent shift, or schnell."""
    import diffusers
    from transformers import CLIPTextModel

    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        guidance_embeds=is_distilled,
        axes_dims_rope=(4, 6, 6),
    )
    shifting = {"use_dynamic_shifting": True, "shift": 3.0} if is_distilled else {"shift": 1.0}
    diffusers.FluxPipeline(
        vae=autoencoder(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(CLIPTextModel, hidden_size=16),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(width=24),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**shifting),
    ).save_pretrained(folder)
    return folder


def save_zimage(folder: Path) -> Path:
    """Save a pipeline like Z-Image: a Qwen3 with a chat template, one stream of image and text tokens."""
    import diffusers
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(0)
    tokenizer = chat_tokenizer()
    diffusers.ZImagePipeline(
        vae=autoencoder(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=Qwen3Model(
            Qwen3Config(
                vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, head_dim=8,
                num_attention_heads=2, num_key_value_heads=1,
            )
        ),
        tokenizer=tokenizer,
        transformer=diffusers.ZImageTransformer2DModel(
            in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
            axes_dims=[4, 6, 6], axes_lens=[128, 64, 64],
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_flux2(folder: Path) -> Path:
    """Save a pipeline like FLUX.2 klein-base: a Qwen3 of which three layers are used, a batch norm of latents."""
    import diffusers
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    tokenizer = chat_tokenizer()
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, latent_channels=4, layers_per_block=1,
    )  # fmt: skip
    vae.bn.running_mean.uniform_(-1, 1)
    vae.bn.running_var.uniform_(0.5, 2)
    diffusers.Flux2KleinPipeline(
        vae=vae,
        text_encoder=Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=28, head_dim=8,
                num_attention_heads=1, num_key_value_heads=1,
            )
        ),
        tokenizer=tokenizer,
        transformer=diffusers.Flux2Transformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=24, timestep_guidance_channels=16, guidance_embeds=False, axes_dims_rope=(4, 4, 4, 4),
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_sana(folder: Path) -> Path:
    """Save a pipeline like SANA: a Gemma 2, linear attention, a DC-AE, a multistep solver."""
    import diffusers
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    blocks: dict[str, Any] = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (
            ("block_types", ("ResBlock", "EfficientViTBlock")), ("block_out_channels", (8, 8)),
            ("qkv_multiscales", ((), (5,))), ("layers_per_block", (1, 1)),
        )
    }  # fmt: skip
    diffusers.SanaPipeline(
        vae=diffusers.AutoencoderDC(
            latent_channels=4, attention_head_dim=2, downsample_block_type="conv", upsample_block_type="interpolate",
            scaling_factor=0.41407, **blocks,
        ),
        text_encoder=Gemma2Model(
            Gemma2Config(
                vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, head_dim=8,
                num_attention_heads=2, num_key_value_heads=1,
            )
        ),
        tokenizer=tokenizer,
        transformer=diffusers.SanaTransformer2DModel(
            in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8, sample_size=8,
            num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
            timestep_scale=0.5,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction",
        ),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_qwen_image(folder: Path) -> Path:
    """Save a pipeline like Qwen-Image: a Qwen2.5-VL, two streams, an autoencoder of videos with a mean per channel."""
    import diffusers
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    text_config = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0},
    }  # fmt: skip
    vision_config = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    diffusers.QwenImagePipeline(
        vae=diffusers.AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
            latents_mean=[-0.8, 0.5, -0.9, 0.1], latents_std=[2.8, 1.4, 2.3, 1.1],
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text_config, vision_config=vision_config)
        ),
        tokenizer=tokenizer,
        transformer=diffusers.QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def chat_tokenizer() -> Any:
    """Return the tokenizer of the toy world with a chat template."""
    tokenizer = clip_tokenizer()
    tokenizer.chat_template = "a {{ messages[0]['content'] }}{% if add_generation_prompt %} thing{% endif %}"
    return tokenizer


def t5(*, width: int) -> Any:
    """Return a T5 encoder with two layers."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=len(t5_tokenizer()), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    )


def t5_tokenizer() -> Any:
    """Return a tokenizer with one token per letter."""
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0)]
    return T5Tokenizer(vocab=[*special, *((letter, -2.0) for letter in "▁abcdefghijklmnopqrstuvwxyz")], extra_ids=0)


def autoencoder(*, latent_channels: int = 4, **settings: Any) -> Any:
    """Return an AutoencoderKL with 2 x 2 pixels per latent."""
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
    """Return the tokenizer of the toy world."""
    from rlhf_t2i.shapes.networks import make_tokenizer

    return make_tokenizer()


def clip(kind: Any, *, hidden_size: int, projection_dim: int = 16, num_layers: int = 2) -> Any:
    """Return a CLIP text encoder; with two layers the hidden states before the last layer are not the inputs."""
    from transformers import CLIPTextConfig

    tokenizer = clip_tokenizer()
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=32,
            num_hidden_layers=num_layers,
            num_attention_heads=2,
            projection_dim=projection_dim,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
