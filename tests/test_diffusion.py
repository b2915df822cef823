"""The DDIM step: against the slow reference, diffusers and the marginals of a Gaussian."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlhf_t2i.diffusion.gaussian import mean_kl, mean_log_prob, per_image, randn, sample
from rlhf_t2i.diffusion.transitions import ddim
from rlhf_t2i.types import Level, Prediction, Schedule, Transition
from tests import reference
from tests.toys import CPU, seeded

SHAPE = (4, 2, 3, 3)


def level_of(*sigmas: float) -> Level:
    """Return levels with alpha^2 + sigma^2 = 1, one per image."""
    sigma = torch.tensor(sigmas)
    return Level((1 - sigma**2).sqrt(), sigma, torch.zeros(len(sigmas)))


def mixed_step() -> tuple[Tensor, Prediction, Level, Level]:
    """Return a batch whose images are at different levels: near noise, in between, near the end, at the last step."""
    level, next_level = level_of(0.999, 0.8, 0.3, 0.1), level_of(0.95, 0.5, 0.1, 0.0)
    clean, noise = torch.randn(2, *SHAPE, generator=seeded(0)[0])
    latents = per_image(level.alpha) * clean + per_image(level.sigma) * noise
    return latents, Prediction(clean, noise), level, next_level


def constant_like(latents: Tensor, clean: float, noise: float) -> Prediction:
    return Prediction(torch.full_like(latents, clean), torch.full_like(latents, noise))


# --- the step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_equals_the_slow_reference(eta: float) -> None:
    latents, prediction, level, next_level = mixed_step()
    transition = ddim(latents, prediction, level, next_level, eta=eta)
    mean, std = reference.ddim(
        prediction.clean.numpy(),
        prediction.noise.numpy(),
        level.alpha.tolist(),
        level.sigma.tolist(),
        next_level.alpha.tolist(),
        next_level.sigma.tolist(),
        eta=eta,
    )
    assert_close(transition.mean.double(), torch.tensor(mean), rtol=1e-5, atol=1e-6)
    assert_close(transition.std.double(), torch.tensor(std, dtype=torch.float64), rtol=1e-5, atol=1e-6)


def test_ddim_by_hand() -> None:
    """From (alpha, sigma) = (0.6, 0.8) to (0.8, 0.6): std = 0.75 sqrt(1 - 0.75^2), clean 1 and noise -1."""
    latents = torch.full((1, 1, 1, 1), -0.2)
    transition = ddim(latents, constant_like(latents, 1.0, -1.0), level_of(0.8), level_of(0.6), eta=1.0)
    std = 0.75 * math.sqrt(0.4375)
    assert transition.std.item() == pytest.approx(std)
    assert transition.mean.item() == pytest.approx(0.8 - math.sqrt(0.36 - std**2))


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_the_remaining_and_the_new_noise_add_up_to_the_next_level(eta: float) -> None:
    latents, _, level, next_level = mixed_step()
    transition = ddim(latents, constant_like(latents, 0.0, 1.0), level, next_level, eta=eta)
    remaining = transition.mean[:, 0, 0, 0]
    assert_close(remaining**2 + transition.std**2, next_level.sigma**2, rtol=1e-5, atol=1e-7)


def test_eta_one_is_the_posterior_of_the_forward_process() -> None:
    """q(x' | x, clean) by Bayes' rule: a precision-weighted mean of alpha' clean and of x scaled back one step."""
    latents, prediction, level, next_level = mixed_step()
    transition = ddim(latents, prediction, level, next_level, eta=1.0)
    for b in range(3):
        alpha, next_alpha = level.alpha[b].item(), next_level.alpha[b].item()
        sigma, next_sigma = level.sigma[b].item(), next_level.sigma[b].item()
        ratio = alpha / next_alpha
        forward = sigma**2 - ratio**2 * next_sigma**2
        precision = 1 / next_sigma**2 + ratio**2 / forward
        clean, x = prediction.clean[b].double(), latents[b].double()
        mean = (next_alpha * clean / next_sigma**2 + ratio * x / forward) / precision
        assert_close(transition.mean[b].double(), mean, rtol=1e-4, atol=1e-5)
        assert transition.std[b].item() == pytest.approx(precision**-0.5, rel=1e-4)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_last_step_returns_the_clean_latents(eta: float) -> None:
    latents, prediction, level, next_level = mixed_step()
    transition = ddim(latents, prediction, level, next_level, eta=eta)
    assert_close(transition.mean[3], prediction.clean[3], rtol=0, atol=1e-6)
    assert transition.std[3].item() == 0


def test_the_log_probability_of_a_deterministic_step_is_zero_with_a_finite_gradient() -> None:
    latents, prediction, level, next_level = mixed_step()
    clean, noise = prediction.clean.requires_grad_(), prediction.noise.requires_grad_()
    transition = ddim(latents, Prediction(clean, noise), level, next_level, eta=1.0)
    log_prob = mean_log_prob(transition, sample(transition, generators=seeded(1)))
    kl = mean_kl(transition, Transition(transition.mean.detach() + 1, transition.std))
    (log_prob.sum() + kl.sum()).backward()
    assert log_prob[3].item() == 0
    assert kl[3].item() == 0
    for gradient in (clean.grad, noise.grad):
        assert gradient is not None
        assert gradient.isfinite().all()
        assert (gradient[3] == 0).all()
        assert (gradient[:3] != 0).all()


def test_a_step_to_the_same_level_changes_nothing() -> None:
    """Schedules with set_alpha_to_one=False and no offset end with such a step; it must not divide by zero."""
    latents, prediction, level, _ = mixed_step()
    transition = ddim(latents, prediction, level, level, eta=1.0)
    assert (transition.std == 0).all()
    assert_close(transition.mean, latents, rtol=1e-5, atol=1e-6)


# --- against diffusers ----------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("spacing", "offset", "set_alpha_to_one"),
    [("leading", 1, False), ("leading", 0, True), ("leading", 0, False), ("trailing", 0, False), ("trailing", 0, True)],
)
def test_every_step_equals_that_of_diffusers(
    eta: float, prediction_type: str, spacing: str, offset: int, set_alpha_to_one: bool
) -> None:
    """One batch holds all steps from the first to the last, one per image."""
    from diffusers import DDIMScheduler

    from rlhf_t2i.models.levels import DiffusionLevels

    num_steps = 5
    latents, output, noise = torch.randn(3, num_steps, 4, 8, 8, generator=seeded(0)[0])
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        timestep_spacing=spacing,
        steps_offset=offset,
        set_alpha_to_one=set_alpha_to_one,
        clip_sample=False,
    )
    levels = DiffusionLevels(scheduler.config, device=CPU)
    schedule, steps = levels.schedule(num_steps), torch.arange(num_steps)
    level, next_level = schedule.at(steps), schedule.at(steps + 1)

    transition = ddim(latents, levels.to_prediction(latents, output, level), level, next_level, eta=eta)
    drawn = transition.mean + per_image(transition.std) * noise

    scheduler.set_timesteps(num_steps)
    expected = [
        scheduler.step(output[[i]], time, latents[[i]], eta=eta, variance_noise=noise[[i]]).prev_sample
        for i, time in enumerate(scheduler.timesteps.tolist())
    ]
    assert_close(level.model_time, scheduler.timesteps.float())
    assert_close(drawn, torch.cat(expected), rtol=1e-4, atol=1e-4)
    if set_alpha_to_one or eta == 0 or (spacing, offset) == ("leading", 0):
        assert transition.std[-1] == 0
    else:
        assert transition.std[-1] > 0


