"""Train a toy LLaVA by captioning only: `python -m rlhf_t2i.shapes.build_captioner --output_folder FOLDER`.

Real multimodal LLMs learn from the next token of texts. So does this one, in the stages of LLaVA (arXiv:2304.08485):

    vision      the tower, by captioning through a decoder that is thrown away afterwards (CapPa, arXiv:2306.07915)
    language    the language model, on captions without images
    projector   the projector alone, by captioning
    captioning  projector and language model, by captioning

It is asked no question and compares no text with an image, unlike the backbone of `build_backbone`. Its images are
those of `compositions` in every domain; captions name places, colours, shapes, numbers and relations, and no prompt
that is held out. It is a backbone for experiments with reward models, and is not shipped.
"""

# transformers has no usable types.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportOptionalOperand=false, reportReturnType=false
from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import CLIPTokenizer

from reward_model.backbones.load import adapt
from reward_model.backbones.settings import BackboneSettings
from reward_model.images import normalise
from reward_model.types import Backbone
from rlhf_t2i.config import parse_config
from rlhf_t2i.settings.base import Settings
from rlhf_t2i.settings.ranges import NonNegativeInt, PositiveInt
from rlhf_t2i.shapes.compositions import (
    WORDS,
    Tier,
    detailed_caption,
    draw_compositions,
    random_composition,
    random_layout,
    true_statements,
)
from rlhf_t2i.shapes.domains import DOMAINS, restyle
from rlhf_t2i.shapes.llava import make_backbone_tokenizer, make_image_processor, make_llava
from rlhf_t2i.shapes.train import train, update_generator

Size = Literal["1m", "5m"]
SIZES: dict[Size, dict[str, int]] = {
    "1m": {},
    "5m": {"width": 256, "num_layers": 6, "vision_width": 160, "num_vision_layers": 4},
}
"""Arguments of `make_llava` for about one and five million parameters."""
CAPTIONED: dict[Tier, float] = {"one": 0.15, "attribute": 0.25, "binding3": 0.2, "count": 0.15, "relation": 0.25}
"""Fraction of the images of each tier."""
NUM_CAPTIONS = 4
"""Captions of each image."""
NOT_FLAT = 0.3
"""Fraction of the images that are in another domain than flat."""
BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Options of the builder."""

    output_folder: str = "runs/captioner"
    """Folder to write the model to; the state of unfinished stages is in the folder of that name with .work."""
    size: Size = "1m"
    """Number of parameters: about one million (1m) or five million (5m)."""
    num_vision_updates: PositiveInt = 4_000
    """Optimiser steps of the vision tower."""
    num_language_updates: PositiveInt = 500
    """Optimiser steps of the language model on texts alone."""
    num_projector_updates: PositiveInt = 300
    """Optimiser steps of the projector alone."""
    num_updates: PositiveInt = 3_000
    """Optimiser steps of projector and language model together."""
    num_images: PositiveInt = 24_000
    """Images to train on."""
    seed: NonNegativeInt = 0
    """Seed of all random numbers."""


@dataclass(frozen=True, slots=True)
class Captioned:
    """Images with the token ids of their captions: start, words, end, and padding."""

    pixels: Float[Tensor, "N 3 Y X"]
    """Normalised, as the vision tower takes them."""
    ids: Int[Tensor, "N K T"]
    lengths: Int[Tensor, "N K"]

    def batch(self, generator: torch.Generator) -> tuple[Float[Tensor, "B 3 Y X"], Int[Tensor, "B T"], Tensor]:
        """Return random images, one caption of each, and the mask of the captions' tokens (B, T)."""
        rows = torch.randint(len(self.pixels), (BATCH,), generator=generator)
        column = torch.randint(self.ids.shape[1], (BATCH,), generator=generator)
        lengths = self.lengths[rows, column]
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        return self.pixels[rows], self.ids[rows, column, : mask.shape[1]].long(), mask


def make_captioned(count: int, tokenizer: CLIPTokenizer, *, seed: int) -> Captioned:
    """Draw images of compositions of training, a part of them in another domain, and caption each `NUM_CAPTIONS` times.

    Half of the captions of up to three things name places (`detailed_caption`); the others are true prompts.
    """
    rng = np.random.default_rng(seed)
    tiers = rng.choice(list(CAPTIONED), count, p=list(CAPTIONED.values()))
    compositions = [random_composition(tier, rng, split="training") for tier in tiers]
    layouts = [random_layout(one, rng) for one in compositions]
    images = draw_compositions(compositions, layouts, rng=rng)
    domains = np.where(rng.random(count) < NOT_FLAT, rng.choice(DOMAINS[1:], count), "flat")
    for domain in DOMAINS:
        rows = torch.from_numpy(domains == domain)
        images[rows] = restyle(images[rows], domain, rng=rng)
    captions: list[str] = []
    for one, layout in zip(compositions, layouts, strict=True):
        num_detailed = NUM_CAPTIONS // 2 if len(layout) <= 3 else 0
        captions += [detailed_caption(one, layout, rng) for _ in range(num_detailed)]
        captions += rng.choice(true_statements(one), NUM_CAPTIONS - num_detailed).tolist()
    tokens = tokenizer(captions, padding=True, return_tensors="pt")
    settings = make_image_processor()
    return Captioned(
        normalise(images, mean=settings.image_mean, std=settings.image_std),
        tokens.input_ids.short().unflatten(0, (count, NUM_CAPTIONS)),
        tokens.attention_mask.sum(1).unflatten(0, (count, NUM_CAPTIONS)),
    )


