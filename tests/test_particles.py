"""Weights, resampling and potentials of FK steering: by hand, against slow references, and in the limits."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_t2i.search.particles import (
    PotentialName,
    effective_sample_size,
    new_particles,
    resample,
    reweight,
    reweight_finished,
    systematic_resample,
)
from tests import reference

POTENTIALS: list[PotentialName] = ["difference", "max", "sum"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("potential", POTENTIALS)
@pytest.mark.parametrize("shift", [0.0, -30.0])  # max must not take 0 as the maximum of negative rewards
def test_every_potential_against_the_reference(potential: PotentialName, shift: float) -> None:
    rewards = torch.randn(5, 1, 3, generator=generator(), dtype=torch.float64) + shift
    particles = new_particles(1, 3, potential=potential)
    log_potentials: list[torch.Tensor] = []
    for r in rewards[:-1]:
        after = reweight(particles, r, potential=potential, strength=1.7)
        log_potentials.append(after.log_weights - particles.log_weights)
        particles = after
    log_potentials.append(reweight_finished(particles, rewards[-1], strength=1.7).log_weights - particles.log_weights)
    for k in range(3):
        expected = reference.log_potentials(rewards[:, 0, k].tolist(), potential=potential, strength=1.7)
        assert torch.stack(log_potentials)[:, 0, k].tolist() == pytest.approx(expected)


def test_the_published_maximum_begins_at_zero() -> None:
    particles = new_particles(1, 3, potential="max", initial_max=0.0)
    weights = reweight(particles, torch.tensor([[-2.0, 0.0, 0.5]]), potential="max", strength=2.0).log_weights
    assert weights.tolist() == [[0.0, 0.0, 1.0]]


@pytest.mark.parametrize("potential", POTENTIALS)
def test_the_potentials_of_a_path_multiply_to_the_weight_of_the_final_reward(potential: PotentialName) -> None:
    """exp(strength * last reward), whatever the intermediate rewards were."""
    particles = new_particles(2, 4, potential=potential)
    for seed in range(4):
        r = torch.randn(2, 4, generator=generator(seed))
        particles = reweight(particles, r, potential=potential, strength=3.0)
    last = torch.randn(2, 4, generator=generator(9))
    assert_close(reweight_finished(particles, last, strength=3.0).log_weights, 3.0 * last.double())


def test_huge_rewards_do_not_saturate() -> None:
    """Weights for rewards of 1,000 and 1,001 differ: exp(1,000) would overflow."""
    particles = reweight(
        new_particles(1, 2, potential="difference"),
        torch.tensor([[1000.0, 1001.0]]),
        potential="difference",
        strength=1.0,
    )
    assert_close(particles.log_weights.softmax(1)[0, 1].item(), 1 / (1 + math.exp(-1)))


def test_effective_sample_size_by_hand_and_against_the_reference() -> None:
    rows = [[0.0] * 4, [0.0, -math.inf, -math.inf, -math.inf], [0.3, -2.0, 700.0, 699.5]]
    found = effective_sample_size(torch.tensor(rows, dtype=torch.float64))
    assert found[:2].tolist() == pytest.approx([4.0, 1.0])
    assert found[2].item() == pytest.approx(reference.effective_sample_size(rows[2]))


@pytest.mark.parametrize("seed", range(20))
def test_systematic_resampling_against_the_reference(seed: int) -> None:
    log_weights = 2 * torch.randn(13, generator=generator(seed), dtype=torch.float64)
    offset = torch.rand(1, generator=generator(seed + 100)).item()
    found = systematic_resample(log_weights, generator=generator(seed + 100))
    assert found.tolist() == reference.systematic_resample(log_weights.tolist(), offset)


def test_each_particle_has_its_expected_number_of_children_rounded_up_or_down() -> None:
    log_weights = torch.randn(64, generator=generator(), dtype=torch.float64)
    expected = 64 * log_weights.softmax(0)
    counts = torch.stack(
        [systematic_resample(log_weights, generator=generator(s)).bincount(minlength=64) for s in range(400)]
    )
    assert ((counts - expected).abs() < 1).all()
    assert_close(counts.double().mean(0), expected, rtol=0, atol=0.1)  # unbiased


@pytest.mark.parametrize("num", [1, 3, 7, 1000])
def test_equal_weights_keep_every_particle(num: int) -> None:
    for seed in range(50):
        found = systematic_resample(torch.full((num,), -123.4), generator=generator(seed))
        assert torch.equal(found, torch.arange(num))


def test_a_particle_without_weight_has_no_children() -> None:
    log_weights = torch.tensor([-math.inf, 0.0, -math.inf, 0.5, -math.inf])
    for seed in range(100):
        assert set(systematic_resample(log_weights, generator=generator(seed)).tolist()) == {1, 3}


def test_weights_are_kept_where_resampling_is_skipped() -> None:
    particles = reweight(
        new_particles(2, 3, potential="max"), torch.randn(2, 3, generator=generator()), potential="max", strength=1.0
    )
    after, parents = resample(particles, chosen=torch.tensor([False, True]), generators=[generator(1), generator(2)])
    assert_close(after.log_weights[0], particles.log_weights[0], rtol=0, atol=0)
    assert_close(after.path_reward[0], particles.path_reward[0], rtol=0, atol=0)
    assert (after.log_weights[1] == 0).all()
    assert_close(after.path_reward[1], particles.path_reward[1, parents[1]])
    assert_close(after.log_product[1], particles.log_product[1, parents[1]])


@pytest.mark.parametrize("potential", POTENTIALS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_particle_with_a_non_finite_reward_has_weight_zero_from_then_on(potential: PotentialName, bad: float) -> None:
    """Other particles are not affected."""
    particles = new_particles(1, 2, potential=potential)
    particles = reweight(particles, torch.tensor([[bad, 1.0]]), potential=potential, strength=1.0)
    particles = reweight(particles, torch.tensor([[5.0, 1.0]]), potential=potential, strength=1.0)
    particles = reweight_finished(particles, torch.tensor([[5.0, 2.0]]), strength=1.0)
    assert particles.log_weights[0, 0] == -math.inf
    assert particles.log_weights[0, 1].item() == pytest.approx(2.0)
