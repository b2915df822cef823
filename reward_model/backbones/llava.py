"""LLaVA-1.5: a CLIP vision tower, a two-layer projector and a Llama; every picture is one square of fixed size."""

# transformers has no usable types.
# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reward_model.backbones.reading import clip_features, read_with
from reward_model.backbones.text import PromptReader
from reward_model.images import centre_crop, normalise, resize
from reward_model.types import Inputs, Reading

PUBLISHED_TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
"""The turn that the published LLaVA-Reward code is left with after it has cut ` ASSISTANT:` off."""


@dataclass(slots=True)
class Llava:
    """`LlavaForConditionalGeneration` of any size as a backbone."""

    model: Any
    reader: PromptReader
    processor: Any
    """The family's CLIP image processor: only its settings are used."""

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

    def prepare(self, images: Sequence[Float[Tensor, "3 _ _"]], prompts: Sequence[str]) -> Inputs:
        """Shortest side to the processor's size, the middle square, CLIP's mean and deviation."""
        sizes = {image.shape for image in images}
        if len(sizes) == 1:
            pixels = self._preprocess(torch.stack(list(images)))
        else:
            pixels = torch.cat([self._preprocess(image[None]) for image in images])
        return {**self.reader(prompts, [self._count(pixels)] * len(images)), "pixel_values": pixels}

    def num_visual_tokens(self, height: int, width: int) -> int:
        return self._count(self._preprocess(torch.zeros(1, 3, height, width)))

    def _count(self, pixels: Float[Tensor, "B 3 _ _"]) -> int:
        patch = self.model.config.vision_config.patch_size
        count = (pixels.shape[-2] // patch) * (pixels.shape[-1] // patch)
        return count + (self.model.config.vision_feature_select_strategy == "full")  # the class token too

    def _preprocess(self, images: Float[Tensor, "B 3 _ _"]) -> Float[Tensor, "B 3 _ _"]:
        settings = self.processor
        if settings.do_resize:
            images = resize(images, *_resized(images.shape[-2], images.shape[-1], settings.size))
        if settings.do_center_crop:
            images = centre_crop(images, settings.crop_size["height"], settings.crop_size["width"])
        return normalise(images, mean=settings.image_mean, std=settings.image_std) if settings.do_normalize else images

    def see(self, inputs: Inputs) -> Inputs:
        rest = {name: tensor for name, tensor in inputs.items() if name != "pixel_values"}
        return {**rest, "features": clip_features(self.model, inputs["pixel_values"])}

    def read(self, inputs: Inputs) -> Reading:
        if "features" not in inputs:
            inputs = self.see(inputs)
        features = inputs["features"].to(self.projector.linear_1.weight.dtype)
        positions = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp_min(0)
        return read_with(self.model, inputs, list(self.projector(features)), position_ids=positions)


def _resized(height: int, width: int, size: Any) -> tuple[int, int]:
    """Where the processor's `size` takes a picture: a fixed size, or its shortest side to a length."""
    if size.get("height"):
        return size["height"], size["width"]
    short = size["shortest_edge"]
    return (short, int(short * width / height)) if height <= width else (int(short * height / width), short)
