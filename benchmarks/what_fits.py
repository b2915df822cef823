"""Compute which full-size models fit on which GPUs: `python benchmarks/what_fits.py`. Nothing is measured.

Weights and activations are counted with diffusers' own networks on fake tensors, in bfloat16, with gradient
checkpointing and the smallest microbatch (a pair for DPO); `rlhf_t2i.distributed.memory` computes the memory of one
GPU. Reward model, text encoders and autoencoder are included, in bfloat16. Prints Markdown: the simplest strategy that
needs at most 90 % of a GPU's memory and its GB on each GPU, or in brackets the least GB of any strategy.
"""

# diffusers has no usable types.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportPrivateImportUsage=false
from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rlhf_t2i.distributed.memory import Layout, Memory, gathered_by_fsdp, memory_of, peak_bytes
from rlhf_t2i.models.lora import ATTENTION, LoraConfiguration, add_lora

GPUS = {"1 x 24 GB": (1, 24), "1 x 80 GB": (1, 80), "8 x 80 GB": (8, 80)}
SPARE = 0.9
"""Usable fraction of a GPU's memory; kernels, fragmentation and the driver take the rest."""
BILLION = 1e9
REWARD_MODELS = {"Qwen2.5-VL-3B": 3.75, "Phi-3.5-vision": 4.15, "Qwen2.5-VL-7B": 8.29}
"""Billions of parameters."""
CLIP_L, CLIP_G, T5, QWEN3, AUTOENCODER = 0.123, 0.695, 4.762, 4.022, 0.084
RANK = 16
say = partial(print, flush=True)


@dataclass(frozen=True)
class Model:
    """Denoiser, its inputs for a batch size, and the parameters (billions) of its text encoders."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Any]]
    text_encoders: float
    latent: tuple[int, int]
    """Channels and side of the latents."""


def sd15() -> nn.Module:
    """Stable Diffusion 1.5."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


def sdxl() -> nn.Module:
    """Stable Diffusion XL."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=128, block_out_channels=(320, 640, 1280), cross_attention_dim=2048, use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), addition_embed_type="text_time",
        addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    )  # fmt: skip


def sd35(*, depth: int, **settings: Any) -> nn.Module:
    """Stable Diffusion 3.5, as many heads wide as layers deep."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=128, in_channels=16, out_channels=16, num_layers=depth, num_attention_heads=depth,
        attention_head_dim=64, joint_attention_dim=4096, caption_projection_dim=64 * depth, pooled_projection_dim=2048,
        qk_norm="rms_norm", **settings,
    )  # fmt: skip


