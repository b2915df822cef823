"""The run of the language model on visual tokens, shared by the families."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from reward_model.types import BackboneOutput, Inputs


def run_language_model(
    model: Any,
    inputs: Inputs,
    visual: Sequence[Float[Tensor, "_ D"]],
    *,
    as_tensor: bool = False,
    deepstack: Sequence[Sequence[Float[Tensor, "_ D"]]] | None = None,
    **more: Tensor,
) -> BackboneOutput:
    """Insert each row's visual tokens into its sequence and run the language model up to its last norm.

    With `as_tensor` the model gets them as one tensor, for a family whose images all have the same number of tokens.
    `deepstack` holds, for some of the first layers, tokens that are added to the states of the visual tokens behind it.
    """
    dtype = model.get_input_embeddings().weight.dtype
    tokens: Any = [row.to(dtype) for row in visual]
    features: Any = BaseModelOutputWithPooling(pooler_output=torch.stack(tokens) if as_tensor else tokens)
    if deepstack is not None:
        features.deepstack_features = deepstack
    mask = inputs["attention_mask"]
    outputs = model.model(
        input_ids=inputs["input_ids"],
        attention_mask=mask,
        mm_encoder_outputs={"image": features},
        use_cache=False,
        **more,
    )
    padded, padded_mask = pad(visual)
    return BackboneOutput(outputs.last_hidden_state, mask.bool(), padded, padded_mask)


def clip_features(model: Any, pixels: Float[Tensor, "N 3 Y X"]) -> Float[Tensor, "N P C"]:
    """Return the vision tower's states of each patch, in the layers that a LLaVA's projector takes."""
    layer, strategy = (getattr(model.config, f"vision_feature_{k}") for k in ("layer", "select_strategy"))
    layers = [layer] if isinstance(layer, int) else layer
    tower = model.model.vision_tower
    pixels = pixels.to(tower.dtype)
    with torch.set_grad_enabled(torch.is_grad_enabled() and pixels.requires_grad):  # the tower is frozen
        states = tower(pixels, output_hidden_states=True).hidden_states
    return torch.cat([states[i][:, 1:] if strategy == "default" else states[i] for i in layers], dim=-1)


def pad(rows: Sequence[Float[Tensor, "_ D"]]) -> tuple[Float[Tensor, "B V D"], Bool[Tensor, "B V"]]:
    """Return rows of different lengths as one tensor, zero-padded at the end, and its mask."""
    counts = torch.tensor([len(row) for row in rows], device=rows[0].device)
    mask = torch.arange(int(counts.max()), device=counts.device) < counts[:, None]
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True), mask
