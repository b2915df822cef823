"""Every stroke is learnt from as often as promised, and processes do not matter."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest
import torch

from rlhf_t2i.seeds import UPDATE, generators_for
from rlhf_t2i.training.batching import minibatches

Pairs = list[tuple[int, int]]


def picked(
    prompts: range,
    *,
    images_per_prompt: int = 6,
    window: tuple[int, int] = (0, 5),
    fraction: float = 1.0,
    num_minibatches: int = 3,
    num_epochs: int = 1,
) -> list[Pairs]:
    """The (image, step) pairs of each minibatch of a process that has these prompts."""
    batches = minibatches(
        generators=generators_for(0, UPDATE, 4, prompts),
        images_per_prompt=images_per_prompt,
        window=window,
        fraction=fraction,
        num_minibatches=num_minibatches,
        num_epochs=num_epochs,
    )
    return [list(zip(image.tolist(), step.tolist(), strict=True)) for image, step in batches]


@pytest.mark.parametrize("window", [(0, 5), (2, 5), (3, 4)])
@pytest.mark.parametrize("num_minibatches", [1, 2, 6])
def test_every_stroke_of_the_window_occurs_once_in_an_epoch(window: tuple[int, int], num_minibatches: int) -> None:
    batches = picked(range(4), window=window, num_minibatches=num_minibatches, num_epochs=3)
    assert len(batches) == 3 * num_minibatches
    every = Counter(product(range(4 * 6), range(*window)))
    for epoch in range(3):
        own = batches[epoch * num_minibatches : (epoch + 1) * num_minibatches]
        assert Counter(pair for batch in own for pair in batch) == every


@pytest.mark.parametrize("fraction", [1.0, 0.4])
def test_each_minibatch_holds_as_many_images_of_one_prompt_as_of_another(fraction: float) -> None:
    for batch in picked(range(4), fraction=fraction):
        images = {image for image, _ in batch}
        assert Counter(image // 6 for image in images) == {0: 2, 1: 2, 2: 2, 3: 2}


@pytest.mark.parametrize("fraction", [1.0, 0.4])
def test_two_processes_pick_together_what_one_would(fraction: float) -> None:
    """Their image numbers start at 0 again; else nothing differs, minibatch by minibatch."""
    settings = {"fraction": fraction, "num_minibatches": 3, "num_epochs": 2}
    whole = picked(range(4), **settings)
    first, second = picked(range(2), **settings), picked(range(2, 4), **settings)
    moved = [[(image + 2 * 6, step) for image, step in batch] for batch in second]
    assert [sorted(a + b) for a, b in zip(first, moved, strict=True)] == [sorted(batch) for batch in whole]


def test_neighbours_in_a_minibatch_are_of_different_images_and_steps() -> None:
    """So a microbatch mixes both, which spreads its noise."""
    (batch,) = picked(range(2), fraction=1.0, num_minibatches=1, num_epochs=1)
    assert len({image for image, _ in batch[:12]}) == 12
    assert len({step for _, step in batch[:12]}) > 1


@pytest.mark.parametrize(
    ("fraction", "num_kept"),
    [(1.0, 10), (0.8, 8), (0.36, 4), (0.34, 3), (0.01, 1)],
)
def test_each_image_keeps_the_rounded_number_of_distinct_steps(fraction: float, num_kept: int) -> None:
    (batch,) = picked(range(3), window=(4, 14), fraction=fraction, num_minibatches=1)
    assert len(batch) == len(set(batch)) == 3 * 6 * num_kept
    assert Counter(image for image, _ in batch) == dict.fromkeys(range(18), num_kept)
    assert all(4 <= step < 14 for _, step in batch)


def test_images_keep_different_steps_and_all_steps_have_their_turn() -> None:
    (batch,) = picked(range(20), window=(0, 8), fraction=0.25, num_minibatches=1)
    choices = {tuple(sorted(step for image, step in batch if image == own)) for own in range(120)}
    assert len(choices) > 20  # of 28 pairs of steps
    counts = Counter(step for _, step in batch)
    # 240 strokes over 8 steps: 30 each, five standard deviations of a binomial are 26.
    assert all(4 < counts[step] < 56 for step in range(8))


def test_epochs_are_shuffled_anew() -> None:
    batches = picked(range(4), fraction=0.4, num_minibatches=2, num_epochs=2)
    images = [{image for image, _ in batch} for batch in batches]
    assert images[0] != images[2]
    assert {pair for batch in batches[:2] for pair in batch} != {pair for batch in batches[2:] for pair in batch}


def test_prompts_are_not_shuffled_alike() -> None:
    batch, *_ = picked(range(6), num_minibatches=2)
    chosen = {tuple(sorted({image % 6 for image, _ in batch if image // 6 == prompt})) for prompt in range(6)}
    assert len(chosen) > 1


def test_picking_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    picked(range(3), fraction=0.5)
    assert torch.equal(torch.get_rng_state(), before)
