"""Images painted by the built-in Stable Diffusion, and what the oracle sees in them: food for the built-in judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from rlhf_t2i.diffusion.transitions import ddim
from rlhf_t2i.models.load import BUILT_IN, load_policy
from rlhf_t2i.sampling.rollout import rollout
from rlhf_t2i.shapes.oracle import oracle_scores, recognise
from rlhf_t2i.shapes.scenes import Scene
from rlhf_t2i.types import Sampler

NUM_STEPS = 8
WAYS = tuple(product((0.0, 1.0), (1.0, 3.0)))
"""(eta, guidance): images that mostly miss their prompt, and images that mostly do not."""


@dataclass(frozen=True, slots=True)
class GeneratedImages:
    """Painted images, the prompt each was painted for, and the oracle's view of it."""

    images: Float[Tensor, "B 3 Y X"]
    prompts: list[str]
    graded: Float[Tensor, " B"]
    """The oracle's score of the image for its prompt, in [0, 1]."""
    seen: list[Scene | None]
    """The scene that the image shows, whatever was asked; None if it passes for no prompt of the grammar."""


def paint(prompts: Sequence[str], *, seed: int) -> GeneratedImages:
    """One image for each prompt, as the model before any tuning paints it, an equal share in each of four `WAYS`.

    Images are rounded to 8 bits, as files will hold them.
    """
    policy = load_policy(str(BUILT_IN), device=torch.device("cpu"), dtype=torch.float32)
    schedule = policy.schedule(NUM_STEPS)
    chunks: list[Tensor] = []
    rows = torch.arange(len(prompts)).split(64)
    for number, chunk in enumerate(tqdm(rows, desc="painting", leave=False)):
        eta, guidance = WAYS[number % len(WAYS)]
        images, _ = rollout(
            policy,
            [prompts[int(i)] for i in chunk],
            sampler=Sampler(schedule, partial(ddim, eta=eta), guidance),
            generators=[torch.Generator().manual_seed(seed * 1_000_003 + int(i)) for i in chunk],
            microbatch_size=64,
        )
        chunks.append((images * 255).round() / 255)
    images = torch.cat(chunks)
    return GeneratedImages(images, list(prompts), oracle_scores(images, prompts).graded, recognise(images))
