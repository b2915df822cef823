"""A judge that was trained here, as a reward: the one door to `reward_model`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from reward_model.scoring import LlavaReward

BUILT_IN_REWARD_MODEL = Path(__file__).parent.parent / "shapes" / "weights" / "reward_model"
"""What the reward name `llava_reward` stands for."""


@cache
def _loaded(source: str) -> LlavaReward:
    """One judge for everything that asks for it, so that training and evaluation hold it once."""
    return LlavaReward.from_pretrained(source)


class LlavaRewardFunction:
    """The scores of a LLaVA-Reward judge, on the device of the images; differentiable."""

    def __init__(self, source: str | Path, *, perspective: str | None = None, batch_size: int = 64) -> None:
        """Load a judge; FileNotFoundError or ValueError if there is none, or if its head has no scores."""
        self.judge = _loaded(str(source))
        self.perspective, self.batch_size = perspective, batch_size
        head = self.judge.config(perspective).head
        if head != "scalar":
            raise ValueError(
                f"The judge {str(source)!r} has a {head.replace('_', '-')} head: it compares images but gives none a "
                f"score, so it cannot be a reward. Train one with loss bradley_terry or cross_entropy."
            )

    def __call__(self, images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> Float[Tensor, " B"]:
        self.judge.model.to(images.device)
        return self.judge.score(images, prompts, perspective=self.perspective, batch_size=self.batch_size)
