"""Options of recipes/flow_grpo.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from rlhf_t2i.settings.base import Rule
from rlhf_t2i.settings.by_model import by_model
from rlhf_t2i.settings.groups import GroupedSamplingSettings, TrainerConfig
from rlhf_t2i.settings.ranges import Fraction, ModelPath, NonNegativeFloat, PositiveFloat, PositiveInt
from rlhf_t2i.settings.several_rewards import SeveralRewardsSettings
from rlhf_t2i.shapes.names import TOY_FLOW_MODEL


@dataclass(frozen=True, kw_only=True)
class Config(SeveralRewardsSettings, GroupedSamplingSettings, TrainerConfig):
    """Flow-GRPO settings. `microbatch_size` counts images in sampling and (image, step) pairs in the update."""

    images_per_prompt: Annotated[int, Ge(2)] = 12
    """Images sampled for each prompt in one training step (a group), all on one process."""
    num_denoising_steps: Annotated[int, Ge(2)] = by_model(8, family="training_steps")
    """Denoising steps for one image; the last one is never noisy."""
    model: ModelPath = by_model(TOY_FLOW_MODEL, TOY_FLOW_MODEL)
    """Flow model: a diffusers pipeline folder, a Hub id, or the built-in shapes-flow."""

    same_initial_noise: bool = False
    """Start the images of a prompt from the same noise, so that they differ by the noise of the window only
    (DanceGRPO, arXiv:2505.07818)."""
    dynamics: Literal["flow_sde", "cps"] = "flow_sde"
    """Noisy denoising step: flow_sde is Flow-GRPO's SDE, cps coefficients-preserving sampling (arXiv:2509.05952)."""
    noise_scale: PositiveFloat = 0.7
    """Noise of a noisy denoising step; published: 0.7 with flow_sde, 0.8 with cps, which allows at most 1."""
    cps_log_prob: Literal["published", "gaussian"] = "published"
    """Log-probability of a step of cps: minus the squared distance from its mean, as in the published code, or the
    Gaussian density, which divides that by twice the variance. Without effect with flow_sde or ratio_normalisation."""
    window_size: PositiveInt | None = None
    """Number of noisy denoising steps, which are the trained ones; null is all that lie between window_start and
    window_end."""
    window_start: Fraction = 0.0
    """Start of the denoising steps that may be noisy, as a fraction of sampling: 0 is pure noise, 1 the image."""
    window_end: Fraction = 0.5
    """End of the denoising steps that may be noisy, as a fraction of sampling: 0 is pure noise, 1 the image. The last
    step is never noisy, because its noise would stay in the image."""
    window_moves_every: PositiveInt | None = None
    """Training steps after which the window of noisy steps moves one step towards the image, and from the end back to
    the start (MixGRPO); null draws its place at random in each training step."""

    advantages: Literal["global_std", "group_std"] = "global_std"
    """Standard deviation that centred rewards are divided by: of all images of the step (global_std), or of each
    prompt's own (group_std)."""
    max_advantage: PositiveFloat = 5.0
    """Absolute value that advantages are clipped to."""
    clip_range: PositiveFloat | None = None
    """Clip range of PPO's probability ratio, whose log-probability is averaged over latent numbers; null is
    0.0113 / sqrt(latent numbers). Published for SD 3.5 medium at 512 pixels: 1e-4, and 1e-5 with a small window."""
    ratio_normalisation: bool = False
    """Remove the bias of probability ratios, scale them alike in all denoising steps, and weight steps by 1 / their
    length (GRPO-Guard, arXiv:2510.22319)."""
    kl_weight: NonNegativeFloat = 0.0
    """Weight of the exact KL divergence from the model before training, averaged over latent numbers; 0 keeps no
    reference model. That divergence is about ten times the authors' estimate, whose published weight is 0.04."""
    num_inner_epochs: PositiveInt = 1
    """Number of passes over the images of each step."""
    num_minibatches: PositiveInt = 2
    """Number of optimiser steps in one inner epoch; divides images_per_prompt."""

    def rules(self) -> list[Rule]:
        first, end = self.noisy_steps
        fits = self.window_size is None or self.window_size <= end - first
        divides = self.images_per_prompt % self.num_minibatches == 0
        return [
            *super().rules(),
            ("noise_scale", self.dynamics == "flow_sde" or self.noise_scale <= 1, "at most 1 with cps"),
            ("window_end", first < end, "later: no denoising step after window_start may be noisy"),
            ("window_size", fits, f"between 1 and the {end - first} steps that may be noisy"),
            ("num_minibatches", divides, f"a divisor of images_per_prompt ({self.images_per_prompt})"),
        ]

    @property
    def noisy_steps(self) -> tuple[int, int]:
        """The first denoising step that may be noisy, and the one after the last."""
        total = self.num_denoising_steps
        return round(self.window_start * total), min(round(self.window_end * total), total - 1)

    @property
    def images_per_optimizer_step(self) -> int:
        return self.prompts_per_step * self.images_per_prompt // self.num_minibatches
