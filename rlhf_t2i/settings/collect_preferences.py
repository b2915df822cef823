"""Options of recipes/collect_preferences.py."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from rlhf_t2i.settings.base import Group, Rule, Settings
from rlhf_t2i.settings.by_model import by_model
from rlhf_t2i.settings.evaluation import EvaluationPromptSettings, EvaluationSamplingSettings
from rlhf_t2i.settings.from_run import sampling_of_runs
from rlhf_t2i.settings.groups import (
    DataSettings,
    GuidanceSettings,
    MicrobatchSettings,
    ModelSettings,
    ResumeSettings,
    SeedSettings,
)
from rlhf_t2i.settings.lists import names
from rlhf_t2i.settings.no_imports import ImportSettings
from rlhf_t2i.settings.ranges import (
    DataPaths,
    InputPath,
    InputPaths,
    NonNegativeInt,
    PositiveInt,
    RewardNames,
    WeightsPaths,
)
from rlhf_t2i.settings.server import ServerSettings


@dataclass(frozen=True, kw_only=True)
class PairSourceSettings(Settings, group="data"):
    """Sources of the pairs of images."""

    runs: InputPaths | None = None
    """Comma-separated folders of runs that trained a diffusion model, or of recipes/evaluate_policy.py: pairs are
    images before and after training, or of two of the evaluated weights."""
    pairs: DataPaths | None = None
    """Preference data to ask again: comma-separated files or folders, each PATH or FORMAT:PATH (docs/data.md). A
    record {"prompt", "tie"} is a pair without a preference. Existing preferences appear on the results page only."""
    num_pairs: PositiveInt | None = None
    """Pairs to ask. With --weights they are sampled, and null is 100; otherwise they are drawn at random, and null is
    all."""


@dataclass(frozen=True, kw_only=True)
class Config(
    ImportSettings,
    SeedSettings,
    ServerSettings,
    MicrobatchSettings,
    ResumeSettings,
    EvaluationPromptSettings,
    EvaluationSamplingSettings,
    DataSettings,
    PairSourceSettings,
    GuidanceSettings,
    ModelSettings,
):
    """Settings of an annotation page. Exactly one of runs, pairs and weights says where the images come from."""

    weights: Annotated[WeightsPaths, Group("model and LoRA")] | None = None
    """Two weights to sample pairs from, comma-separated, as in recipes/evaluate_policy.py: base, and folders of runs,
    of what they exported, or of checkpoints."""
    num_evaluation_steps: Annotated[PositiveInt, Group("evaluation")] = by_model(8, family="sampling_steps")
    """Denoising steps for one image with --weights."""
    criteria: Annotated[str, Group("data")] | None = None
    """Comma-separated criteria such as alignment,quality (lower-case letters, digits and _), asked one after another of
    each pair; the preferences by each go to pairs_CRITERION.jsonl. null asks once, for the whole."""
    known_pairs: Annotated[DataPaths, Group("data")] | None = None
    """Preference data whose answers are known, for the training round and the attention checks: comma-separated files
    or folders, each PATH or FORMAT:PATH (docs/data.md). Their first pairs are the training round."""
    num_training_questions: Annotated[NonNegativeInt, Group("data")] = 0
    """Pairs of known_pairs that every annotator is asked first, and told the known answer of."""
    num_attention_checks: Annotated[NonNegativeInt, Group("data")] = 0
    """Pairs of known_pairs that every annotator is asked among the others without being told; the results page shows
    how many each one passed."""
    guideline: Annotated[InputPath, Group("data")] | None = None
    """Text file that the page shows to annotators at the start and on request; an empty line begins a paragraph. null
    is a short general text."""
    rewards: Annotated[RewardNames, Group("reward")] | None = None
    """Rewards that the results page compares with people's answers, comma-separated NAME or NAME=WEIGHT, summed by
    weight (docs/rewards.md); null compares with none."""
    seed: NonNegativeInt = 0
    """Seed of the order and the sides in which each annotator sees the pairs."""

    def run_settings(self) -> Mapping[str, Any]:
        return sampling_of_runs(names(self.weights or ""), vars(self))

    def unused(self) -> Collection[str]:
        return () if self.weights else ("evaluation_prompts",)

    def rules(self) -> list[Rule]:
        sources = [name for name in ("runs", "pairs", "weights") if names(getattr(self, name) or "")]
        two = self.weights is None or len(names(self.weights)) == 2
        given = " and ".join(sources) or "none of them"
        if len(sources) != 1:
            raise ValueError(f"Images come from exactly one of runs, pairs and weights; given is {given}.")
        given_criteria = names(self.criteria or "")
        are_words = all(re.fullmatch("[a-z0-9_]{1,30}", one) for one in given_criteria)
        words = (
            are_words and len(set(given_criteria)) == len(given_criteria) and (self.criteria is None or given_criteria)
        )
        num_known = self.num_training_questions + self.num_attention_checks
        return [
            *super().rules(),
            (
                "known_pairs",
                (num_known > 0) == (self.known_pairs is not None),
                "given together with num_training_questions or num_attention_checks, and only then",
            ),
            ("weights", two, "two of them, such as base,FOLDER"),
            (
                "criteria",
                bool(words),
                "different words of at most 30 lower-case letters, digits and _, with commas between",
            ),
        ]
