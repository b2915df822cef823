"""Preprocessing of Qwen's images: resized at their aspect ratio, within bounds, and cut into patches."""

# transformers has no usable types.
# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reward_model.backbones.prompts import PromptTokenizer
from reward_model.images import normalise, resize
from reward_model.types import Inputs


@dataclass(frozen=True, slots=True)
class PatchPreprocessor:
    """Images to patches, by the settings of one model."""

    processor: Any
    """The family's image processor, of which only the settings are used."""
    min_pixels: int
    max_pixels: int
    """Bounds of the resized image's number of pixels; both sides are multiples of two patches."""
    first_bounds: tuple[int, int] | None = None
    """Bounds of a resize before that one, as in the published LLaVA-Reward code for Qwen2.5-VL; None for none."""

    def prepare(
        self, images: Iterable[Float[Tensor, "3 _ _"]], prompts: Sequence[str], prompt_tokenizer: PromptTokenizer
    ) -> Inputs:
        """Return the flattened patches of all images in one tensor, and the grid of each image."""
        found = [self._patches(image) for image in images]
        grids = torch.tensor([grid for _, grid in found])
        counts = [int(n) for n in grids.prod(dim=1) // self.processor.merge_size**2]
        tokens = prompt_tokenizer(prompts, counts)
        return {**tokens, "pixel_values": torch.cat([patches for patches, _ in found]), "image_grid_thw": grids}

    def num_tokens(self, height: int, width: int) -> int:
        """Return the number of visual tokens of an image of this size in pixels."""
        rows, columns = self.token_grid(height, width)
        return rows * columns

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of the visual tokens of an image of this size in pixels."""
        side = self.processor.patch_size * self.processor.merge_size
        height, width = self._sizes(height, width)[-1]
        return height // side, width // side

    def _patches(self, image: Float[Tensor, "3 _ _"]) -> tuple[Float[Tensor, "N P"], tuple[int, int, int]]:
        """Return flattened patches (3 x 2 frames x patch x patch) grouped by token, and the grid (1, rows, columns)."""
        settings = self.processor
        patch, merge = settings.patch_size, settings.merge_size
        pixels = image[None]
        for height, width in self._sizes(*image.shape[-2:]):
            pixels = resize(pixels, height, width)
        image = normalise(pixels, mean=settings.image_mean, std=settings.image_std)[0]
        height, width = image.shape[-2:]
        rows, columns = height // patch, width // patch
        cut = image.reshape(3, rows // merge, merge, patch, columns // merge, merge, patch).permute(1, 4, 2, 5, 0, 3, 6)
        frames = cut.unsqueeze(5).expand(*cut.shape[:5], settings.temporal_patch_size, patch, patch)
        return frames.reshape(rows * columns, -1), (1, rows, columns)

    def _sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Return the heights and widths to which an image is resized, one after the other."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        factor = self.processor.patch_size * self.processor.merge_size
        sizes = [(height, width)]
        for low, high in filter(None, (self.first_bounds, (self.min_pixels, self.max_pixels))):
            sizes.append(smart_resize(*sizes[-1], factor=factor, min_pixels=low, max_pixels=high))
        return sizes[1:]


def load_patch_preprocessor(
    source: str, min_pixels: int | None, max_pixels: int | None, *, first_bounds: tuple[int, int] | None = None
) -> PatchPreprocessor:
    """Load the settings of `source`'s image processor; None takes its own bounds. ValueError for invalid bounds."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil.from_pretrained(source)
    low = processor.size["shortest_edge"] if min_pixels is None else min_pixels
    high = processor.size["longest_edge"] if max_pixels is None else max_pixels
    if not 0 < low <= high:
        raise ValueError(f"min_pixels ({low}) must be positive and at most max_pixels ({high}).")
    return PatchPreprocessor(processor, low, high, first_bounds)
