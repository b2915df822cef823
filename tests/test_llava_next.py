"""LLaVA-NeXT and VQAScore against their papers, written out in float64: tiles, padding, line ends, and one probability.

The rules are those of the LLaVA-NeXT release (January 2024): the grid in which an image is largest, then the one with
the least padding; the resized view first, then the tiles' patches line by line without padding, a learned token behind
each line.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText

from reward_model.backbones.llava_next import LlavaNext
from reward_model.images import to_tensor
from reward_model.scorers.vqa_score import QUESTION, load_vqa_score
from tests.reward_models import backbone_folder, backbone_of, bytes_of

RELEASED_GRIDS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
"""Height and width of the grids of LLaVA-1.6, whose tower takes 336 pixels: 24 x 24 patches."""
SIZES = [
    # height, width, lines and columns of patches without padding
    ((336, 672), (24, 48)),
    ((672, 672), (48, 48)),
    ((1024, 1024), (48, 48)),
    ((480, 640), (36, 48)),  # 504 of 672 lines of pixels
    ((640, 480), (48, 36)),
    ((720, 1280), (28, 48)),  # 27 of 48 lines; an even number is removed
    ((336, 1008), (24, 72)),
    ((1200, 300), (72, 18)),  # 252 of 336 columns of pixels
    ((336, 336), (24, 24)),  # no grid enlarges it
]


@pytest.mark.parametrize(("size", "patches"), SIZES)
def test_an_image_becomes_as_many_tokens_as_in_the_release(size: tuple[int, int], patches: tuple[int, int]) -> None:
    vision = SimpleNamespace(image_size=336, patch_size=14)
    model = SimpleNamespace(config=SimpleNamespace(image_grid_pinpoints=RELEASED_GRIDS, vision_config=vision))
    backbone, (rows, columns) = backbone_of("llava_next"), patches
    assert isinstance(backbone, LlavaNext)
    assert replace(backbone, model=model).num_visual_tokens(*size) == 24 * 24 + rows * (columns + 1)


@cache
def model() -> Any:
    """The tiny model in float64: tiles of 28 pixels, which are 2 x 2 patches."""
    return AutoModelForImageTextToText.from_pretrained(backbone_folder("llava_next")).double().eval()


SHAPES = {(40, 58): (2, 2, 1, 0), (58, 40): (2, 2, 0, 1), (28, 84): (1, 3, 0, 0), (56, 56): (2, 2, 0, 0)}
"""Rows and columns of tiles of an image by its size, and the lines and columns of padding at each of two sides."""


def slow_tokens(views: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the visual tokens of an image, one patch at a time."""
    parts = model().model
    patches = parts.vision_tower(views.double(), output_hidden_states=True).hidden_states[-2][:, 1:]
    first, second = parts.multi_modal_projector.linear_1, parts.multi_modal_projector.linear_2

    def token(view: int, y: int, x: int) -> Tensor:
        middle = first.weight @ patches[view, 2 * y + x] + first.bias
        return second.weight @ (0.5 * middle * (1 + torch.erf(middle / 2**0.5))) + second.bias

    rows, columns, lines, sides = SHAPES[size]
    tokens = [token(0, y, x) for y in range(2) for x in range(2)]
    for y in range(lines, 2 * rows - lines):
        for x in range(sides, 2 * columns - sides):
            tokens.append(token(1 + y // 2 * columns + x // 2, y % 2, x % 2))
        tokens.append(parts.image_newline)
    return torch.stack(tokens)


def slow_states(ids: Tensor, tokens: Tensor) -> Tensor:
    """Return the language model's last states of one row without padding."""
    language, remaining = model().model.language_model, iter(tokens)
    rows = [next(remaining) if i == 4 else language.embed_tokens.weight[i] for i in ids.tolist()]
    assert next(remaining, None) is None
    return language(inputs_embeds=torch.stack(rows)[None]).last_hidden_state[0]


@torch.no_grad()
def test_tokens_and_states_equal_a_reference_in_float64() -> None:
    backbone = backbone_of("llava_next")
    images = [to_tensor(bytes_of(*size, seed=i)) for i, size in enumerate(SHAPES)]
    inputs = backbone.prepare(images, ["a red fox", "", "a blue cat on a red fox", "a fox"])
    output, start = backbone.forward(inputs), 0
    for i, (size, (rows, columns, _, _)) in enumerate(SHAPES.items()):
        views = inputs["pixel_values"][start : start + 1 + rows * columns]
        start += len(views)
        tokens, mask = slow_tokens(views, size), inputs["attention_mask"][i].bool()
        assert_close(output.visual[i][output.visual_mask[i]].double(), tokens, rtol=0, atol=1e-5)
        assert_close(
            output.hidden[i][mask].double(), slow_states(inputs["input_ids"][i][mask], tokens), atol=1e-5, rtol=0
        )
    assert start == len(inputs["pixel_values"])


@torch.no_grad()
def test_vqa_score_is_the_softmax_of_one_token_in_float64() -> None:
    """P(answer | image, question) = exp(l_answer) / sum_v exp(l_v) at the first answer token (arXiv:2404.01291)."""
    scorer = load_vqa_score(str(backbone_folder("llava_next")), answer="red")
    images = torch.stack([to_tensor(bytes_of(40, 58, seed=seed)) for seed in range(2)])
    prompts = ["a red fox", "cat"]
    scores = scorer(images, prompts)
    for image, prompt, score in zip(images, prompts, scores, strict=True):
        inputs = scorer.backbone.prepare([image], [QUESTION.format(prompt)])
        state = slow_states(inputs["input_ids"][0], slow_tokens(inputs["pixel_values"], (40, 58)))[-1]
        logits = [(row @ state).exp() for row in model().lm_head.weight]
        assert score.item() == pytest.approx((logits[scorer.answer_id] / sum(logits)).item(), rel=1e-4)
    assert (scores[0] - scores[1]).abs() > 1e-4
