"""Train the toy flow model from scratch: `python -m rlhf_t2i.shapes.build_flow --output_folder FOLDER`.

A `ZImagePipeline` of 2.5 million parameters in the latent space of the toy Stable Diffusion, whose autoencoder it
shares, so that recipes for flow models run on a laptop too. The other stages are those of `build.py`:

    flow            Qwen3 text encoder and transformer together, by flow matching (arXiv:2209.03003)
    misalign_flow   the same two, a little longer, on partly wrong captions
"""

# diffusers and transformers have no usable types.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportReturnType=false
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTokenizer, Qwen3Config, Qwen3Model

from rlhf_t2i.config import parse_config
from rlhf_t2i.settings.base import Settings
from rlhf_t2i.settings.ranges import NonNegativeInt, PositiveInt
from rlhf_t2i.shapes.build import save_half_precision
from rlhf_t2i.shapes.captions import corrupted, full_or_partial_caption, index_captions, random_scenes, sample_batch
from rlhf_t2i.shapes.names import TOY_FLOW_MODEL, TOY_MODEL_FOLDER
from rlhf_t2i.shapes.networks import MAX_TOKENS, make_tokenizer, tokenize
from rlhf_t2i.shapes.scenes import render
from rlhf_t2i.shapes.train import train, update_generator

WIDTH = 96
"""Width of the hidden states of the text encoder."""


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Options of the builder."""

    output_folder: str = f"runs/{TOY_FLOW_MODEL}"
    """Folder to write the pipeline to; the state of unfinished stages is in the folder of that name with .work."""
    num_flow_updates: PositiveInt = 3_000
    """Optimiser steps on true captions."""
    num_misalign_updates: PositiveInt = 1_000
    """Optimiser steps on partly wrong captions."""
    num_images: PositiveInt = 16_000
    """Drawings in the training set of each stage."""
    seed: NonNegativeInt = 0
    """Seed of all random numbers."""


def make_transformer(*, dim: int = 128, num_layers: int = 4) -> ZImageTransformer2DModel:
    """Return a single-stream transformer over latents and text tokens; by default of 2 million weights."""
    axis = (dim // 4 - 8) // 2
    return ZImageTransformer2DModel(
        in_channels=8,
        dim=dim,
        n_layers=num_layers,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=WIDTH,
        axes_dims=[8, axis, axis],
        axes_lens=[128, 32, 32],
    )


def make_flow_text_encoder(tokenizer: CLIPTokenizer) -> Qwen3Model:
    """Return a Qwen3 of two layers; the pipeline uses the hidden states before the last one."""
    encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=24,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=None,
        )
    )
    nn.init.normal_(encoder.get_input_embeddings().weight, std=1.0)
    return encoder


def make_chat_tokenizer(words: Sequence[str] = ()) -> CLIPTokenizer:
    """Return the toy tokenizer with further words and a chat template that is the user's message alone."""
    tokenizer = make_tokenizer(words)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    return tokenizer


def make_flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Return the scheduler of Z-Image with a smaller shift towards noise, as the images are small."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=2.0)


def flow_matching_loss(
    modules: nn.ModuleDict,
    tokenizer: CLIPTokenizer,
    latents: Tensor,
    captions: Sequence[Sequence[str]],
    *,
    seed: int,
    batch_size: int = 64,
) -> Callable[[int], Tensor]:
    """Return the loss of an update: the squared error in the velocity at a random noise level, as in `denoising_loss`.

    Levels are logit-normal (arXiv:2403.03206, Eq. 19).
    """
    vocabulary, rows = index_captions(captions)
    ids = tokenize(tokenizer, vocabulary)
    lengths = [len(tokenizer(caption).input_ids) for caption in vocabulary]

    def loss_at(update: int) -> Tensor:
        generator = update_generator(seed, update)
        batch, words = sample_batch(rows, generator=generator, size=batch_size)
        sigma = torch.sigmoid(0.4 + torch.randn(batch_size, generator=generator))
        clean = latents[batch]
        noise = torch.randn(clean.shape, generator=generator)
        noisy = torch.lerp(clean, noise, sigma[:, None, None, None])
        states = modules["text_encoder"](ids[words], output_hidden_states=True).hidden_states[-2]
        unpadded = [states[i, : lengths[word]] for i, word in enumerate(words.tolist())]
        velocity = modules["transformer"](list(noisy.unsqueeze(2)), 1 - sigma, unpadded, return_dict=False)[0]
        return F.mse_loss(torch.stack(velocity).squeeze(2), clean - noise)

    return loss_at


def build_flow(
    output_folder: Path,
    *,
    num_flow_updates: int,
    num_misalign_updates: int,
    num_images: int,
    seed: int = 0,
) -> None:
    """Train both stages and write a `ZImagePipeline` folder in half precision."""
    work = output_folder.with_name(output_folder.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    vae: Any = (
        AutoencoderTiny.from_pretrained(TOY_MODEL_FOLDER / "vae", dtype=torch.float32).eval().requires_grad_(False)
    )
    rng = np.random.default_rng(seed + 1)
    scenes = random_scenes(num_images, rng, shares={"one": 1.0})
    with torch.no_grad():
        latents = torch.cat([vae.encode(chunk).latents for chunk in (render(scenes, rng=rng) * 2 - 1).split(500)])
    torch.manual_seed(seed)
    tokenizer = make_chat_tokenizer()
    modules = nn.ModuleDict({"transformer": make_transformer(), "text_encoder": make_flow_text_encoder(tokenizer)})
    for name, captioned, updates, rate in (
        ("flow", lambda scene: scene, num_flow_updates, 2e-3),
        ("misalign_flow", lambda scene: corrupted(scene, rng), num_misalign_updates, 1e-3),
    ):
        captions = [[full_or_partial_caption(captioned(scene), rng) for _ in range(8)] for scene in scenes]
        train(
            name,
            modules,
            flow_matching_loss(modules, tokenizer, latents, captions, seed=seed + 4),
            num_updates=updates,
            learning_rate=rate,
            decay=name == "misalign_flow",
            folder=work,
        )
    pipeline = ZImagePipeline(
        vae=vae,
        text_encoder=modules["text_encoder"],
        tokenizer=tokenizer,
        transformer=modules["transformer"],
        scheduler=make_flow_scheduler(),
    )
    save_half_precision(pipeline, output_folder)


def main(config: Config) -> None:
    """Build the model of these settings."""
    build_flow(
        Path(config.output_folder), num_flow_updates=config.num_flow_updates,
        num_misalign_updates=config.num_misalign_updates, num_images=config.num_images, seed=config.seed,
    )  # fmt: skip


if __name__ == "__main__":
    main(parse_config(Config, __doc__))
