"""VisualGPTScore (arXiv:2306.01879): a multimodal LLM's log-likelihood of the prompt given the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from reward_model.backbones.load import load_backbone
from reward_model.prompt_likelihood import check_language_head, prompt_log_likelihood
from reward_model.scorers.vqa_score import inputs_on_device
from reward_model.types import Backbone


@dataclass(frozen=True, slots=True)
class VisualGptScore:
    """score = log P(prompt | image) in nats, at most 0, differentiable.

    Any backbone of LLaVA-Reward serves, untrained, that has a language-model head. Only differences between images of
    one prompt have a meaning: a longer prompt has a lower likelihood. The paper subtracts alpha log P(prompt), which
    such differences do not have.
    """

    backbone: Backbone
    log_odds_unit: float = 1.0
    """By Bayes' rule the difference of two images is the log-odds of which of them the prompt describes."""

    @property
    def model(self) -> Any:
        return self.backbone.model

    def __call__(self, images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> Float[Tensor, " B"]:
        inputs = inputs_on_device(self.backbone, images, prompts)
        return prompt_log_likelihood(self.backbone.forward(inputs), inputs["input_ids"], self.backbone)[:, 0]


@cache
def load_visual_gpt_score(source: str | Path) -> VisualGptScore:
    """Load a multimodal LLM of a supported family; ValueError for one without a language-model head."""
    backbone = load_backbone(str(source))
    check_language_head(backbone)
    return VisualGptScore(backbone)
