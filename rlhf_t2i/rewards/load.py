"""Build checked rewards from what a user writes: `llava_reward`, `jpeg_compressibility=0.1`, `my_module:my_reward`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.rewards.table import find_reward, reward_names
from rlhf_t2i.rewards.terms import parse_terms
from rlhf_t2i.types import Reward


@dataclass(frozen=True, slots=True)
class CheckedReward:
    """A reward with a name, which checks the type, shape and values of every result."""

    name: str
    function: Reward
    finite: bool = True
    """True if a score that is not finite is an error; a search ranks such an image last instead."""
    differentiable: bool | None = None
    """True if the gradient reaches the pixels; None if that must be tested."""

    def __call__(self, images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> Float[Tensor, " B"]:
        """Return float32 scores on the device of the images.

        Raises TypeError or ValueError, naming the reward and the prompt, for a result that is not one finite float per
        image.
        """
        scores = self.function(images, prompts)
        if not isinstance(scores, Tensor):
            raise TypeError(
                f"The reward {self.name!r} returned a {type(scores).__name__}; it must return a torch.Tensor with one "
                f"float for each image. The first prompt was {prompts[0]!r}."
            )
        if scores.shape != (len(images),):
            raise ValueError(
                f"The reward {self.name!r} returned shape {tuple(scores.shape)} for {len(images)} images; it must "
                f"return ({len(images)},). The first prompt was {prompts[0]!r}."
            )
        if not scores.is_floating_point():
            raise TypeError(
                f"The reward {self.name!r} returned {scores.dtype}; it must return floats. The first prompt was "
                f"{prompts[0]!r}."
            )
        scores = scores.float().to(images.device)
        if self.finite and not (finite := scores.isfinite()).all():
            worst = int((~finite).nonzero()[0])
            raise ValueError(
                f"The reward {self.name!r} returned {scores[worst].item()} for the prompt {prompts[worst]!r} "
                f"(image {worst} of {len(images)}); rewards must be finite."
            )
        return scores


@dataclass(frozen=True, slots=True)
class WeightedSum:
    """A weighted sum of rewards: sum_i weight_i * reward_i."""

    terms: tuple[tuple[CheckedReward, float], ...]

    @property
    def rewards(self) -> list[CheckedReward]:
        """The rewards without their weights."""
        return [reward for reward, _ in self.terms]

    def __call__(
        self, images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str], *, batch_size: int | None = None
    ) -> tuple[Float[Tensor, " B"], dict[str, Float[Tensor, " B"]]]:
        """Return (total, scores): the weighted sum, and the unweighted scores of each reward by its name.

        A reward is called with at most `batch_size` images at once, by default with all.
        """
        chunks = torch.arange(len(images)).split(batch_size or len(images))
        scores = {
            reward.name: torch.cat([reward(images[rows], [prompts[int(i)] for i in rows]) for rows in chunks])
            for reward, _ in self.terms
        }
        total = torch.stack([weight * scores[reward.name] for reward, weight in self.terms]).sum(0)
        return total, scores


def load_rewards(specification: str, *, finite: bool = True) -> WeightedSum:
    """Build the weighted sum that a text such as `oracle,jpeg_compressibility=0.1` describes.

    Each term is NAME or NAME=WEIGHT, with a weight of 1 by default (`parse_terms`); rewards/table.py lists the names.
    With `finite` false, scores that are not finite are no error. Raises ValueError for an unknown or repeated name and
    for a weight that is not a finite number.
    """
    parts = parse_terms(specification)
    if not parts:
        raise ValueError(f"No reward was given; choose from {', '.join(reward_names())}.")
    terms: list[tuple[CheckedReward, float]] = []
    for name, number in parts:
        weight = 1.0 if number is None else _weight(number, name)
        if name in {reward.name for reward, _ in terms}:
            raise ValueError(f"The reward {name!r} was given twice.")
        terms.append((load_reward(name, finite=finite), weight))
    return WeightedSum(tuple(terms))


def load_reward(name: str, *, finite: bool = True) -> CheckedReward:
    """Load one reward by its name; rewards/table.py lists the names."""
    entry, argument = find_reward(name)
    return CheckedReward(name, entry.load(argument, finite), finite, entry.differentiable)


def _weight(text: str, name: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise ValueError(
            f"In the reward '{name}={text}' the weight {text!r} is not a number; a name with = or , in it is quoted."
        )
    return weight
