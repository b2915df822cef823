"""Options of recipes/ddpo.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from rlhf_t2i.settings.base import Group, Rule
from rlhf_t2i.settings.groups import GroupedSamplingSettings, TrainerConfig
from rlhf_t2i.settings.ranges import Fraction, NonNegativeFloat, PositiveFloat, PositiveFraction, PositiveInt
from rlhf_t2i.settings.several_rewards import SeveralRewardsSettings


@dataclass(frozen=True, kw_only=True)
class DdpoSettings(GroupedSamplingSettings, TrainerConfig):
    """Sampling and update of DDPO, whatever the reward."""

    eta: Annotated[PositiveFraction, Group("sampling")] = 1.0
    """Noise of each denoising step; 1 is the noise of the forward process. Not 0: a deterministic step has no
    log-probability."""

    max_advantage: PositiveFloat = 5.0
    """Absolute value that advantages are clipped to."""

    window_start: Fraction = 0.0
    """Start of the trained denoising steps, as a fraction of sampling: 0 is pure noise, 1 the image. Early steps decide
    the content of an image, late ones its detail."""
    window_end: Fraction = 0.5
    """End of the trained denoising steps, as a fraction of sampling: 0 is pure noise, 1 the image."""
    timestep_fraction: PositiveFraction = 1.0
    """Fraction of the denoising steps in the window that each image trains, drawn at random."""
    clip_range: PositiveFloat | None = None
    """Clip range of PPO's probability ratio, whose log-probability is averaged over latent numbers; null is
    0.0113 / sqrt(latent numbers): 5e-4 for the built-in model, 9e-5 for SD 1.5 (published: 1e-4)."""
    kl_weight: NonNegativeFloat = 0.0
    """Weight of the KL divergence from the model before training, averaged over latent numbers; 0 keeps no reference
    model."""
    num_inner_epochs: PositiveInt = 1
    """Number of passes over the images of each step."""
    num_minibatches: PositiveInt = 2
    """Number of optimiser steps in one inner epoch; divides images_per_prompt."""

    def rules(self) -> list[Rule]:
        first, end = self.trained_window
        return [
            *super().rules(),
            ("window_end", first < end, "at least one denoising step after window_start"),
            (
                "num_minibatches",
                self.images_per_prompt % self.num_minibatches == 0,
                f"a divisor of images_per_prompt ({self.images_per_prompt}): each minibatch takes the same number of "
                f"images of every prompt",
            ),
        ]

    @property
    def trained_window(self) -> tuple[int, int]:
        """The first trained denoising step, and the one after the last."""
        steps = self.num_denoising_steps
        first, end = round(self.window_start * steps), round(self.window_end * steps)
        return (0, 1) if steps == 1 and self.window_start < self.window_end else (first, end)

    @property
    def images_per_optimizer_step(self) -> int:
        return self.prompts_per_step * self.images_per_prompt // self.num_minibatches


@dataclass(frozen=True, kw_only=True)
class Config(SeveralRewardsSettings, DdpoSettings):
    """DDPO settings. `microbatch_size` counts images in sampling and (image, step) pairs in the update."""

    async_reward: Annotated[bool, Group("reward")] = False
    """Score each microbatch while the next one is being sampled; for a reward on another machine or device."""
    advantages: Literal["per_prompt_history", "group_relative", "whole_batch"] = "per_prompt_history"
    """Mean and standard deviation that rewards are normalised by: of the prompt's recent rewards (per_prompt_history),
    of the prompt's images in this step (group_relative), or of all images in this step (whole_batch)."""
    history_size: PositiveInt = 32
    """Number of the latest rewards of each prompt that per_prompt_history keeps."""
    history_min_count: PositiveInt = 16
    """Number of rewards of a prompt that per_prompt_history needs; with fewer, all images in this step are used."""
