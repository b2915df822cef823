"""Export of trained weights: diffusers' folders, and LoRAs in Kohya's key layout."""

# diffusers has no usable types.
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from safetensors.torch import save_file
from torch import Tensor

from rlhf_t2i.models.lora import ADAPTER, lora_weights
from rlhf_t2i.output.run_folder import KOHYA_LORA

if TYPE_CHECKING:
    from rlhf_t2i.models.base import DiffusionPolicy


def export_lora(policy: DiffusionPolicy, folder: Path, weights: Mapping[str, Tensor], *, kohya: bool) -> Path:
    """Write a LoRA into `folder/lora`, and with `kohya` also in Kohya's layout; return `folder/lora`."""
    named, config = lora_weights(policy.network, weights), policy.network.peft_config[ADAPTER]
    policy.pipeline_class.save_lora_weights(
        folder / "lora",
        **{
            f"{policy.component}_lora_layers": named,
            f"{policy.component}_lora_adapter_metadata": config.to_dict(),
        },
    )
    if kohya:
        check_kohya(policy)
        (folder / KOHYA_LORA).parent.mkdir(parents=True, exist_ok=True)
        save_file(in_kohyas_layout(policy.network, named), folder / KOHYA_LORA)
    return folder / "lora"


def check_kohya(policy: DiffusionPolicy) -> None:
    """Raise ValueError for a policy whose LoRA has no form in Kohya's layout."""
    if policy.component != "unet":
        raise ValueError(
            f"export_format is both; a LoRA is written in Kohya's layout for U-Nets only, and for {policy.title} in "
            f"diffusers' layout. Set it to diffusers."
        )
    if policy.network.peft_config[ADAPTER].use_dora:
        raise ValueError("export_format is both; it must be diffusers with a DoRA.")


def in_kohyas_layout(network: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a LoRA's weights under Kohya's names, with the alpha of each layer, whose scale is alpha / rank."""
    converted = convert_state_dict_to_kohya({f"unet.{name}": weight.contiguous() for name, weight in weights.items()})
    for name in (name.partition(".lora_A.")[0] for name in weights if ".lora_A." in name):
        layer = network.get_submodule(name)
        alpha = layer.scaling[ADAPTER] * layer.r[ADAPTER]
        converted[f"lora_unet_{name.replace('.', '_')}.alpha"] = torch.tensor(float(alpha))
    # SDXL's added conditioning has Kohya's own names; others are those of diffusers.
    for number in (1, 2):
        own, theirs = f"add_embedding_linear_{number}", f"label_emb_0_{2 * number - 2}"
        converted = {name.replace(own, theirs): weight for name, weight in converted.items()}
    return converted


def export_denoiser(policy: DiffusionPolicy, folder: Path, weights: Mapping[str, Tensor]) -> Path:
    """Write a full denoiser into the folder of its name; return that."""
    network: Any = policy.network_class.from_config(policy.network.config)
    expected = network.state_dict()
    network.load_state_dict({**{n: b for n, b in policy.network.named_buffers() if n in expected}, **weights})
    network.save_pretrained(folder / policy.component)
    return folder / policy.component
