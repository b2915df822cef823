"""Random changes of preference pairs: horizontal flips of their images, and empty prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from reward_model.stored_images import ImageSource
from rlhf_t2i.seeds import AUGMENT, generator_for


class ImageView(NamedTuple):
    """An image as it is encoded."""

    source: ImageSource
    flipped: bool
    """True if it is mirrored, left to right, before the autoencoder, whose latents of both are no mirror images."""
    size: tuple[int, int]
    """Height and width in pixels that it is cropped to."""


class PairChanges(NamedTuple):
    """What changes in one pair."""

    flip_winner: bool = False
    flip_loser: bool = False
    empty_prompt: bool = False
    """True if both images are trained with the empty prompt."""


@dataclass(frozen=True, slots=True)
class Augmentation:
    """Random changes of pairs, as in the published code of Diffusion-DPO (random_flip "image", 0.2 empty prompts).

    The changes of a pair are a function of the seed, its step and its row in that step, so that a resumed run and any
    number of processes see the same.
    """

    random_flip: Literal["none", "pair", "image"] = "none"
    """Which images are mirrored with probability 1/2: none, both of a pair together, or each on its own."""
    proportion_empty_prompts: float = 0.0
    seed: int = 0

    def changes(self, step: int, row: int) -> PairChanges:
        """Return the changes of a pair of a step (from 0)."""
        winner, loser, prompt = torch.rand(3, generator=generator_for(self.seed, AUGMENT, step, row)).tolist()
        if self.random_flip == "pair":
            loser = winner
        flips = self.random_flip != "none"
        return PairChanges(flips and winner < 0.5, flips and loser < 0.5, prompt < self.proportion_empty_prompts)


UNCHANGED = Augmentation()
"""No changes: every image and prompt as it is."""
