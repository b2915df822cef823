"""The untrained networks, tokenizer and scheduler of the toy Stable Diffusion."""

# diffusers and transformers have no usable types.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false
from __future__ import annotations

from collections.abc import Sequence

from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from rlhf_t2i.shapes.scenes import BACKGROUNDS, COLOURS, COUNTS, RELATIONS, SHAPES

MAX_TOKENS = 24
"""Number of tokens to which a caption is padded."""


def make_autoencoder() -> AutoencoderTiny:
    """Return an autoencoder of 32 x 32 pixels with 8 x 8 latents of 8 channels; 0.3 million parameters."""
    return AutoencoderTiny(
        latent_channels=8,
        encoder_block_out_channels=(32, 32, 32),
        decoder_block_out_channels=(32, 32, 32),
        num_encoder_blocks=(1, 2, 2),
        num_decoder_blocks=(2, 2, 1),
    )


def make_denoiser() -> UNet2DConditionModel:
    """Return a U-Net over 8 x 8 latents with cross-attention at its lower level; 2.5 million parameters."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        block_out_channels=(64, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=96,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def make_text_encoder(tokenizer: CLIPTokenizer, *, position_std: float = 0.3) -> CLIPTextModel:
    """Return a CLIP text encoder of two layers of width 96; `position_std` is that of its position embeddings.

    Token embeddings with a large standard deviation make the words distinct from the first update on.
    """
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=192,
            projection_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    embeddings = encoder.get_input_embeddings()
    nn.init.normal_(embeddings.weight, std=1.0)
    for name, parameter in encoder.named_parameters():
        if "position_embedding" in name:
            nn.init.normal_(parameter, std=position_std)
    return encoder


def make_tokenizer(words: Sequence[str] = ()) -> CLIPTokenizer:
    """Return a byte-pair tokenizer that makes each word of the grammar one token and splits other text into letters.

    `words` are further words that are one token each.
    """
    text = [*COLOURS, *BACKGROUNDS, *COUNTS, *" ".join(RELATIONS).split(), "a", "thing", "on", "background"]
    text += [shape + ending for shape in SHAPES for ending in ("", "s")] + list(words)
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = dict.fromkeys([*letters, *(letter + "</w>" for letter in letters)])
    merges: dict[str, None] = {}
    for word in dict.fromkeys(text):
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merges[f"{parts[-2]} {parts[-1]}"] = None
            parts[-2:] = [parts[-2] + parts[-1]]
            vocabulary[parts[-1]] = None
    special = ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate([*vocabulary, *special])},
        merges=[tuple(merge.split()) for merge in merges],
        model_max_length=MAX_TOKENS,
    )


def make_scheduler() -> DDIMScheduler:
    """Return the schedule of Stable Diffusion, with v-prediction."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Return padded token ids (B, MAX_TOKENS)."""
    return tokenizer(list(captions), padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids
