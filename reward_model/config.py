"""The config of a perspective: everything about it besides its weights, stored as JSON beside them."""

from __future__ import annotations

import json
import math
import re
import reprlib
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from torch import nn

from reward_model.heads import HeadKind, Readout
from reward_model.skip_ca import SkipCaKeys
from reward_model.text_files import parse_json

FORMAT = 1
_MAX_WIDTH = 1 << 15
"""Widest language model and LoRA of which the weights are allocated."""


@with_config(ConfigDict(strict=True, allow_inf_nan=False))
@dataclass(frozen=True, kw_only=True)
class RewardModelConfig:
    """One perspective of a reward model: its modules on the backbone, and the units of its scores."""

    perspective: str = "alignment"
    """Lower-case letters, digits and _. The paper has alignment, fidelity, safety and ranking."""
    backbone: str
    """A folder relative to the adapter checkpoint's, an absolute path, or a Hub id."""
    model_type: str
    """`model_type` of the backbone's config.json."""
    width: int
    """D: hidden size of the backbone's language model."""
    head: HeadKind = "scalar"
    readout: Readout = "last_token"
    """What a score is read from. Without last_token there are neither SkipCA nor a head."""
    temperature: float = 0.1
    """Score differences divided by it are log-odds; > 0."""
    tie_width: float = 0.0
    """Half-width of a tie in log-odds, >= 0 (Rao and Kupper, 1967); 0 for a model without ties."""
    skip_ca: bool = True
    skip_ca_heads: int = 1
    skip_ca_keys: SkipCaKeys = "visual"
    """Keys and values of SkipCA: the image's visual tokens, or those of a published checkpoint."""
    skip_ca_eps: float = 1e-5
    """Epsilon of SkipCA's RMSNorm; > 0."""
    lora_rank: int = 128
    lora_alpha: float = 256.0
    lora_dropout: float = 0.05
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the backbone in training, and the default of inference."""
    template: Literal["family", "published"] = "family"
    """Chat template of the prompt: the backbone's own, or that of the published LLaVA-Reward code, with the sizes to
    which that resizes the images of Qwen2.5-VL."""
    min_pixels: int | None = None
    max_pixels: int | None = None
    num_crops: int | None = None
    """Bounds of an image's visual tokens, for families that have them; None is the backbone's own."""
    score_mean: float | None = None
    score_std: float | None = None
    """Mean and standard deviation of the scores on the validation images; None for a head without scores."""

    def __post_init__(self) -> None:
        """Raise ValueError for a value out of range, with its name and the range."""
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.perspective) or hasattr(nn.ModuleDict, self.perspective):
            raise ValueError(
                f"perspective is {self.perspective!r}; it must be a-z, 0-9 and _, and no attribute of nn.ModuleDict."
            )
        bounds = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels, "num_crops": self.num_crops}
        for name, valid, rule in (
            ("head", self.head in get_args(HeadKind), "scalar or general_preference"),
            ("readout", self.readout in get_args(Readout), " or ".join(get_args(Readout))),
            ("temperature", math.isfinite(self.temperature) and self.temperature > 0, "positive"),
            ("tie_width", math.isfinite(self.tie_width) and self.tie_width >= 0, "at least 0"),
            ("width", 1 <= self.width <= _MAX_WIDTH, f"in [1, {_MAX_WIDTH}]"),
            ("skip_ca_heads", 1 <= self.skip_ca_heads <= self.width, "at least 1, and at most the width"),
            ("skip_ca_keys", self.skip_ca_keys in get_args(SkipCaKeys), " or ".join(get_args(SkipCaKeys))),
            ("skip_ca_eps", 0 < self.skip_ca_eps < math.inf, "positive and finite"),
            ("lora_rank", 1 <= self.lora_rank <= _MAX_WIDTH, f"in [1, {_MAX_WIDTH}]"),
            ("lora_alpha", 0 < self.lora_alpha < math.inf, "positive and finite"),
            ("lora_dropout", 0 <= self.lora_dropout < 1, "in [0, 1)"),
            *((name, value is None or value >= 1, "null or at least 1") for name, value in bounds.items()),
            ("dtype", self.dtype in ("float32", "bfloat16"), "float32 or bfloat16"),
            ("template", self.template in ("family", "published"), "family or published"),
        ):
            if not valid:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {rule}.")
        if self.readout == "prompt_likelihood" and (self.skip_ca or self.head != "scalar"):
            raise ValueError(
                f"readout is prompt_likelihood, with skip_ca {self.skip_ca} and head {self.head}; it has no SkipCA, "
                f"and its scores are scalar."
            )

    def to_json(self) -> str:
        """Return the config as JSON, with the version of the format."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    @staticmethod
    def from_json(text: str, *, where: str) -> RewardModelConfig:
        """Parse the output of `to_json`; ValueError, naming `where`, for another format or wrong keys."""
        try:
            values: Any = parse_json(text)
        except ValueError as error:
            raise ValueError(f"{where} is not JSON: {error}.") from error
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise ValueError(f"{where} is not a reward model config of format {FORMAT}, the one that is supported.")
        if unknown := values.keys() - {field.name for field in fields(RewardModelConfig)}:
            raise ValueError(f"{where} has unknown keys: {', '.join(sorted(unknown))}.")
        if missing := {"backbone", "model_type", "width"} - values.keys():
            raise ValueError(f"{where} lacks keys: {', '.join(sorted(missing))}.")
        try:
            return TypeAdapter(RewardModelConfig).validate_json(json.dumps(values))
        except ValidationError as error:
            fault = error.errors()[0]
            named = "".join(f"{name} is {reprlib.repr(fault['input'])}: " for name in fault["loc"])
            raise ValueError(f"{where}: {named}{fault['msg'].removeprefix('Value error, ')}") from error
