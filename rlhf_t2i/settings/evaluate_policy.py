"""Options of recipes/evaluate_policy.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from rlhf_t2i.settings.base import Group, Rule
from rlhf_t2i.settings.by_model import by_model
from rlhf_t2i.settings.evaluation import EvaluationPromptSettings, EvaluationSamplingSettings
from rlhf_t2i.settings.from_run import sampling_of_runs
from rlhf_t2i.settings.groups import (
    FolderSettings,
    GuidanceSettings,
    MicrobatchSettings,
    ModelSettings,
    PrecisionSettings,
    ThreadSettings,
)
from rlhf_t2i.settings.lists import names
from rlhf_t2i.settings.no_imports import ImportSettings
from rlhf_t2i.settings.ranges import BASE, PositiveInt, RewardNames, WeightsPaths


@dataclass(frozen=True, kw_only=True)
class Config(
    ImportSettings,
    ThreadSettings,
    PrecisionSettings,
    MicrobatchSettings,
    FolderSettings,
    EvaluationPromptSettings,
    EvaluationSamplingSettings,
    GuidanceSettings,
    ModelSettings,
):
    """Settings of an evaluation. Defaults of model, resolution, steps, guidance, prompts and rewards are those of the
    run whose weights are evaluated."""

    weights: Annotated[WeightsPaths, Group("model and LoRA")] = BASE
    """Weights to evaluate, comma-separated: base (the model itself), and folders of runs, of what they exported, or of
    checkpoints. A run's own weights are its EMA if it kept one (ema_decay), a checkpoint's the last ones."""
    num_evaluation_images: Annotated[PositiveInt, Group("evaluation")] = by_model(408, 64)
    """Images for each of the weights, over all processes; the prompts are used in turn."""
    num_evaluation_steps: Annotated[PositiveInt, Group("evaluation")] = by_model(8, family="sampling_steps")
    """Denoising steps for one image."""
    evaluation_rewards: Annotated[RewardNames, Group("evaluation")] = by_model("oracle,oracle_pass")
    """Rewards to measure, comma-separated NAME (docs/rewards.md)."""

    def run_settings(self) -> Mapping[str, Any]:
        return sampling_of_runs(names(self.weights), vars(self))

    def rules(self) -> list[Rule]:
        return [*super().rules(), ("weights", bool(names(self.weights)), "base or at least one folder")]
