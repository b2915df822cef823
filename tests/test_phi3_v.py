"""Phi-3.5-vision compared with slow references: images by PIL, tokens one by one, the decoder of transformers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import CLIPVisionConfig, CLIPVisionModel

from reward_model.backbones.load import load_backbone
from reward_model.backbones.phi3_v import hd_grid
from reward_model.backbones.phi3_v_model import Phi3V, Phi3VConfig
from reward_model.images import to_tensor
from reward_model.model import visual_token_table
from reward_model.types import BackboneOutput
from tests.reward_models import (
    MAX_TOKENS,
    backbone_of,
    bytes_of,
    fresh_backbone,
    phi_config,
    phi_decoder,
    phi_tensors,
    save_phi,
)

PROMPTS = ["a red fox", "", "a blue cat on a red fox"]
CROP, SIDE = 56, 2
"""Pixels and visual tokens along a side of one crop of the tiny model."""


# --- images -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "crops", "tokens"),
    [
        ((1344, 1344), 16, 2509), ((256, 256), 16, 2509), ((1024, 1024), 16, 2509), ((512, 512), 16, 2509),
        ((768, 512), 12, 1933), ((512, 768), 12, 1921), ((768, 1024), 12, 1921), ((512, 704), 12, 1921),
        ((768, 1344), 15, 2353),
    ],
)  # fmt: skip
def test_the_number_of_tokens_equals_the_published_processors(size: tuple[int, int], crops: int, tokens: int) -> None:
    """Sizes are (height, width); the rest of the model is not needed to count."""
    with torch.device("meta"):
        model = Phi3V(Phi3VConfig(num_hidden_layers=1, pad_token_id=0))
    backbone = type(backbone_of("phi3_v"))(model, backbone_of("phi3_v").prompt_tokenizer, 16, (0.5,) * 3, (0.5,) * 3)
    rows, columns = hd_grid(*size, num_crops=16, crop=336)[1]
    assert rows * columns == crops
    assert backbone.num_visual_tokens(*size) == tokens == (crops + 1) * 144 + 1 + (rows + 1) * 12
    assert f"{size[0]} x {size[0]}: 2,509" in visual_token_table(backbone, (size[0],))


def by_pil(pixels: Tensor, num_crops: int) -> list[np.ndarray]:
    """The crops of an image in 8 bits, as by the published processor: tall images are transposed first."""
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    tall = image.width < image.height
    if tall:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    ratio = image.width / image.height
    scale = max(s for s in range(1, num_crops + 1) if s * math.ceil(s / ratio) <= num_crops)
    image = image.resize((scale * CROP, int(scale * CROP / ratio)), Image.Resampling.BILINEAR)
    height = math.ceil(image.height / CROP) * CROP
    padded = Image.new("RGB", (image.width, height), "white")
    padded.paste(image, (0, (height - image.height) // 2))
    if tall:
        padded = padded.transpose(Image.Transpose.TRANSPOSE)
    array = np.asarray(padded)
    return [
        array[y : y + CROP, x : x + CROP]
        for y in range(0, array.shape[0], CROP)
        for x in range(0, array.shape[1], CROP)
    ]


@pytest.mark.parametrize("num_crops", [1, 4, 6])
@pytest.mark.parametrize("shape", [(56, 56), (40, 90), (91, 33), (20, 130), (112, 112)])
def test_crops_equal_the_published_processors_up_to_its_rounding(shape: tuple[int, int], num_crops: int) -> None:
    pixels = bytes_of(*shape)
    backbone = fresh_backbone("phi3_v", num_crops=num_crops)
    found = backbone.prepare([to_tensor(pixels)], ["a fox"])["pixel_values"]
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in ([0.48, 0.46, 0.41], [0.27, 0.26, 0.28]))
    crops = [torch.from_numpy(crop.copy()).permute(2, 0, 1) / 255 for crop in by_pil(pixels, num_crops)]
    assert len(found) == 1 + len(crops) <= 1 + num_crops
    assert_close(found[1:] * std + mean, torch.stack(crops), rtol=0, atol=1.5 / 255)


def test_the_view_is_the_padded_image_resized_without_antialiasing() -> None:
    """Bicubic, a = -0.75, at four neighbours on each axis: of 2 x 2 crops each second pixel's middle."""
    found = backbone_of("phi3_v").prepare([to_tensor(bytes_of(112, 112))], ["a fox"])["pixel_values"]
    whole = torch.cat([torch.cat([found[1], found[2]], dim=2), torch.cat([found[3], found[4]], dim=2)], dim=1)
    weights = torch.tensor([-0.09375, 0.59375, 0.59375, -0.09375])
    for y, x in ((0, 5), (5, 3), (17, 40), (55, 55)):
        rows, columns = ([min(max(2 * at + k, 0), 111) for k in (-1, 0, 1, 2)] for at in (y, x))
        expected = torch.einsum("crk,r,k->c", whole[:, rows][:, :, columns], weights, weights)
        assert_close(found[0][:, y, x], expected, rtol=0, atol=1e-5)


