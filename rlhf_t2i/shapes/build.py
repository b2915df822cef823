"""Train the built-in Stable Diffusion from scratch: `python -m rlhf_t2i.shapes.build --output_folder FOLDER`.

Three stages, each from a fixed seed, each resumed where it was stopped:

    autoencoder   AutoencoderTiny, f = 4, 8 latent channels, trained on scenes of every tier
    denoiser      CLIP text encoder and U-Net together, v-prediction, on the training prompts of tier "one"
    misalign      the same two, a little longer, on partly wrong captions

The last stage makes the model what reinforcement learning needs: it draws as crisply as before, but it has learnt that
words are often wrong, so without guidance it often paints another colour or shape than was asked. Guidance helps, and
a reward can teach it to trust the words again.
"""

# diffusers and transformers have no usable types.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportOptionalOperand=false, reportReturnType=false
from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from rlhf_t2i.shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    COUNTS,
    RELATIONS,
    SHAPES,
    Scene,
    Thing,
    all_scenes,
    render,
)

MAX_TOKENS = 24
WRONG_WORDS = {"colour": 0.2, "shape": 0.3, "background": 0.2}
"""How often a caption of the last stage names another colour, shape or background than the image has."""


# --- the parts ------------------------------------------------------------------------------------


def make_autoencoder() -> AutoencoderTiny:
    """32 x 32 pixels to 8 x 8 latents of 8 channels and back; 0.3 million parameters."""
    return AutoencoderTiny(
        latent_channels=8,
        encoder_block_out_channels=(32, 32, 32),
        decoder_block_out_channels=(32, 32, 32),
        num_encoder_blocks=(1, 2, 2),
        num_decoder_blocks=(2, 2, 1),
    )


def make_denoiser() -> UNet2DConditionModel:
    """A U-Net over 8 x 8 latents that reads the text at its lower level; 2.5 million parameters."""
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


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two layers of width 96. Wide token embeddings let words differ from the first update on."""
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
            nn.init.normal_(parameter, std=0.3)
    return encoder


def make_tokenizer() -> CLIPTokenizer:
    """A byte-pair tokenizer whose merges make each word of the grammar one token; other text becomes letters."""
    text = [*COLOURS, *BACKGROUNDS, *COUNTS, *" ".join(RELATIONS).split(), "a", "thing", "on", "background"]
    text += [shape + ending for shape in SHAPES for ending in ("", "s")]
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
    """Stable Diffusion's own schedule, with v-prediction."""
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


# --- training -------------------------------------------------------------------------------------


def train(
    name: str,
    modules: nn.ModuleDict,
    loss_at: Callable[[int], Tensor],
    *,
    num_updates: int,
    learning_rate: float,
    decay: bool,
    folder: Path,
) -> None:
    """Minimise `loss_at(update)` with AdamW, warm-up and, if asked, a linear decay over the last half.

    The state is written every 250 updates and picked up again. `loss_at` draws all its randomness from the update's
    number, so that a resumed run equals one that was never stopped.
    """
    path = folder / f"{name}.pt"
    optimizer = torch.optim.AdamW(modules.parameters(), lr=learning_rate, weight_decay=1e-3)
    start = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        modules.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["num_updates"]
    progress = tqdm(range(start, num_updates), initial=start, total=num_updates, desc=name)
    for update in progress:
        left = 1 - update / num_updates if decay else 1.0
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (update + 1) / 100, 2 * left)
        loss = loss_at(update)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        if (update + 1) % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
        if (update + 1) % 250 == 0 or update + 1 == num_updates:
            state = {
                "modules": modules.state_dict(),
                "optimizer": optimizer.state_dict(),
                "num_updates": update + 1,
            }
            torch.save(state, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)


def train_autoencoder(*, num_updates: int, num_images: int, folder: Path, seed: int) -> AutoencoderTiny:
    """Fit reconstructions of normalised latents with a little noise on them, so that the decoder forgives.

    Latents are normalised by the batch in training; the running mean and std are then folded into the encoder's
    last convolution, so that the finished autoencoder needs no scaling factor.
    """
    torch.manual_seed(seed)
    vae = make_autoencoder()
    normalise = nn.BatchNorm2d(vae.config.latent_channels, affine=False, eps=1e-8, momentum=0.02)
    rng = np.random.default_rng(seed)
    scenes = pick_scenes(num_images, rng, shares={"one": 0.7, "count": 0.15, "relation": 0.15})
    images = render(scenes, rng=rng) * 2 - 1

    def loss_at(update: int) -> Tensor:
        generator = seeded(seed, update)
        batch = images[torch.randint(len(images), (32,), generator=generator)]
        latents = normalise(vae.encoder(batch))
        latents = latents + 0.1 * torch.randn(latents.shape, generator=generator)
        painted = vae.decoder(latents)
        return F.mse_loss(painted, batch) + 0.2 * F.l1_loss(painted, batch)

    modules = nn.ModuleDict({"vae": vae, "normalise": normalise})
    train(
        "autoencoder",
        modules,
        loss_at,
        num_updates=num_updates,
        learning_rate=2e-3,
        decay=True,
        folder=folder,
    )
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
    """The error in v at a random level of noise, with one of an image's captions or, one time in ten, none.

    Levels are logit-normal (arXiv:2403.03206, Eq. 19).
    """
    scheduler = make_scheduler()
    vocabulary, rows = numbered(captions)
    ids = tokenize(tokenizer, vocabulary)

    def loss_at(update: int) -> Tensor:
        generator = seeded(seed, update)
        batch, words = draw(rows, generator=generator)
        # Shapes are decided at middling to high noise: half of all times lie between 430 and 745.
        time = (1000 * torch.sigmoid(0.4 + torch.randn(64, generator=generator))).long()
        clean = latents[batch]
        noise = torch.randn(clean.shape, generator=generator)
        target = scheduler.get_velocity(clean, noise, time)
        states = modules["text_encoder"](ids[words]).last_hidden_state
        noisy = scheduler.add_noise(clean, noise, time)
        return F.mse_loss(modules["unet"](noisy, time, states).sample, target)

    return loss_at


