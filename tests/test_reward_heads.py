"""The heads of benchmarks/reward_heads.py: all of a head learns; SkipCA differs from mean pooling by its attention."""

from __future__ import annotations

import pytest
import torch

from benchmarks.reward_heads_variants import VARIANTS, MeanPooled, Seen, SkipCa
from reward_model.backbones.load import load_backbone
from reward_model.types import Backbone
from rlhf_t2i.shapes.names import TOY_BACKBONE_FOLDER


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone(str(TOY_BACKBONE_FOLDER))


def seen(backbone: Backbone, prompt: str = "a red circle on a blue background") -> Seen:
    """Four random images with one prompt."""
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    inputs = backbone.prepare(list(images), [prompt] * 4)
    last, middle = torch.rand(2, 4, 16, 96, generator=torch.Generator().manual_seed(1))
    return Seen(backbone.forward(inputs), last, middle, inputs["input_ids"])


@pytest.mark.parametrize("name", VARIANTS)
def test_a_head_gives_antisymmetric_log_odds_and_all_its_parameters_learn(name: str, backbone: Backbone) -> None:
    torch.manual_seed(0)
    variant = VARIANTS[name](backbone)
    given = seen(backbone, "a red circle on a blue background" + variant.prompt_end)

    outputs = variant(given)
    first, second = outputs.chunk(2)
    logits = variant.logits(first, second)
    assert logits.shape == (2,)
    torch.testing.assert_close(variant.logits(second, first), -logits)
    assert torch.isfinite(logits).all()
    parameters = list(variant.parameters())
    if parameters:
        logits.sum().backward()
        assert all(parameter.grad is not None for parameter in parameters)


def test_skip_ca_without_a_query_is_mean_pooling(backbone: Backbone) -> None:
    skip, mean = SkipCa(backbone), MeanPooled(backbone)
    with torch.no_grad():
        skip.skip_ca.query.weight.zero_()
        mean.value.weight.copy_(skip.skip_ca.value.weight)
        mean.head.weight.copy_(skip.head.weight)
        given = seen(backbone)
        torch.testing.assert_close(skip(given), mean(given))
