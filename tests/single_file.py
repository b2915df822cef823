"""A pipeline like SD 1.5 as one file, in the key layout of the original code (CompVis/stable-diffusion)."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
OUTER = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0", "conv_out": "out.2", "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2",
}  # fmt: skip
VAE = {
    "resnets": "block", "conv_norm_out": "norm_out", "mid_block.attentions.0": "mid.attn_1", "group_norm": "norm",
    "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "downsamplers.0": "downsample",
    "upsamplers.0": "upsample", "conv_shortcut": "nin_shortcut",
}  # fmt: skip


def save_single_file(model: Path, file: Path) -> Path:
    """Write a model's weights into one file, and its configs and tokenizer into a folder beside it."""
    weights = {f"model.diffusion_model.{_unet_name(k)}": w for k, w in _weights(model / "unet").items()}
    for key, weight in _weights(model / "vae").items():
        is_attention = "attentions" in key and weight.ndim == 2
        weights[f"first_stage_model.{_vae_name(key)}"] = weight[:, :, None, None] if is_attention else weight
    for key, weight in _weights(model / "text_encoder").items():
        weights[f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}"] = weight
    save_file({name: weight.contiguous() for name, weight in weights.items()}, file)
    shutil.copytree(model, file.with_suffix(""), ignore=shutil.ignore_patterns("*.safetensors"))
    return file


def _weights(folder: Path) -> dict[str, Tensor]:
    [file] = folder.glob("*.safetensors")
    return load_file(file)


def _unet_name(key: str) -> str:
    """With one layer in each block: two positions for a block going down, two going up."""
    for own, theirs in OUTER.items():
        if key.startswith(f"{own}."):
            return _resnet(theirs + key.removeprefix(own))
    kind, block, part, index, rest = key.split(".", 4)
    number = int(block)
    if kind == "down_blocks":
        if part == "downsamplers":
            return f"input_blocks.{2 * number + 2}.0.op.{rest.removeprefix('conv.')}"
        return _resnet(f"input_blocks.{2 * number + 1 + int(index)}.{['resnets', 'attentions'].index(part)}.{rest}")
    if part == "upsamplers":
        return f"output_blocks.{2 * number + 1}.2.{rest}"
    return _resnet(f"output_blocks.{2 * number + int(index)}.{['resnets', 'attentions'].index(part)}.{rest}")


def _resnet(name: str) -> str:
    for own, theirs in RESNET.items():
        if f".{own}." in name and "transformer" not in name:
            return name.replace(f".{own}.", f".{theirs}.")
    return name


def _vae_name(key: str) -> str:
    key = key.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
    for own, theirs in VAE.items():
        key = key.replace(own, theirs)
    parts = key.split(".")
    if len(parts) > 2 and parts[1] in ("down_blocks", "up_blocks"):
        is_up = parts[1] == "up_blocks"
        parts[1:3] = ["up" if is_up else "down", str(1 - int(parts[2])) if is_up else parts[2]]
    return ".".join(parts)
