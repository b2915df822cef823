"""How the published LLaVA-Reward code named the tensors of each family, and what it did with them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from reward_model.compatibility import SkipCaKeys


@dataclass(frozen=True, slots=True)
class Variant:
    """One family in the published code."""

    decoder: str
    """Before `layers.N` in the names of the LoRA."""
    projector: str
    """Before the names of the projector's own tensors."""
    skip_ca_keys: SkipCaKeys | None
    """What its SkipCA looked at; None if it was never run."""
    skip_ca_eps: float = 1e-5
    note: str = ""
    """What that means, for whoever imports one."""
    bounds: dict[str, int] = field(default_factory=dict)
    """How large its images were."""


VARIANTS = {
    "phi3_v": Variant(
        "model.",
        "model.vision_embed_tokens.img_projection.",
        "visual_and_padding",
        note="As published, SkipCA does not mask the zeros behind an image with fewer visual tokens than others, so "
        "that a score depends on its batch; with --skip-ca-keys visual it does. Alone, an image scores the same.",
        bounds={"num_crops": 16},
    ),
    "qwen2_5_vl": Variant(
        "model.",
        "visual.merger.",
        "text_padding",
        skip_ca_eps=1e-6,
        note="As published, SkipCA looks at a row's padding in place of its image, and at nothing where there is "
        "none, so that a score depends on its batch; with --skip-ca-keys visual it looks at the image.",
        bounds={"min_pixels": 256 * 28 * 28, "max_pixels": 1280 * 28 * 28},
    ),
    "llava_next": Variant("language_model.model.", "multi_modal_projector.", None),
}
"""By the base model's type."""

_ALONE = {
    "value_head.weight": "head.weight",
    "W_q.weight": "skip_ca.query.weight",
    "W_k.weight": "skip_ca.key.weight",
    "W_v.weight": "skip_ca.value.weight",
    "ca_layernorm.weight": "skip_ca.norm.weight",
}

Named = dict[str, tuple[str, Tensor]]
"""By the name in a bundle: the published name, and the tensor."""


def other_tensors(stored: dict[str, Tensor], variant: Variant, *, where: Path) -> Named:
    """Head, SkipCA and projector of a pytorch_model.bin; ValueError for a name of none of them."""

    def ours(name: str) -> str | None:
        # Later versions of transformers keep the vision tower, and with it the projector, one level further down.
        for prefix in (variant.projector, f"model.{variant.projector}"):
            if name.startswith(prefix):
                return f"projector.{name.removeprefix(prefix)}"
        return _ALONE.get(name)

    return _renamed(stored, ours, where=where)


def lora_tensors(stored: dict[str, Tensor], variant: Variant, *, where: Path) -> Named:
    """The LoRA of an adapter_model.bin; ValueError for a name outside of the decoder, as of a vision tower's LoRA."""
    pattern = re.compile(
        rf"(?:base_model\.model\.)?{re.escape(variant.decoder)}(layers\.\d+\.[a-z_.]+\.lora_[AB])(?:\.default)?\.weight"
    )

    def ours(name: str) -> str | None:
        found = pattern.fullmatch(name)
        return f"lora.{found[1]}.weight" if found else None

    return _renamed(stored, ours, where=where)


def _renamed(stored: dict[str, Tensor], ours: Callable[[str], str | None], *, where: Path) -> Named:
    named: Named = {}
    for published, tensor in stored.items():
        name = ours(published)
        if name is None:
            raise ValueError(f"{where} holds {published}, which no part of a judge of this family is called.")
        if name in named:
            raise ValueError(f"{where} holds {name} twice: as {named[name][0]} and as {published}.")
        named[name] = (published, tensor)
    return named
