"""Qwen2-VL as HPSv3 runs it; not offered for training."""

# transformers has no usable types.
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import torch

from reward_model.backbones.outputs import run_language_model
from reward_model.backbones.qwen2_5_vl import Qwen25VL
from reward_model.types import BackboneOutput, Inputs


class Qwen2VL(Qwen25VL):
    """`Qwen2VLForConditionalGeneration` whose tokens, of text and image alike, are numbered from left to right.

    The family itself numbers an image's tokens by row and column. HPSv3's published code passes embeddings without
    ids, for which the model counts instead, in training as in inference. Rows must be padded on the right.
    """

    __slots__ = ()

    def encode_image(self, inputs: Inputs) -> Inputs:
        """Run the vision tower; its patches are in the order of the image."""
        tower = self.model.model.visual
        patches = inputs["pixel_values"].to(tower.patch_embed.proj.weight.dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and patches.requires_grad):  # the tower is frozen
            states = tower(patches, grid_thw=inputs["image_grid_thw"]).last_hidden_state
        others = {name: tensor for name, tensor in inputs.items() if name != "pixel_values"}
        return {**others, "features": states.unflatten(0, (-1, tower.spatial_merge_size**2))}

    def forward(self, inputs: Inputs) -> BackboneOutput:
        """Run projector and language model."""
        if "features" not in inputs:
            inputs = self.encode_image(inputs)
        grids = inputs["image_grid_thw"]
        counts: list[int] = (grids.prod(dim=1) // self.model.model.visual.spatial_merge_size**2).tolist()
        features = inputs["features"].to(self.projector.ln_q.weight.dtype)
        rows, length = inputs["input_ids"].shape
        positions = torch.arange(length, device=features.device).expand(3, rows, length)
        visual = self.projector(features.flatten(0, 1)).split(counts)
        return run_language_model(self.model, inputs, visual, position_ids=positions)
