"""Train the toy Stable Diffusion from scratch: `python -m rlhf_t2i.shapes.build --output_folder FOLDER`.

Three stages, each from a fixed seed, each resumed where it was interrupted:

    autoencoder   AutoencoderTiny, f = 4, 8 latent channels, trained on scenes of every tier
    denoiser      CLIP text encoder and U-Net together, v-prediction, on the training prompts of tier "one"
    misalign      the same two, a little longer, on partly wrong captions

The last stage gives reinforcement learning something to improve: the images stay sharp, but the model learns that words
are often wrong, so without guidance it often generates another colour or shape than the prompt names. Guidance helps,
and tuning with a reward can undo the misalignment.
"""

# diffusers and transformers have no usable types.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportOptionalOperand=false, reportReturnType=false
from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from torch import Tensor, nn
from transformers import CLIPTokenizer

from rlhf_t2i.config import parse_config
from rlhf_t2i.settings.base import Settings
from rlhf_t2i.settings.ranges import NonNegativeInt, PositiveInt
from rlhf_t2i.shapes.captions import corrupted, full_or_partial_caption, index_captions, random_scenes, sample_batch
from rlhf_t2i.shapes.names import TOY_MODEL
from rlhf_t2i.shapes.networks import (
    make_autoencoder,
    make_denoiser,
    make_scheduler,
    make_text_encoder,
    make_tokenizer,
    tokenize,
)
from rlhf_t2i.shapes.scenes import render
from rlhf_t2i.shapes.train import train, update_generator


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Options of the builder."""

    output_folder: str = f"runs/{TOY_MODEL}"
    """Folder to write the pipeline to; the state of unfinished stages is in the folder of that name with .work."""
    num_autoencoder_updates: PositiveInt = 3_000
    """Optimiser steps of the autoencoder."""
    num_denoiser_updates: PositiveInt = 2_000
    """Optimiser steps of the text encoder and denoiser on true captions."""
    num_misalign_updates: PositiveInt = 1_000
    """Optimiser steps of the text encoder and denoiser on partly wrong captions."""
    num_images: PositiveInt = 16_000
    """Drawings in the training set of each stage."""
    seed: NonNegativeInt = 0
    """Seed of all random numbers."""


def train_autoencoder(
    vae: AutoencoderTiny, sample: Callable[[torch.Generator], Tensor], *, name: str, num_updates: int, folder: Path,
    seed: int,
) -> AutoencoderTiny:  # fmt: skip
    """Train an autoencoder to reconstruct images from normalised latents with a little noise.

    `sample` returns a batch of images in [-1, 1]. The noise makes the decoder robust to small errors of the denoiser.
    Latents are normalised per batch in training; the running mean and standard deviation are then folded into the last
    convolution of the encoder, so that the finished autoencoder needs no scaling factor.
    """
    normalise = nn.BatchNorm2d(vae.config.latent_channels, affine=False, eps=1e-8, momentum=0.02)

    def loss_at(update: int) -> Tensor:
        generator = update_generator(seed, update)
        batch = sample(generator)
        latents = normalise(vae.encoder(batch))
        latents = latents + 0.1 * torch.randn(latents.shape, generator=generator)
        decoded = vae.decoder(latents)
        return F.mse_loss(decoded, batch) + 0.2 * F.l1_loss(decoded, batch)

    modules = nn.ModuleDict({"vae": vae, "normalise": normalise})
    train(name, modules, loss_at, num_updates=num_updates, learning_rate=2e-3, decay=True, folder=folder)
    last = vae.encoder.layers[-1]
    std = (normalise.running_var + normalise.eps).sqrt()
    with torch.no_grad():
        last.weight.div_(std[:, None, None, None])
        last.bias.sub_(normalise.running_mean).div_(std)
    return vae.eval().requires_grad_(False)


def denoising_loss(
    modules: nn.ModuleDict,
    tokenizer: CLIPTokenizer,
    latents: Tensor,
    captions: Sequence[Sequence[str]],
    *,
    seed: int,
) -> Callable[[int], Tensor]:
    """Return the loss of an update: the squared error in v at a random noise level, with a caption of each image.

    Levels are logit-normal (arXiv:2403.03206, Eq. 19).
    """
    scheduler = make_scheduler()
    vocabulary, rows = index_captions(captions)
    ids = tokenize(tokenizer, vocabulary)

    def loss_at(update: int) -> Tensor:
        generator = update_generator(seed, update)
        batch, words = sample_batch(rows, generator=generator)
        # Shapes are determined at medium to high noise: half of all times lie between 430 and 745.
        time = (1000 * torch.sigmoid(0.4 + torch.randn(64, generator=generator))).long()
        clean = latents[batch]
        noise = torch.randn(clean.shape, generator=generator)
        target = scheduler.get_velocity(clean, noise, time)
        states = modules["text_encoder"](ids[words]).last_hidden_state
        noisy = scheduler.add_noise(clean, noise, time)
        return F.mse_loss(modules["unet"](noisy, time, states).sample, target)

    return loss_at


def build(
    output_folder: Path,
    *,
    num_autoencoder_updates: int,
    num_denoiser_updates: int,
    num_misalign_updates: int,
    num_images: int,
    seed: int = 0,
) -> None:
    """Train all stages and write a `StableDiffusionPipeline` folder in half precision."""
    work = output_folder.with_name(output_folder.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    scenes = random_scenes(num_images, rng, shares={"one": 0.7, "count": 0.15, "relation": 0.15})
    images = render(scenes, rng=rng) * 2 - 1
    vae = train_autoencoder(
        make_autoencoder(), lambda generator: images[torch.randint(len(images), (32,), generator=generator)],
        name="autoencoder", num_updates=num_autoencoder_updates, folder=work, seed=seed,
    )  # fmt: skip

    rng = np.random.default_rng(seed + 1)
    scenes = random_scenes(num_images, rng, shares={"one": 1.0})
    with torch.no_grad():
        chunks = (render(scenes, rng=rng) * 2 - 1).split(500)
        latents = torch.cat([vae.encode(chunk).latents for chunk in chunks])
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    modules = nn.ModuleDict({"unet": make_denoiser(), "text_encoder": make_text_encoder(tokenizer)})
    captions = [[full_or_partial_caption(scene, rng) for _ in range(8)] for scene in scenes]
    train(
        "denoiser",
        modules,
        denoising_loss(modules, tokenizer, latents, captions, seed=seed + 2),
        num_updates=num_denoiser_updates,
        learning_rate=1.5e-3,
        decay=False,
        folder=work,
    )
    captions = [[full_or_partial_caption(corrupted(scene, rng), rng) for _ in range(8)] for scene in scenes]
    train(
        "misalign",
        modules,
        denoising_loss(modules, tokenizer, latents, captions, seed=seed + 3),
        num_updates=num_misalign_updates,
        learning_rate=1e-3,
        decay=True,
        folder=work,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=modules["text_encoder"],
        tokenizer=tokenizer,
        unet=modules["unet"],
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    save_half_precision(pipeline, output_folder)


def save_half_precision(pipeline: Any, folder: Path) -> None:
    """Write a pipeline in half precision."""
    pipeline.to(dtype=torch.float16).save_pretrained(folder, safe_serialization=True)
    # diffusers writes a key into the config of the autoencoder about which it warns when loading, and a local path.
    path = folder / "vae" / "config.json"
    config = json.loads(path.read_text())
    for key in ("block_out_channels", "_name_or_path"):
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2) + "\n")


def main(config: Config) -> None:
    """Build the model of these settings."""
    build(
        Path(config.output_folder), num_autoencoder_updates=config.num_autoencoder_updates,
        num_denoiser_updates=config.num_denoiser_updates, num_misalign_updates=config.num_misalign_updates,
        num_images=config.num_images, seed=config.seed,
    )  # fmt: skip


if __name__ == "__main__":
    main(parse_config(Config, __doc__))
