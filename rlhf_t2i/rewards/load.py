"""Build checked rewards from what a user writes: `llava_reward`, `jpeg_compressibility=0.1`, `my_module:my_reward`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.passed import passed
from rlhf_t2i.prompt_rows import metadata_of
from rlhf_t2i.rewards.groups import groups_of, needs_groups
from rlhf_t2i.rewards.imported import as_callable, takes_metadata
from rlhf_t2i.rewards.rows import check_rows
from rlhf_t2i.rewards.scores import as_scores
from rlhf_t2i.rewards.table import find_reward, reward_names
from rlhf_t2i.rewards.terms import parse_terms
from rlhf_t2i.types import MetadataReward, Reward


@dataclass(frozen=True, slots=True)
class CheckedReward:
    """A reward with a name, which checks the type, shape and values of every result."""

    name: str
    function: Callable[..., Any]
    """Takes images and prompts, and the row of each prompt if it has a parameter `metadata`."""
    finite: bool = True
    """True if a score that is not finite is an error; a search ranks such an image last instead."""
    differentiable: bool | None = None
    """True if the gradient reaches the pixels; None if that must be tested."""

    @property
    def needs_groups(self) -> bool:
        """True if the reward compares the images of one prompt (`rewards.groups`)."""
        return needs_groups(self.function)

    def __call__(self, images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> Float[Tensor, " B"]:
        """Return float32 scores on the device of the images, which stay as they are whatever the reward does.

        Raises TypeError or ValueError, naming the reward and the prompt, for a result that is not one finite number per
        image, and ValueError for a prompt without what the reward needs (`check_rows`).
        """
        check_rows(self.name, self.function, prompts)
        # Copies: a reward may write into what it is given, and the images are also scored by others, saved and shown.
        rows = {"metadata": metadata_of(prompts)} if takes_metadata(self.function) else {}
        result = self.function(images.clone(), list(prompts), **rows)
        try:
            scores = as_scores(result, count=len(images), device=images.device)
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"The reward {self.name!r} returned {error}. The first prompt was {prompts[0]!r}."
            ) from None
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

    @property
    def needs_groups(self) -> bool:
        """True if one of the rewards compares the images of one prompt."""
        return any(reward.needs_groups for reward in self.rewards)

    def refuse_groups(self, why: str) -> None:
        """Raise ValueError, naming it, for a reward that compares the images of one prompt; `why` completes it."""
        for reward in self.rewards:
            if reward.needs_groups:
                raise ValueError(
                    f"The reward {reward.name!r} compares the images of one prompt with one another, but {why}. Use a "
                    f"reward that scores one image."
                )

    def without_groups(self) -> WeightedSum:
        """Return the rewards that score one image, for an evaluation.

        The others have the same mean for every model. Raises ValueError, naming them, if none is left.
        """
        single = tuple(term for term in self.terms if not term[0].needs_groups)
        if not single:
            self.refuse_groups("an evaluation needs scores that differ between models: set evaluation_rewards")
        return WeightedSum(single)

    def __call__(
        self,
        images: Float[Tensor, "B 3 Y X"],
        prompts: Sequence[str],
        *,
        batch_size: int | None = None,
        group_size: int | None = None,
    ) -> tuple[Float[Tensor, " B"], dict[str, Float[Tensor, " B"]]]:
        """Return (total, scores): the weighted sum, and the unweighted scores of each reward by its name.

        A reward is called with at most `batch_size` images at once, by default with all; one that compares the images
        of a prompt with a whole group at once: `group_size` images, by default each run of equal prompts.
        """
        size = batch_size or max(len(images), 1)
        chunks = [slice(start, start + size) for start in range(0, max(len(images), 1), size)]
        scores = dict[str, Tensor]()
        for reward in self.rewards:
            parts = groups_of(prompts, group_size) if reward.needs_groups else chunks
            scores[reward.name] = torch.cat([reward(images[rows], prompts[rows]) for rows in parts])
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


def as_weighted_sum(reward: Reward | MetadataReward | WeightedSum, *, finite: bool = True) -> WeightedSum:
    """Return any callable of images and prompts as a sum with one term, and a sum unchanged."""
    return reward if isinstance(reward, WeightedSum) else WeightedSum(((as_checked(reward, finite=finite), 1.0),))


def as_checked(reward: Reward | MetadataReward, *, finite: bool = True) -> CheckedReward:
    """Return any callable of images and prompts as a checked reward, which has the callable's own name."""
    if isinstance(reward, CheckedReward):
        return reward
    function = reward.func if isinstance(reward, partial) else reward
    name = str(getattr(function, "__name__", type(function).__name__))
    name = "reward" if name == "<lambda>" else name
    return CheckedReward(name, as_callable(reward, name), finite)


def load_reward(name: str, *, finite: bool = True) -> CheckedReward:
    """Load one reward by its name; rewards/table.py lists the names, and a caller in Python may have passed others."""
    if (reward := passed().rewards.get(name)) is not None:
        return replace(as_checked(reward), name=name, finite=finite)
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
