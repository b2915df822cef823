"""LLaVA-1.5: a CLIP vision tower, a two-layer projector and a Llama; every image becomes one square of fixed size."""

# transformers has no usable types.
# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reward_model.backbones.outputs import clip_features, run_language_model
from reward_model.backbones.prompts import PromptTokenizer
from reward_model.backbones.settings import BackboneSettings, prompt_tokenizer
from reward_model.backbones.token_boxes import grid_boxes, nowhere
from reward_model.images import centred_offsets, preprocess_as_clip, resized_as_clip, size_as_clip
from reward_model.types import BackboneOutput, Inputs

TITLE = "LLaVA-1.5"
OPTIONS: tuple[str, ...] = ()
PUBLISHED_TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
"""The user turn of the published LLaVA-Reward code, which removes ` ASSISTANT:` at its end."""


@dataclass(slots=True)
class Llava:
    """`LlavaForConditionalGeneration` of any size as a backbone."""

    model: Any
    prompt_tokenizer: PromptTokenizer
    processor: Any
    """The family's CLIP image processor, of which only the settings are used."""

    @property
    def width(self) -> int:
        return self.model.config.text_config.hidden_size

    @property
    def projector(self) -> Any:
        return self.model.model.multi_modal_projector

    @projector.setter
    def projector(self, module: nn.Module) -> None:
        self.model.model.multi_modal_projector = module

    @property
    def language_model(self) -> nn.Module:
        return self.model.model.language_model

    def prepare(self, images: Iterable[Float[Tensor, "3 _ _"]], prompts: Sequence[str]) -> Inputs:
        """Resize the shortest side, crop the centre and normalise, by the processor's settings."""
        pixels = torch.cat([preprocess_as_clip(image[None].contiguous(), self.processor) for image in images])
        count = self._count(*pixels.shape[-2:])
        return {**self.prompt_tokenizer(prompts, [count] * len(pixels)), "pixel_values": pixels}

    def num_visual_tokens(self, height: int, width: int) -> int:
        return self._count(*size_as_clip(height, width, self.processor))

    def token_boxes(self, height: int, width: int) -> Float[Tensor, "V 4"]:
        """Return the box of each visual token: a grid over the crop, and none for the class token."""
        resized, cropped = (f(height, width, self.processor) for f in (resized_as_clip, size_as_clip))
        top, left = centred_offsets(cropped, resized)
        patch = self.model.config.vision_config.patch_size
        rows, columns = (side // patch for side in cropped)
        bottom, right = top + rows * patch, left + columns * patch
        area = (top / resized[0], left / resized[1], bottom / resized[0], right / resized[1])
        boxes = grid_boxes(rows, columns, area).flatten(0, 1)
        return torch.cat([nowhere(self._count(*cropped) - len(boxes)), boxes])

    def _count(self, height: int, width: int) -> int:
        patch = self.model.config.vision_config.patch_size
        count = (height // patch) * (width // patch)
        return count + (self.model.config.vision_feature_select_strategy == "full")  # the class token too

    def encode_image(self, inputs: Inputs) -> Inputs:
        others = {name: tensor for name, tensor in inputs.items() if name != "pixel_values"}
        return {**others, "features": clip_features(self.model, inputs["pixel_values"])}

    def forward(self, inputs: Inputs) -> BackboneOutput:
        if "features" not in inputs:
            inputs = self.encode_image(inputs)
        features = inputs["features"].to(self.projector.linear_1.weight.dtype)
        positions = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp_min(0)
        return run_language_model(self.model, inputs, list(self.projector(features)), position_ids=positions)


def adapt(model: Any, source: str, settings: BackboneSettings) -> Llava:
    """Return the backbone of a loaded model."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil.from_pretrained(source)
    return Llava(model, prompt_tokenizer(model, source, settings, published=PUBLISHED_TEMPLATE), processor)