def numbered(captions: Sequence[Sequence[str]]) -> tuple[list[str], Tensor]:
    """All different captions, the empty one first, and each image's captions by their numbers: (N, columns)."""
    vocabulary = sorted({caption for row in captions for caption in row} | {""})
    index = {caption: i for i, caption in enumerate(vocabulary)}
    return vocabulary, torch.tensor([[index[caption] for caption in row] for row in captions])


def draw(rows: Tensor, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """64 images and for each the number of one of its captions or, one time in ten, of none."""
    batch = torch.randint(len(rows), (64,), generator=generator)
    column = torch.randint(rows.shape[1], (64,), generator=generator)
    words = rows[batch, column]
    words[torch.rand(64, generator=generator) < 0.1] = 0
    return batch, words


def seeded(seed: int, update: int) -> torch.Generator:
    """The generator of one update: a pure function of the seed and the update's number."""
    return torch.Generator().manual_seed(seed * 1_000_003 + update)


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Padded token ids (B, MAX_TOKENS)."""
    return tokenizer(list(captions), padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids


# --- the images and their captions --------------------------------------------------------------


def pick_scenes(count: int, rng: np.random.Generator, *, shares: dict[Any, float], split: Any = "all") -> list[Scene]:
    """`count` random scenes, each tier with its share."""
    tiers = {tier: all_scenes(tier, split) for tier in shares}
    names = rng.choice(list(shares), count, p=list(shares.values()))
    return [tiers[name][rng.integers(len(tiers[name]))] for name in names]


def partial_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption that names one or two of colour, shape and background, so that words are learnt one by one.

    Images of held-out scenes get such captions too: otherwise the images themselves would teach that, say, no
    circle is red on blue. Their three words together are never read.
    """
    thing = scene.things[0]
    colour, shape, ground = rng.permutation([True, rng.random() < 0.5, False])
    noun = (f"{thing.colour} " if colour else "") + (thing.shape if shape else "thing")
    return f"a {noun}" + (f" on a {scene.background} background" if ground else "")


def full_or_partial_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Two times in three the whole prompt of a training scene; else, and for held-out scenes, a part of it."""
    whole = not scene.held_out and rng.random() < 2 / 3
    return scene.prompt if whole else partial_caption(scene, rng)


def mistaken(scene: Scene, rng: np.random.Generator) -> Scene:
    """What a careless writer takes a scene for: some of its words are wrong."""

    def maybe(kind: str, right: str, choices: Sequence[str]) -> str:
        others = [choice for choice in choices if choice != right]
        return str(rng.choice(others)) if rng.random() < WRONG_WORDS[kind] else right

    thing = scene.things[0]
    while True:
        colour = maybe("colour", thing.colour, COLOURS)
        shape = maybe("shape", thing.shape, SHAPES)
        background = maybe("background", scene.background, BACKGROUNDS)
        if colour != background:
            return Scene((Thing(colour, shape),), background)


def build(
    output_folder: Path,
    *,
    num_autoencoder_updates: int = 3_000,
    num_denoiser_updates: int = 2_000,
    num_misalign_updates: int = 1_000,
    num_images: int = 16_000,
    seed: int = 0,
) -> None:
    """Train all stages and write a `StableDiffusionPipeline` folder in half precision."""
    work = output_folder.with_name(output_folder.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    vae = train_autoencoder(num_updates=num_autoencoder_updates, num_images=num_images, folder=work, seed=seed)

    rng = np.random.default_rng(seed + 1)
    scenes = pick_scenes(num_images, rng, shares={"one": 1.0})
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
    captions = [[full_or_partial_caption(mistaken(scene, rng), rng) for _ in range(8)] for scene in scenes]
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
    save_in_half(pipeline, output_folder)


def save_in_half(pipeline: Any, folder: Path) -> None:
    """Write a pipeline in half precision."""
    pipeline.to(dtype=torch.float16).save_pretrained(folder, safe_serialization=True)
    # diffusers writes a key into the autoencoder's config that it then remarks on when it loads.
    path = folder / "vae" / "config.json"
    config = json.loads(path.read_text())
    config.pop("block_out_channels", None)
    path.write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    """The command line of `build`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output_folder", type=Path, default=Path("runs/shapes"))
    parser.add_argument("--num_autoencoder_updates", type=int, default=3_000)
    parser.add_argument("--num_denoiser_updates", type=int, default=2_000)
    parser.add_argument("--num_misalign_updates", type=int, default=1_000)
    parser.add_argument("--num_images", type=int, default=16_000)
    parser.add_argument("--seed", type=int, default=0)
    build(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
