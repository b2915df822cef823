"""The toy world's preference pairs in seconds, from drawings instead of generated images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import numpy as np

from rlhf_t2i.shapes import pairs
from rlhf_t2i.shapes.generated import GeneratedImages
from rlhf_t2i.shapes.oracle import oracle_scores, recognise
from rlhf_t2i.shapes.scenes import parse_prompt, render


def write_toy_pairs(folder: Path, **sizes: int) -> Path:
    """Write the files of `pairs.write_pairs`."""
    with mock.patch.object(pairs, "generate_images", drawn_images):
        return pairs.write_pairs(folder, **sizes)


def drawn_images(prompts: Sequence[str], *, seed: int) -> GeneratedImages:
    """Draw the scene of every second prompt, and a near miss of the others."""
    rng = np.random.default_rng(seed)
    scenes = [parse_prompt(prompt) for prompt in prompts]
    shown = [scene if rng.random() < 0.5 else pairs.random_near_miss(scene, rng) for scene in scenes]
    images = (render(shown, rng=rng) * 255).round() / 255
    return GeneratedImages(images, list(prompts), oracle_scores(images, prompts).graded, recognise(images))
