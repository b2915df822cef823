"""Minibatches hold every (image, step) pair as often as they should, on any number of processes."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest
import torch

from rlhf_t2i.seeds import UPDATE, generators_for
from rlhf_t2i.training.batching import minibatches

Pairs = list[tuple[int, int]]


def minibatch_pairs(
    prompts: range,
    *,
    images_per_prompt: int = 6,
    window: tuple[int, int] = (0, 5),
    fraction: float = 1.0,
    num_minibatches: int = 3,
    num_epochs: int = 1,
) -> list[Pairs]:
    """The (image, step) pairs of each minibatch of a process with these prompts."""
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
def test_every_pair_of_the_window_occurs_once_in_an_epoch(window: tuple[int, int], num_minibatches: int) -> None:
    batches = minibatch_pairs(range(4), window=window, num_minibatches=num_minibatches, num_epochs=3)
    assert len(batches) == 3 * num_minibatches
    expected = Counter(product(range(4 * 6), range(*window)))
    for epoch in range(3):
        own = batches[epoch * num_minibatches : (epoch + 1) * num_minibatches]
        assert Counter(pair for batch in own for pair in batch) == expected


@pytest.mark.parametrize("fraction", [1.0, 0.4])
def test_each_minibatch_has_equally_many_images_of_every_prompt(fraction: float) -> None:
    for batch in minibatch_pairs(range(4), fraction=fraction):
        images = {image for image, _ in batch}
        assert Counter(image // 6 for image in images) == {0: 2, 1: 2, 2: 2, 3: 2}


@pytest.mark.parametrize("fraction", [1.0, 0.4])
def test_two_processes_together_have_the_minibatches_of_one(fraction: float) -> None:
    """The second process numbers its images from 0."""
    settings = {"fraction": fraction, "num_minibatches": 3, "num_epochs": 2}
    one = minibatch_pairs(range(4), **settings)
    first, second = minibatch_pairs(range(2), **settings), minibatch_pairs(range(2, 4), **settings)
    shifted = [[(image + 2 * 6, step) for image, step in batch] for batch in second]
    assert [sorted(a + b) for a, b in zip(first, shifted, strict=True)] == [sorted(batch) for batch in one]


def test_consecutive_pairs_are_of_different_images_and_steps() -> None:
    """So a microbatch mixes images and denoising steps."""
    (batch,) = minibatch_pairs(range(2), fraction=1.0, num_minibatches=1, num_epochs=1)
    assert len({image for image, _ in batch[:12]}) == 12
    assert len({step for _, step in batch[:12]}) > 1


@pytest.mark.parametrize(
    ("fraction", "num_trained"),
    [(1.0, 10), (0.8, 8), (0.36, 4), (0.34, 3), (0.01, 1)],
)
def test_each_image_has_the_rounded_number_of_distinct_steps(fraction: float, num_trained: int) -> None:
    (batch,) = minibatch_pairs(range(3), window=(4, 14), fraction=fraction, num_minibatches=1)
    assert len(batch) == len(set(batch)) == 3 * 6 * num_trained
    assert Counter(image for image, _ in batch) == dict.fromkeys(range(18), num_trained)
    assert all(4 <= step < 14 for _, step in batch)


def test_images_have_different_steps_and_all_steps_occur() -> None:
    (batch,) = minibatch_pairs(range(20), window=(0, 8), fraction=0.25, num_minibatches=1)
    choices = {tuple(sorted(step for image, step in batch if image == own)) for own in range(120)}
    assert len(choices) > 20  # of 28 pairs of steps
    counts = Counter(step for _, step in batch)
    # 240 pairs over 8 steps: 30 each; five standard deviations of a binomial are 26.
    assert all(4 < counts[step] < 56 for step in range(8))


def test_epochs_are_shuffled_anew() -> None:
    batches = minibatch_pairs(range(4), fraction=0.4, num_minibatches=2, num_epochs=2)
    images = [{image for image, _ in batch} for batch in batches]
    assert images[0] != images[2]
    assert {pair for batch in batches[:2] for pair in batch} != {pair for batch in batches[2:] for pair in batch}


def test_prompts_are_shuffled_differently() -> None:
    batch, *_ = minibatch_pairs(range(6), num_minibatches=2)
    chosen = {tuple(sorted({image % 6 for image, _ in batch if image // 6 == prompt})) for prompt in range(6)}
    assert len(chosen) > 1


def test_minibatches_do_not_use_the_global_generator() -> None:
    before = torch.get_rng_state()
    minibatch_pairs(range(3), fraction=0.5)
    assert torch.equal(torch.get_rng_state(), before)
