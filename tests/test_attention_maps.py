"""Maps of SkipCA's attention: the place of each visual token in the image, and the weights that are shown there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from reward_model.attention import AttentionMap, attention_maps, why_no_map
from reward_model.backbones.phi3_v import join_views, merge_patches
from reward_model.backbones.token_boxes import HasTokenBoxes
from reward_model.scoring import LlavaReward
from tests.reward_models import ALL_FAMILIES, backbone_of, fresh_backbone, load, random_image

SIZES = [(56, 56), (64, 120), (120, 64), (90, 56)]
NOWHERE = float("nan")


def ramps(height: int, width: int) -> Tensor:
    """An image whose red is the row and whose green is the column, from 0 to 1."""
    y, x = (torch.arange(n) + 0.5 for n in (height, width))
    red, green = torch.meshgrid(y / height, x / width, indexing="ij")
    return torch.stack([red, green, 0.5 * torch.ones_like(red)])


def mean_of_tokens(family: str, backbone: Any, image: Tensor) -> Tensor:
    """The mean colour of the pixels of each visual token, in the order of the tokens; nan at separators."""
    inputs = backbone.prepare([image], ["a fox"])
    pixels = inputs["pixel_values"]
    processor: Any = getattr(getattr(backbone, "preprocessor", backbone), "processor", None)
    mean, std = (processor.image_mean, processor.image_std) if processor else (backbone.mean, backbone.std)
    separator = torch.full((3,), NOWHERE)
    if family.startswith("qwen"):
        side = processor.patch_size
        patches = pixels.unflatten(1, (3, 2, side, side)).mean(dim=(2, 3, 4))
    else:
        patches = F.avg_pool2d(pixels, 14).flatten(2).transpose(1, 2)
    match family:
        case "qwen2_5_vl" | "qwen3_vl":
            means = patches.unflatten(0, (-1, processor.merge_size**2)).mean(dim=1)
        case "llava_next":
            pack = backbone.model.model.pack_image_features
            means = pack([patches], inputs["image_sizes"], "default", image_newline=separator)[0][0]
        case "phi3_v":
            views = merge_patches(patches).unflatten(-1, (4, 3)).mean(dim=-2)
            first = backbone.model.config.global_first
            means = join_views(views, inputs["crop_grid"][0].tolist(), separator, separator, global_first=first)
        case _:
            means = patches[0]
    return means * torch.tensor(std) + torch.tensor(mean)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", [*ALL_FAMILIES, "phi3_v_view_first"])
def test_the_box_of_a_token_is_where_its_pixels_come_from(family: str, size: tuple[int, int]) -> None:
    """Tokens of an image whose colours are coordinates have the centre of their box as their mean colour."""
    backbone: Any = backbone_of("phi3_v" if family == "phi3_v_view_first" else family)
    if family == "phi3_v_view_first":
        family, backbone = "phi3_v", fresh_backbone("phi3_v")
        backbone.model.config.embd_layer["hd_transform_order"] = "glb_sub"
    boxes, means = backbone.token_boxes(*size), mean_of_tokens(family, backbone, ramps(*size))
    assert len(boxes) == len(means) == backbone.num_visual_tokens(*size)
    assert torch.equal(boxes.isnan().any(dim=1), means.isnan().any(dim=1))
    inside = (boxes[:, :2] >= -1e-6).all(dim=1) & (boxes[:, 2:] <= 1 + 1e-6).all(dim=1)
    assert inside.sum() >= 4
    centres = (boxes[inside, :2] + boxes[inside, 2:]) / 2
    assert_close(means[inside, :2], centres, rtol=0, atol=0.04)


def test_the_class_token_has_no_place() -> None:
    backbone = fresh_backbone("llava_two_layers")
    assert isinstance(backbone, HasTokenBoxes)
    boxes = backbone.token_boxes(28, 28)
    assert boxes.isnan().all(dim=1).tolist() == [True, False, False, False, False]


def test_density_by_hand() -> None:
    """The left half gets 0.6, the lower right quarter 0.2, a separator 0.1, and a token half outside 0.1."""
    boxes = torch.tensor([
        [0, 0, 1, 0.5], [0.5, 0.5, 1, 1], [NOWHERE] * 4, [-1, 0, 1, 1],
    ])  # fmt: skip
    found = AttentionMap(torch.tensor([0.6, 0.2, 0.1, 0.1]), boxes)
    half = 0.05  # the last token spreads 0.1 over an area of 2
    expected = torch.tensor([[1.2, 0.0], [1.2, 0.8]]) + half
    assert_close(found.density(2, 2), expected)
    assert found.outside == pytest.approx(0.15)
    assert found.density(64, 48).mean().item() == pytest.approx(0.85)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_maps_show_the_weights_that_the_score_is_made_from(family: str) -> None:
    """With the mean of SkipCA's heads, one image at a time, and nothing of a second image's padding."""
    reward = load(family, skip_ca_heads=2)
    images = [random_image(*size, seed=i) for i, size in enumerate([(56, 56), (64, 120)])]
    maps = attention_maps(reward, images, ["a red fox", "a"])
    kept: list[Tensor] = []
    skip_ca: Any = reward.model.perspectives[reward.model.active].skip_ca
    own = skip_ca.attention_weights

    def recorded(*given: Tensor) -> Tensor:
        kept.append(own(*given))
        return kept[-1]

    skip_ca.attention_weights = recorded
    for image, prompt in zip(images, ["a red fox", "a"], strict=True):
        reward.score([image], [prompt])
    for found, weights, image in zip(maps, kept, images, strict=True):
        assert_close(found.weights, weights[0].mean(dim=0))
        assert len(found.weights) == len(found.boxes) == reward.model.backbone.num_visual_tokens(*image.shape[1:])
        assert found.weights.sum().item() == pytest.approx(1, abs=1e-5)
        assert found.weights.std() > 1e-3, "a guard: these weights are not uniform"


def test_without_a_place_to_show_the_reason_is_said() -> None:
    image = [random_image(56, 56)]
    cases = {
        "without SkipCA": load("llava", skip_ca=False),
        "padding in place of the image": load("qwen2_5_vl", skip_ca_keys="text_padding"),
    }
    for reason, reward in cases.items():
        assert reason in str(why_no_map(reward))
        with pytest.raises(ValueError, match=reason):
            attention_maps(reward, image, ["a red fox"])
    assert "no SkipCA" in str(why_no_map(object()))
    assert why_no_map(load("llava")) is None

    class Foreign:
        """A backbone without boxes."""

        def __init__(self, inner: Any) -> None:
            self._inner = inner

        def __getattr__(self, name: str) -> Any:
            if name == "token_boxes":
                raise AttributeError(name)
            return getattr(self._inner, name)

    reward: Any = LlavaReward(load("llava").model)
    reward.model.backbone = Foreign(reward.model.backbone)
    assert "not known" in str(why_no_map(reward))


def test_a_model_without_skip_ca_has_no_attention_weights() -> None:
    reward = load("llava", skip_ca=False)
    inputs = reward.model.backbone.prepare([random_image(28, 28)], ["a"])
    with pytest.raises(ValueError, match="no SkipCA"):
        reward.model.attention_weights(reward.model.backbone.forward(inputs), reward.model.active)