def flux() -> nn.Module:
    """FLUX.1 dev."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(guidance_embeds=True)


def zimage() -> nn.Module:
    """Z-Image."""
    from diffusers import ZImageTransformer2DModel

    return ZImageTransformer2DModel()


def for_unet(batch: int, *, side: int, width: int, **extra: Any) -> dict[str, Any]:
    """77 tokens of text."""
    return {
        "sample": torch.zeros(batch, 4, side, side),
        "timestep": torch.zeros(batch),
        "encoder_hidden_states": torch.zeros(batch, 77, width),
        **extra,
    }


def for_sdxl(batch: int) -> dict[str, Any]:
    """1024 x 1024 pixels."""
    added = {"text_embeds": torch.zeros(batch, 1280), "time_ids": torch.zeros(batch, 6)}
    return for_unet(batch, side=128, width=2048, added_cond_kwargs=added)


def for_sd3(batch: int, *, side: int) -> dict[str, Any]:
    """77 tokens of CLIP and 256 of T5."""
    return {
        "hidden_states": torch.zeros(batch, 16, side, side),
        "encoder_hidden_states": torch.zeros(batch, 77 + 256, 4096),
        "pooled_projections": torch.zeros(batch, 2048),
        "timestep": torch.zeros(batch),
    }


def for_flux(batch: int, *, side: int) -> dict[str, Any]:
    """Four latents in each place, 512 tokens of T5."""
    places = (side // 2) ** 2
    return {
        "hidden_states": torch.zeros(batch, places, 64),
        "encoder_hidden_states": torch.zeros(batch, 512, 4096),
        "pooled_projections": torch.zeros(batch, 768),
        "timestep": torch.zeros(batch),
        "guidance": torch.zeros(batch),
        "img_ids": torch.zeros(places, 3),
        "txt_ids": torch.zeros(512, 3),
    }


def for_zimage(batch: int) -> dict[str, Any]:
    """1024 x 1024 pixels, 128 tokens of Qwen3."""
    return {
        "x": [torch.zeros(16, 1, 128, 128)] * batch,
        "t": torch.zeros(batch),
        "cap_feats": [torch.zeros(128, 2560)] * batch,
    }


medium = partial(sd35, depth=24, pos_embed_max_size=384, dual_attention_layers=tuple(range(13)))
large = partial(sd35, depth=38, pos_embed_max_size=192)
MODELS = {
    "SD 1.5, 512 px": Model(sd15, partial(for_unet, side=64, width=768), CLIP_L, (4, 64)),
    "SDXL": Model(sdxl, for_sdxl, CLIP_L + CLIP_G, (4, 128)),
    "SD 3.5 medium, 512 px": Model(medium, partial(for_sd3, side=64), CLIP_L + CLIP_G + T5, (16, 64)),
    "SD 3.5 Large": Model(large, partial(for_sd3, side=128), CLIP_L + CLIP_G + T5, (16, 128)),
    "Z-Image": Model(zimage, for_zimage, QWEN3, (16, 128)),
    "FLUX.1, 512 px": Model(flux, partial(for_flux, side=64), CLIP_L + T5, (16, 64)),
    "FLUX.1": Model(flux, partial(for_flux, side=128), CLIP_L + T5, (16, 128)),
}
"""Models to train, at 1024 x 1024 pixels unless stated otherwise."""


def on_fake_tensors(network: nn.Module, *, frozen: torch.dtype) -> Any:
    """Turn a network of the meta device into one of fake tensors: trained weights in float32, others in `frozen`."""
    for module in network.modules():
        for name, old in module._parameters.items():
            if old is not None:
                dtype = torch.float32 if old.requires_grad else frozen
                module._parameters[name] = nn.Parameter(torch.empty(old.shape, dtype=dtype), old.requires_grad)
        for name, old in module._buffers.items():
            if old is not None:
                module._buffers[name] = torch.empty(old.shape, dtype=old.dtype)
    return network.train()


def count_activations(model: Model, *, adapters: bool, batch: int) -> tuple[nn.Module, int]:
    """Return the network on fake tensors, and the activation bytes of a forward and backward pass."""
    with torch.device("meta"):
        network = model.build()
        if adapters:
            add_lora(network, LoraConfiguration(RANK), ATTENTION, seed=0)
    with FakeTensorMode():
        network = on_fake_tensors(network, frozen=torch.bfloat16)
        network.enable_gradient_checkpointing()

        def step() -> None:
            with torch.autocast("cpu", torch.bfloat16):
                output = network(**model.inputs(batch), return_dict=False)[0]
            output = torch.stack(output) if isinstance(output, list) else output  # Z-Image returns a list of images
            output.float().square().mean().backward()

        return network, peak_bytes(network, step)


def print_weights(models: list[str]) -> None:
    """Print the GB of each denoiser's frozen weights under a LoRA, plain and quantised as by `models.quantization`."""
    say("| GB of the denoiser | bfloat16 | int8 | nf4 |\n|---|---|---|---|")
    for name in models:
        with torch.device("meta"):
            network = MODELS[name].build()
        total = sum(p.numel() for p in network.parameters())
        layers = [module.weight.shape for module in network.modules() if type(module) is nn.Linear]
        linear, rows = sum(layer.numel() for layer in layers), sum(layer[0] for layer in layers)
        sizes = [2 * total, *(2 * (total - linear) + size for size in (linear + 3 * rows, linear * (1 / 2 + 4 / 64)))]
        say(f"| {name} | {' | '.join(f'{size / BILLION:.1f}' for size in sizes)} |")


