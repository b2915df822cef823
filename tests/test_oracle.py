"""The oracle: correct images pass, near misses do not, and noise, blur, order and size hardly matter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from rlhf_t2i.shapes.oracle import OracleScores, oracle_scores, shows_something
from rlhf_t2i.shapes.scenes import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, Scene, Thing, all_scenes, render

NUM_RENDERS = 700
"""Images of each tier."""

TIERS = pytest.mark.parametrize("tier", ["one", "count", "relation"])


@cache
def renders(tier: str) -> tuple[Tensor, list[Scene]]:
    """Return images of random scenes of a tier, and the scenes."""
    rng = np.random.default_rng(0)
    every = all_scenes(tier)
    scenes = [every[i] for i in rng.integers(0, len(every), NUM_RENDERS)]
    return render(scenes, rng=rng), scenes


def prompts_of(scenes: list[Scene]) -> list[str]:
    return [scene.prompt for scene in scenes]


def wrong_colour(scene: Scene) -> Iterator[Scene]:
    """One thing in a wrong colour that is neither that of the background nor that of the other thing."""
    taken = {thing.colour for thing in scene.things if scene.relation} | {scene.background}
    for index, thing in enumerate(scene.things):
        for colour in set(COLOURS) - taken - {thing.colour}:
            yield with_thing(scene, index, Thing(colour, thing.shape))


def wrong_shape(scene: Scene) -> Iterator[Scene]:
    for index, thing in enumerate(scene.things):
        for shape in set(SHAPES) - {thing.shape}:
            yield with_thing(scene, index, Thing(thing.colour, shape))


def wrong_background(scene: Scene) -> Iterator[Scene]:
    for background in set(BACKGROUNDS) - {scene.background} - {thing.colour for thing in scene.things}:
        yield replace(scene, background=background)


def wrong_count(scene: Scene) -> Iterator[Scene]:
    """Another number of things, each of them in the prompt."""
    for things in (scene.things[:1], scene.things[-1:], (*scene.things[:2], scene.things[0]), scene.things[:1] * 2):
        if len(things) != len(scene.things):
            yield Scene(things, scene.background)


def wrong_relation(scene: Scene) -> Iterator[Scene]:
    for relation in set(RELATIONS) - {scene.relation} if scene.relation else ():
        yield replace(scene, relation=relation)


def with_thing(scene: Scene, index: int, thing: Thing) -> Scene:
    """Return the scene with another thing at an index."""
    return replace(scene, things=(*scene.things[:index], thing, *scene.things[index + 1 :]))


NEAR_MISSES = [
    (tier, wrong)
    for tier in ("one", "count", "relation")
    for wrong in (wrong_colour, wrong_shape, wrong_background, wrong_count, wrong_relation)
    if wrong is not wrong_relation or tier == "relation"
]


@pytest.mark.parametrize(("tier", "wrong"), NEAR_MISSES)
def test_a_near_miss_does_not_pass_and_scores_less_than_half(tier: str, wrong: object) -> None:
    """One word of the prompt is not what the image shows."""
    assert callable(wrong)
    rng = np.random.default_rng(1)
    pairs: list[tuple[Scene, Scene]] = [(scene, shown) for scene in renders(tier)[1] for shown in wrong(scene)]
    pairs.sort(key=repr)
    pairs = [pairs[i] for i in rng.integers(0, len(pairs), 200)]
    scores = oracle_scores(render([shown for _, shown in pairs], rng=rng), [expected.prompt for expected, _ in pairs])
    assert scores.passed.float().mean() <= 0.02
    high = scores.graded >= 0.5
    mistakes = [
        (expected.prompt, shown) for (expected, shown), is_high in zip(pairs, high.tolist(), strict=True) if is_high
    ]
    assert not mistakes, f"{len(mistakes)} of {len(pairs)}, such as {mistakes[:3]}"


@cache
def scores_of_tier(tier: str) -> OracleScores:
    """Return the scores of the images of a tier."""
    images, scenes = renders(tier)
    return oracle_scores(images, prompts_of(scenes))


def test_a_correct_image_passes() -> None:
    """99 % of the 2,100 images of three tiers, and 98 % of each tier."""
    passed = torch.stack([scores_of_tier(tier).passed for tier in ("one", "count", "relation")]).float()
    assert passed.mean() >= 0.99
    assert (passed.mean(1) >= 0.98).all()


def test_a_correct_image_scores_above_nine_tenths() -> None:
    graded = torch.stack([scores_of_tier(tier).graded for tier in ("one", "count", "relation")])
    assert (graded > 0.9).float().mean() >= 0.99


def test_a_correct_image_shows_something() -> None:
    images = torch.cat([renders(tier)[0] for tier in ("one", "count", "relation")])
    assert shows_something(images).float().mean() >= 0.99


def test_a_small_triangle_is_not_detected_as_a_square() -> None:
    """Its apex is thinner than a pixel."""
    shown = Scene((Thing("red", "triangle"), Thing("green", "triangle")), "blue", "above")
    images = render([shown] * 400, rng=np.random.default_rng(0))
    scores = oracle_scores(images, ["a red square above a green triangle on a blue background"] * 400)
    assert (scores.graded >= 0.5).sum() == 0
    assert oracle_scores(images, [shown.prompt] * 400).passed.float().mean() >= 0.99


def test_noise_shows_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(100, 3, 32, 32, generator=generator)
    normal = torch.randn(100, 3, 32, 32, generator=generator)
    smooth = torch.from_numpy(gaussian_filter(normal.numpy(), (0, 0, 3, 3))) * 5 + 0.5
    assert not shows_something(torch.cat([uniform, normal, smooth])).any()


@pytest.mark.parametrize("brightness", [0.0, 0.5, 1.0])
def test_an_empty_image_scores_low_and_shows_nothing(brightness: float) -> None:
    """Even for a prompt with its background: the colour and shape of the thing and the count are wrong."""
    scenes = all_scenes("one") + all_scenes("count") + all_scenes("relation")[::20]
    empty = torch.full((len(scenes), 3, 32, 32), brightness)
    scores = oracle_scores(empty, prompts_of(scenes))
    assert not scores.passed.any()
    assert scores.graded.max() < 0.2
    assert not shows_something(empty).any()


def test_a_wrong_thing_scores_no_less_than_an_empty_image() -> None:
    """Otherwise a policy tuned with this reward would learn to generate empty images."""
    drawn = render([Scene((Thing("green", "square"),), "blue")], rng=np.random.default_rng(0))
    empty = drawn[:, :, :1, :1].expand_as(drawn)
    prompt = "a red circle on a blue background"
    assert oracle_scores(drawn, [prompt]).graded >= oracle_scores(empty, [prompt]).graded


# --- blur and noise -------------------------------------------------------------------------------


@pytest.mark.parametrize(("std", "at_least"), [(0.05, 0.99), (0.1, 0.98), (0.2, 0.94)])
def test_noise_hardly_changes_the_scores_of_one_thing(std: float, at_least: float) -> None:
    images, scenes = renders("one")
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    scores = oracle_scores((images + std * noise).clamp(0, 1), prompts_of(scenes))
    assert scores.passed.float().mean() >= at_least
    assert scores.graded.mean() >= at_least - 0.03


@pytest.mark.parametrize(("sigma", "at_least"), [(0.7, 0.99), (0.9, 0.99), (1.2, 0.97)])
def test_blur_hardly_changes_the_scores_of_one_thing(sigma: float, at_least: float) -> None:
    images, scenes = renders("one")
    scores = oracle_scores(torch.from_numpy(gaussian_filter(images.numpy(), (0, 0, sigma, sigma))), prompts_of(scenes))
    assert scores.passed.float().mean() >= at_least
    assert scores.graded.mean() >= at_least - 0.01


def test_values_beyond_the_image_do_not_matter() -> None:
    images, scenes = renders("one")
    stretched = (images - 0.5) * 3 + 0.5
    inside = oracle_scores(stretched.clamp(0, 1), prompts_of(scenes)).graded
    assert torch.equal(oracle_scores(stretched, prompts_of(scenes)).graded, inside)


# --- neighbours, order, size ----------------------------------------------------------------------


def noisy_images() -> tuple[Tensor, list[str]]:
    """Images of all tiers, noisy enough for many different scores."""
    images = torch.cat([renders(tier)[0][:30] for tier in ("one", "count", "relation")])
    scenes = [scene for tier in ("one", "count", "relation") for scene in renders(tier)[1][:30]]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + 0.25 * noise).clamp(0, 1), prompts_of(scenes)


def test_scores_do_not_depend_on_neighbours() -> None:
    images, prompts = noisy_images()
    together = oracle_scores(images, prompts)
    alone = [oracle_scores(images[i : i + 1], prompts[i : i + 1]) for i in range(len(prompts))]
    assert len(together.graded.unique()) > 30
    torch.testing.assert_close(torch.cat([scores.graded for scores in alone]), together.graded, rtol=0, atol=1e-5)
    assert torch.equal(torch.cat([scores.passed for scores in alone]), together.passed)


def test_scores_do_not_depend_on_order() -> None:
    images, prompts = noisy_images()
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0))
    straight, shuffled = oracle_scores(images, prompts), oracle_scores(images[order], [prompts[i] for i in order])
    torch.testing.assert_close(shuffled.graded, straight.graded[order], rtol=0, atol=1e-5)
    assert torch.equal(shuffled.passed, straight.passed[order])


@TIERS
@pytest.mark.parametrize("size", [64, 96])
def test_a_larger_image_has_similar_scores(tier: str, size: int) -> None:
    scenes = renders(tier)[1][:120]
    small, large = (
        oracle_scores(render(scenes, rng=np.random.default_rng(3), size=n), prompts_of(scenes)) for n in (32, size)
    )
    assert (large.passed == small.passed).float().mean() >= 0.97
    assert large.passed.float().mean() >= 0.98
    assert (large.graded - small.graded).abs().mean() < 0.03


def test_scoring_records_no_gradient_and_leaves_images_unchanged() -> None:
    images = renders("one")[0][:4].clone().requires_grad_()
    before = images.detach().clone()
    scores = oracle_scores(images, prompts_of(renders("one")[1][:4]))
    assert not scores.graded.requires_grad
    assert torch.equal(images, before)


def test_no_images_have_no_scores() -> None:
    assert oracle_scores(torch.zeros(0, 3, 32, 32), []).graded.tolist() == []
    assert shows_something(torch.zeros(0, 3, 32, 32)).tolist() == []


@pytest.mark.parametrize("num_prompts", [0, 1, 3])
def test_the_numbers_of_prompts_and_images_must_agree(num_prompts: int) -> None:
    with pytest.raises(ValueError, match=f"2 images came with {num_prompts} prompts"):
        oracle_scores(torch.zeros(2, 3, 32, 32), ["a red circle on a blue background"] * num_prompts)


def test_a_prompt_outside_the_grammar_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'a fox'.*not in the grammar"):
        oracle_scores(torch.zeros(1, 3, 32, 32), ["a fox"])
