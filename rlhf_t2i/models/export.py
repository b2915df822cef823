"""Export of trained weights: diffusers' folders, and LoRAs in Kohya's key layout too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor

from rlhf_t2i.models.kohya import check_kohya, in_kohyas_layout
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
        save_file(in_kohyas_layout(policy, named), folder / KOHYA_LORA)
    return folder / "lora"


def export_denoiser(policy: DiffusionPolicy, folder: Path, weights: Mapping[str, Tensor]) -> Path:
    """Write a full denoiser into the folder of its name; return that."""
    network: Any = policy.network_class.from_config(policy.network.config)
    expected = network.state_dict()
    network.load_state_dict({**{n: b for n, b in policy.network.named_buffers() if n in expected}, **weights})
    network.save_pretrained(folder / policy.component)
    return folder / policy.component
