"""Any function that scores a batch of images as a judge that takes files, images of all sizes, and pairs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from reward_model.images import ImageInput, to_tensor


@runtime_checkable
class ScoreFunction(Protocol):
    """Scores of images (B, 3, Y, X) in [0, 1], on their device: higher is better."""

    @property
    def model(self) -> Any: ...

    @property
    def log_odds_unit(self) -> float:
        """(score(a) - score(b)) / log_odds_unit are the log-odds that a is preferred."""
        ...

    def __call__(self, images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> Float[Tensor, " B"]: ...


@dataclass(frozen=True, slots=True)
class PointwiseScorer:
    """A judge of single images, asked as a LLaVA-Reward judge is.

        judge = load_scorer("pick_score:models/PickScore_v1")
        judge.score(["fox.png"], ["a red fox"])            # float32 (1,): higher is better

    Images are PIL images, arrays, paths, or float tensors (3, Y, X) in [0, 1], to whose pixels the gradient reaches.
    """

    name: str
    function: ScoreFunction

    def to(self, device: str | torch.device) -> PointwiseScorer:
        """Move the model, here."""
        self.function.model.to(device)
        return self

    def score(
        self, images: Sequence[ImageInput] | Float[Tensor, "B 3 _ _"], prompts: Sequence[str], *, batch_size: int = 32
    ) -> Float[Tensor, " B"]:
        """How well each image serves its prompt; images of one size are judged together."""
        if isinstance(prompts, str):
            raise TypeError(f"prompts is one text ({prompts[:40]!r}); give a list with one prompt for each image.")
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images came with {len(prompts)} prompts; there must be as many.")
        if not len(prompts):
            raise ValueError("There is no image to score.")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
        parts = [
            self._batch(images[start : start + batch_size], prompts[start : start + batch_size])
            for start in range(0, len(prompts), batch_size)
        ]
        return torch.cat(parts)

    def logits(
        self,
        first: Sequence[ImageInput] | Float[Tensor, "B 3 _ _"],
        second: Sequence[ImageInput] | Float[Tensor, "B 3 _ _"],
        prompts: Sequence[str],
        *,
        second_prompts: Sequence[str] | None = None,
        batch_size: int = 32,
    ) -> Float[Tensor, " B"]:
        """The log-odds that each first image is preferred to its second."""
        one = self.score(first, prompts, batch_size=batch_size)
        two = self.score(second, prompts if second_prompts is None else second_prompts, batch_size=batch_size)
        return (one - two) / self.function.log_odds_unit

    def _batch(self, images: Sequence[ImageInput] | Tensor, prompts: Sequence[str]) -> Float[Tensor, " B"]:
        device = next(self.function.model.parameters()).device
        pixels = [to_tensor(image) for image in images]
        same: dict[torch.Size, list[int]] = defaultdict(list)
        for row, image in enumerate(pixels):
            same[image.shape].append(row)
        wanted = torch.is_grad_enabled() and any(image.requires_grad for image in pixels)
        with torch.set_grad_enabled(wanted):
            scores = [
                self.function(torch.stack([pixels[i] for i in rows]).to(device), [prompts[i] for i in rows])
                for rows in same.values()
            ]
        order = torch.tensor([row for rows in same.values() for row in rows])
        return torch.cat(scores)[order.argsort().to(device)]
