"""Loading of a backbone from the path or Hub id of a multimodal LLM, and the table of the families."""

# transformers has no usable types.
# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false
from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PreTrainedConfig

from reward_model.backbones.prompts import PaddingSide
from reward_model.backbones.settings import BackboneSettings, Template
from reward_model.progress import no_loading_bar
from reward_model.quantization import Quantization, check_installed, quantize
from reward_model.types import Backbone

FAMILIES = {
    "llava": "llava",
    "llava_next": "llava_next",
    "phi3_v": "phi3_v",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
}
"""`model_type` of a config.json -> module of this package, imported when it is needed.

A module has TITLE, OPTIONS (the bounds of `BackboneSettings` that it has) and `adapt(model, source, settings)`.
"""
LORA_TARGETS = (
    "q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj",
)  # fmt: skip
"""Names of the linear layers of the language models, which carry the LoRA; as published."""


def backbone_family(source: str) -> str:
    """Return the row of `FAMILIES` of a model, from its config.json alone.

    Raises FileNotFoundError, naming `source`, if there is no such model, and ValueError for an unsupported family.
    """
    try:
        kind = PreTrainedConfig.get_config_dict(source)[0].get("model_type")
    except OSError as error:
        raise FileNotFoundError(
            f"The backbone {source!r} could not be loaded, neither as a folder nor from the Hub: {error}"
        ) from error
    if kind is None:
        raise FileNotFoundError(f"The backbone {source!r} has no config.json with a model_type of transformers.")
    if kind not in FAMILIES:
        raise ValueError(_unsupported(source, kind))
    return kind


@no_loading_bar()
def load_backbone(
    source: str,
    *,
    dtype: torch.dtype = torch.float32,
    template: Template = "family",
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    num_crops: int | None = None,
    padding_side: PaddingSide = "right",
    quantization: Quantization | None = None,
) -> Backbone:
    """Load a model, frozen and in evaluation mode. No remote code is run.

    The settings are those of `BackboneSettings`. With `quantization` the linear layers of the language model hold 8 or
    4 bits, as in `quantize`; vision tower, projector, embeddings and language-model head stay as they are. Raises what
    `backbone_family` and `check_installed` raise, and ValueError for a setting that the family does not have.
    """
    if quantization:
        check_installed(quantization)  # before minutes of loading
    if backbone_family(source) == "phi3_v":
        from reward_model.backbones.phi3_v_model import load_phi3_v

        model = load_phi3_v(source, dtype=dtype)
    else:
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype)
    settings = BackboneSettings(
        template=template, min_pixels=min_pixels, max_pixels=max_pixels, num_crops=num_crops, padding_side=padding_side
    )
    backbone = adapt(model.eval().requires_grad_(False), source, settings)
    if quantization:
        quantize(backbone.language_model, quantization, device=torch.device("cpu"), dtype=dtype)
    return backbone


def adapt(model: Any, source: str, settings: BackboneSettings) -> Backbone:
    """Return the backbone of a model in memory; tokenizer and image settings are loaded from `source`."""
    family = _module(model.config.model_type)
    for option in ("min_pixels", "max_pixels", "num_crops"):
        if getattr(settings, option) is not None and option not in family.OPTIONS:
            others = [_module(kind).TITLE for kind in FAMILIES if option in _module(kind).OPTIONS]
            raise ValueError(f"{option} does not apply to {family.TITLE}, only to {' and '.join(others)}.")
    return family.adapt(model, source, settings)


def _module(kind: str) -> Any:
    return import_module(f"reward_model.backbones.{FAMILIES[kind]}")


def _unsupported(source: str, kind: str | None) -> str:
    """Return the error message for a family without a backbone class."""
    known = ", ".join(f"{kind} ({_module(kind).TITLE})" for kind in FAMILIES)
    return (
        f"{source!r} is a model of type {kind!r}, which is not supported; there are {known}. A new family is a file of "
        f"reward_model/backbones/ and a line in load.py: docs/extending.md shows one."
    )
