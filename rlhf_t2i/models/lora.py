"""LoRA adapters on a denoiser (peft)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_t2i.models.quiet import only_errors

ADAPTER = "default"
"""peft's name of the adapter that is trained or loaded."""
REFERENCE = "reference"
"""Name of the frozen adapter that a trained one is compared with."""
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""The attention projections that DDPO and most LoRAs of Stable Diffusion train."""
JOINT_ATTENTION = (
    *(f"attn.{name}" for name in ATTENTION),
    *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
)
"""The projections of joint text-image attention that Flow-GRPO (arXiv:2505.05470) trains."""


@dataclass(frozen=True, slots=True)
class LoraConfiguration:
    """Form of the adapters: x + scale * B A x with scale = alpha / rank, or alpha / sqrt(rank) with rsLoRA."""

    rank: int
    alpha: float | None = None
    """None is the rank."""
    targets: str | None = None
    """Layers that get an adapter, as in `target_layers`."""
    use_dora: bool = False
    use_rslora: bool = False

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> LoraConfiguration | None:
        """Return the LoRA that options describe, which in older runs were fewer; None without lora_rank."""
        if options["lora_rank"] is None:
            return None
        kinds = {name: options[name] for name in ("use_dora", "use_rslora") if name in options}
        return cls(options["lora_rank"], options["lora_alpha"], options.get("lora_targets"), **kinds)


def add_lora(denoiser: Any, lora: LoraConfiguration, targets: Sequence[str], *, seed: int) -> None:
    """Freeze a denoiser and add trainable float32 adapters, initialised from `seed`, to layers by their name endings.

    Raises ValueError, with some names of layers, if no layer's name ends with one of `targets`.
    """
    from peft import LoraConfig  # takes seconds

    layers = [name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            raise ValueError(
                f"No layer of the denoiser ends with {target}; it has, for example, {', '.join(layers[:5])}."
            )
    denoiser.requires_grad_(False)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=float(lora.alpha or lora.rank),  # pyright: ignore[reportArgumentType]  # peft takes fractions
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
        init_lora_weights="gaussian",
        target_modules=list(targets),
    )
    with only_errors(), torch.random.fork_rng(devices=[]):  # peft draws from the global generator
        torch.manual_seed(seed)
        denoiser.add_adapter(config)
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def target_layers(
    chosen: str | None, denoiser: nn.Module, *, attention: Sequence[str], mlp: Sequence[str]
) -> Sequence[str]:
    """Return name endings of layers: of a preset (attention, attention_mlp, all_linear), or comma-separated ones."""
    match chosen:
        case None | "attention":
            return attention
        case "attention_mlp":
            return (*attention, *mlp)
        case "all_linear":
            return [name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)]
        case endings:
            return [ending.strip() for ending in endings.split(",") if ending.strip()]


def uses_dora(denoiser: Any) -> bool:
    """True if the denoiser's adapters are DoRA."""
    return has_lora(denoiser) and denoiser.peft_config[ADAPTER].use_dora


def has_lora(denoiser: Any) -> bool:
    """True if the denoiser has adapters."""
    return bool(getattr(denoiser, "peft_config", None))


def lora_weights(denoiser: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the adapters' weights, given by parameter name, under the names that diffusers loads."""
    from peft.utils import get_peft_model_state_dict  # takes seconds

    return get_peft_model_state_dict(denoiser, state_dict=dict(weights))


def set_lora_weights(denoiser: Any, weights: Mapping[str, Tensor]) -> None:
    """Load the adapters' weights, under the names that `lora_weights` returns."""
    from peft.utils import set_peft_model_state_dict  # takes seconds

    set_peft_model_state_dict(denoiser, dict(weights), ADAPTER)


@torch.no_grad()
def lora_scaled(weights: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Return the weights to change, with their new values, so that every adapter contributes `scale` times as much."""
    return {name: scale * weight for name, weight in weights.items() if "lora_B" in name}


def keep_lora(denoiser: Any) -> None:
    """Keep a frozen copy of the adapters as they are now, for `lora_reference`."""
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict  # takes seconds

    weights = get_peft_model_state_dict(denoiser, adapter_name=ADAPTER)
    with only_errors(), torch.random.fork_rng(devices=[]):  # peft draws from the global generator
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        denoiser.add_adapter(replace(denoiser.peft_config[ADAPTER]), REFERENCE)
    set_peft_model_state_dict(denoiser, weights, REFERENCE)
    denoiser.set_adapter(ADAPTER)
    for name, parameter in denoiser.named_parameters():
        if f".{REFERENCE}." in name:
            parameter.data = parameter.data.float().requires_grad_(False)


@contextmanager
def lora_reference(denoiser: Any) -> Iterator[None]:
    """Use the adapters that `keep_lora` kept, or none, within the context, which must not need gradients."""
    if REFERENCE in denoiser.peft_config:
        denoiser.set_adapter(REFERENCE)
    else:
        denoiser.disable_adapters()
    try:
        yield
    finally:
        denoiser.set_adapter(ADAPTER)
        denoiser.enable_adapters()


def set_lora_dropout(denoiser: Any, probability: float) -> None:
    """Give the adapters a dropout of their inputs, which is active within `lora_dropout` only."""
    from peft.tuners.lora import LoraLayer  # takes seconds

    for layer in denoiser.modules():
        if isinstance(layer, LoraLayer):
            layer.lora_dropout[ADAPTER] = nn.Dropout(probability).eval()


@contextmanager
def lora_dropout(denoiser: nn.Module, *, seed: int) -> Iterator[None]:
    """Context of a forward and backward pass in which the adapters' dropout, if they have any, is drawn from `seed`."""
    layers = [m for name, m in denoiser.named_modules() if ".lora_dropout." in name and isinstance(m, nn.Dropout)]
    if not layers:
        yield
        return
    device = next(denoiser.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for layer in layers:
            layer.train()
        try:
            yield
        finally:
            for layer in layers:
                layer.eval()


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require a gradient, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}
