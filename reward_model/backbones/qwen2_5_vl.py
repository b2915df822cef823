"""Qwen2.5-VL: pictures keep their shape and become as many visual tokens as they need."""

# transformers has no usable types.
# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from reward_model.backbones.reading import read_with
from reward_model.backbones.text import PromptReader
from reward_model.images import normalise, resize
from reward_model.types import Inputs, Reading

PUBLISHED_TEMPLATE = (
    "{% for message in messages %}<|im_start|>user\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>{% endfor %}"
)
"""The turn that the published LLaVA-Reward code is left with: the family's own without its system turn."""


@dataclass(slots=True)
class Qwen25VL:
    """`Qwen2_5_VLForConditionalGeneration` of any size as a backbone."""

    model: Any
    reader: PromptReader
    processor: Any
    """The family's image processor: only its settings are used."""
    min_pixels: int
    max_pixels: int
    """A picture is resized to lie between these, both sides multiples of two patches."""

    @property
    def width(self) -> int:
        return self.model.config.text_config.hidden_size

    @property
    def projector(self) -> Any:
        return self.model.model.visual.merger

    @projector.setter
    def projector(self, module: nn.Module) -> None:
        self.model.model.visual.merger = module

    @property
    def language_model(self) -> nn.Module:
        return self.model.model.language_model

    def num_visual_tokens(self, height: int, width: int) -> int:
        height, width = self._size(height, width)
        return (height * width) // (self.processor.patch_size * self.processor.merge_size) ** 2

    def prepare(self, images: Sequence[Float[Tensor, "3 _ _"]], prompts: Sequence[str]) -> Inputs:
        """Each picture as a row of flattened patches, all rows one behind the other, and the grid of each."""
        found = [self._patches(image) for image in images]
        grids = torch.tensor([grid for _, grid in found])
        counts = [int(n) for n in grids.prod(dim=1) // self.processor.merge_size**2]
        words = self.reader(prompts, counts)
        return {**words, "pixel_values": torch.cat([patches for patches, _ in found]), "image_grid_thw": grids}

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
        """To which height and width a picture is resized."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        factor = self.processor.patch_size * self.processor.merge_size
        return smart_resize(height, width, factor=factor, min_pixels=self.min_pixels, max_pixels=self.max_pixels)

    def see(self, inputs: Inputs) -> Inputs:
        from transformers.vision_utils import get_vision_window_index

        tower, grids = self.model.model.visual, inputs["image_grid_thw"]
        patches = inputs["pixel_values"].to(tower.patch_embed.proj.weight.dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and patches.requires_grad):  # nothing in it is trained
            states = tower(patches, grid_thw=grids).last_hidden_state
        # The tower works in windows; its groups of patches go back into the order of the picture.
        order, _ = get_vision_window_index(
            grids, spatial_merge_size=tower.spatial_merge_size, window_size=tower.window_size,
            patch_size=tower.patch_size,
        )  # fmt: skip
        groups = states.unflatten(0, (-1, tower.spatial_merge_unit))[torch.argsort(order)]
        rest = {name: tensor for name, tensor in inputs.items() if name != "pixel_values"}
        return {**rest, "features": groups}

    def read(self, inputs: Inputs) -> Reading:
        if "features" not in inputs:
            inputs = self.see(inputs)
        ids, grids = inputs["input_ids"], inputs["image_grid_thw"]
        features = inputs["features"].to(self.projector.ln_q.weight.dtype)
        visual = self.projector(features.flatten(0, 1)).split(self._counts(grids))
        return read_with(
            self.model, inputs, visual,
            image_grid_thw=grids, mm_token_type_ids=(ids == self.reader.image_token_id).int(),
        )  # fmt: skip

    def _counts(self, grids: Int[Tensor, "B 3"]) -> list[int]:
        return (grids.prod(dim=1) // self.model.model.visual.spatial_merge_unit).tolist()


def image_settings(source: str, min_pixels: int | None, max_pixels: int | None) -> tuple[Any, tuple[int, int]]:
    """The family's image processor as `source` has it, and the bounds of a picture; ValueError if they cannot be."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil.from_pretrained(source)
    low = processor.size["shortest_edge"] if min_pixels is None else min_pixels
    high = processor.size["longest_edge"] if max_pixels is None else max_pixels
    if not 0 < low <= high:
        raise ValueError(f"min_pixels ({low}) must be positive and at most max_pixels ({high}).")
    return processor, (low, high)
