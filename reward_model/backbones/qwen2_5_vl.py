"""Qwen2.5-VL: images keep their aspect ratio; the number of visual tokens depends on their size."""

# transformers has no usable types.
# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from reward_model.backbones.outputs import run_language_model
from reward_model.backbones.patches import PatchPreprocessor, load_patch_preprocessor
from reward_model.backbones.prompts import PromptTokenizer
from reward_model.backbones.settings import BackboneSettings, prompt_tokenizer
from reward_model.backbones.token_boxes import grid_boxes
from reward_model.backbones.windows import attend_windows_at_once
from reward_model.types import BackboneOutput, Inputs

TITLE = "Qwen2.5-VL"
OPTIONS = ("min_pixels", "max_pixels")
PUBLISHED_TEMPLATE = (
    "{% for message in messages %}<|im_start|>user\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>{% endfor %}"
)
"""The user turn of the published LLaVA-Reward code: the family's own without its system turn."""
PUBLISHED_FIRST_BOUNDS = (4 * 28**2, 16384 * 28**2)
"""Bounds of the number of pixels to which that code resizes an image before the processor resizes it again."""


@dataclass(slots=True)
class Qwen25VL:
    """`Qwen2_5_VLForConditionalGeneration` of any size as a backbone."""

    model: Any
    prompt_tokenizer: PromptTokenizer
    preprocessor: PatchPreprocessor
    """Images to patches."""

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
        return self.preprocessor.num_tokens(height, width)

    def token_boxes(self, height: int, width: int) -> Float[Tensor, "V 4"]:
        """Return the box of each visual token: a grid over the image, line by line."""
        return grid_boxes(*self.preprocessor.token_grid(height, width)).flatten(0, 1)

    def prepare(self, images: Iterable[Float[Tensor, "3 _ _"]], prompts: Sequence[str]) -> Inputs:
        return self.preprocessor.prepare(images, prompts, self.prompt_tokenizer)

    def encode_image(self, inputs: Inputs) -> Inputs:
        from transformers.vision_utils import get_vision_window_index

        tower, grids = self.model.model.visual, inputs["image_grid_thw"]
        patches = inputs["pixel_values"].to(tower.patch_embed.proj.weight.dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and patches.requires_grad):  # the tower is frozen
            states = tower(patches, grid_thw=grids).last_hidden_state
        # The tower orders patches by window; restore the order of the image.
        order, _ = get_vision_window_index(
            grids, spatial_merge_size=tower.spatial_merge_size, window_size=tower.window_size,
            patch_size=tower.patch_size,
        )  # fmt: skip
        groups = states.unflatten(0, (-1, tower.spatial_merge_unit))[torch.argsort(order)]
        others = {name: tensor for name, tensor in inputs.items() if name != "pixel_values"}
        return {**others, "features": groups}

    def forward(self, inputs: Inputs) -> BackboneOutput:
        if "features" not in inputs:
            inputs = self.encode_image(inputs)
        ids, grids = inputs["input_ids"], inputs["image_grid_thw"]
        features = inputs["features"].to(self.projector.ln_q.weight.dtype)
        visual = self.projector(features.flatten(0, 1)).split(self._counts(grids))
        return run_language_model(
            self.model, inputs, visual,
            image_grid_thw=grids, mm_token_type_ids=(ids == self.prompt_tokenizer.image_token_id).int(),
        )  # fmt: skip

    def _counts(self, grids: Int[Tensor, "B 3"]) -> list[int]:
        return (grids.prod(dim=1) // self.model.model.visual.spatial_merge_unit).tolist()


def adapt(model: Any, source: str, settings: BackboneSettings) -> Qwen25VL:
    """Return the backbone of a loaded model."""
    first = PUBLISHED_FIRST_BOUNDS if settings.template == "published" else None
    attend_windows_at_once(model.model.visual)
    preprocessor = load_patch_preprocessor(source, settings.min_pixels, settings.max_pixels, first_bounds=first)
    return Qwen25VL(model, prompt_tokenizer(model, source, settings, published=PUBLISHED_TEMPLATE), preprocessor)
