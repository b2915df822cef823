"""Preference pairs of compositions, in memory: strict ones of every tier, ties, graded ones, and wrong labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_t2i.shapes.compositions import (
    TIERS,
    Composition,
    Tier,
    draw_compositions,
    near_miss,
    random_composition,
    random_layout,
)
from rlhf_t2i.shapes.scenes import Split


@dataclass(frozen=True, slots=True)
class CompositionPairs:
    """Pairs of images of one prompt."""

    tiers: list[Tier]
    prompts: list[Composition]
    winners: Float[Tensor, "P 3 Y X"]
    losers: Float[Tensor, "P 3 Y X"]
    tie: Bool[Tensor, " P"]
    """True where both images show the prompt."""

    def __len__(self) -> int:
        return len(self.tiers)

    def select(self, rows: Sequence[int]) -> CompositionPairs:
        """Return some pairs, in this order."""
        index = torch.as_tensor(rows, dtype=torch.long)
        tiers: list[Tier] = [self.tiers[i] for i in rows]
        prompts = [self.prompts[i] for i in rows]
        return CompositionPairs(tiers, prompts, self.winners[index], self.losers[index], self.tie[index])


def strict_pairs(count: int, split: Split, *, seed: int, tiers: Sequence[Tier] = TIERS) -> CompositionPairs:
    """Return drawings of prompts and of their near misses, the tiers in turn."""
    rng = np.random.default_rng([seed, 1])
    names: list[Tier] = [tiers[i % len(tiers)] for i in range(count)]
    prompts = [random_composition(tier, rng, split=split) for tier in names]
    misses = [near_miss(prompt, tier, rng) for prompt, tier in zip(prompts, names, strict=True)]
    return _drawn(names, prompts, prompts, misses, rng, tie=False)


def tied_pairs(count: int, split: Split, *, seed: int, tiers: Sequence[Tier] = TIERS) -> CompositionPairs:
    """Return two drawings of each prompt, which are equally good."""
    rng = np.random.default_rng([seed, 2])
    names: list[Tier] = [tiers[i % len(tiers)] for i in range(count)]
    prompts = [random_composition(tier, rng, split=split) for tier in names]
    return _drawn(names, prompts, prompts, prompts, rng, tie=True)


def graded_pairs(count: int, split: Split, *, seed: int) -> CompositionPairs:
    """Return pairs of tier `attribute` that are both wrong: the winner in one word, the loser in one of each thing."""
    rng = np.random.default_rng([seed, 3])
    prompts = [random_composition("attribute", rng, split=split) for _ in range(count)]
    winners = [near_miss(prompt, "attribute", rng) for prompt in prompts]
    losers = []
    for prompt, winner in zip(prompts, winners, strict=True):
        while True:
            loser = near_miss(winner, "attribute", rng)
            if all(a != b for a, b in zip(loser.things, prompt.things, strict=True)):
                break
        losers.append(loser)
    tiers: list[Tier] = ["attribute" for _ in range(count)]
    return _drawn(tiers, prompts, winners, losers, rng, tie=False)


def _drawn(
    tiers: list[Tier], prompts: list[Composition], winners: list[Composition], losers: list[Composition],
    rng: np.random.Generator, *, tie: bool,
) -> CompositionPairs:  # fmt: skip
    drawn, beside = (
        draw_compositions(side, [random_layout(one, rng) for one in side], rng=rng) for side in (winners, losers)
    )
    return CompositionPairs(tiers, prompts, drawn, beside, torch.full((len(tiers),), tie))


def with_wrong_labels(pairs: CompositionPairs, fraction: float, *, seed: int) -> CompositionPairs:
    """Return the pairs with winner and loser exchanged in a random `fraction` of them, exactly (rounded)."""
    rows = np.random.default_rng([seed, 4]).permutation(len(pairs))[: round(fraction * len(pairs))]
    wrong = torch.zeros(len(pairs), dtype=torch.bool)
    wrong[torch.from_numpy(rows)] = True
    mask = wrong[:, None, None, None]
    return replace(
        pairs,
        winners=torch.where(mask, pairs.losers, pairs.winners),
        losers=torch.where(mask, pairs.winners, pairs.losers),
    )
