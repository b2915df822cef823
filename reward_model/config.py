"""What one has to know of a trained judge beside its weights; it travels as JSON."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from torch import nn

from reward_model.compatibility import SkipCaKeys
from reward_model.heads import HeadKind

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig:
    """One perspective of a judge: how it is built on its backbone, and how its scores are meant."""

    perspective: str = "alignment"
    """A name of lower-case letters, digits and _: alignment, fidelity, safety and ranking are the paper's."""
    backbone: str
    """A folder, as seen from the bundle's own, or a path or Hub id."""
    model_type: str
    """The backbone's family, as transformers calls it."""
    width: int
    """D, the width of the backbone's language model."""
    head: HeadKind = "scalar"
    temperature: float = 0.1
    """Scores are divided by it to become log-odds."""
    tie_width: float = 0.0
    """Rao and Kupper's, in log-odds: how close two images must be to be called equal; 0 for a judge without ties."""
    skip_ca: bool = True
    skip_ca_heads: int = 1
    skip_ca_keys: SkipCaKeys = "visual"
    """What SkipCA looks at: the image's visual tokens, or what a published checkpoint's did (`compatibility`)."""
    skip_ca_eps: float = 1e-5
    """Of its norm."""
    lora_rank: int = 128
    lora_alpha: float = 256.0
    lora_dropout: float = 0.05
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the backbone in training, and so in use unless one says otherwise."""
    template: Literal["family", "published"] = "family"
    min_pixels: int | None = None
    max_pixels: int | None = None
    num_crops: int | None = None
    """What bounds an image's visual tokens, as its family does; None is the backbone's own."""
    score_mean: float | None = None
    score_std: float | None = None
    """Of the scores on the validation images: the judge's own unit. None where the head has no scores."""

    def __post_init__(self) -> None:
        """Refuse values that cannot be, naming them."""
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.perspective) or hasattr(nn.ModuleDict, self.perspective):
            raise ValueError(f"perspective is {self.perspective!r}; it must be a-z, 0-9 and _, and no word of torch.")
        for name, works, rule in (
            ("head", self.head in get_args(HeadKind), "scalar or general_preference"),
            ("temperature", math.isfinite(self.temperature) and self.temperature > 0, "positive"),
            ("tie_width", math.isfinite(self.tie_width) and self.tie_width >= 0, "at least 0"),
            ("skip_ca_heads", self.skip_ca_heads >= 1, "at least 1"),
            ("skip_ca_keys", self.skip_ca_keys in get_args(SkipCaKeys), " or ".join(get_args(SkipCaKeys))),
            ("skip_ca_eps", self.skip_ca_eps > 0, "positive"),
            ("lora_rank", self.lora_rank >= 1, "at least 1"),
            ("lora_alpha", self.lora_alpha > 0, "positive"),
            ("lora_dropout", 0 <= self.lora_dropout < 1, "in [0, 1)"),
            ("dtype", self.dtype in ("float32", "bfloat16"), "float32 or bfloat16"),
            ("template", self.template in ("family", "published"), "family or published"),
        ):
            if not works:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {rule}.")

    def to_json(self) -> str:
        """The facts and the version of this format, for people and programs to read."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    @staticmethod
    def from_json(text: str, *, where: str) -> RewardModelConfig:
        """Read what `to_json` wrote; ValueError for another format, a missing fact or an unknown one."""
        try:
            values: Any = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON: {error}.") from error
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise ValueError(f"{where} is not a judge of format {FORMAT}, the one that this version reads.")
        if unknown := values.keys() - {field.name for field in fields(RewardModelConfig)}:
            raise ValueError(f"{where} holds facts that this version does not know: {', '.join(sorted(unknown))}.")
        if missing := {"backbone", "model_type", "width"} - values.keys():
            raise ValueError(f"{where} lacks facts: {', '.join(sorted(missing))}.")
        try:
            return RewardModelConfig(**values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error
