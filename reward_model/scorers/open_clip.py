"""Conversion of a CLIP with open_clip's tensor names to a `CLIPModel` of transformers.

Both are the same network; open_clip stores the projections of query, key and value in one matrix, and those to the
common space transposed.
"""

# transformers has no usable types.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false
from __future__ import annotations

import math
import re
from pathlib import Path

from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from reward_model.scorers.weights import fill

HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104}
"""Width of a head by width of the tower, for the vision towers H, g and bigG; all others have heads of 64."""
_NAMES = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "text_projection": "text_projection.weight",
}
_PREFIXES = {
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "ln_final.": "text_model.final_layer_norm.",
}
_IN_BLOCK = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)\.?(weight|bias)$")


def clip_from_open_clip(tensors: dict[str, Tensor], *, file: Path, eos_token_id: int) -> CLIPModel:
    """Return the model, with sizes derived from the tensors; ValueError if they are no CLIP with two transformers."""
    for needed in ("visual.conv1.weight", "visual.positional_embedding", "positional_embedding", "text_projection"):
        if needed not in tensors:
            raise ValueError(f"{file} has no tensor {needed!r}, so it is no CLIP in open_clip's layout.")
    model = CLIPModel(_config(tensors, eos_token_id))
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name != "attn_mask":  # a constant
            renamed |= _converted(name, tensor)
    fill(model, renamed, file=file)
    return model


def _config(tensors: dict[str, Tensor], eos_token_id: int) -> CLIPConfig:
    patches = tensors["visual.conv1.weight"]
    width, patch = patches.shape[0], patches.shape[-1]
    side = math.isqrt(len(tensors["visual.positional_embedding"]) - 1)
    num_positions, text_width = tensors["positional_embedding"].shape
    shared = {"hidden_act": "gelu", "layer_norm_eps": 1e-5}
    vision = {
        **shared, **_depth(tensors, "visual."), "hidden_size": width, "patch_size": patch, "image_size": side * patch,
        "num_attention_heads": max(1, width // HEAD_WIDTHS.get(width, 64)),
    }  # fmt: skip
    text = {
        **shared, **_depth(tensors, ""), "hidden_size": text_width, "max_position_embeddings": num_positions,
        "vocab_size": len(tensors["token_embedding.weight"]), "eos_token_id": eos_token_id, "bos_token_id": None,
        "pad_token_id": None, "num_attention_heads": max(1, text_width // 64),
    }  # fmt: skip
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=tensors["text_projection"].shape[1])


def _depth(tensors: dict[str, Tensor], tower: str) -> dict[str, int]:
    start = f"{tower}transformer.resblocks."
    blocks = {name.removeprefix(start).partition(".")[0] for name in tensors if name.startswith(start)}
    return {"num_hidden_layers": len(blocks), "intermediate_size": len(tensors[f"{start}0.mlp.c_fc.weight"])}


def _converted(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return a tensor under transformers' name, or split in three; an unknown one keeps its name."""
    if name in _NAMES:
        return {_NAMES[name]: tensor.T.contiguous() if name in ("visual.proj", "text_projection") else tensor}
    for prefix, new in _PREFIXES.items():
        if name.startswith(prefix):
            return {name.replace(prefix, new, 1): tensor}
    if found := _BLOCK.match(name):
        tower, number, part, kind = found.groups()
        layer = f"{'vision' if tower else 'text'}_model.encoder.layers.{number}."
        part = part.rstrip("._")
        if part == "attn.in_proj":
            names = [f"{layer}self_attn.{which}_proj.{kind}" for which in ("q", "k", "v")]
            return dict(zip(names, (third.clone() for third in tensor.chunk(3)), strict=True))
        if part == "attn.out_proj":
            return {f"{layer}self_attn.out_proj.{kind}": tensor}
        if part in _IN_BLOCK:
            return {f"{layer}{_IN_BLOCK[part]}.{kind}": tensor}
    return {name: tensor}
