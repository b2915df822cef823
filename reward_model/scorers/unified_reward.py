"""UnifiedReward 2.0: a multimodal LLM that was trained to rate an image in words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reward_model.backbones.load import backbone_family
from reward_model.scorers.greedy_answers import greedy_answers, load_answering
from reward_model.types import Backbone

FAMILIES = ("qwen2_5_vl", "qwen3_vl")
"""Families that the published models belong to."""
AXES = ("Alignment", "Coherence", "Style")
MAX_TOKENS = 256
"""Length of an answer; the ratings take about 40 tokens."""
QUESTION = (
    "You are presented with a generated image and its associated text caption. Your task is to analyze the image "
    "across multiple dimensions in relation to the caption. Specifically:\n"
    "Provide overall assessments for the image along the following axes (each rated from 1 to 5):\n"
    "- Alignment Score: How well the image matches the caption in terms of content.\n"
    "- Coherence Score: How logically consistent the image is (absence of visual glitches, object distortions, etc.).\n"
    "- Style Score: How aesthetically appealing the image looks, regardless of caption accuracy.\n\n"
    "Output your evaluation using the format below:\n\n"
    "Alignment Score (1-5): X\nCoherence Score (1-5): Y\nStyle Score (1-5): Z\n\n"
    "Your task is provided as follows:\nText Caption: [{}]"
)
"""The question that the models were trained with."""


@dataclass(frozen=True, slots=True)
class UnifiedReward:
    """score = (mean of alignment, coherence and style - 1) / 4, in [0, 1], from a greedy answer; no gradient."""

    backbone: Backbone
    batch_size: int = 8
    log_odds_unit: float = 1.0
    """Arbitrary: a rating is no log-odds, and only the order of images has a meaning."""

    @property
    def model(self) -> Any:
        return self.backbone.model

    def __call__(self, images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> Float[Tensor, " B"]:
        """Return one score per image; raises ValueError, with the prompt, for an answer without three ratings."""
        answers = greedy_answers(
            self.backbone, images, [QUESTION.format(prompt) for prompt in prompts], max_tokens=MAX_TOKENS,
            batch_size=self.batch_size,
        )  # fmt: skip
        scores = [rating(answer, prompt) for answer, prompt in zip(answers, prompts, strict=True)]
        return images.new_tensor(scores, dtype=torch.float32)


def rating(answer: str, prompt: str) -> float:
    """Return the score of an answer; raises ValueError unless it rates each axis from 1 to 5."""
    found = [re.findall(rf"{axis} Score \(1-5\):\s*(\d+(?:\.\d+)?)", answer) for axis in AXES]
    values = [float(each[-1]) for each in found if each]
    if len(values) != len(AXES) or not all(1 <= value <= 5 for value in values):
        raise ValueError(
            f"The answer of UnifiedReward for the prompt {prompt!r} has no {', '.join(AXES)} between 1 and 5; it is "
            f"{answer[:200]!r}. Is it a UnifiedReward 2.0?"
        )
    return (sum(values) / len(values) - 1) / 4


@cache
def load_unified_reward(source: str | Path) -> UnifiedReward:
    """Load CodeGoat24/UnifiedReward-2.0-qwen3vl-8b or a sibling, in the type of its weights.

    Raises FileNotFoundError or ValueError, naming what is wrong.
    """
    if (family := backbone_family(str(source))) not in FAMILIES:
        raise ValueError(
            f"{str(source)!r} is a model of type {family!r}; UnifiedReward 2.0 is one of {', '.join(FAMILIES)}."
        )
    return UnifiedReward(load_answering(str(source)))
