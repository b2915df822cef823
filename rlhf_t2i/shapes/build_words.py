"""Train the toy model of words from scratch: `python -m rlhf_t2i.shapes.build_words --output_folder FOLDER`.

A `ZImagePipeline` that writes signs of 24 x 80 pixels (`signs.py`), whose text encoder gets letters one by one. Stages,
each from a fixed seed, each resumed where it was interrupted:

    autoencoder_words   the autoencoder of the toy Stable Diffusion, a little longer, on crops of signs
    words               CLIP text encoder and transformer together, by flow matching (arXiv:2209.03003)
    misspell            the same two, a little longer, on captions in which some letters are wrong

Captions have words to train on and letters at random, so that the model spells and does not know words by heart;
held-out words are never shown. After the last stage the letters stay sharp, but the model no longer trusts the spelling
of a prompt, which tuning with a reward can undo.
"""

# diffusers and transformers have no usable types.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportReturnType=false
from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny, ZImagePipeline
from jaxtyping import Float
from torch import Tensor, nn

from rlhf_t2i.config import parse_config
from rlhf_t2i.settings.base import Settings
from rlhf_t2i.settings.ranges import NonNegativeInt, PositiveInt
from rlhf_t2i.shapes.build import save_half_precision, train_autoencoder
from rlhf_t2i.shapes.build_flow import flow_matching_loss, make_chat_tokenizer, make_flow_scheduler, make_transformer
from rlhf_t2i.shapes.names import TOY_MODEL_FOLDER, TOY_SIGN_MODEL
from rlhf_t2i.shapes.networks import make_text_encoder
from rlhf_t2i.shapes.signs import GROUNDS, LENGTHS, LETTERS, Sign, render_signs, words
from rlhf_t2i.shapes.train import train

WRONG_LETTER = 0.15
"""Probability that a letter of a caption of the last stage is replaced by one at random."""


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Options of the builder."""

    output_folder: str = f"runs/{TOY_SIGN_MODEL}"
    """Folder to write the pipeline to; the state of unfinished stages is in the folder of that name with .work."""
    num_autoencoder_updates: PositiveInt = 600
    """Optimiser steps of the autoencoder."""
    num_word_updates: PositiveInt = 1_300
    """Optimiser steps on true captions."""
    num_misspell_updates: PositiveInt = 400
    """Optimiser steps on partly wrong captions."""
    num_images: PositiveInt = 12_000
    """Drawings in the training set of each stage."""
    seed: NonNegativeInt = 0
    """Seed of all random numbers."""


def random_signs(count: int, rng: np.random.Generator) -> list[Sign]:
    """Return signs, one in four with a word to train on, the others with random letters that are no held-out word."""
    known, held_out = words("training"), set(words("held-out"))

    def word() -> str:
        if rng.random() < 0.25:
            return known[rng.integers(len(known))]
        while True:
            drawn = "".join(rng.choice(list(LETTERS), rng.choice(LENGTHS)))
            if drawn not in held_out:
                return drawn

    return [Sign(word(), *GROUNDS[rng.integers(len(GROUNDS))]) for _ in range(count)]


def misspelt(sign: Sign, rng: np.random.Generator) -> Sign:
    """Return the sign with some letters replaced at random, each with probability WRONG_LETTER."""
    wrong = rng.random(len(sign.word)) < WRONG_LETTER
    letters = [rng.choice(list(LETTERS)) if bad else letter for letter, bad in zip(sign.word, wrong, strict=True)]
    return replace(sign, word="".join(letters))


def sample_crops(images: Float[Tensor, "B 3 Y X"], *, generator: torch.Generator) -> Float[Tensor, "32 3 Y Y"]:
    """Return 32 square crops at one random place, which train an autoencoder as well as whole images and cost less."""
    height, width = images.shape[-2:]
    x = int(torch.randint(width - height + 1, (1,), generator=generator))
    crops = images[torch.randint(len(images), (32,), generator=generator), :, :, x : x + height]
    return crops.contiguous(memory_format=torch.channels_last)


def hidden_matrices(modules: nn.ModuleDict) -> list[nn.Parameter]:
    """Return the weights of attention and feed-forward layers, which Muon trains in fewer updates than AdamW."""
    layers = (".attention.", ".self_attn.", ".feed_forward.", ".mlp.fc")
    named = modules.named_parameters()
    return [weights for name, weights in named if weights.ndim == 2 and any(layer in name for layer in layers)]


def build_words(
    output_folder: Path,
    *,
    num_autoencoder_updates: int,
    num_word_updates: int,
    num_misspell_updates: int,
    num_images: int,
    seed: int = 0,
) -> None:
    """Train all stages and write a `ZImagePipeline` folder in half precision."""
    work = output_folder.with_name(output_folder.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    signs = random_signs(num_images, rng)
    images = render_signs(signs, rng=rng) * 2 - 1
    vae: Any = AutoencoderTiny.from_pretrained(TOY_MODEL_FOLDER / "vae", dtype=torch.float32)
    vae = train_autoencoder(
        vae.to(memory_format=torch.channels_last), lambda generator: sample_crops(images, generator=generator),
        name="autoencoder_words", num_updates=num_autoencoder_updates, folder=work, seed=seed,
    )  # fmt: skip
    vae.to(memory_format=torch.contiguous_format)
    with torch.no_grad():
        latents = torch.cat([vae.encode(chunk).latents for chunk in images.split(500)])
    torch.manual_seed(seed)
    tokenizer = make_chat_tokenizer(("sign", "that", "says", "in"))
    # CLIP's tokens know their place in the prompt; with large embeddings letters and places differ from the start.
    text_encoder = make_text_encoder(tokenizer, position_std=1.0)
    modules = nn.ModuleDict({"transformer": make_transformer(dim=96, num_layers=3), "text_encoder": text_encoder})
    for name, captions, updates, rate in (
        ("words", [[sign.prompt] for sign in signs], num_word_updates, 3e-3),
        (
            "misspell",
            [[misspelt(sign, rng).prompt for _ in range(4)] for sign in signs],
            num_misspell_updates,
            2e-3,
        ),
    ):
        train(
            name,
            modules,
            flow_matching_loss(modules, tokenizer, latents, captions, seed=seed + 4, batch_size=32),
            num_updates=updates,
            learning_rate=rate,
            decay=name == "misspell",
            folder=work,
            matrices=hidden_matrices(modules),
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
    build_words(
        Path(config.output_folder), num_autoencoder_updates=config.num_autoencoder_updates,
        num_word_updates=config.num_word_updates, num_misspell_updates=config.num_misspell_updates,
        num_images=config.num_images, seed=config.seed,
    )  # fmt: skip


if __name__ == "__main__":
    main(parse_config(Config, __doc__))
