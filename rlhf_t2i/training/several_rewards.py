"""Advantages of one reward or of several, as the options combine_rewards and veto say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.advantages import decoupled_advantages, standardised_sum, vetoed_advantages
from rlhf_t2i.rewards.load import WeightedSum
from rlhf_t2i.settings.several_rewards import SeveralRewardsSettings
from rlhf_t2i.types import ProcessGroup

Method = Callable[[Float[Tensor, "P K"]], Float[Tensor, "P K"]]
"""Rewards of K images of each of P prompts -> their advantages."""


def combined_advantages(
    processes: ProcessGroup,
    rewards: Float[Tensor, "P K"],
    scores: Mapping[str, Float[Tensor, " B"]],
    *,
    reward: WeightedSum,
    methods: Sequence[Method],
    config: SeveralRewardsSettings,
) -> Float[Tensor, "P K"]:
    """Return the advantages of the images of all processes. Collective.

    `rewards` are weighted sums of all processes; `scores` those of each reward for the images of this process. With
    gdpo `methods` has one method for each term of the sum, otherwise the first one is used.
    """
    if config.combine_rewards == "sum" and config.veto is None:
        return methods[0](rewards)
    gathered = {name: processes.gather(each.view(-1, rewards.shape[1])).cpu() for name, each in scores.items()}
    stacked, weights = torch.stack([gathered[term.name] for term in reward.rewards]), [w for _, w in reward.terms]
    match config.combine_rewards:
        case "sum":
            advantages = methods[0](rewards)
        case "standardised_sum":
            advantages = methods[0](standardised_sum(stacked, weights))
        case "gdpo":
            parts = [method(part) for method, part in zip(methods, stacked, strict=True)]
            advantages = decoupled_advantages(torch.stack(parts), weights)
    return (
        advantages if config.veto is None else vetoed_advantages(advantages, gathered[config.veto] >= config.veto_below)
    )
