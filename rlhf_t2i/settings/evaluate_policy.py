"""Options of recipes/evaluate_policy.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from rlhf_t2i.settings.base import Group, Rule
from rlhf_t2i.settings.groups import (
    EvaluationSamplingSettings,
    FolderSettings,
    GuidanceSettings,
    MicrobatchSettings,
    ModelSettings,
    PrecisionSettings,
    RewardNames,
    ThreadSettings,
)
from rlhf_t2i.settings.lists import names
from rlhf_t2i.settings.ranges import PositiveInt


@dataclass(frozen=True, kw_only=True)
class Config(
    ThreadSettings,
    PrecisionSettings,
    MicrobatchSettings,
    FolderSettings,
    EvaluationSamplingSettings,
    GuidanceSettings,
    ModelSettings,
):
    """Settings of an evaluation."""

    weights: Annotated[str, Group("model and LoRA")] = "base"
    """Weights to evaluate, comma-separated: base (the model itself), and folders of runs, of what they exported, or of
    checkpoints. A run's own weights are its EMA if it kept one (ema_decay), a checkpoint's the last ones."""
    num_evaluation_images: Annotated[PositiveInt, Group("evaluation")] = 408
    """Images for each of the weights, over all processes; the prompts are used in turn."""
    num_evaluation_steps: Annotated[PositiveInt, Group("evaluation")] = 8
    """Denoising steps for one image."""
    evaluation_rewards: Annotated[RewardNames, Group("evaluation")] = "oracle,oracle_pass"
    """Rewards to measure, comma-separated NAME (docs/rewards.md)."""

    def rules(self) -> list[Rule]:
        return [*super().rules(), ("weights", bool(names(self.weights)), "base or at least one folder")]
