"""SkipCA: cross-attention from the last token to the image's visual tokens (LLaVA-Reward, arXiv:2507.21391)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from reward_model.types import BackboneOutput

SkipCaKeys = Literal["visual", "visual_and_padding", "text_padding"]
"""The keys and values of SkipCA.

visual              the visual tokens of a row's own image, as in the paper
visual_and_padding  these and zeros up to the largest number of visual tokens in the batch (published code for Phi)
text_padding        the padding of a row in place of its image; none in the longest row (published code for Qwen)

The last two exist for published checkpoints: with them a score depends on its batch. With the second it does not if
each image is scored alone.
"""


class SkipCrossAttention(nn.Module):
    """Attention from the pooled token to the visual tokens as they left the projector, skipping the language model.

        q = W_q h                                        one query: the last real token after the last layer
        a = softmax(q . (W_k z) / sqrt(D / heads))       over the visual tokens z of its own image
        out = norm(h + sum_v a_v W_v z_v)                RMSNorm with a learned gain

    One head as published. Keys and values are never formed: q . (W_k z) = (W_k^T q) . z and sum_v a_v W_v z_v =
    W_v sum_v a_v z_v, which costs D^2 + V D multiplications in place of V D^2. All of it is float32. Padding among the
    visual tokens is masked; otherwise a score would depend on the other images of its batch.
    """

    def __init__(self, width: int, *, num_heads: int = 1, eps: float = 1e-5) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"skip_ca_heads ({num_heads}) must divide the width of the language model ({width}).")
        self.num_heads = num_heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.norm = nn.RMSNorm(width, eps=eps)
        for layer in (self.query, self.key, self.value):
            nn.init.normal_(layer.weight, std=1 / (width + 1))  # as published: at first this is almost norm(h)

    def forward(
        self, hidden: Float[Tensor, "B D"], visual: Float[Tensor, "B V D"], visual_mask: Bool[Tensor, "B V"]
    ) -> Float[Tensor, "B D"]:
        with torch.autocast(hidden.device.type, enabled=False):
            hidden, visual = hidden.float(), visual.float()  # once, so that a gradient is rounded to bfloat16 once
            weights = self.attention_weights(hidden, visual, visual_mask)
            pooled = torch.einsum("bhv,bvw->bhw", weights, visual)
            attended = torch.einsum("bhw,hdw->bhd", pooled, self._of_heads(self.value)).flatten(1)
            return F.rms_norm(hidden + attended, hidden.shape[-1:], self.norm.weight.float(), self.norm.eps)

    def attention_weights(
        self, hidden: Float[Tensor, "B D"], visual: Float[Tensor, "B V D"], visual_mask: Bool[Tensor, "B V"]
    ) -> Float[Tensor, "B H V"]:
        """Return how much each head attends to each visual token: float32, sums to 1 over V, and 0 at padding."""
        with torch.autocast(hidden.device.type, enabled=False):
            hidden, visual = hidden.float(), visual.float()
            query = F.linear(hidden, self.query.weight.float()).unflatten(1, (self.num_heads, -1))
            projected_query = torch.einsum("bhd,hdw->bhw", query, self._of_heads(self.key))
            logits = torch.einsum("bhw,bvw->bhv", projected_query, visual) / math.sqrt(query.shape[-1])
            return logits.masked_fill(~visual_mask[:, None], -torch.inf).softmax(dim=-1)

    def _of_heads(self, layer: nn.Linear) -> Float[Tensor, "H d D"]:
        """Return the weight of a layer by head, in float32."""
        return layer.weight.float().unflatten(0, (self.num_heads, -1))


def skip_ca_inputs(
    keys: SkipCaKeys, output: BackboneOutput, padding: Callable[[], Float[Tensor, " D"]]
) -> tuple[Float[Tensor, "B K D"], Bool[Tensor, "B K"]]:
    """Return SkipCA's keys and values and their mask; `padding` returns the embedding of the padding token.

    All padding of a row has one embedding e, so attention to it is W_v e, however much of it there is: one key
    suffices. For a row without padding that key is zero, whose value is zero, as attention to nothing came to.
    """
    match keys:
        case "visual":
            return output.visual, output.visual_mask
        case "visual_and_padding":
            return output.visual, torch.ones_like(output.visual_mask)
        case "text_padding":
            padded = ~output.hidden_mask.all(dim=1)
            return torch.where(padded[:, None], padding(), 0.0)[:, None], torch.ones_like(padded)[:, None]
