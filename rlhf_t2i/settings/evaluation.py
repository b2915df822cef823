"""Options of evaluations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from rlhf_t2i.rewards.terms import reward_names_of
from rlhf_t2i.settings.base import Rule, Settings
from rlhf_t2i.settings.by_model import by_model
from rlhf_t2i.settings.no_imports import ImportSettings
from rlhf_t2i.settings.ranges import Fraction, MeasuredReward, NonNegativeInt, PositiveInt, PromptsPath, RewardNames
from rlhf_t2i.shapes.names import TOY_PROMPTS, TOY_REWARD, TOY_SIGN_PROMPTS


@dataclass(frozen=True, kw_only=True)
class EvaluationPromptSettings(Settings, group="evaluation"):
    """Prompts to evaluate trained weights on."""

    evaluation_prompts: PromptsPath = by_model(TOY_PROMPTS, signs=TOY_SIGN_PROMPTS)
    """Prompts to evaluate on: a .txt file with one a line, a .jsonl, .json, .csv or .parquet file with "prompt" in each
    row, hf:ID@SPLIT for a data set of the Hub, or shapes or words for the held-out prompts of the toy
    world."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSamplingSettings(Settings, group="evaluation"):
    """Images to evaluate by: the same seeds for all weights."""

    evaluation_eta: Fraction = 0.0
    """Noise of each denoising step in evaluation; 0 is deterministic, 1 is the noise of the forward process."""
    evaluation_seed: NonNegativeInt = 1_000_000
    """Seed of image 0 in evaluation; image i uses evaluation_seed + i."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(ImportSettings, EvaluationSamplingSettings, group="evaluation"):
    """Evaluation during training."""

    evaluate_every: NonNegativeInt = 10
    """Training steps between evaluations; 0 evaluates only before the first and after the last step."""
    evaluation_prompts: PromptsPath | None = by_model(TOY_PROMPTS, None, signs=TOY_SIGN_PROMPTS)
    """Prompts to evaluate on: a .txt file with one a line, a .jsonl, .json, .csv or .parquet file with "prompt" in each
    row, hf:ID@SPLIT for a data set of the Hub, or shapes or words for the held-out prompts of the toy
    world; null holds back a tenth of the prompts, at most 64."""
    num_evaluation_images: Annotated[int, Ge(2)] = by_model(408, 64)
    """Images in one evaluation, over all processes; the prompts are used in turn."""
    evaluation_rewards: RewardNames = by_model(
        f"oracle,oracle_pass,{TOY_REWARD}", "", signs="oracle,oracle_pass,oracle_word"
    )
    """Rewards to measure in evaluations beside those that are trained on, comma-separated NAME. One that is not trained
    on shows reward hacking."""
    num_evaluation_steps: PositiveInt | None = by_model(None, family="sampling_steps")
    """Denoising steps for one image in evaluation; null is num_denoising_steps."""
    max_image_grids: Annotated[int, Ge(3)] = 100
    """Evaluations whose images are kept, about evenly spaced, with the first, the best by early_stop_reward and the
    last; the images of others are deleted, and their scores stay."""
    early_stop_reward: MeasuredReward | None = None
    """Reward that may stop training, a NAME of evaluation_rewards and best one that is not trained on: once it has not
    risen in `patience` evaluations, training ends and the weights with its highest value are exported; null trains all
    num_steps."""
    patience: PositiveInt = 3
    """Evaluations in a row without a new highest early_stop_reward before training stops."""

    def rules(self) -> list[Rule]:
        return [
            *super().rules(),
            (
                "early_stop_reward",
                self.early_stop_reward is None or self.early_stop_reward in reward_names_of(self.evaluation_rewards),
                f"one of evaluation_rewards ({self.evaluation_rewards})",
            ),
            (
                "evaluate_every",
                self.early_stop_reward is None or self.evaluate_every >= 1,
                "at least 1 with early_stop_reward",
            ),
        ]
