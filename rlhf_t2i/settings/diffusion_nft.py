"""Options of recipes/diffusion_nft.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

from annotated_types import Ge

from rlhf_t2i.settings.base import Group, Rule
from rlhf_t2i.settings.by_model import by_model
from rlhf_t2i.settings.groups import GroupedSamplingSettings, TrainerConfig
from rlhf_t2i.settings.ranges import (
    Decay,
    Fraction,
    ModelPath,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
)
from rlhf_t2i.settings.several_rewards import SeveralRewardsSettings
from rlhf_t2i.shapes.names import TOY_FLOW_MODEL


class NftUpdateConfig(Protocol):
    """What DiffusionNFT's update reads of the settings of a recipe."""

    @property
    def images_per_prompt(self) -> int: ...
    @property
    def num_denoising_steps(self) -> int: ...
    @property
    def guidance_scale(self) -> float: ...
    @property
    def max_advantage(self) -> float: ...
    @property
    def timestep_fraction(self) -> float: ...
    @property
    def beta(self) -> float: ...
    @property
    def kl_weight(self) -> float: ...
    @property
    def num_minibatches(self) -> int: ...
    @property
    def seed(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Config(SeveralRewardsSettings, GroupedSamplingSettings, TrainerConfig):
    """DiffusionNFT settings. `microbatch_size` counts images in sampling and noised images in the update."""

    images_per_prompt: Annotated[int, Ge(2)] = 12
    """Images sampled for each prompt in one training step (a group), all on one process."""
    model: ModelPath = by_model(TOY_FLOW_MODEL, TOY_FLOW_MODEL)
    eta: Annotated[Fraction, Group("sampling")] = 0.0
    """Noise of each denoising step; 0 is deterministic, 1 is the noise of the forward process."""

    advantages: Literal["global_std", "group_std"] = "global_std"
    """Standard deviation that centred rewards are divided by: of all images of the step (global_std), or of each
    prompt's own (group_std)."""
    max_advantage: PositiveFloat = 5.0
    """Absolute value that advantages are clipped to; such an advantage gives an optimality probability of 0 or 1."""
    timestep_fraction: PositiveFraction = 0.5
    """Fraction of the sampler's noise levels that each image trains, drawn at random."""
    beta: PositiveFloat = 1.0
    """Distance of the implicit positive and negative policies from the sampling weights; published: 1, or 0.1 for
    several rewards."""
    kl_weight: NonNegativeFloat = 1e-4
    """Weight of the mean squared difference of outputs from the model before training; 0 keeps no reference model."""
    num_minibatches: PositiveInt = 1
    """Optimiser steps on the images of each step; divides images_per_prompt. The loss assumes that they are few."""

    sampling_ema_start: NonNegativeInt = 0
    """Training step up to which sampling uses the trained weights; after it an EMA of them."""
    sampling_ema_rise: NonNegativeFloat = 1e-3
    """Growth per training step of the decay of the sampling weights' EMA, from 0 at sampling_ema_start."""
    sampling_ema_max: Decay = 0.5
    """Largest decay of the sampling weights' EMA. For a reward that is easily hacked, start 75, rise 0.0075 and max
    0.999 were published."""

    def rules(self) -> list[Rule]:
        divides = self.images_per_prompt % self.num_minibatches == 0
        return [
            *super().rules(),
            ("num_minibatches", divides, f"a divisor of images_per_prompt ({self.images_per_prompt})"),
        ]

    @property
    def images_per_optimizer_step(self) -> int:
        return self.prompts_per_step * self.images_per_prompt // self.num_minibatches
