"""Advantages of one reward or of several, as the options combine_rewards and veto say, and what makes them useless."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.advantages import decoupled_advantages, standardised_sum, vetoed_advantages
from rlhf_t2i.rewards.load import WeightedSum
from rlhf_t2i.settings.several_rewards import SeveralRewardsSettings
from rlhf_t2i.types import ProcessGroup

_DROWNED = 0.01
"""Standard deviation of a weighted reward, in units of the largest one, below which their sum hardly depends on it."""

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


def any_to_learn(advantages: Tensor, *, step: int, print: Callable[[str], None]) -> bool:
    """Return False, and say so, if no image of a step, of all processes, is better than another: it takes no update.

    An update by weight decay and a KL's rounding errors, which Adam makes as large as any other, would move the model
    away from where its rewards have brought it.
    """
    found = bool(advantages.any())
    if not found:
        print(f"WARNING: in step {step + 1} the images of each prompt have equal rewards; the update was left out.")
    return found


def warn_of_drowned(
    scores: Mapping[str, Float[Tensor, " B"]],
    reward: WeightedSum,
    *,
    gather: Callable[[Tensor], Tensor],
    print: Callable[[str], None],
) -> None:
    """Warn of a reward whose differences are lost in a weighted sum, by the images of all processes. Collective."""
    stds = {
        term.name: abs(weight) * gather(scores[term.name]).std(correction=0).item() for term, weight in reward.terms
    }
    largest = max(stds, key=stds.__getitem__)
    for name, std in stds.items():
        if 0 < std < _DROWNED * stds[largest]:
            print(
                f"WARNING: the reward {name} is drowned: times its weight its standard deviation is {std:.2g}, and "
                f"that of {largest} {stds[largest]:.2g}. Change weights, or try --combine_rewards standardised_sum."
            )