def decoding(model: Model) -> int:
    """Return the activation bytes of decoding an image in bfloat16, forward and backward, for DRaFT."""
    from diffusers import AutoencoderKL

    channels, side = model.latent
    with torch.device("meta"):
        autoencoder = AutoencoderKL(
            latent_channels=channels, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        ).requires_grad_(False)  # fmt: skip
    with FakeTensorMode():
        autoencoder = on_fake_tensors(autoencoder, frozen=torch.bfloat16)
        autoencoder.enable_gradient_checkpointing()
        latents = torch.zeros(1, channels, side, side, dtype=torch.bfloat16, requires_grad=True)
        return peak_bytes(autoencoder, lambda: autoencoder.decode(latents, return_dict=False)[0].sum().backward())


def strategies(layout: Layout, num_gpus: int) -> dict[str, Layout]:
    """Return the strategies from the simplest to the one that needs the least memory."""
    one = replace(layout, processes=num_gpus)
    offload = {"ZeRO-3 offload": replace(one, mode="zero3", offload=True, gather_for_sampling=False)}
    if num_gpus == 1:
        return {"one process": replace(one, mode="single"), **offload}
    return {
        "DDP": replace(one, mode="ddp"), "ZeRO-2": replace(one, mode="zero2"), "ZeRO-3": replace(one, mode="zero3"),
        "ZeRO-3, layer by layer": replace(one, mode="zero3", gather_for_sampling=False),
        "FSDP2, layer by layer": replace(one, mode="fsdp2", gather_for_sampling=False), **offload,
    }  # fmt: skip


def cell(layout: Layout, *, activations: float, others: float, num_gpus: int, size: float) -> str:
    """Return the first strategy that fits, with its GB."""

    def gigabytes(memory: Memory) -> float:
        return memory.peak / BILLION

    needed = {
        name: gigabytes(memory_of(strategy, activations=activations, others=others))
        for name, strategy in strategies(layout, num_gpus).items()
    }
    fitting = next((name for name, peak in needed.items() if peak <= SPARE * size), None)
    return f"{fitting}, {needed[fitting]:.0f}" if fitting else f"no ({min(needed.values()):.0f})"


def main() -> None:
    """Print the table of all models."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--reward_model", choices=[*REWARD_MODELS, "elsewhere"], default="Qwen2.5-VL-3B")
    parser.add_argument("--offload_text_encoders", action="store_true")
    parser.add_argument("--only_adapters", action="store_true")
    parser.add_argument("--weights", action="store_true", help="print the size of the denoisers' weights only")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    if arguments.weights:
        print_weights(arguments.models)
        return
    say(
        f"Reward model: {arguments.reward_model}; text encoders: "
        f"{'offloaded' if arguments.offload_text_encoders else 'on the GPU'}.\n"
    )
    say(f"| model | trained | recipe | {' | '.join(GPUS)} |\n|{'---|' * (3 + len(GPUS))}")
    for name in arguments.models:
        model = MODELS[name]
        encoders = 0.0 if arguments.offload_text_encoders else model.text_encoders
        reward_model = 0.0 if arguments.reward_model == "elsewhere" else REWARD_MODELS[arguments.reward_model]
        others = 2 * BILLION * (encoders + AUTOENCODER + reward_model)
        decoder = decoding(model)
        for adapters in (True,) if arguments.only_adapters else (True, False):
            network, one = count_activations(model, adapters=adapters, batch=1)
            _, pair = count_activations(model, adapters=adapters, batch=2)
            trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
            total = sum(p.numel() for p in network.parameters())
            layout = Layout(
                mode="single", processes=1, trainable=trainable, frozen=total - trainable, frozen_width=2,
                block=gathered_by_fsdp(network),
            )  # fmt: skip
            for recipe, activations, reference in (
                ("DDPO", one, False), ("DRaFT-1", one + decoder, False), ("DPO", pair, not adapters),
            ):  # fmt: skip
                cells = [
                    cell(
                        replace(layout, reference=reference),
                        activations=activations,
                        others=others,
                        num_gpus=count,
                        size=size,
                    )
                    for count, size in GPUS.values()
                ]
                trained = f"LoRA of rank {RANK}" if adapters else "all"
                say(f"| {name} | {trained} ({trainable / 1e6:,.0f} M) | {recipe} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
