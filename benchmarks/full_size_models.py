"""Models of published sizes with random weights, made on a device: no file is read, and no file is written of them."""

# diffusers and transformers have no usable types.
# pyright: reportPrivateImportUsage=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_t2i.models.architectures import published_architecture
from rlhf_t2i.models.without_weights import build_without_weights

QWEN_SIZES: dict[str, dict[str, Any]] = {
    "Qwen2.5-VL-3B": {
        "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 2,
    },
    "Qwen2.5-VL-7B": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
}  # fmt: skip
_SCALE = 0.02
_BLOCK = 1 << 20


def random_pipeline(model: str, *, device: torch.device, dtype: torch.dtype, without: tuple[str, ...] = ()) -> Any:
    """Return the pipeline of a Hub id, on a device; parts of the names `without` are missing."""
    architecture = published_architecture(model)
    if architecture is None:
        raise ValueError(f"The architecture of {model!r} is not among those that ship with the package.")
    parts = {name: part for name, part in architecture["parts"].items() if name not in without}
    architecture = {**architecture, "parts": parts, "missing": [*architecture.get("missing", ()), *without]}
    block = _SCALE * torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0)).to(device)

    def random(shape: Any, *, dtype: torch.dtype) -> Tensor:
        tensor = torch.zeros(shape, dtype=dtype, device=device)
        if dtype.is_floating_point and tensor.numel():
            repeats = -(-tensor.numel() // _BLOCK)
            tensor.view(-1).copy_(block.to(dtype).repeat(repeats)[: tensor.numel()])
        elif not dtype.is_floating_point and tensor.dim():  # the positions of text encoders
            tensor.copy_(torch.arange(tensor.shape[-1], device=device).expand(tensor.shape))
        return tensor

    pipeline = build_without_weights(architecture, dtype=dtype, denoiser_dtype=dtype, empty=random)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            _normalise(part)
    return pipeline


@torch.no_grad()
def _normalise(network: nn.Module) -> None:
    """Give normalisation layers the scale 1, or nothing would be left after a few of them."""
    for module in network.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 1:
            weight.fill_(1.0)


def random_reward_model(size: dict[str, Any], folder: Path, *, device: torch.device, dtype: torch.dtype) -> Any:
    """Return LLaVA-Reward on a Qwen2.5-VL of published size, with a LoRA of rank 128; `folder` takes its tokenizer."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from reward_model.backbones.load import adapt
    from reward_model.backbones.settings import BackboneSettings
    from reward_model.config import RewardModelConfig
    from reward_model.model import RewardModel
    from reward_model.scoring import LlavaReward
    from tests import reward_models

    vision = {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14,
        "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "out_hidden_size": size["hidden_size"],
    }  # fmt: skip
    quarter = size["hidden_size"] // size["num_attention_heads"] // 8
    rope = {"rope_type": "default", "mrope_section": [quarter, quarter * 3 // 2, quarter * 3 // 2], "rope_theta": 1e6}
    config = Qwen2_5_VLConfig(
        vision_config=vision | size.get("vision", {}),
        text_config={
            "vocab_size": 151936, "max_position_embeddings": 128000, "rope_parameters": rope, "bos_token_id": 0,
            "eos_token_id": 2, "pad_token_id": 0, **{key: value for key, value in size.items() if key != "vision"},
        },
        image_token_id=5, video_token_id=6, vision_start_token_id=3, vision_end_token_id=4,
    )  # fmt: skip
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            network = Qwen2_5_VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(torch.float32)
    config.save_pretrained(folder)
    reward_models.save_qwen_preprocessors(folder, reward_models.QWEN_TEMPLATE, patch_size=14)
    settings = BackboneSettings(min_pixels=200704, max_pixels=1003520)
    backbone = adapt(network.eval().requires_grad_(False), str(folder), settings)
    model = RewardModel(backbone)
    model.add(
        RewardModelConfig(
            perspective="alignment", backbone=str(folder), model_type="qwen2_5_vl", width=size["hidden_size"],
            lora_rank=min(128, size["hidden_size"] // 8), lora_alpha=256.0,
        )
    )  # fmt: skip
    return LlavaReward(model.to(device).requires_grad_(False))
