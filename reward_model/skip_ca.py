"""SkipCA: the last word looks at the image once more before it is scored (LLaVA-Reward, arXiv:2507.21391)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn


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
            hidden, visual = hidden.float(), visual.float()
            key, value = (
                layer.weight.float().unflatten(0, (self.num_heads, -1)) for layer in (self.key, self.value)
            )  # (heads, D / heads, D)
            query = F.linear(hidden, self.query.weight.float()).unflatten(1, (self.num_heads, -1))
            sought = torch.einsum("bhd,hdw->bhw", query, key)
            logits = torch.einsum("bhw,bvw->bhv", sought, visual) / math.sqrt(query.shape[-1])
            weights = logits.masked_fill(~visual_mask[:, None], -torch.inf).softmax(dim=-1)
            found = torch.einsum("bhv,bvw->bhw", weights, visual)
            looked_up = torch.einsum("bhw,hdw->bhd", found, value).flatten(1)
            return F.rms_norm(hidden + looked_up, hidden.shape[-1:], self.norm.weight.float(), self.norm.eps)
