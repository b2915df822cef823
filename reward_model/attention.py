"""Maps of where a LLaVA-Reward's SkipCA attends in an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from reward_model.backbones.token_boxes import HasTokenBoxes
from reward_model.images import ImageInput, to_tensor
from reward_model.scoring import LlavaReward


@dataclass(frozen=True, slots=True)
class AttentionMap:
    """SkipCA's attention to the visual tokens of one image, averaged over its heads."""

    weights: Float[Tensor, " V"]
    """Sum 1."""
    boxes: Float[Tensor, "V 4"]
    """(top, left, bottom, right) of each token, in fractions of the image; nan for a token of no place."""

    def density(self, height: int, width: int) -> Float[Tensor, "{height} {width}"]:
        """Return the attention per area as an image, in units of attention that is the same everywhere.

        Its mean is the fraction of the attention that falls within the image. A token's weight is spread evenly over
        its box; views of different size that overlap are added.
        """
        placed = self.boxes.isfinite().all(dim=1)
        boxes = self.boxes[placed]
        rows = _coverage(boxes[:, 0], boxes[:, 2], height)
        columns = _coverage(boxes[:, 1], boxes[:, 3], width)
        return torch.einsum("v,vy,vx->yx", self.weights[placed], rows, columns)

    @property
    def outside(self) -> float:
        """Fraction of the attention that falls on no part of the image: separators, a class token, padding."""
        return max(0.0, 1 - self.density(1, 1).item())


def attention_maps(
    reward: LlavaReward, images: Sequence[ImageInput], prompts: Sequence[str], *, perspective: str | None = None
) -> list[AttentionMap]:
    """Return where a perspective (by default the first) attends in each image when it scores it for its prompt.

    Images are passed through the model one by one. Raises ValueError with the reason of `why_no_map`, if there is one.
    """
    if reason := why_no_map(reward, perspective=perspective):
        raise ValueError(reason)
    name = reward.config(perspective).perspective
    model, backbone = reward.model, reward.model.backbone
    assert isinstance(backbone, HasTokenBoxes)
    maps = list[AttentionMap]()
    with torch.no_grad(), model.using(name):
        for image, prompt in zip(images, prompts, strict=True):
            pixels = to_tensor(image).to(reward.device)
            inputs = {key: tensor.to(reward.device) for key, tensor in backbone.prepare([pixels], [prompt]).items()}
            weights = model.attention_weights(backbone.forward(inputs), name)[0].mean(dim=0)
            height, width = pixels.shape[1:]
            maps.append(AttentionMap(weights.cpu(), backbone.token_boxes(height, width)))
    return maps


def why_no_map(reward: object, *, perspective: str | None = None) -> str | None:
    """Return why a reward model has no maps of attention, as a sentence; None if it has."""
    if not isinstance(reward, LlavaReward):
        return "This scorer has no SkipCA, and so no attention map."
    config = reward.config(perspective)
    if not config.skip_ca:
        return "This reward model was trained without SkipCA, and so has no attention map."
    if config.skip_ca_keys == "text_padding":
        return "This reward model's SkipCA reads padding in place of the image, as published, and so has no map."
    if not isinstance(reward.model.backbone, HasTokenBoxes):
        return "The places of this backbone's visual tokens in the image are not known, so there is no map."
    return None


def _coverage(start: Float[Tensor, " V"], end: Float[Tensor, " V"], length: int) -> Float[Tensor, "V {length}"]:
    """Return the density on each of `length` equal cells of [0, 1] of mass 1 that is spread over start to end."""
    edges = torch.arange(length + 1) / length
    overlap = torch.minimum(end[:, None], edges[1:]) - torch.maximum(start[:, None], edges[:-1])
    return overlap.clamp_min(0) * length / (end - start)[:, None]