def test_a_schedule_that_ends_at_sigma_zero_ends_with_a_deterministic_step() -> None:
    schedule = Schedule(torch.tensor([0.1, 0.8, 1.0]), torch.tensor([0.99**0.5, 0.6, 0.0]), torch.tensor([9.0, 4, 0]))
    latents = torch.randn(2, 1, 2, 2, generator=seeded(0)[0])
    clean = torch.zeros_like(latents, requires_grad=True)
    steps = torch.tensor([0, 1])
    prediction = Prediction(clean, torch.ones_like(latents))
    transition = ddim(latents, prediction, schedule.at(steps), schedule.at(steps + 1), eta=1.0)
    log_prob = mean_log_prob(transition, torch.ones_like(latents))
    log_prob.sum().backward()
    assert log_prob[0] != 0
    assert log_prob[1] == 0
    assert clean.grad is not None
    assert clean.grad.isfinite().all()


# --- marginals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_exact_predictor_keeps_every_marginal_of_a_gaussian(eta: float) -> None:
    """Data N(0.5, 0.7^2) at level (alpha, sigma) is N(0.5 alpha, 0.49 alpha^2 + sigma^2) for any eta.

    The standard error over 16,384 numbers is 0.8 % of a standard deviation for the mean and 0.6 % for the std: four
    of these are allowed, plus 1 % for steps of finite size.
    """
    mean, std, num_steps, count = 0.5, 0.7, 400, 16_384
    sigma = torch.linspace(0.9999, 0.02, num_steps + 1)
    alpha = (1 - sigma**2).sqrt()
    schedule = Schedule(alpha, sigma, torch.zeros(num_steps + 1))
    [generator], step = seeded(0), partial(ddim, eta=eta)
    latents = alpha[0] * mean + (alpha[0] ** 2 * std**2 + sigma[0] ** 2).sqrt() * randn(
        (1, 1, 1, count), generators=[generator], device=CPU
    )
    for index in range(num_steps):
        level, next_level = (schedule.at(torch.tensor([index + i])) for i in (0, 1))
        variance = level.alpha**2 * std**2 + level.sigma**2
        clean = mean + level.alpha * std**2 / variance * (latents - level.alpha * mean)
        noise = (latents - level.alpha * clean) / level.sigma
        transition = step(latents, Prediction(clean, noise), level, next_level)
        latents = sample(transition, generators=[generator])
        expected_std = (next_level.alpha**2 * std**2 + next_level.sigma**2).sqrt().item()
        error = (latents.mean().item() - next_level.alpha.item() * mean) / expected_std
        assert abs(error) < 0.04, f"mean after step {index}"
        assert latents.std().item() == pytest.approx(expected_std, rel=0.034), f"std after step {index}"


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_known_image_keeps_its_marginals_in_steps_of_any_size(eta: float) -> None:
    """With the exact predictor of one image, x stays alpha * clean + sigma * noise."""
    levels, count = [level_of(s) for s in (0.9999, 0.9, 0.4, 0.05)], 16_384
    [generator], clean = seeded(1), torch.full((1, 1, 1, count), 0.8)
    latents = per_image(levels[0].alpha) * clean + per_image(levels[0].sigma) * randn(
        clean.shape, generators=[generator], device=CPU
    )
    for level, next_level in pairwise(levels):
        prediction = Prediction(clean, (latents - per_image(level.alpha) * clean) / per_image(level.sigma))
        latents = sample(ddim(latents, prediction, level, next_level, eta=eta), generators=[generator])
        noise = (latents - per_image(next_level.alpha) * clean) / per_image(next_level.sigma)
        assert abs(noise.mean().item()) < 0.032
        assert noise.std().item() == pytest.approx(1, rel=0.023)
