"""Qwen3-VL: like Qwen2.5-VL, but its language model also gets states of the vision tower's middle layers."""

# transformers has no usable types.
# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reward_model.backbones.outputs import run_language_model
from reward_model.backbones.patches import PatchPreprocessor, load_patch_preprocessor
from reward_model.backbones.prompts import PromptTokenizer
from reward_model.backbones.qwen2_5_vl import PUBLISHED_TEMPLATE
from reward_model.backbones.settings import BackboneSettings, prompt_tokenizer
from reward_model.backbones.token_boxes import grid_boxes
from reward_model.types import BackboneOutput, Inputs

TITLE = "Qwen3-VL"
OPTIONS = ("min_pixels", "max_pixels")


@dataclass(slots=True)
class Qwen3VL:
    """`Qwen3VLForConditionalGeneration` of any size as a backbone.

    The projector is the tower's last merger. The mergers of its middle layers (DeepStack, arXiv:2406.04334), whose
    tokens are added to the states behind the language model's first layers, are frozen.
    """

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
        """Add `features` (each token's patches after the last layer) and `deepstack` (of the middle layers, merged)."""
        tower, grids = self.model.model.visual, inputs["image_grid_thw"]
        patches = inputs["pixel_values"].to(tower.patch_embed.proj.weight.dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and patches.requires_grad), without_merger(tower):
            outputs = tower(patches, grid_thw=grids)
        groups = outputs.last_hidden_state.unflatten(0, (-1, tower.spatial_merge_unit))
        others = {name: tensor for name, tensor in inputs.items() if name != "pixel_values"}
        return {**others, "features": groups, "deepstack": torch.stack(outputs.deepstack_features, dim=1)}

    def forward(self, inputs: Inputs) -> BackboneOutput:
        if "features" not in inputs:
            inputs = self.encode_image(inputs)
        ids, grids = inputs["input_ids"], inputs["image_grid_thw"]
        counts: list[int] = (grids.prod(dim=1) // self.model.model.visual.spatial_merge_unit).tolist()
        features = inputs["features"].to(next(self.projector.parameters()).dtype)
        return run_language_model(
            self.model, inputs, self.projector(features.flatten(0, 1)).split(counts),
            deepstack=[layer.split(counts) for layer in inputs["deepstack"].unbind(dim=1)],
            image_grid_thw=grids, mm_token_type_ids=(ids == self.prompt_tokenizer.image_token_id).int(),
        )  # fmt: skip


@contextmanager
def without_merger(tower: Any) -> Iterator[None]:
    """Bypass the tower's last merger: it is the projector, which is float32 beside a tower in bfloat16."""
    merger, tower.merger = tower.merger, nn.Identity()
    try:
        yield
    finally:
        tower.merger = merger


def adapt(model: Any, source: str, settings: BackboneSettings) -> Qwen3VL:
    """Return the backbone of a loaded model."""
    preprocessor = load_patch_preprocessor(source, settings.min_pixels, settings.max_pixels)
    return Qwen3VL(model, prompt_tokenizer(model, source, settings, published=PUBLISHED_TEMPLATE), preprocessor)
