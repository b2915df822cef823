"""Kohya's key layout of LoRAs: lora_unet_LAYER.lora_down.weight, .lora_up.weight and .alpha.

The layers are those of the original models, in which several layers of diffusers may be one: such a layer gets the
LoRAs of its parts as one of their added ranks. diffusers reads all that is written here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from torch import Tensor

from rlhf_t2i.models.lora import ADAPTER

if TYPE_CHECKING:
    from rlhf_t2i.models.base import DiffusionPolicy

_DOUBLE = {
    "double_blocks_{}_img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "double_blocks_{}_img_attn_proj": ("attn.to_out.0",),
    "double_blocks_{}_txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "double_blocks_{}_txt_attn_proj": ("attn.to_add_out",),
}
_FLUX = {
    "double_blocks_{}_img_mlp_0": ("ff.net.0.proj",),
    "double_blocks_{}_img_mlp_2": ("ff.net.2",),
    "double_blocks_{}_img_mod_lin": ("norm1.linear",),
    "double_blocks_{}_txt_mlp_0": ("ff_context.net.0.proj",),
    "double_blocks_{}_txt_mlp_2": ("ff_context.net.2",),
    "double_blocks_{}_txt_mod_lin": ("norm1_context.linear",),
    "single_blocks_{}_linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "single_blocks_{}_linear2": ("proj_out",),
    "single_blocks_{}_modulation_lin": ("norm.linear",),
}
_FLUX2 = {
    "double_blocks_{}_img_mlp_0": ("ff.linear_in",),
    "double_blocks_{}_img_mlp_2": ("ff.linear_out",),
    "double_blocks_{}_txt_mlp_0": ("ff_context.linear_in",),
    "double_blocks_{}_txt_mlp_2": ("ff_context.linear_out",),
    "single_blocks_{}_linear1": ("attn.to_qkv_mlp_proj",),
    "single_blocks_{}_linear2": ("attn.to_out",),
}
_LAYERS: Mapping[str, Mapping[str, Sequence[str]] | None] = {
    "FluxPipeline": _DOUBLE | _FLUX,
    "Flux2KleinPipeline": _DOUBLE | _FLUX2,
    "QwenImagePipeline": None,
}
"""diffusers pipeline class -> Kohya's layers and their parts in diffusers' blocks; None if the layers are the same."""
_WITHOUT = {
    "StableDiffusion3Pipeline": "diffusers does not read Kohya's layout of it",
    "ZImagePipeline": "its trainers write several layouts under Kohya's names",
    "SanaPipeline": "Kohya's trainers do not have it",
}
_BLOCK = re.compile(r"(single_)?transformer_blocks\.(\d+)\.(.+)")


def check_kohya(policy: DiffusionPolicy) -> None:
    """Raise ValueError for a policy whose LoRA has no form in Kohya's layout, or a layer without a name in it."""
    pipeline_class, network = policy.pipeline_class.__name__, policy.network
    if policy.component == "transformer" and pipeline_class not in _LAYERS:
        reason = _WITHOUT.get(pipeline_class, "its names there are not known")
        raise ValueError(
            f"export_format is both; a LoRA of {policy.title} is written in diffusers' layout only: {reason}. Set it "
            f"to diffusers, whose layout ComfyUI reads too."
        )
    if network.peft_config[ADAPTER].use_dora:
        raise ValueError("export_format is both; it must be diffusers with a DoRA.")
    if (layers := _LAYERS.get(pipeline_class)) is not None:
        for name in (name for name, layer in network.named_modules() if hasattr(layer, "lora_A")):
            if _place(name, layers) is None:
                raise ValueError(
                    f"export_format is both; the layer {name} of {policy.title}, which lora_targets selects, has no "
                    f"name in Kohya's layout. Set lora_targets to attention or attention_mlp, or export_format to "
                    f"diffusers."
                )


def in_kohyas_layout(policy: DiffusionPolicy, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a LoRA's weights under Kohya's names, with the alpha of each layer, whose scale is alpha / rank."""
    if policy.component == "unet":
        return _of_a_unet(policy.network, weights)
    return of_a_transformer(policy.network, weights, layers=_LAYERS[policy.pipeline_class.__name__])


def of_a_transformer(
    network: Any, weights: Mapping[str, Tensor], *, layers: Mapping[str, Sequence[str]] | None
) -> dict[str, Tensor]:
    """Return the weights of a transformer's LoRA under Kohya's names; `layers` are a value of `_LAYERS`.

    A fused layer gets the stacked lora_down of its parts and their lora_up as blocks of one matrix, which is zero
    elsewhere, also in the rows of parts that are not trained.
    """
    trained = [name.removesuffix(".lora_A.weight") for name in weights if name.endswith(".lora_A.weight")]
    fused: dict[str, Sequence[str]] = {}
    for name in trained:
        place = (name.replace(".", "_"), [name]) if layers is None else _place(name, layers)
        assert place is not None, name  # check_kohya
        fused[place[0]] = place[1]
    converted = dict[str, Tensor]()
    for theirs, parts in fused.items():
        own = [part for part in parts if part in trained]
        scales = {part: network.get_submodule(part).scaling[ADAPTER] for part in own}
        ups = [
            weights[f"{part}.lora_B.weight"] * (scales[part] / scales[own[0]])
            if part in own
            else torch.zeros(network.get_submodule(part).out_features, 0)
            for part in parts
        ]
        down = torch.cat([weights[f"{part}.lora_A.weight"] for part in own])
        converted[f"lora_unet_{theirs}.lora_down.weight"] = down.contiguous()
        converted[f"lora_unet_{theirs}.lora_up.weight"] = torch.block_diag(*ups).to(down).contiguous()
        converted[f"lora_unet_{theirs}.alpha"] = torch.tensor(float(scales[own[0]] * len(down)))
    return converted


def _place(name: str, layers: Mapping[str, Sequence[str]]) -> tuple[str, Sequence[str]] | None:
    """Return Kohya's name of the layer that a layer of diffusers is in, and all layers in it; None without one."""
    if (found := _BLOCK.fullmatch(name)) is None:
        return None
    single, number, layer = found.groups()
    kind = "single" if single else "double"
    for theirs, parts in layers.items():
        if theirs.startswith(kind) and layer in parts:
            return theirs.format(number), [f"{name.removesuffix(layer)}{part}" for part in parts]
    return None


def _of_a_unet(network: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
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
