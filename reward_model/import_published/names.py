"""Tensor names and quirks of the published LLaVA-Reward code, by family of the base model."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from reward_model.skip_ca import SkipCaKeys


@dataclass(frozen=True, slots=True)
class Variant:
    """One family in the published code."""

    decoder: str
    """Prefix of `layers.N` in the names of the LoRA."""
    projector: str
    """Prefix of the projector's own names."""
    skip_ca_keys: SkipCaKeys | None
    """Keys and values of its SkipCA; None if the published code never ran it."""
    skip_ca_eps: float = 1e-5
    note: str = ""
    """Consequence of the keys, printed at import."""
    bounds: dict[str, int] = field(default_factory=dict)
    """Bounds of the image size in training."""


VARIANTS = {
    "phi3_v": Variant(
        "model.",
        "model.vision_embed_tokens.img_projection.",
        "visual_and_padding",
        note="As published, SkipCA does not mask the zeros behind an image with fewer visual tokens than others, so "
        "that a score depends on its batch; with --skip_ca_keys visual they are masked. An image alone in a batch "
        "gets the same score with both.",
        bounds={"num_crops": 16},
    ),
    "qwen2_5_vl": Variant(
        "model.",
        "visual.merger.",
        "text_padding",
        skip_ca_eps=1e-6,
        note="As published, SkipCA attends to the padding of a row in place of its image, and to nothing in a row "
        "without padding, so that a score depends on its batch; with --skip_ca_keys visual it attends to the image.",
        bounds={"min_pixels": 256 * 28 * 28, "max_pixels": 1280 * 28 * 28},
    ),
    "llava_next": Variant("language_model.model.", "multi_modal_projector.", None),
}
"""Variants by `model_type` of the base model."""

_FIXED_NAMES = {
    "value_head.weight": "head.weight",
    "W_q.weight": "skip_ca.query.weight",
    "W_k.weight": "skip_ca.key.weight",
    "W_v.weight": "skip_ca.value.weight",
    "ca_layernorm.weight": "skip_ca.norm.weight",
}

NamedTensors = dict[str, tuple[str, Tensor]]
"""Name in an adapter checkpoint -> (published name, tensor)."""


def other_tensors(stored: dict[str, Tensor], variant: Variant, *, where: Path) -> NamedTensors:
    """Rename head, SkipCA and projector of a pytorch_model.bin; ValueError for a name of none of them."""

    def rename(name: str) -> str | None:
        # Later versions of transformers keep the vision tower, and with it the projector, one level further down.
        for prefix in (variant.projector, f"model.{variant.projector}"):
            if name.startswith(prefix):
                return f"projector.{name.removeprefix(prefix)}"
        return _FIXED_NAMES.get(name)

    return _renamed(stored, rename, where=where)


def lora_tensors(stored: dict[str, Tensor], variant: Variant, *, where: Path) -> NamedTensors:
    """Rename the LoRA of an adapter_model.bin; ValueError for a name outside of the decoder."""
    pattern = re.compile(
        rf"(?:base_model\.model\.)?{re.escape(variant.decoder)}(layers\.\d+\.[a-z_.]+\.lora_[AB])(?:\.default)?\.weight"
    )

    def rename(name: str) -> str | None:
        found = pattern.fullmatch(name)
        return f"lora.{found[1]}.weight" if found else None

    return _renamed(stored, rename, where=where)


def _renamed(stored: dict[str, Tensor], rename: Callable[[str], str | None], *, where: Path) -> NamedTensors:
    named: NamedTensors = {}
    for published, tensor in stored.items():
        name = rename(published)
        if name is None:
            raise ValueError(f"{where} holds {published}, which is no tensor of a reward model of this family.")
        if name in named:
            raise ValueError(f"{where} holds {name} twice: as {named[name][0]} and as {published}.")
        named[name] = (published, tensor)
    return named
