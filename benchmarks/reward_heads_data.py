"""The data of `benchmarks/reward_heads.py`: encoded pairs, test sets, and samples of the built-in diffusion model."""

# transformers has no usable types.
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from reward_model.types import Backbone
from rlhf_t2i.search.api import best_of_n
from rlhf_t2i.shapes.composition_oracle import composition_scores
from rlhf_t2i.shapes.composition_pairs import CompositionPairs, graded_pairs, strict_pairs, tied_pairs
from rlhf_t2i.shapes.compositions import TIERS, Composition
from rlhf_t2i.shapes.domains import DOMAINS, restyle
from rlhf_t2i.shapes.oracle import oracle_scores
from rlhf_t2i.shapes.scenes import Scene, all_scenes
from rlhf_t2i.types import DiffusionModel

NUM_TEST, NUM_DOMAIN, NUM_OTHER = 150, 30, 100
"""Test pairs of each tier as drawn, of each tier in each other domain, and of ties and graded pairs."""
NUM_CANDIDATES = 16
"""Images of each prompt of which a reward model selects one."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Images with their prompts, after the frozen vision tower."""

    prompts: list[str]
    last: Float[Tensor, "N P C"]
    """States of the patches after the vision tower's last layer."""
    middle: Float[Tensor, "N P C"]
    """The same after its middle layer."""


@torch.no_grad()
def encode(backbone: Backbone, images: Float[Tensor, "N 3 Y X"], prompts: Sequence[str]) -> Encoded:
    """Run the vision tower on images, once for all heads."""
    last, middle = [], []
    for part in images.split(256):
        pixels = backbone.prepare(list(part), ["a"] * len(part))["pixel_values"]
        states = backbone.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        last.append(states[-1][:, 1:])
        middle.append(states[len(states) // 2][:, 1:])
    return Encoded(list(prompts), torch.cat(last), torch.cat(middle))


def encode_pairs(backbone: Backbone, pairs: CompositionPairs) -> Encoded:
    """Encode all winners, then all losers."""
    images = torch.cat([pairs.winners, pairs.losers])
    return encode(backbone, images, 2 * [composition.prompt for composition in pairs.prompts])


def test_sets() -> Iterator[tuple[str, CompositionPairs]]:
    """Yield the test pairs: by domain, ties, and graded pairs. They are the same for all models."""
    rng = np.random.default_rng(6)
    for number, domain in enumerate(DOMAINS):
        each = NUM_TEST if domain == "flat" else NUM_DOMAIN
        pairs = strict_pairs(each * len(TIERS), "held-out", seed=1_000 + number)
        winners, losers = (restyle(side, domain, rng=rng) for side in (pairs.winners, pairs.losers))
        yield domain, CompositionPairs(pairs.tiers, pairs.prompts, winners, losers, pairs.tie)
    yield "ties", tied_pairs(NUM_OTHER, "held-out", seed=1_100)
    yield "graded", graded_pairs(NUM_OTHER, "held-out", seed=1_101)


def ceiling() -> dict[str, dict[str, float]]:
    """Return the share of test pairs that the oracle orders rightly, by domain and tier; ties count as half."""
    found: dict[str, dict[str, float]] = {}
    for name, pairs in test_sets():
        if name == "ties":
            continue
        gap = composition_scores(pairs.winners, pairs.prompts) - composition_scores(pairs.losers, pairs.prompts)
        credit = ((gap > 0).float() + 0.5 * (gap == 0).float()).numpy()
        tiers = np.array(pairs.tiers)
        found[name] = {tier: float(credit[tiers == tier].mean()) for tier in TIERS if (tiers == tier).any()}
    return found


def unseen_prompts() -> list[str]:
    """Return the prompts of one thing that no reward model here was trained on."""
    return [scene.prompt for scene in all_scenes("one") if _composition(scene).held_out]


def _composition(scene: Scene) -> Composition:
    return Composition(scene.things, scene.background, scene.relation, large=scene.relation is None)


@dataclass(frozen=True, slots=True)
class Samples:
    """Images of the built-in diffusion model, all of a prompt together, and which of them the oracle passes."""

    images: Float[Tensor, "N 3 Y X"]
    prompts: list[str]
    passed: Bool[Tensor, "P 16"]


@cache
def samples(repeats: int = 4) -> Samples:
    """Return `NUM_CANDIDATES` images of each unseen prompt, `repeats` times."""
    prompts = unseen_prompts() * repeats
    each = [prompt for prompt in prompts for _ in range(NUM_CANDIDATES)]
    found = best_of_n(
        built_in_policy(), prompts, lambda images, prompts: torch.zeros(len(images)), num_candidates=NUM_CANDIDATES,
        num_denoising_steps=8, guidance_scale=1.0, microbatch_size=64, seed=50_000,
    ).images.flatten(0, 1)  # fmt: skip
    return Samples(found, each, oracle_scores(found, each).passed.view(len(prompts), NUM_CANDIDATES))


@cache
def built_in_policy() -> DiffusionModel:
    """Return the built-in diffusion model."""
    from rlhf_t2i.models.load import load_policy
    from rlhf_t2i.shapes.names import TOY_MODEL

    return load_policy(TOY_MODEL, device=torch.device("cpu"))
