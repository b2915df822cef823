"""LoRA adapters on a denoiser (peft)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""The attention projections that DDPO and most LoRAs of Stable Diffusion train."""
JOINT_ATTENTION = (
    *(f"attn.{name}" for name in ATTENTION),
    *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
)
"""The projections of joint text-image attention that Flow-GRPO (arXiv:2505.05470) trains."""


def add_lora(denoiser: Any, *, rank: int, alpha: float, seed: int, targets: Sequence[str] = ATTENTION) -> None:
    """Freeze a denoiser and add trainable float32 adapters `x + alpha / rank * B A x` to its projections.

    Raises ValueError if no module's name ends with one of `targets`.
    """
    from peft import LoraConfig  # takes seconds

    names = [name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    if not any(name.endswith(tuple(targets)) for name in names):
        raise ValueError(f"No layer of the denoiser ends with {', '.join(targets)}; it has, for example, {names[:5]}.")
    denoiser.requires_grad_(False)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  # peft takes fractions
        init_lora_weights="gaussian",
        target_modules=list(targets),
    )
    with torch.random.fork_rng(devices=[]):  # peft draws from the global generator
        torch.manual_seed(seed)
        denoiser.add_adapter(config)
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def has_lora(denoiser: Any) -> bool:
    """True if the denoiser has adapters."""
    return bool(getattr(denoiser, "peft_config", None))


def lora_weights(denoiser: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the adapters' weights, given by parameter name, under the names that diffusers loads."""
    from peft.utils import get_peft_model_state_dict  # takes seconds

    return get_peft_model_state_dict(denoiser, state_dict=dict(weights))


@torch.no_grad()
def lora_scaled(weights: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Return the weights to change, with their new values, so that every adapter contributes `scale` times as much."""
    return {name: scale * weight for name, weight in weights.items() if "lora_B" in name}


@contextmanager
def lora_disabled(denoiser: Any) -> Iterator[None]:
    """Switch the adapters off within the context."""
    denoiser.disable_adapters()
    try:
        yield
    finally:
        denoiser.enable_adapters()


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require a gradient, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}
