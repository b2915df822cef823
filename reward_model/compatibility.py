"""What SkipCA looked at in the published LLaVA-Reward code, for checkpoints that were trained with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from reward_model.types import BackboneOutput

SkipCaKeys = Literal["visual", "visual_and_padding", "text_padding"]
"""visual: the visual tokens of a row's own image, as the paper has it.

visual_and_padding: these, and zeros behind them as far as the batch's image with the most tokens goes (Phi's code).
text_padding: a row's padding in place of its image, and nothing in the longest row of a batch (Qwen's code).
With the last two a score depends on the batch; with the second not if the image is alone in it.
"""


def looked_at(
    kind: SkipCaKeys, output: BackboneOutput, padding: Callable[[], Float[Tensor, " D"]]
) -> tuple[Float[Tensor, "B K D"], Bool[Tensor, "B K"]]:
    """The tokens that are SkipCA's keys and values, and which of them count; `padding` makes the embedding of padding.

    All padding of a row is one and the same embedding e, so attention to it is W_v e, however much of it there is; one
    key is enough. For a row without padding it is a zero, whose value is zero: what attention to nothing came to.
    """
    match kind:
        case "visual":
            return output.visual, output.visual_mask
        case "visual_and_padding":
            return output.visual, torch.ones_like(output.visual_mask)
        case "text_padding":
            padded = ~output.hidden_mask.all(dim=1)
            return torch.where(padded[:, None], padding(), 0.0)[:, None], torch.ones_like(padded)[:, None]
