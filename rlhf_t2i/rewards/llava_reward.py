"""A LLaVA-Reward model as a reward.

This module and `scorers` are the only ones under rewards/ that import `reward_model`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from reward_model.quantization import Quantization
from reward_model.scoring import LlavaReward
from rlhf_t2i.output.run_folder import reward_model_of


@cache
def load_once(source: str, *, merge: bool = False, quantization: Quantization | None = None) -> LlavaReward:
    """Load a reward model once per process and kind, so that training and evaluation share its memory."""
    # It moves to the device of the first images.
    found = LlavaReward.from_pretrained(source, quantization=quantization, device="cpu")
    return found.merge_lora() if merge else found


class LlavaRewardFunction:
    """The scores of a LLaVA-Reward model, computed on the device of the images; differentiable."""

    def __init__(
        self,
        source: str | Path,
        *,
        perspective: str | None = None,
        batch_size: int = 64,
        merge: object = False,
        quantization: Any = None,
    ) -> None:
        """Load a reward model from its folder, the folder of the run that trained it, or the Hub.

        With `merge` its LoRA becomes part of the backbone's weights, as in `LlavaReward.merge_lora`; `quantization` is
        as in `LlavaReward.from_pretrained`. Raises FileNotFoundError or ValueError if there is no reward model, or if
        its head compares images without scoring them, and ValueError for another value of an option.
        """
        if not isinstance(merge, bool):
            raise ValueError(f"merge is {merge!r}; it must be True or False.")
        if quantization not in (None, "int8", "nf4"):
            raise ValueError(f"quantization is {quantization!r}; it must be 'int8', 'nf4' or None.")
        if merge and quantization:
            raise ValueError(
                f"merge is True, but a LoRA cannot be merged into weights of 8 or 4 bits ({quantization})."
            )
        self.reward_model = load_once(reward_model_of(str(source)), merge=merge, quantization=quantization)
        self.perspective, self.batch_size = perspective, batch_size
        head = self.reward_model.config(perspective).head
        if head != "scalar":
            raise ValueError(
                f"The reward model {str(source)!r} has a {head.replace('_', '-')} head: it compares two images but "
                f"gives no score to one. Use pairwise:PATH, which counts the pairs that an image wins in its group, or "
                f"train one with loss bradley_terry or cross_entropy."
            )

    def __call__(self, images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> Float[Tensor, " B"]:
        """Return one float32 score per image."""
        self.reward_model.to(images.device)
        return self.reward_model.score(images, prompts, perspective=self.perspective, batch_size=self.batch_size)
