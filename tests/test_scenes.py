"""The toy world: each prompt has one scene, and the drawing of a scene shows it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
import torch
from scipy import ndimage

from rlhf_t2i.shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    PALETTE,
    SHAPES,
    Scene,
    Thing,
    all_prompts,
    all_scenes,
    parse_prompt,
    render,
)

TIERS = pytest.mark.parametrize("tier", ["one", "count", "relation"])
FILL = {"circle": math.pi / 4, "square": 1.0, "triangle": 0.5}
"""Fraction of its bounding box that each shape covers."""


def draw(scenes: Sequence[Scene], *, seed: int = 0, size: int = 32) -> np.ndarray:
    return render(scenes, rng=np.random.default_rng(seed), size=size).numpy()


def near(image: np.ndarray, colour: str) -> np.ndarray:
    """Return True for pixels of the named colour in some shade: all channels shifted by at most 0.04."""
    target = np.array(PALETTE[colour])[:, None, None]
    low, high = (target - 0.0401).clip(0, 1), (target + 0.0401).clip(0, 1)
    return ((image >= low) & (image <= high)).all(0)


# --- prompts --------------------------------------------------------------------------------------


@TIERS
def test_the_prompt_of_every_scene_parses_to_the_scene(tier: str) -> None:
    scenes = all_scenes(tier)
    assert [parse_prompt(scene.prompt) for scene in scenes] == scenes
    assert {scene.tier for scene in scenes} == {tier}


@pytest.mark.parametrize(("tier", "count"), [("one", 72), ("count", 144), ("relation", 2160)])
def test_every_scene_is_listed_once_and_visible(tier: str, count: int) -> None:
    scenes = all_scenes(tier)
    assert len(scenes) == len({scene.prompt for scene in scenes}) == count
    assert all(scene.background not in {thing.colour for thing in scene.things} for scene in scenes)


def test_the_three_kinds_of_prompts_by_hand() -> None:
    red, green = Thing("red", "circle"), Thing("green", "square")
    assert parse_prompt("a red circle on a blue background") == Scene((red,), "blue")
    assert parse_prompt("three green squares on a white background") == Scene((green,) * 3, "white")
    prompt = "a red circle left of a green square on a gray background"
    assert parse_prompt(prompt) == Scene((red, green), "gray", "left of")
    assert parse_prompt(f"  {prompt.upper()} ") == Scene((red, green), "gray", "left of")


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a fox",
        "a red circle",
        "a pink circle on a blue background",
        "a white circle on a blue background",
        "a red star on a blue background",
        "a red circle on a pink background",
        "a red circle on a blue background, highly detailed",
        "four red circles on a blue background",
        "two red circle on a blue background",
        "a red circle near a green square on a blue background",
        "two red circles above a green square on a blue background",
    ],
)
def test_a_prompt_outside_the_grammar_is_refused_with_examples_and_all_words(prompt: str) -> None:
    with pytest.raises(ValueError, match="not in the grammar of the toy world") as caught:
        parse_prompt(prompt)
    message = str(caught.value)
    assert repr(prompt) in message
    assert "'two red circles on a blue background'" in message
    assert all(word in message for word in [*COLOURS, *SHAPES, *BACKGROUNDS, "left of", "below"])


# --- splits ---------------------------------------------------------------------------------------


@TIERS
def test_a_fifth_to_three_tenths_of_a_tier_are_held_out(tier: str) -> None:
    training, held_out = all_scenes(tier, "training"), all_scenes(tier, "held-out")
    assert 0.2 <= len(held_out) / len(all_scenes(tier)) <= 0.3
    assert not set(training) & set(held_out)
    assert set(training) | set(held_out) == set(all_scenes(tier))


def test_every_pair_of_words_of_one_thing_occurs_in_training() -> None:
    """A held-out prompt is a new combination of known pairs of words."""
    scenes = all_scenes("one", "training")
    words = [(scene.things[0].colour, scene.things[0].shape, scene.background) for scene in scenes]
    assert {(colour, shape) for colour, shape, _ in words} == set(product(COLOURS, SHAPES))
    assert {(shape, ground) for _, shape, ground in words} == set(product(SHAPES, BACKGROUNDS))
    visible = {(colour, ground) for colour, ground in product(COLOURS, BACKGROUNDS) if colour != ground}
    assert {(colour, ground) for colour, _, ground in words} == visible


@pytest.mark.parametrize("split", ["training", "held-out", "all"])
def test_prompts_are_ordered_by_tier(split: str) -> None:
    expected = [scene.prompt for tier in ("count", "one") for scene in all_scenes(tier, split)]
    assert all_prompts(split, ("count", "one")) == expected


def test_an_unknown_tier_is_refused_and_the_known_ones_are_listed() -> None:
    with pytest.raises(Exception, match="two"):
        all_prompts("all", ("two",))


# --- images -------------------------------------------------------------------------------------


def test_the_same_generator_draws_the_same_images_to_the_bit() -> None:
    scenes = all_scenes("one")[:5] + all_scenes("count")[:5] + all_scenes("relation")[:5]
    first, again, other = draw(scenes), draw(scenes), draw(scenes, seed=1)
    assert np.array_equal(first, again)
    assert all((a != b).any() for a, b in zip(first, other, strict=True))


def test_images_drawn_one_by_one_are_those_drawn_together() -> None:
    scenes, rng = all_scenes("relation")[:6], np.random.default_rng(0)
    single = np.concatenate([render([scene], rng=rng).numpy() for scene in scenes])
    assert np.array_equal(single, draw(scenes))


def test_drawing_leaves_the_global_generators_alone() -> None:
    before, state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    draw(all_scenes("one")[:3])
    assert torch.equal(torch.get_rng_state(), before)
    assert np.random.get_state()[1].tolist() == state


def test_pixels_are_in_range() -> None:
    images = draw(all_scenes("one", "all") * 3)
    assert images.min() >= 0
    assert images.max() <= 1


def test_the_middle_has_the_colour_of_the_thing_and_the_corners_that_of_the_background() -> None:
    scenes = all_scenes("one")
    for image, scene in zip(draw(scenes), scenes, strict=True):
        background = near(image, scene.background)
        assert background[[0, 0, -1, -1], [0, -1, 0, -1]].all(), scene.prompt
        rows, columns = np.nonzero(~background)
        middle = (rows.min() + rows.max()) // 2, (columns.min() + columns.max()) // 2
        assert near(image, scene.things[0].colour)[middle], scene.prompt


def test_shades_differ_from_image_to_image_but_not_within_one() -> None:
    images = draw([Scene((Thing("red", "circle"),), "gray")] * 200)
    corners = images[:, :, 0, 0]
    assert np.ptp(corners, axis=1).max() < 1e-6  # gray stays gray
    assert corners.min() < 0.465
    assert corners.max() > 0.535
    assert (np.abs(corners - 0.5) <= 0.0401).all()


@TIERS
def test_things_lie_inside_the_image_and_apart_from_one_another(tier: str) -> None:
    scenes = [all_scenes(tier)[i] for i in np.random.default_rng(0).integers(0, len(all_scenes(tier)), 60)]
    for image, scene in zip(draw(scenes, size=64), scenes, strict=True):
        background = near(image, scene.background)
        border = np.concatenate([background[0], background[-1], background[:, 0], background[:, -1]])
        assert border.all(), scene.prompt
        _, count = ndimage.label(~background)
        assert count == len(scene.things), scene.prompt


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_fills_its_share_of_its_box(shape: str) -> None:
    """A circle pi / 4 of it, a square all, a triangle half; drawn large, so that pixels hardly matter."""
    for image in draw([Scene((Thing("blue", shape),), "yellow")] * 5, size=256):
        inside = near(image, "blue")
        rows, columns = np.nonzero(inside)
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert len(rows) / (height * width) == pytest.approx(FILL[shape], abs=0.02)
        assert width / height == pytest.approx(1 / 0.9 if shape == "triangle" else 1, abs=0.02)
        if shape == "triangle":  # apex up
            assert inside[rows.min()].sum() < 0.05 * width < 0.95 * width < inside[rows.max()].sum()


@pytest.mark.parametrize("relation", ["left of", "right of", "above", "below"])
def test_the_first_thing_has_its_relation_to_the_second(relation: str) -> None:
    scene = parse_prompt(f"a red circle {relation} a green square on a white background")
    for image in draw([scene] * 40):
        (y, x), (other_y, other_x) = (ndimage.center_of_mass(near(image, colour)) for colour in ("red", "green"))
        right, down = x - other_x, y - other_y
        along = {"left of": -right, "right of": right, "above": -down, "below": down}[relation]
        across = down if relation in ("left of", "right of") else right
        assert along > 8
        assert along > abs(across)


def test_a_larger_image_shows_the_same_scene() -> None:
    scenes = all_scenes("relation")[:20]
    small, large = draw(scenes, size=32), draw(scenes, size=64)
    averaged = large.reshape(20, 3, 32, 2, 32, 2).mean((3, 5))
    assert np.abs(averaged - small).mean() < 0.01
