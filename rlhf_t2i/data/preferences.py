"""Selection of preference pairs for Diffusion-DPO: two images of one prompt, one of them preferred."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlhf_t2i.advantages import EQUAL


def random_order(count: int, epoch: int, seed: int) -> Int[Tensor, " N"]:
    """Return the numbers below `count` in the random order of an epoch."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def pairs_of_step(
    count: int,
    step: int,
    *,
    num_pairs: int,
    seed: int,
    order: Callable[[int, int, int], Int[Tensor, " N"]] = random_order,
) -> list[int]:
    """Return the indices of the pairs of a step: the next `num_pairs` of `count`, reshuffled in every epoch.

    A pure function of the step, so that resuming needs no stored state. `order` takes count, epoch and seed.
    """
    indices: list[int] = []
    start, stop = step * num_pairs, (step + 1) * num_pairs
    for epoch in range(start // count, -(-stop // count)):
        indices += order(count, epoch, seed)[max(0, start - epoch * count) : stop - epoch * count].tolist()
    return indices


def choose_pairs(
    scores: Float[Tensor, "P K"],
    *,
    selection: Literal["best_worst", "all", "random"],
    generators: Sequence[torch.Generator],
) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"]]:
    """Return winners and losers among the K scored images of each prompt, as indices into the flattened scores.

    `selection` is the best and the worst image, all pairs, or two images drawn by the prompt's generator. Two images
    with equal scores, as `EQUAL` of `rlhf_t2i.advantages` says, are not a pair.
    """
    num_prompts, copies = scores.shape
    match selection:
        case "best_worst":
            first, second = scores.argmax(dim=1, keepdim=True), scores.argmin(dim=1, keepdim=True)
        case "all":
            both = torch.combinations(torch.arange(copies), 2).to(scores.device)
            first, second = (side.expand(num_prompts, -1) for side in both.T)
        case "random":
            drawn = [torch.randperm(copies, generator=generator)[:2] for generator in generators]
            first, second = torch.stack(drawn).to(scores.device).split(1, dim=1)
    starts = copies * torch.arange(num_prompts, device=scores.device)[:, None]
    first, second = (first + starts).flatten(), (second + starts).flatten()
    one, other = scores.flatten()[first], scores.flatten()[second]
    differ = (one - other).abs() > EQUAL * torch.maximum(one.abs(), other.abs())
    winner, loser = torch.where(one > other, first, second), torch.where(one > other, second, first)
    return winner[differ], loser[differ]


def implicit_preference(margin: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """Return 1 where the policy agrees with a pair, 0 where it disagrees, 1/2 where the margin is 0.

    margin = (loser_error - reference_loser_error) - (winner_error - reference_winner_error)
    """
    return (margin.sign() + 1) / 2
