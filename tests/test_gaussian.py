"""Gaussian transitions: log-probabilities, KL divergences and samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from rlhf_t2i.diffusion.gaussian import mean_kl, mean_log_prob, per_image, randn, sample, unscaled_log_ratio
from rlhf_t2i.types import Transition
from tests import reference
from tests.toys import CPU, seeded

SHAPE = (4, 2, 3, 3)


# --- log-probabilities ------------------------------------------------------------------------------------


def test_the_log_probability_equals_the_slow_reference() -> None:
    x, mean = torch.randn(2, *SHAPE, generator=seeded(0)[0])
    std = torch.tensor([0.5, 1.0, 2.0, 0.0])
    expected = reference.mean_log_prob(x.numpy(), mean.numpy(), std.tolist())
    assert_close(mean_log_prob(Transition(mean, std), x), torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_the_published_log_ratio_of_cps_is_a_difference_of_squared_errors() -> None:
    x, old, new = torch.randn(3, *SHAPE, generator=seeded(0)[0])
    std = torch.tensor([0.1, 0.5, 2.0, 0.0])
    gaussian = mean_log_prob(Transition(new, std), x) - mean_log_prob(Transition(old, std), x)
    expected = ((x - old) ** 2 - (x - new) ** 2).mean(dim=(1, 2, 3)) * (std > 0)
    assert_close(unscaled_log_ratio(gaussian, Transition(new, std)), expected, rtol=1e-4, atol=1e-6)


def test_the_log_probability_by_hand() -> None:
    """At the mean of N(m, 0.5^2) the density is 2 / sqrt(2 pi); one std away it is less by 1/2."""
    mean, std = torch.full((2, 1, 2, 2), 3.0), torch.tensor([0.5, 0.5])
    x = mean + torch.tensor([0.0, 0.5])[:, None, None, None]
    top = math.log(2 / math.sqrt(2 * math.pi))
    assert_close(mean_log_prob(Transition(mean, std), x), torch.tensor([top, top - 0.5]))


def test_the_log_probability_is_a_mean_not_a_sum() -> None:
    """Repeating the dimensions does not change it; DDPO's clip range of 1e-4 depends on that."""
    x, mean, std = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2), torch.tensor([0.7])
    small = mean_log_prob(Transition(mean, std), x)
    large = mean_log_prob(Transition(mean.repeat(1, 4, 5, 5), std), x.repeat(1, 4, 5, 5))
    assert_close(large, small)


def test_the_gradient_of_the_log_probability_moves_the_mean_towards_the_sample() -> None:
    """d/dmean = (x - mean) / (n std^2); the sample gets no gradient."""
    mean, x = (torch.randn(SHAPE, generator=seeded(s)[0]).requires_grad_() for s in (0, 1))
    std = torch.tensor([0.5, 1.0, 2.0, 3.0])
    mean_log_prob(Transition(mean, std), x).sum().backward()
    assert_close(mean.grad, ((x - mean) / (18 * per_image(std) ** 2)).detach())
    assert x.grad is None


def test_the_mean_log_probability_of_samples_is_minus_the_entropy() -> None:
    """-log(std) - log(2 pi e) / 2, within four standard errors of 1 / sqrt(2 n)."""
    transition = Transition(torch.randn(2, 4, 64, 64, generator=seeded(0)[0]), torch.tensor([0.1, 3.0]))
    drawn = sample(transition, generators=seeded(1))
    entropy = transition.std.log() + 0.5 * math.log(2 * math.pi * math.e)
    assert_close(mean_log_prob(transition, drawn), -entropy, rtol=0, atol=4 / math.sqrt(2 * 4 * 64 * 64))


def test_log_probabilities_are_float32_whatever_the_dtype_of_the_mean() -> None:
    mean = torch.randn(SHAPE, generator=seeded(0)[0]).bfloat16()
    x, std = torch.randn(SHAPE, generator=seeded(1)[0]), torch.full((4,), 0.02)
    log_prob = mean_log_prob(Transition(mean, std), x)
    assert log_prob.dtype == torch.float32
    assert_close(log_prob, mean_log_prob(Transition(mean.float(), std), x), rtol=0, atol=0)


def test_the_kl_equals_the_slow_reference() -> None:
    mean, other = torch.randn(2, *SHAPE, generator=seeded(0)[0])
    std = torch.tensor([0.5, 1.0, 2.0, 0.0])
    expected = reference.mean_kl(mean.numpy(), other.numpy(), std.tolist())
    kl = mean_kl(Transition(mean, std), Transition(other, std))
    assert_close(kl, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_the_kl_is_the_expected_difference_of_log_probabilities() -> None:
    """E[log p(x) - log q(x)] over x from p, within five standard errors of |gap| / (std sqrt(n))."""
    p = Transition(torch.zeros(1, 4, 128, 128), torch.tensor([0.5]))
    q = Transition(torch.full((1, 4, 128, 128), 0.2), torch.tensor([0.5]))
    x = sample(p, generators=seeded(0))
    gap = mean_log_prob(p, x) - mean_log_prob(q, x)
    assert_close(mean_kl(p, q), torch.tensor([0.08]))
    assert_close(gap, mean_kl(p, q), rtol=0, atol=5 * 0.4 / math.sqrt(4 * 128 * 128))


def test_the_kl_of_equal_transitions_is_zero() -> None:
    transition = Transition(torch.randn(SHAPE, generator=seeded(0)[0]), torch.tensor([0.5, 1.0, 2.0, 0.0]))
    assert mean_kl(transition, transition).tolist() == [0, 0, 0, 0]


# --- samples ----------------------------------------------------------------------------------------


def test_each_image_is_sampled_with_its_own_std() -> None:
    mean, std = torch.randn(3, 4, 64, 64, generator=seeded(0)[0]), torch.tensor([0.0, 0.1, 2.0])
    error = (sample(Transition(mean, std), generators=seeded(1)) - mean).flatten(1)
    assert_close(error.std(1), std, rtol=0.03, atol=0)
    assert_close(error.mean(1) / std.clamp_min(0.1), torch.zeros(3), rtol=0, atol=0.04)
    assert (error[0] == 0).all()


def test_random_numbers_do_not_depend_on_the_number_of_processes() -> None:
    together = randn((6, 4, 2, 2), generators=seeded(0, 1, 2), device=CPU)
    parts = [randn((2, 4, 2, 2), generators=seeded(s), device=CPU) for s in range(3)]
    assert torch.equal(together, torch.cat(parts))
    assert len(together.unique()) == together.numel()


def test_samples_do_not_depend_on_the_number_of_processes() -> None:
    transition = Transition(torch.randn(SHAPE, generator=seeded(0)[0]), torch.tensor([0.5, 1.0, 2.0, 0.0]))
    together = sample(transition, generators=seeded(1, 2))
    halves = [
        sample(Transition(transition.mean[rows], transition.std[rows]), generators=seeded(seed))
        for rows, seed in ((slice(0, 2), 1), (slice(2, 4), 2))
    ]
    assert torch.equal(together, torch.cat(halves))


def test_an_uneven_split_of_images_is_refused() -> None:
    with pytest.raises(ValueError, match="3 generators cannot share 4 images"):
        randn(SHAPE, generators=seeded(0, 1, 2), device=CPU)


def test_sampling_does_not_touch_the_global_generators() -> None:
    before, state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    sample(Transition(torch.zeros(SHAPE), torch.ones(4)), generators=seeded(0))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.random.get_state()[1].tolist() == state
