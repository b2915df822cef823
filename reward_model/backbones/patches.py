"""Qwen's images: they keep their shape, within bounds, and are laid out as rows of patches."""

# transformers has no usable types.
# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reward_model.backbones.prompts import PromptTokenizer
from reward_model.images import normalise, resize
from reward_model.types import Inputs


@dataclass(frozen=True, slots=True)
class PatchFrame:
    """How one model's images become patches."""

    processor: Any
    """The family's image processor: only its settings are used."""
    min_pixels: int
    max_pixels: int
    """An image is resized to lie between these, both sides multiples of two patches."""

    def prepare(
        self, images: Sequence[Float[Tensor, "3 _ _"]], prompts: Sequence[str], prompt_tokenizer: PromptTokenizer
    ) -> Inputs:
        """Each image as a row of flattened patches, all rows one behind the other, and the grid of each."""
        found = [self._patches(image) for image in images]
        grids = torch.tensor([grid for _, grid in found])
        counts = [int(n) for n in grids.prod(dim=1) // self.processor.merge_size**2]
        tokens = prompt_tokenizer(prompts, counts)
        return {**tokens, "pixel_values": torch.cat([patches for patches, _ in found]), "image_grid_thw": grids}

    def num_tokens(self, height: int, width: int) -> int:
        """What an image of this size becomes."""
        height, width = self._size(height, width)
        return (height * width) // (self.processor.patch_size * self.processor.merge_size) ** 2

    def _patches(self, image: Float[Tensor, "3 _ _"]) -> tuple[Float[Tensor, "N P"], tuple[int, int, int]]:
        """Flattened patches (3 x 2 frames x patch x patch) in groups that become one token; and (1, rows, columns)."""
        settings = self.processor
        patch, merge = settings.patch_size, settings.merge_size
        height, width = self._size(*image.shape[-2:])
        image = normalise(resize(image[None], height, width), mean=settings.image_mean, std=settings.image_std)[0]
        rows, columns = height // patch, width // patch
        cut = image.reshape(3, rows // merge, merge, patch, columns // merge, merge, patch).permute(1, 4, 2, 5, 0, 3, 6)
        frames = cut.unsqueeze(5).expand(*cut.shape[:5], settings.temporal_patch_size, patch, patch)
        return frames.reshape(rows * columns, -1), (1, rows, columns)

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """To which height and width an image is resized."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        factor = self.processor.patch_size * self.processor.merge_size
        return smart_resize(height, width, factor=factor, min_pixels=self.min_pixels, max_pixels=self.max_pixels)


def load_patch_frame(source: str, min_pixels: int | None, max_pixels: int | None) -> PatchFrame:
    """The settings of `source`'s image processor, and the bounds given or its own; ValueError if they cannot be."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil.from_pretrained(source)
    low = processor.size["shortest_edge"] if min_pixels is None else min_pixels
    high = processor.size["longest_edge"] if max_pixels is None else max_pixels
    if not 0 < low <= high:
        raise ValueError(f"min_pixels ({low}) must be positive and at most max_pixels ({high}).")
    return PatchFrame(processor, low, high)
