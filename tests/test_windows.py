"""Attention within windows of a vision tower, all windows of one size at once."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from reward_model.backbones.windows import attend
from tests.reward_models import fresh_backbone, random_image

PIXELS = (random_image(70, 130, seed=1), random_image(56, 56, seed=2), random_image(84, 90, seed=3))
PROMPTS = ["a red fox", "a", "a blue cat"]


def counted() -> Any:
    """Context with a mock that counts calls of torch's attention."""
    return patch.object(F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention)


def features_of(backbone: Any, *, requires_grad: bool = False) -> tuple[Tensor, Tensor, int]:
    """Return what the tower gives for images of three sizes, their patches, and the number of attention calls."""
    inputs = backbone.prepare(PIXELS, PROMPTS)
    inputs["pixel_values"].requires_grad_(requires_grad)
    with patch(
        "torch.nn.functional.scaled_dot_product_attention", wraps=torch.nn.functional.scaled_dot_product_attention
    ) as calls:
        features = backbone.encode_image(inputs)["features"]
    return features, inputs["pixel_values"], calls.call_count


def test_windows_at_once_give_the_features_and_gradients_of_windows_one_by_one_in_fewer_calls() -> None:
    backbone: Any = fresh_backbone("qwen2_5_vl")
    features, pixels, num_calls = features_of(backbone, requires_grad=True)
    (gradient,) = torch.autograd.grad(features.square().sum(), pixels)
    backbone.model.model.visual.config._attn_implementation = "sdpa"
    expected, pixels, num_expected = features_of(backbone, requires_grad=True)
    assert_close(features, expected, rtol=1e-5, atol=1e-6)
    assert_close(gradient, torch.autograd.grad(expected.square().sum(), pixels)[0], rtol=1e-4, atol=1e-6)
    assert num_calls < num_expected


def test_a_position_attends_to_its_window_only() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 7, 4, generator=generator) for _ in range(3))
    starts = torch.tensor([0, 2, 5, 7], dtype=torch.int32)
    found, _ = attend(None, query, key, value, None, scaling=0.5, cu_seq_lens_q=starts)
    for first, end in ((0, 2), (2, 5), (5, 7)):
        weights = (0.5 * query[0, :, first:end] @ key[0, :, first:end].mT).softmax(-1)
        assert_close(found[0, first:end], (weights @ value[0, :, first:end]).transpose(0, 1))


def test_windows_of_a_batch_of_equal_images_take_as_many_calls_as_those_of_one() -> None:
    backbone: Any = fresh_backbone("qwen2_5_vl")
    counts = list[int]()
    for count in (1, 4):
        inputs = backbone.prepare([random_image(56, 56, seed=i) for i in range(count)], ["a"] * count)
        with patch(
            "torch.nn.functional.scaled_dot_product_attention", wraps=torch.nn.functional.scaled_dot_product_attention
        ) as calls:
            backbone.encode_image(inputs)
        counts.append(calls.call_count)
    assert counts[0] == counts[1]
