"""Random scenes and their captions, true and partly wrong, for training the toy models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_t2i.shapes.scenes import BACKGROUNDS, COLOURS, SHAPES, Scene, Thing, all_scenes

WRONG_WORDS = {"colour": 0.2, "shape": 0.3, "background": 0.2}
"""Probability that a caption of the misalignment stage names another colour, shape or background than the image has."""


def random_scenes(count: int, rng: np.random.Generator, *, shares: dict[Any, float], split: Any = "all") -> list[Scene]:
    """Return `count` random scenes; `shares` maps each tier to its probability."""
    tiers = {tier: all_scenes(tier, split) for tier in shares}
    names = rng.choice(list(shares), count, p=list(shares.values()))
    return [tiers[name][rng.integers(len(tiers[name]))] for name in names]


def partial_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Return a caption that names one or two of colour, shape and background, so that words are learnt one by one.

    Images of held-out scenes have such captions too: without those images the training set would imply that, for
    example, no circle is red on blue. The full prompt of a held-out scene is never a caption.
    """
    thing = scene.things[0]
    colour, shape, ground = rng.permutation([True, rng.random() < 0.5, False])
    noun = (f"{thing.colour} " if colour else "") + (thing.shape if shape else "thing")
    return f"a {noun}" + (f" on a {scene.background} background" if ground else "")


def full_or_partial_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Return the prompt of a training scene with probability 2/3; otherwise, and for held-out scenes, a part of it."""
    full = not scene.held_out and rng.random() < 2 / 3
    return scene.prompt if full else partial_caption(scene, rng)


def corrupted(scene: Scene, rng: np.random.Generator) -> Scene:
    """Return the scene with some words replaced at random, each kind with its probability in WRONG_WORDS."""

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


def index_captions(captions: Sequence[Sequence[str]]) -> tuple[list[str], Tensor]:
    """Return all different captions, the empty one first, and the indices of each image's captions: (N, columns)."""
    vocabulary = sorted({caption for row in captions for caption in row} | {""})
    index = {caption: i for i, caption in enumerate(vocabulary)}
    return vocabulary, torch.tensor([[index[caption] for caption in row] for row in captions])


def sample_batch(rows: Tensor, *, generator: torch.Generator, size: int = 64) -> tuple[Tensor, Tensor]:
    """Return the indices of `size` images and of a caption of each, with probability 0.1 the empty caption."""
    batch = torch.randint(len(rows), (size,), generator=generator)
    column = torch.randint(rows.shape[1], (size,), generator=generator)
    words = rows[batch, column]
    words[torch.rand(size, generator=generator) < 0.1] = 0
    return batch, words
