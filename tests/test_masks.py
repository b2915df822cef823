"""Attention masks, which forbid the fastest kernels: the denoisers get none that would mask nothing."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

from tests.policies import policy_of
from tests.toys import seeded

FAMILIES = (
    "tiny_sd", "tiny_sdxl", "tiny_sd3", "tiny_flux", "tiny_zimage",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("tiny_flux2", "tiny_sana", "tiny_qwen_image")),
)  # fmt: skip


@pytest.mark.parametrize("model", FAMILIES)
def test_no_denoiser_attends_under_a_mask_that_masks_nothing(model: str, request: pytest.FixtureRequest) -> None:
    """Prompts of one length, so that no padding within a batch needs a mask."""
    policy = policy_of(request.getfixturevalue(model))
    prompts, level = policy.encode(["a fox", "a cat"]), policy.schedule(2).at(torch.zeros(2, dtype=torch.int64))
    latents = policy.initial_noise(seeded(0), copies=2)
    original = F.scaled_dot_product_attention
    with patch.object(F, "scaled_dot_product_attention", wraps=original) as attention, torch.no_grad():
        policy.predict(latents, level, prompts, guidance_scale=1.0)
    masks = [
        call.kwargs.get("attn_mask", call.args[3] if len(call.args) > 3 else None) for call in attention.mock_calls
    ]
    assert masks
    nothing = [m for m in masks if m is not None and (m.all() if m.dtype == torch.bool else (m == 0).all())]
    assert not nothing, f"{len(nothing)} of {len(masks)}"
