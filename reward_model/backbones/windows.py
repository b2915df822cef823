"""Attention within the windows of a vision tower, computed for all windows of one size at once.

transformers calls torch's attention for each window of each image: 81 times in each of 28 layers for an image of 1024 x
1024 pixels in Qwen2.5-VL. On a GPU the launches of these kernels take most of the time of a score, and batches gain
nothing, as they have as many windows to an image.
"""

# transformers has no usable types.
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AttentionInterface

_NAME = "windows_at_once_flash"
"""transformers hands all windows over in one call to implementations whose name has "flash" in it."""


def attend_windows_at_once(vision_tower: Any) -> None:
    """Let a tower of transformers whose layers know `cu_seqlens` compute its attention by `attend`."""
    AttentionInterface.register(_NAME, attend)
    vision_tower.config._attn_implementation = _NAME


def attend(
    module: Any,
    query: Float[Tensor, "1 H L D"],
    key: Float[Tensor, "1 H L D"],
    value: Float[Tensor, "1 H L D"],
    attention_mask: None,
    *,
    scaling: float,
    cu_seq_lens_q: Int[Tensor, " boundaries"],
    **_: Any,
) -> tuple[Float[Tensor, "1 L H D"], None]:
    """Return the attention of each position to those of its window; windows begin at `cu_seq_lens_q`."""
    del module, attention_mask
    lengths, starts = cu_seq_lens_q.diff(), cu_seq_lens_q[:-1]
    outputs, positions = list[Tensor](), list[Tensor]()
    for length in lengths.unique().tolist():
        rows = starts[lengths == length][:, None] + torch.arange(length, device=starts.device)
        q, k, v = (states[0][:, rows].transpose(0, 1) for states in (query, key, value))
        outputs.append(F.scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2).flatten(0, 1))
        positions.append(rows.flatten())
    order = torch.cat(positions)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return torch.cat(outputs)[place][None], None
