"""A score function of image batches as a scorer of files, images of any size, and pairs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from reward_model.images import ImageInput, to_tensor

MAX_HELD_PIXELS = 2**25
"""Pixels of images that are decoded together, such as 32 images of 1024 x 1024."""


@runtime_checkable
class ScoreFunction(Protocol):
    """A function of images (B, 3, Y, X) in [0, 1] and prompts to scores on the same device: higher is better."""

    @property
    def model(self) -> Any: ...

    @property
    def log_odds_unit(self) -> float:
        """Unit of scores: (score(a) - score(b)) / log_odds_unit are the log-odds that a is preferred."""
        ...

    def __call__(self, images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> Float[Tensor, " B"]: ...


@dataclass(frozen=True, slots=True)
class PointwiseScorer:
    """A scorer of single images with the interface of `LlavaReward`.

        scorer = load_scorer("pick_score:models/PickScore_v1")
        scorer.score(["fox.png"], ["a red fox"])            # float32 (1,): higher is better

    Images are PIL images, arrays, paths, or float tensors (3, Y, X) in [0, 1], with respect to whose pixels scores are
    differentiable.
    """

    name: str
    function: ScoreFunction

    def to(self, device: str | torch.device) -> PointwiseScorer:
        """Move the model to a device, in place; return self."""
        self.function.model.to(device)
        return self

    def score(
        self, images: Sequence[ImageInput] | Float[Tensor, "B 3 _ _"], prompts: Sequence[str], *, batch_size: int = 32
    ) -> Float[Tensor, " B"]:
        """Return the score of each image for its prompt; images of one size are scored in one batch."""
        if isinstance(prompts, str):
            raise TypeError(f"prompts is one text ({prompts[:40]!r}); give a list with one prompt for each image.")
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images came with {len(prompts)} prompts; the numbers must agree.")
        if not len(prompts):
            raise ValueError("There is no image to score.")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
        batches = [
            self._batch(images[start : start + batch_size], prompts[start : start + batch_size])
            for start in range(0, len(prompts), batch_size)
        ]
        return torch.cat(batches)

    def logits(
        self,
        first: Sequence[ImageInput] | Float[Tensor, "B 3 _ _"],
        second: Sequence[ImageInput] | Float[Tensor, "B 3 _ _"],
        prompts: Sequence[str],
        *,
        second_prompts: Sequence[str] | None = None,
        batch_size: int = 32,
    ) -> Float[Tensor, " B"]:
        """Return the log-odds that each first image is preferred to its second."""
        one = self.score(first, prompts, batch_size=batch_size)
        two = self.score(second, prompts if second_prompts is None else second_prompts, batch_size=batch_size)
        return (one - two) / self.function.log_odds_unit

    def _batch(self, images: Sequence[ImageInput] | Tensor, prompts: Sequence[str]) -> Float[Tensor, " B"]:
        device = next(self.function.model.parameters()).device
        needs_gradient = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in images)
        rows, scores = list[int](), list[Tensor]()
        with torch.set_grad_enabled(needs_gradient):
            for group in _groups_of_one_size(images):
                scores.append(self.function(torch.stack([*group.values()]).to(device), [prompts[i] for i in group]))
                rows += group
        return torch.cat(scores)[torch.tensor(rows).argsort().to(device)]


def _groups_of_one_size(images: Sequence[ImageInput] | Tensor) -> Iterator[dict[int, Tensor]]:
    """Yield the images of one size by row, and hold at most MAX_HELD_PIXELS of them, or one image, at a time."""
    held: dict[torch.Size, dict[int, Tensor]] = defaultdict(dict)
    count = 0
    for row, image in enumerate(images):
        pixels = to_tensor(image)
        size = pixels.shape[1] * pixels.shape[2]
        if held and count + size > MAX_HELD_PIXELS:
            yield from held.values()
            held.clear()
            count = 0
        held[pixels.shape][row] = pixels
        count += size
    yield from held.values()
