"""Backbones compared with stock transformers: token ids, pixels, visual tokens and states."""

from __future__ import annotations

import json
import shutil
import sys
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from reward_model import bounded_steps
from reward_model.backbones.load import load_backbone
from reward_model.images import to_tensor
from reward_model.types import Inputs
from tests.reward_models import (
    ALL_FAMILIES,
    MAX_TOKENS,
    WIDTH,
    backbone_folder,
    backbone_of,
    bytes_of,
    fresh_backbone,
    random_image,
)

IMAGE = {"llava": 4, "llava_next": 4, "phi3_v": 4, "qwen2_5_vl": 5, "qwen3_vl": 5}
STOCK = tuple(family for family in ALL_FAMILIES if family != "phi3_v")
"""The families of transformers; the other has a slow reference in `test_phi3_v.py`."""
PROMPTS = ["a red fox", "", "a blue cat on a red fox"]


def as_pil(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


@cache
def stock_model(family: str) -> Any:
    return AutoModelForImageTextToText.from_pretrained(backbone_folder(family)).eval().requires_grad_(False)


# --- prompts --------------------------------------------------------------------------------------

# Ids are indices into `reward_models.LLAVA_TOKENS`, `QWEN_TOKENS` and `PHI_TOKENS`.
SYSTEM = [1, 8, 26, 11, 12, 24, 13, 14, 28, 2, 26]  # <|im_start|>system\nYou are a helpful assistant.<|im_end|>\n
USER = [1, 9, 26, 3, 5, 5, 5, 5, 4]  # <|im_start|>user\n<|vision_start|><|image_pad|> x 4 <|vision_end|>


@pytest.mark.parametrize(
    ("family", "template", "prompt", "expected"),
    [
        # <s> USER : _ <image> x 4 \n a _red _fox </s>
        ("llava", "family", "a red fox", [1, 5, 19, 8, 4, 4, 4, 4, 18, 7, 9, 11, 2]),
        ("llava", "published", "a red fox", [1, 5, 19, 8, 4, 4, 4, 4, 18, 7, 9, 11, 2]),
        ("llava", "family", "", [1, 5, 19, 8, 4, 4, 4, 4, 2]),
        ("llava", "published", "", [1, 5, 19, 8, 4, 4, 4, 4, 2]),
        # a _red _fox <|im_end|>; the published code removes the system turn
        ("qwen2_5_vl", "family", "a red fox", [*SYSTEM, *USER, 15, 17, 19, 2]),
        ("qwen2_5_vl", "published", "a red fox", [*USER, 15, 17, 19, 2]),
        ("qwen2_5_vl", "family", "", [*SYSTEM, *USER, 2]),
        ("qwen2_5_vl", "published", "", [*USER, 2]),
        ("qwen3_vl", "family", "a red fox", [*USER, 15, 17, 19, 2]),
        ("qwen3_vl", "published", "a red fox", [*USER, 15, 17, 19, 2]),
        # <s> <|user|> \n <|image|> x 4 <s> \n a _red _fox <|end|> <|endoftext|>, in two parts
        ("phi3_v", "family", "a red fox", [1, 5, 25, 4, 4, 4, 4, 1, 25, 14, 16, 18, 7, 2]),
        ("phi3_v", "published", "a red fox", [1, 5, 25, 4, 4, 4, 4, 1, 25, 14, 16, 18, 2]),
        ("phi3_v", "family", "", [1, 5, 25, 4, 4, 4, 4, 1, 25, 7, 2]),
        ("phi3_v", "published", "", [1, 5, 25, 4, 4, 4, 4, 1, 25, 2]),
    ],
)
def test_the_token_ids_of_a_prompt(family: str, template: str, prompt: str, expected: list[int]) -> None:
    assert backbone_of(family, template).prompt_tokenizer.ids(prompt, 4) == expected


@pytest.mark.parametrize("template", ["family", "published"])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_one_run_of_image_tokens_and_the_end_token_last(family: str, template: str) -> None:
    tokenizer = backbone_of(family, template).prompt_tokenizer
    for prompt in PROMPTS:
        for count in (1, 7, 16):
            ids = tokenizer.ids(prompt, count)
            at = ids.index(IMAGE[family])
            assert ids[at : at + count] == [IMAGE[family]] * count
            assert ids.count(IMAGE[family]) == count
            assert ids[-1] == tokenizer.tokenizer.eos_token_id == 2


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_rows_are_padded_on_the_given_side(family: str, side: str) -> None:
    tokenizer = backbone_of(family, "family", side).prompt_tokenizer
    tokens = tokenizer(PROMPTS, [4, 5, 6])
    lengths = [len(tokenizer.ids(prompt, count)) for prompt, count in zip(PROMPTS, [4, 5, 6], strict=True)]
    for i, length in enumerate(lengths):
        row, mask = tokens["input_ids"][i], tokens["attention_mask"][i].bool()
        assert row[mask].tolist() == tokenizer.ids(PROMPTS[i], 4 + i)
        filled = mask[:length] if side == "right" else mask[len(mask) - length :]
        assert filled.all()
        assert mask.sum() == length
        assert not (row[~mask] == IMAGE[family]).any()


@pytest.mark.parametrize(
    ("family", "token"),
    [
        ("llava", "<image>"), ("llava", "</s>"), ("llava", "<s>"), ("llava", "<pad>"),
        ("qwen2_5_vl", "<|image_pad|>"), ("qwen2_5_vl", "<|im_end|>"), ("qwen2_5_vl", "<|vision_start|>"),
        ("phi3_v", "<|image_1|>"), ("phi3_v", "<|image|>"), ("phi3_v", "<|end|>"),
    ],
)  # fmt: skip
def test_a_prompt_that_contains_a_special_token_is_refused(family: str, token: str) -> None:
    """It could end the turn early, or be a second image."""
    with pytest.raises(ValueError, match=r"'a red .*fox' contains '.*', a special token") as caught:
        backbone_of(family).prepare([random_image(56, 56)], [f"a red {token} fox"])
    assert repr(token) in str(caught.value)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_the_longest_prompt_fits_and_one_word_more_is_refused(family: str) -> None:
    """Nothing is truncated: that would remove the end token, or a part of the image."""
    tokenizer = backbone_of(family).prompt_tokenizer
    longest = "a" + " red" * (MAX_TOKENS - len(tokenizer.ids("a", 4)))
    assert len(tokenizer.ids(longest, 4)) == MAX_TOKENS
    with pytest.raises(ValueError, match=rf"'a red .*\.\.\.' .*{MAX_TOKENS + 1} tokens \(4 of .* {MAX_TOKENS}\."):
        tokenizer.ids(longest + " red", 4)
    with pytest.raises(ValueError, match=rf"{MAX_TOKENS + 1} tokens \(5 of"):
        tokenizer.ids(longest, 5)


def test_a_template_without_an_image_is_refused() -> None:
    tokenizer = replace(backbone_of("llava").prompt_tokenizer, chat_template="{{ messages[0]['content'][1]['text'] }}")
    with pytest.raises(ValueError, match="has 0 placeholders for one image; rendered: 'a red fox'"):
        tokenizer.ids("a red fox", 4)


def test_a_chat_template_that_does_not_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """jinja's sandbox bounds one loop by 100,000 rounds, and two of them take an hour."""
    monkeypatch.setattr(bounded_steps, "MAX_STEPS", 200_000)
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    tokenizer = replace(backbone_of("llava").prompt_tokenizer, chat_template=loops)
    before = sys.gettrace()
    with pytest.raises(ValueError, match=r"The chat template of this model does not end within 200,000 steps"):
        tokenizer.text("a fox")
    assert sys.gettrace() is before


@pytest.mark.parametrize(
    "template",
    [
        "{% set n = namespace(x='ab') %}{% for i in range(45) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
        "{% set n = namespace(x=1) %}{% for i in range(45) %}{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
        "{% set n = namespace(x=['a']) %}{% for i in range(45) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set x = 'ab' * 500 %}{% for i in range(99999) %}{{ x }}{% endfor %}",
    ],
)
def test_a_chat_template_that_doubles_a_text_on_each_pass_is_refused(template: str) -> None:
    """After 45 passes it would have 70 terabytes."""
    tokenizer = replace(backbone_of("llava").prompt_tokenizer, chat_template=template)
    tracemalloc.start()
    try:
        with pytest.raises(
            ValueError, match=r"The chat template of this model makes a text or list of more than 1,000,"
        ):
            tokenizer.text("a fox")
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()


def test_a_chat_template_is_also_found_beside_the_tokenizer_and_its_absence_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Older models keep theirs in `chat_template.json`. Loading shows no progress bar."""
    folder = tmp_path / "model"
    shutil.copytree(backbone_folder("llava"), folder)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=rf"{folder}' has no chat template"):
        load_backbone(str(folder))
    capsys.readouterr()
    load_backbone(str(folder), template="published")  # which brings its own
    assert "Loading weights" not in capsys.readouterr().err
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert load_backbone(str(folder)).prompt_tokenizer.ids("a fox", 4) == backbone_of("llava").prompt_tokenizer.ids(
        "a fox", 4
    )


# --- pixels ---------------------------------------------------------------------------------------

EXACT = {
    "llava": [(28, 28), (28, 41), (55, 28)],
    "llava_next": [(28, 28)],  # its crops are twice as large
    "qwen2_5_vl": [(56, 56), (112, 84), (84, 56), (56, 112)],
    "qwen3_vl": [(64, 64), (128, 96)],
}
RESIZED = {
    "llava": [(64, 64), (90, 37), (33, 91), (200, 151), (17, 23), (29, 28)],
    "qwen2_5_vl": [(100, 60), (61, 131), (300, 200), (151, 400), (20, 31), (57, 83), (113, 113)],
    "llava_next": [(64, 64), (90, 37), (33, 91), (200, 151), (17, 23), (20, 90)],
    "qwen3_vl": [(100, 60), (300, 200), (20, 31)],
}


def processed(family: str, pixels: Tensor) -> dict[str, Tensor]:
    """Return the output of the family's own processor."""
    kinds = {"llava": CLIPImageProcessorPil, "llava_next": LlavaNextImageProcessorPil}
    kind = kinds.get(family, Qwen2VLImageProcessorPil)
    found = dict(kind.from_pretrained(backbone_folder(family))(as_pil(pixels), return_tensors="pt"))
    if family == "llava_next":  # a row of views for each image; transformers also takes all of them in one
        found["pixel_values"] = found["pixel_values"].flatten(0, 1)
    return found


@pytest.mark.parametrize(("family", "shape"), [(family, shape) for family in STOCK for shape in EXACT[family]])
def test_pixels_equal_the_processors_without_a_resize(family: str, shape: tuple[int, int]) -> None:
    """Including the order of patches and of the values within one (Qwen), and that of crops (LLaVA-NeXT)."""
    pixels = bytes_of(*shape)
    ours, theirs = backbone_of(family).prepare([to_tensor(pixels)], ["a fox"]), processed(family, pixels)
    assert_close(ours["pixel_values"], theirs["pixel_values"], rtol=0, atol=1e-6)
    for key in ("image_grid_thw", "image_sizes"):
        assert key not in theirs or torch.equal(ours[key], theirs[key])


@pytest.mark.parametrize(("family", "shape"), [(family, shape) for family in STOCK for shape in RESIZED[family]])
def test_resized_pixels_equal_the_processors_up_to_its_rounding(family: str, shape: tuple[int, int]) -> None:
    pixels = (128 + 0.5 * (bytes_of(*shape).float() - 128)).byte()
    ours, theirs = backbone_of(family).prepare([to_tensor(pixels)], ["a fox"]), processed(family, pixels)
    gap = (ours["pixel_values"] - theirs["pixel_values"]).abs()
    assert gap.max() <= 0.03
    assert gap.mean() <= 0.006
    for key in ("image_grid_thw", "image_sizes"):
        assert key not in theirs or torch.equal(ours[key], theirs[key])


@pytest.mark.parametrize(
    ("shape", "low", "high"), [((200, 300), 3136, 6272), ((30, 30), 7000, 9408), ((80, 120), 1, 900)]
)
def test_bounds_on_pixels_have_the_effect_of_the_processors(shape: tuple[int, int], low: int, high: int) -> None:
    pixels = bytes_of(*shape)
    ours = fresh_backbone("qwen2_5_vl", min_pixels=low, max_pixels=high).prepare([to_tensor(pixels)], ["a fox"])
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": low, "longest_edge": high})
    theirs = processor(as_pil(pixels), return_tensors="pt")
    assert torch.equal(ours["image_grid_thw"], theirs["image_grid_thw"])
    assert_close(ours["pixel_values"], theirs["pixel_values"], rtol=0, atol=0.03)


def test_num_crops_restricts_llava_next_to_grids_with_at_most_as_many() -> None:
    """As in a stock model whose config lists only these."""
    backbone, stock = fresh_backbone("llava_next", num_crops=2), stock_model("llava_next")
    assert backbone_of("llava_next").num_visual_tokens(60, 57) == 4 + 4 * 5  # 56 x 56, all of it used
    before = stock.config.image_grid_pinpoints
    try:
        stock.config.image_grid_pinpoints = [[28, 56], [56, 28]]
        for shape in ((60, 57), (30, 90), (91, 20)):
            inputs = backbone.prepare([random_image(*shape)], ["a fox"])
            assert len(inputs["pixel_values"]) == 3
            with torch.no_grad():
                states = stock.model(**inputs).last_hidden_state
                assert_close(backbone.forward(inputs).hidden, states, rtol=0, atol=1e-5)
    finally:
        stock.config.image_grid_pinpoints = before


def test_a_processor_whose_crops_do_not_fit_the_tower_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(backbone_folder("llava_next"), folder)
    path = folder / "preprocessor_config.json"
    path.write_text(path.read_text().replace('"height": 28', '"height": 56'))
    with pytest.raises(ValueError, match=r"makes crops of 56 pixels .* the vision tower takes 28"):
        load_backbone(str(folder))


def test_a_processor_that_resizes_to_a_fixed_size_is_reproduced() -> None:
    processor = CLIPImageProcessorPil(size={"height": 28, "width": 28}, do_center_crop=False, image_std=[0.5] * 3)
    pixels = bytes_of(60, 45)
    ours = replace(backbone_of("llava"), processor=processor).prepare([to_tensor(pixels)], ["a fox"])
    assert_close(
        ours["pixel_values"], processor(as_pil(pixels), return_tensors="pt")["pixel_values"], rtol=0, atol=0.03
    )


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_the_number_of_visual_tokens_is_known_from_the_size(family: str) -> None:
    backbone = backbone_of(family)
    for shape in ((28, 28), (60, 60), (57, 90), (131, 61), (200, 300)):
        inputs = backbone.prepare([random_image(*shape)], ["a fox"])
        assert backbone.num_visual_tokens(*shape) == (inputs["input_ids"] == IMAGE[family]).sum()


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_batch_is_prepared_like_its_images_one_by_one(family: str) -> None:
    backbone = backbone_of(family)
    for shapes in ([(60, 60)] * 3, [(60, 60), (90, 57), (112, 112)]):
        images = [random_image(*shape, seed=i) for i, shape in enumerate(shapes)]
        together = backbone.prepare(images, PROMPTS)
        alone = [backbone.prepare([one], [prompt]) for one, prompt in zip(images, PROMPTS, strict=True)]
        expected = torch.cat([inputs["pixel_values"] for inputs in alone])
        assert_close(together["pixel_values"], expected, rtol=0, atol=1e-6)


# --- states ---------------------------------------------------------------------------------------


SHAPES = {
    "llava": [(28, 28)] * 3,
    "llava_next": [(56, 56), (56, 28), (28, 84)],
    "phi3_v": [(112, 112), (112, 56), (112, 112)],
    "qwen2_5_vl": [(56, 56), (56, 224), (84, 84)],
    "qwen3_vl": [(64, 64), (64, 256), (96, 96)],
}


def images_of(family: str) -> list[Tensor]:
    """Images that need no resizing; for Qwen2.5-VL of 2 x 2, 2 x 8 and 3 x 3 tokens, in windows of 2 x 2.

    The order of the last two within the tower is not its own inverse, as that of a square of 4 x 4 would be.
    """
    return [bytes_of(*shape, seed=i) for i, shape in enumerate(SHAPES[family])]


def stock_inputs(family: str, ids: Tensor, mask: Tensor, pixels: Sequence[Tensor]) -> Inputs:
    """Return the inputs of the stock model."""
    parts = [processed(family, one) for one in pixels]
    inputs = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (ids == IMAGE[family]).int()
    return {"input_ids": ids, "attention_mask": mask, **inputs}


@pytest.mark.parametrize("template", ["family", "published"])
@pytest.mark.parametrize("family", STOCK)
def test_states_and_visual_tokens_equal_the_stock_models(family: str, template: str) -> None:
    backbone, stock, pixels = backbone_of(family, template), stock_model(family), images_of(family)
    inputs = backbone.prepare([to_tensor(one) for one in pixels], PROMPTS)
    with torch.no_grad():
        output = backbone.forward(inputs)
        theirs = stock_inputs(family, inputs["input_ids"], inputs["attention_mask"], pixels)
        if family == "llava_next":  # whose view of the whole is always resized, which rounds
            theirs["pixel_values"] = inputs["pixel_values"]
        states = stock.model(**theirs).last_hidden_state
        image_inputs = {k: theirs[k] for k in ("pixel_values", "image_grid_thw", "image_sizes") if k in theirs}
        features = stock.get_image_features(**image_inputs)
    mask = inputs["attention_mask"].bool()
    assert torch.equal(output.hidden_mask, mask)
    assert_close(output.hidden[mask], states[mask], rtol=0, atol=1e-5)
    assert output.visual_mask.sum(dim=1).tolist() == [len(row) for row in features.pooler_output]
    for i, row in enumerate(features.pooler_output):
        assert output.visual.shape[2] == row.shape[1] == WIDTH
        assert_close(output.visual[i][output.visual_mask[i]], row, rtol=0, atol=1e-5)
        assert torch.all(output.visual[i][~output.visual_mask[i]] == 0)


def test_several_vision_layers_and_the_class_token_are_used_if_the_config_says_so() -> None:
    backbone, stock = backbone_of("llava_two_layers"), stock_model("llava_two_layers")
    inputs = backbone.prepare([random_image(28, 28)], ["a red fox"])
    assert (inputs["input_ids"] == IMAGE["llava"]).sum() == 5
    with torch.no_grad():
        output, states = backbone.forward(inputs), stock.model(**inputs).last_hidden_state
        features = stock.get_image_features(inputs["pixel_values"]).pooler_output
    assert_close(output.hidden, states, rtol=0, atol=1e-5)
    assert_close(output.visual[0], features[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_visual_tokens_replace_the_images_placeholders_and_nothing_else(family: str, side: str) -> None:
    """The language model's input: exactly the visual tokens of the output, and embeddings elsewhere."""
    backbone, given = backbone_of(family, "family", side), []
    inputs = backbone.prepare([to_tensor(one) for one in images_of(family)], PROMPTS)
    hook = backbone.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    try:
        with torch.no_grad():
            output = backbone.forward(inputs)
    finally:
        hook.remove()
    at_image = inputs["input_ids"] == IMAGE[family]
    assert torch.equal(given[0][at_image], output.visual[output.visual_mask])
    tokens = backbone.model.get_input_embeddings().weight[inputs["input_ids"]]
    assert torch.equal(given[0][~at_image], tokens[~at_image])
    # No text embedding is among the visual tokens (as padding was in the published code).
    assert torch.cdist(output.visual[output.visual_mask], backbone.model.get_input_embeddings().weight).min() > 0.1


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_visual_tokens_do_not_depend_on_the_prompt_but_the_last_states_do(family: str) -> None:
    backbone, one = backbone_of(family), random_image(56, 56)
    with torch.no_grad():
        fox, cat = (backbone.forward(backbone.prepare([one], [prompt])) for prompt in ("a red fox", "a blue cat"))
    assert torch.equal(fox.visual, cat.visual)
    assert (fox.hidden[:, -1] - cat.hidden[:, -1]).abs().max() > 0.01


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_changing_one_visual_token_changes_it_and_the_states_from_there_on(family: str) -> None:
    backbone = backbone_of(family)
    inputs = backbone.prepare([to_tensor(one) for one in images_of(family)], PROMPTS)
    with torch.no_grad():
        encoded = backbone.encode_image(inputs)
        assert "pixel_values" not in encoded
        before = backbone.forward(encoded)
        features = encoded["features"].clone()
        features[(0, 1) if family in ("llava", "llava_next") else 1] += 1.0  # rows of tokens, or groups of all rows
        after = backbone.forward({**encoded, "features": features})
    changed = (before.visual != after.visual).any(dim=2)
    assert changed.nonzero().tolist() == [[0, 1]]
    start = inputs["input_ids"][0].tolist().index(IMAGE[family]) + 1
    moved = (before.hidden != after.hidden).any(dim=2)
    assert not moved[0, :start].any()  # causal
    assert moved[0, start:][inputs["attention_mask"][0, start:].bool()].all()
    assert not moved[1:].any()


def test_deepstack_features_reach_the_states_but_not_the_visual_tokens() -> None:
    """A DeepStack token is added at one position of one row and changes the states behind it."""
    backbone = backbone_of("qwen3_vl")
    with torch.no_grad():
        encoded = backbone.encode_image(backbone.prepare([to_tensor(one) for one in images_of("qwen3_vl")], PROMPTS))
        deepstack = encoded["deepstack"].clone()
        deepstack[1, 0] += 1.0
        before, after = backbone.forward(encoded), backbone.forward({**encoded, "deepstack": deepstack})
    assert torch.equal(before.visual, after.visual)
    start = encoded["input_ids"][0].tolist().index(IMAGE["qwen3_vl"]) + 1
    moved = (before.hidden != after.hidden).any(dim=2)
    assert not moved[0, :start].any()
    assert moved[0, start:][encoded["attention_mask"][0, start:].bool()].all()
    assert not moved[1:].any()


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_forward_on_encoded_images_equals_forward_on_pixels(family: str) -> None:
    backbone = backbone_of(family)
    inputs = backbone.prepare([to_tensor(one) for one in images_of(family)], PROMPTS)
    with torch.no_grad():
        at_once, in_two = backbone.forward(inputs), backbone.forward(backbone.encode_image(inputs))
    assert torch.equal(at_once.hidden, in_two.hidden)
    assert torch.equal(at_once.visual, in_two.visual)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_projector_that_is_set_is_used(family: str) -> None:
    backbone = fresh_backbone(family)
    inputs = backbone.prepare([random_image(56, 56)], ["a fox"])

    class Twice(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner
            for name in ("linear_1", "ln_q"):
                if hasattr(inner, name):
                    setattr(self, name, getattr(inner, name))

        def forward(self, features: Tensor) -> Tensor:
            return 2 * self.inner(features)

    with torch.no_grad():
        before = backbone.forward(inputs)
        backbone.projector = Twice(backbone.projector)
        after = backbone.forward(inputs)
    expected = 2 * before.visual
    if family == "llava_next":  # tokens at the ends of lines are inserted behind the projector
        newline = backbone.model.model.image_newline
        expected = torch.where((before.visual == newline).all(dim=-1, keepdim=True), newline, expected)
    assert torch.equal(after.visual, expected)
    assert not torch.equal(after.hidden, before.hidden)


# --- loading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_loaded_backbone_is_frozen_and_in_evaluation_mode(family: str) -> None:
    backbone = fresh_backbone(family, dtype=torch.bfloat16)
    assert backbone.width == WIDTH
    assert not backbone.model.training
    assert {p.dtype for p in backbone.model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in backbone.model.parameters())


def test_a_backbone_that_does_not_exist_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=rf"^The backbone '{tmp_path}/empty' has no config\.json"):
        load_backbone(str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match=rf"^The backbone '{tmp_path}/nowhere' could not be loaded, neither as"):
        load_backbone(str(tmp_path / "nowhere"))


def test_an_unsupported_family_is_named(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    with pytest.raises(
        ValueError,
        match=r"'.*llama' is a model of type 'llama', which is not supported; there are llava .* A new family is",
    ):
        load_backbone(str(tmp_path / "llama"))


def test_settings_that_a_family_lacks_or_that_contradict_each_other_are_refused() -> None:
    for family, options, message in (
        ("llava", {"min_pixels": 1}, "min_pixels does not apply to LLaVA-1.5, only to Qwen2.5-VL and Qwen3-VL"),
        ("phi3_v", {"max_pixels": 1}, "max_pixels does not apply to Phi-3.5-vision"),
        ("qwen2_5_vl", {"num_crops": 4}, "num_crops does not apply to Qwen2.5-VL"),
        ("llava_next", {"num_crops": 1}, "num_crops is 1; this model's grids have 2, 2, 3, 3, 4 crops"),
    ):
        with pytest.raises(ValueError, match=message):
            fresh_backbone(family, **options)
    for low, high in ((9000, 8000), (0, 8000), (13000, None)):
        with pytest.raises(ValueError, match=rf"min_pixels \({low}\) must be positive and at most max_pixels"):
            fresh_backbone("qwen2_5_vl", min_pixels=low, max_pixels=high)