def test_an_image_whose_short_side_would_be_resized_to_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="1 x 300 pixels is too narrow"):
        backbone_of("phi3_v").prepare([torch.rand(3, 1, 300)], ["a fox"])
    with pytest.raises(ValueError, match="num_crops is 0; it must be at least 1"):
        fresh_backbone("phi3_v", num_crops=0)


# --- states ---------------------------------------------------------------------------------------


@cache
def reference() -> tuple[dict[str, Tensor], CLIPVisionModel, Any]:
    """Return the published tensors, the full tower and the decoder with its head, all in float64."""
    tensors = {name: tensor.double() for name, tensor in phi_tensors(phi_config()).items()}
    tower, decoder = (
        CLIPVisionModel(CLIPVisionConfig(**phi_config()["vision_config"])).double(),
        phi_decoder(phi_config()),
    )
    inside = "model.vision_embed_tokens.img_processor.vision_model."
    tower.load_state_dict({k.removeprefix(inside): v for k, v in tensors.items() if k.startswith(inside)})
    decoder.double().load_state_dict({k: v for k, v in tensors.items() if "vision_embed_tokens" not in k})
    return tensors, tower.eval(), decoder.eval()


def slow_tokens(views: Tensor, rows: int, columns: int, *, order: str) -> Tensor:
    """Return one image's visual tokens, each computed by hand."""
    tensors, tower, _ = reference()
    with torch.no_grad():
        patches = tower(views.double(), output_hidden_states=True).hidden_states[-2][:, 1:]
    inside = "model.vision_embed_tokens."

    def token(view: int, y: int, x: int) -> Tensor:
        corners = [(2 * y + dy) * 2 * SIDE + 2 * x + dx for dy in (0, 1) for dx in (0, 1)]
        return torch.cat([patches[view, corner] for corner in corners])

    line_end, between = tensors[inside + "sub_GN"].flatten(), tensors[inside + "glb_GN"].flatten()
    crops: list[Tensor] = []
    for y in range(rows * SIDE):
        for x in range(columns * SIDE):
            crops.append(token(1 + y // SIDE * columns + x // SIDE, y % SIDE, x % SIDE))
        crops.append(line_end)
    whole = [t for y in range(SIDE) for t in (*(token(0, y, x) for x in range(SIDE)), line_end)]
    merged = torch.stack([*crops, between, *whole] if order == "sub_glb" else [*whole, between, *crops])
    first, second = ([tensors[f"{inside}img_projection.{i}.{part}"] for part in ("weight", "bias")] for i in (0, 2))
    middle = merged @ first[0].T + first[1]
    middle = 0.5 * middle * (1 + torch.erf(middle / math.sqrt(2)))
    return middle @ second[0].T + second[1]


def slow_states(ids: Tensor, tokens: Tensor) -> Tensor:
    """Return the decoder's last states of one unpadded row."""
    tensors, _, decoder = reference()
    rows, remaining = [], iter(tokens)
    for i in ids.tolist():
        rows.append(next(remaining) if i == 4 else tensors["model.embed_tokens.weight"][i])
    assert next(remaining, None) is None
    with torch.no_grad():
        return decoder(inputs_embeds=torch.stack(rows)[None], output_hidden_states=True).hidden_states[-1][0]


def assert_output(output: BackboneOutput, inputs: dict[str, Tensor], *, order: str = "sub_glb") -> None:
    start = 0
    for i, (rows, columns) in enumerate(inputs["crop_grid"].tolist()):
        views = inputs["pixel_values"][start : start + 1 + rows * columns]
        start += len(views)
        tokens, mask = slow_tokens(views, rows, columns, order=order), inputs["attention_mask"][i].bool()
        assert_close(output.visual[i][output.visual_mask[i]].double(), tokens, rtol=0, atol=1e-4)
        states = slow_states(inputs["input_ids"][i][mask], tokens)
        assert_close(output.hidden[i][output.hidden_mask[i]].double(), states, rtol=0, atol=1e-4)
    assert start == len(inputs["pixel_values"])


def images() -> Sequence[Tensor]:
    return [to_tensor(bytes_of(*shape, seed=i)) for i, shape in enumerate([(60, 60), (120, 50), (33, 90)])]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("template", ["family", "published"])
def test_tokens_and_states_equal_a_slow_reference(template: str, side: str) -> None:
    """The tower's last but one layer without its class token, 2 x 2 patches a token, a separator after each line."""
    backbone = backbone_of("phi3_v", template, side)
    inputs = backbone.prepare(images(), PROMPTS)
    with torch.no_grad():
        assert_output(backbone.forward(inputs), inputs)


def test_the_view_may_also_come_before_the_crops(tmp_path: Path) -> None:
    embedding = {**phi_config()["embd_layer"], "hd_transform_order": "glb_sub"}
    save_phi(tmp_path, embd_layer=embedding)
    backbone = load_backbone(str(tmp_path))
    inputs = backbone.prepare(images(), PROMPTS)
    with torch.no_grad():
        assert_output(backbone.forward(inputs), inputs, order="glb_sub")


def test_no_row_is_long_enough_to_change_the_position_scaling_of_the_batch() -> None:
    """Under longrope one long row switches a whole batch to the long factors; the config has four times more."""
    tokenizer = backbone_of("phi3_v").prompt_tokenizer
    assert phi_config()["max_position_embeddings"] == 4 * MAX_TOKENS
    assert tokenizer.max_length == MAX_TOKENS
    with pytest.raises(ValueError, match=rf"the maximum of this model is {MAX_TOKENS}"):
        tokenizer.ids("a red fox" * MAX_TOKENS, 4)


# --- files ----------------------------------------------------------------------------------------


def test_a_sharded_checkpoint_is_the_same_model(tmp_path: Path) -> None:
    save_phi(tmp_path, num_shards=3)
    whole, parts = backbone_of("phi3_v").model.state_dict(), load_backbone(str(tmp_path)).model.state_dict()
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_missing_and_unexpected_tensors_are_named(tmp_path: Path) -> None:
    save_phi(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for change, message in (
        ({"model.layers.1.mlp.down_proj.weight": None}, r"lacks 1 tensors: language_model\.layers\.1\.mlp\.down_proj"),
        ({"model.vision_embed_tokens.sub_GN": None}, "lacks 1 tensors: sub_GN"),
        ({"model.layers.7.mlp.down_proj.weight": torch.zeros(2)}, r"unexpected tensors: .*layers\.7\.mlp\.down_proj"),
    ):
        changed = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
        save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message) as caught:
            load_backbone(str(tmp_path))
        assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"img_processor": {"model_name": "google/siglip"}, "vision_config": None}, "model_name is 'google/siglip'"),
        ({"img_processor": {"type_feature": "cls_patch"}}, "type_feature is 'cls_patch'; only patch"),
        ({"img_processor": {"layer_idx": -9}}, "layer_idx is -9; the tower has states 0 to 3"),
        ({"embd_layer": {"projection_cls": "linear"}}, "projection_cls is 'linear'; supported: mlp"),
        ({"embd_layer": {"use_hd_transform": False}}, "use_hd_transform is False; supported: True"),
        ({"embd_layer": {"hd_transform_order": "both"}}, "hd_transform_order is 'both'; supported: sub_glb or glb_sub"),
    ],
)
def test_an_unsupported_variant_is_refused(changes: dict[str, Any], message: str) -> None:
    own = {**phi_config(), **changes}
    kept = {name: own[name] for name in ("img_processor", "embd_layer", "vision_config")}
    with pytest.raises(ValueError, match=message):
        _ = Phi3VConfig(**kept).vision


def test_a_tokenizer_without_a_placeholder_for_visual_tokens_is_named(tmp_path: Path) -> None:
    save_phi(tmp_path)
    text = (tmp_path / "tokenizer.json").read_text().replace("<|image|>", "<|photo|>")
    (tmp_path / "tokenizer.json").write_text(text)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text().replace("<|image|>", "<|photo|>"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"has no token '<\|image\|>'"):
        load_backbone(str(tmp_path))


def test_add_bos_token_false_leaves_the_start_token_out(tmp_path: Path) -> None:
    save_phi(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": False}))
    ids = load_backbone(str(tmp_path), template="published").prompt_tokenizer.ids("a red fox", 4)
    assert ids == [i for i in backbone_of("phi3_v", "published").prompt_tokenizer.ids("a red fox", 4) if i != 1]
