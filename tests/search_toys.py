"""Search contexts of toy models with known distributions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_t2i.diffusion.transitions import ddim
from rlhf_t2i.models.base import DiffusionPolicy
from rlhf_t2i.search.context import RewardFunction, SearchContext
from rlhf_t2i.search.particles import PotentialName
from rlhf_t2i.search.steering import SteeringResult, fk_steering
from rlhf_t2i.types import Sampler
from tests.runs import redness
from tests.toys import GaussianModel, number

POTENTIALS: list[PotentialName] = ["difference", "max", "sum"]


def value(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The reward of the toy model: the number that its image encodes."""
    return number(images)


def generators(count: int, *, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed * 1_000_000 + i) for i in range(count)]


def toy(*, eta: float, reward: RewardFunction = value, num_steps: int = 8, **settings: Any) -> SearchContext:
    model = GaussianModel()
    sampler = Sampler(model.schedule(num_steps), partial(ddim, eta=eta))
    return SearchContext(
        model, reward, sampler=sampler, microbatch_size=settings.pop("microbatch_size", 100_000), **settings
    )


def distribution_of(context: SearchContext) -> tuple[float, float]:
    """Mean and variance of the samples of a toy model."""
    assert isinstance(context.model, GaussianModel)
    return context.model.distribution(context.sampler)


def context_of(policy: DiffusionPolicy, *, eta: float, microbatch_size: int = 64, num_steps: int = 4) -> SearchContext:
    return SearchContext(
        policy,
        redness,
        sampler=Sampler(policy.schedule(num_steps), partial(ddim, eta=eta)),
        microbatch_size=microbatch_size,
    )


def steer_toy(
    *,
    num_particles: int,
    num_prompts: int = 1,
    strength: float,
    reward_std: float = 1.0,
    reward: RewardFunction = value,
    **settings: Any,
) -> tuple[SearchContext, SteeringResult]:
    context = toy(eta=1.0, reward=reward)
    result = fk_steering(
        context, ["a"] * num_prompts, strength=strength, reward_std=reward_std, resample_after=[2, 4, 6],
        generators=generators(num_particles * num_prompts), resampling=generators(num_prompts, seed=1), **settings,
    )  # fmt: skip
    return context, result


def nan_above(limit: float) -> RewardFunction:
    return lambda images, prompts: torch.where(number(images) > limit, math.nan, number(images))
