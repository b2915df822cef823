"""Linear heads on the pooled token, and the preference logits of their outputs."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

HeadKind = Literal["scalar", "general_preference"]
Readout = Literal["last_token", "prompt_likelihood"]
"""last_token: a head on the last token (the paper); prompt_likelihood: temperature * log p(prompt | image)."""


class Head(nn.Linear):
    """One linear layer in float32 without a bias: one output for `scalar`, two for `general_preference`."""

    def __init__(self, width: int, kind: HeadKind) -> None:
        super().__init__(width, {"scalar": 1, "general_preference": 2}[kind], bias=False)
        nn.init.normal_(self.weight, std=1 / (width + 1))

    def forward(self, input: Float[Tensor, "B D"]) -> Float[Tensor, "B d"]:
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.float(), self.weight.float())


def preference_logits(
    first: Float[Tensor, "P d"], second: Float[Tensor, "P d"], *, kind: HeadKind, temperature: float
) -> Float[Tensor, " P"]:
    """Return the log-odds that the first image is preferred to the second.

        scalar               (a - b) / temperature                         Bradley-Terry
        general_preference   (a_0 b_1 - a_1 b_0) / temperature             a skew-symmetric form (arXiv:2410.02197)

    Swapping the two changes the sign of either. A general preference may be intransitive: a beats b, b beats c and c
    beats a.
    """
    match kind:
        case "scalar":
            return (first - second)[:, 0] / temperature
        case "general_preference":
            return (first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0]) / temperature