def next_token_loss(logits: Float[Tensor, "B T V"], ids: Int[Tensor, "B T"], mask: Tensor) -> Float[Tensor, ""]:
    """Return the mean cross-entropy of each next token, the end included; logits[:, t] predict ids[:, t + 1]."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids.masked_fill(~mask, -100)[:, 1:].flatten())


class CaptionDecoder(nn.Module):
    """A decoder of one layer with cross-attention to the patches; trains the vision tower and is thrown away."""

    def __init__(self, num_words: int, width: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(num_words, width), nn.Embedding(64, width)
        self.layer = nn.TransformerDecoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.words.weight, std=0.3)
        nn.init.normal_(self.places.weight, std=0.3)

    def forward(self, ids: Int[Tensor, "B T"], patches: Float[Tensor, "B P C"]) -> Float[Tensor, "B T V"]:
        length = ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).triu(1)
        states = self.words(ids) + self.places.weight[:length]
        return self.norm(self.layer(states, patches, tgt_mask=causal, tgt_is_causal=True)) @ self.words.weight.T


def vision_loss(tower: Any, decoder: nn.Module, data: Captioned, *, seed: int) -> Callable[[int], Tensor]:
    """Return the loss of an update of the vision tower: captions by the decoder."""

    def loss_at(update: int) -> Tensor:
        pixels, ids, mask = data.batch(update_generator(seed, update))
        return next_token_loss(decoder(ids, tower(pixels).last_hidden_state[:, 1:]), ids, mask)

    return loss_at


def language_loss(model: Any, data: Captioned, *, seed: int) -> Callable[[int], Tensor]:
    """Return the loss of an update of the language model without images."""

    def loss_at(update: int) -> Tensor:
        _, ids, mask = data.batch(update_generator(seed, update))
        states = model.model.language_model(input_ids=ids, attention_mask=mask.long(), use_cache=False)
        return next_token_loss(model.lm_head(states.last_hidden_state), ids, mask)

    return loss_at


def caption_logits(
    backbone: Backbone, inputs: dict[str, Tensor], ids: Int[Tensor, "B T"], mask: Tensor
) -> Float[Tensor, "B T V"]:
    """Return the logits of each caption's next token behind its image; `inputs` has pixel_values or features."""
    count = backbone.num_visual_tokens(1, 1)
    image = torch.full((len(ids), count), backbone.prompt_tokenizer.image_token_id)
    tokens = torch.cat([ids[:, :1], image, ids[:, 1:]], dim=1)
    seen = torch.cat([torch.ones_like(image), mask.long()], dim=1)
    output = backbone.forward({**inputs, "input_ids": tokens, "attention_mask": seen})
    return backbone.model.lm_head(output.hidden[:, count:])


def captioning_loss(backbone: Backbone, data: Captioned, *, seed: int) -> Callable[[int], Tensor]:
    """Return the loss of an update of projector and language model: captions behind their images."""

    def loss_at(update: int) -> Tensor:
        pixels, ids, mask = data.batch(update_generator(seed, update))
        with torch.no_grad():  # the tower is frozen
            features = backbone.encode_image({"pixel_values": pixels})
        return next_token_loss(caption_logits(backbone, features, ids, mask), ids, mask)

    return loss_at


def build(
    output_folder: Path, *, size: Size, num_vision_updates: int, num_language_updates: int, num_projector_updates: int,
    num_updates: int, num_images: int, seed: int,
) -> None:  # fmt: skip
    """Train all stages and save the model in half precision, with tokenizer and image processor."""
    work = output_folder.with_name(output_folder.name + ".work")
    for folder in (work, output_folder):
        folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_backbone_tokenizer(WORDS)
    torch.manual_seed(seed)
    model = make_llava(tokenizer, **SIZES[size])
    tower, projector, language = model.model.vision_tower, model.model.multi_modal_projector, model.model.language_model
    decoder = CaptionDecoder(len(tokenizer), tower.config.hidden_size)
    tokenizer.save_pretrained(output_folder)
    make_image_processor().save_pretrained(output_folder)
    backbone = adapt(model, str(output_folder), BackboneSettings())
    data = make_captioned(num_images, tokenizer, seed=seed)

    captioning = captioning_loss(backbone, data, seed=seed + 3)
    stages: list[tuple[str, dict[str, nn.Module], Callable[[int], Tensor], int]] = [
        ("vision", {"tower": tower, "decoder": decoder}, vision_loss(tower, decoder, data, seed=seed + 1),
         num_vision_updates),
        ("language", {"language": language}, language_loss(model, data, seed=seed + 2), num_language_updates),
        ("projector", {"projector": projector}, captioning, num_projector_updates),
        ("captioning", {"projector": projector, "language": language}, captioning, num_updates),
    ]  # fmt: skip
    for name, modules, loss_at, count in stages:
        model.requires_grad_(False)
        parts = nn.ModuleDict(modules).requires_grad_(True)
        train(name, parts, loss_at, num_updates=count, learning_rate=1.5e-3, decay=True, folder=work)
    model.eval().half().save_pretrained(output_folder)


def main(config: Config) -> None:
    """Build the backbone of these settings."""
    build(**{**asdict(config), "output_folder": Path(config.output_folder)})


if __name__ == "__main__":
    main(parse_config(Config, __doc__))
