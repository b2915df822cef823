"""Flow transitions, x = (1 - sigma) clean + sigma noise: against slow references, diffusers and closed forms."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlhf_t2i.diffusion.gaussian import mean_log_prob, per_image, sample
from rlhf_t2i.diffusion.transitions import ancestral, cps, ddim, flow_sde, stochastic, windowed
from rlhf_t2i.types import Dynamics, Level, Prediction, Schedule
from tests import reference

CAP = 0.9
SIGMAS, NEXT_SIGMAS = [1.0, 0.9, 0.5, 0.2], [0.9, 0.4, 0.45, 0.0]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flow_level(*sigmas: float) -> Level:
    sigma = torch.tensor(sigmas)
    return Level(1 - sigma, sigma, 1000 * sigma)


def of_velocity(latents: Tensor, velocity: Tensor, level: Level) -> Prediction:
    return Prediction(latents - per_image(level.sigma) * velocity, latents + per_image(level.alpha) * velocity)


@pytest.fixture
def flow_steps() -> tuple[Tensor, Tensor, Prediction, Level, Level]:
    """Latents, velocity, prediction, level and next level of four steps, from pure noise to clean."""
    latents, velocity = torch.randn(2, 4, 2, 3, 3, generator=seeded(0))
    level, after = flow_level(*SIGMAS), flow_level(*NEXT_SIGMAS)
    return latents, velocity, of_velocity(latents, velocity, level), level, after


# --- against slow references --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flow_sde", "cps", "ancestral"])
def test_steps_and_log_probabilities_equal_independent_float64_loops(
    kind: str, flow_steps: tuple[Tensor, Tensor, Prediction, Level, Level]
) -> None:
    latents, velocity, prediction, level, after = flow_steps
    exact = latents.double().numpy(), velocity.double().numpy(), SIGMAS, NEXT_SIGMAS
    dynamics: Dynamics
    match kind:
        case "flow_sde":
            dynamics = partial(flow_sde, noise_scale=0.7, sigma_cap=CAP)
            mean, std = reference.flow_sde(*exact, noise_scale=0.7, sigma_cap=CAP)
        case "cps":
            dynamics = partial(cps, noise_scale=0.8)
            mean, std = reference.cps(*exact, noise_scale=0.8)
        case _:
            dynamics = partial(ancestral, eta=0.6)
            alpha, next_alpha = ([1 - s for s in sigmas] for sigmas in (SIGMAS, NEXT_SIGMAS))
            clean, noise = prediction.clean.numpy(), prediction.noise.numpy()
            mean, std = reference.ancestral(clean, noise, alpha, SIGMAS, next_alpha, NEXT_SIGMAS, eta=0.6)
    transition = dynamics(latents, prediction, level, after)
    assert_close(transition.mean.double(), torch.from_numpy(mean), rtol=1e-5, atol=1e-5)
    assert_close(transition.std.double(), torch.tensor(std, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    drawn = sample(transition, generators=[seeded(1)])
    expected = torch.tensor(reference.mean_log_prob(drawn.double().numpy(), mean, std), dtype=torch.float64)
    assert_close(mean_log_prob(transition, drawn).double(), expected, rtol=1e-4, atol=1e-4)


def test_flow_sde_by_hand() -> None:
    """sigma 0.5 to 0.4, scale 1: g = 1, std = sqrt(0.1); x = 1 and v = 2: drift = 2 + (1 + 0.5 * 2) = 4."""
    level, after = flow_level(0.5), flow_level(0.4)
    latents, velocity = torch.full((1, 1, 1, 1), 1.0), torch.full((1, 1, 1, 1), 2.0)
    step = flow_sde(latents, of_velocity(latents, velocity, level), level, after, noise_scale=1.0, sigma_cap=CAP)
    assert step.mean.item() == pytest.approx(1 - 0.4)
    assert step.std.item() == pytest.approx(math.sqrt(0.1))


def test_the_ancestral_step_is_ddim_if_the_variance_is_preserved() -> None:
    sigma = torch.tensor([0.99, 0.8, 0.3])
    level = Level((1 - sigma**2).sqrt(), sigma, sigma)
    next_sigma = sigma - torch.tensor([0.1, 0.5, 0.3])
    after = Level((1 - next_sigma**2).sqrt(), next_sigma, next_sigma)
    latents, clean, noise = torch.randn(3, 3, 1, 2, 2, generator=seeded(0))
    one, other = (step(latents, Prediction(clean, noise), level, after, eta=0.7) for step in (ancestral, ddim))
    assert_close(one.mean, other.mean, rtol=1e-5, atol=1e-5)
    assert_close(one.std, other.std, rtol=1e-5, atol=1e-6)


# --- against diffusers --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flow_sde", "cps", "ancestral"])
def test_without_noise_every_step_is_the_euler_step_of_diffusers(kind: str) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    from rlhf_t2i.models.levels import FlowLevels

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    levels = FlowLevels(scheduler.config, device=torch.device("cpu"), shift=1.0)
    schedule, steps = levels.schedule(6), torch.arange(6)
    level, after = schedule.at(steps), schedule.at(steps + 1)
    latents, velocity = torch.randn(2, 6, 2, 3, 3, generator=seeded(0))
    without_noise: dict[str, Dynamics] = {
        "flow_sde": partial(flow_sde, noise_scale=0.0, sigma_cap=float(schedule.sigma[1])),
        "cps": partial(cps, noise_scale=0.0),
        "ancestral": partial(ancestral, eta=0.0),
    }
    found = without_noise[kind](latents, levels.to_prediction(latents, velocity, level), level, after)
    scheduler.set_timesteps(6)
    expected = [scheduler.step(velocity[[i]], t, latents[[i]])[0] for i, t in enumerate(scheduler.timesteps)]
    assert_close(level.model_time, scheduler.timesteps)
    assert_close(found.mean, torch.cat(expected), rtol=0, atol=1e-5)
    assert found.std.eq(0).all()


def test_training_levels_and_targets_equal_those_of_diffusers() -> None:
    """`scale_noise`, at every level of the model's own schedule."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from rlhf_t2i.diffusion.forward import noise_to
    from rlhf_t2i.models.levels import FlowLevels

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    levels = FlowLevels(scheduler.config, device=torch.device("cpu"), shift=1.0)
    clean, noise = torch.randn(2, 1000, 1, 2, 2, generator=seeded(0))
    level = levels.at(torch.arange(1000))
    assert_close(level.model_time, scheduler.timesteps.flip(0))
    assert_close(noise_to(clean, level, noise), scheduler.scale_noise(clean, level.model_time, noise))
    prediction = levels.to_prediction(noise_to(clean, level, noise), noise - clean, level)
    assert_close(prediction.clean, clean, rtol=1e-5, atol=1e-5)
    assert_close(prediction.noise, noise, rtol=1e-5, atol=1e-5)
    assert_close(levels.to_output(Prediction(clean, noise), level), noise - clean)
    with pytest.raises(ValueError, match="times range from 5 to 1000; the model was trained at 0 to 999"):
        levels.at(torch.tensor([5, 1000]))


# --- marginals of a Gaussian, in closed form ----------------------------------------------------------


def variance_after(dynamics: Dynamics, schedule: Schedule, *, std: float) -> list[float]:
    """Return the variance of latents at each level, for clean ~ Normal(0, std^2) and the exact predictor.

    Every step is linear in x, so zeros has to be drawn.
    """
    found = [(schedule.alpha[0] ** 2 * std**2 + schedule.sigma[0] ** 2).item()]
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for index in range(schedule.num_steps):
        level, after = (schedule.at(torch.tensor([index + i])) for i in (0, 1))
        total = per_image(level.alpha**2 * std**2 + level.sigma**2)
        prediction = Prediction(per_image(level.alpha) * std**2 / total * x, per_image(level.sigma) / total * x)
        step = dynamics(x, prediction, level, after)
        found.append(step.mean.item() ** 2 * found[-1] + step.std.item() ** 2)
    return found


def even_flow(num_steps: int, *, start: float = 1.0) -> Schedule:
    sigma = torch.linspace(start, 0.0, num_steps + 1, dtype=torch.float64)
    return Schedule(1 - sigma, sigma, sigma, kind="flow")


@pytest.mark.parametrize("std", [0.3, 1.5])
@pytest.mark.parametrize("kind", ["ode", "flow_sde", "ancestral"])
def test_the_marginals_of_the_sde_equal_those_of_the_ode(kind: str, std: float) -> None:
    """The variance is alpha^2 std^2 + sigma^2 at every level, with an error that falls with the step size.

    The schedule starts at sigma = 0.98: at 1 the SDE is singular, and the cap makes the first step inexact.
    """
    errors: list[float] = []
    for num_steps in (200, 2000):
        schedule = even_flow(num_steps, start=0.98)
        steps: dict[str, Dynamics] = {
            "ode": partial(ddim, eta=0.0),
            "flow_sde": partial(flow_sde, noise_scale=0.7, sigma_cap=0.99),
            "ancestral": partial(ancestral, eta=0.7),
        }
        exact = schedule.alpha**2 * std**2 + schedule.sigma**2
        found = torch.tensor(variance_after(steps[kind], schedule, std=std), dtype=torch.float64)
        errors.append(((found - exact).abs() / exact).max().item())
    assert errors[1] < 0.02
    assert errors[1] < 0.25 * errors[0]


def test_ancestral_noise_approaches_that_of_the_sde_for_small_steps() -> None:
    level, after = flow_level(0.6), flow_level(0.599)
    zeros = torch.zeros(1, 1, 1, 1)
    one = ancestral(zeros, Prediction(zeros, zeros), level, after, eta=0.5)
    other = flow_sde(zeros, Prediction(zeros, zeros), level, after, noise_scale=0.5 * math.sqrt(2), sigma_cap=CAP)
    assert one.std.item() == pytest.approx(other.std.item(), rel=0.01)


@pytest.mark.parametrize("step", [partial(ancestral, eta=1.0), partial(cps, noise_scale=0.8)])
def test_a_known_image_keeps_its_marginals_in_steps_of_any_size(step: Dynamics) -> None:
    """With the exact predictor of one image, x stays alpha' clean + sigma' noise."""
    clean = torch.zeros(1, 1, 1, 1)
    for sigma, next_sigma in pairwise((1.0, 0.9, 0.3, 0.0)):
        level, after = flow_level(sigma), flow_level(next_sigma)
        found = step(clean, Prediction(clean, clean + 1), level, after)
        assert found.mean.item() ** 2 + found.std.item() ** 2 == pytest.approx(next_sigma**2, abs=1e-6)


def test_the_last_step_returns_the_clean_latents_except_for_the_sde() -> None:
    level, after = flow_level(0.2), flow_level(0.0)
    latents = torch.ones(1, 1, 1, 1)
    prediction = of_velocity(latents, latents, level)
    for step in (partial(ancestral, eta=1.0), partial(cps, noise_scale=1.0)):
        found = step(latents, prediction, level, after)
        assert_close(found.mean, prediction.clean)
        assert found.std.item() == 0
    assert flow_sde(latents, prediction, level, after, noise_scale=0.7, sigma_cap=CAP).std.item() > 0.1


# --- choice of the step -------------------------------------------------------------------------------


def test_steps_are_stochastic_within_the_window_only(
    flow_steps: tuple[Tensor, Tensor, Prediction, Level, Level],
) -> None:
    """The window 0.2 < sigma <= 0.9 holds the second and third step."""
    latents, _, prediction, level, after = flow_steps
    noisy = partial(flow_sde, noise_scale=0.7, sigma_cap=CAP)
    found = windowed(latents, prediction, level, after, dynamics=noisy, first=0.9, end=0.2)
    inside, outside = noisy(latents, prediction, level, after), ddim(latents, prediction, level, after, eta=0.0)
    assert_close(found.mean[1:3], inside.mean[1:3], rtol=0, atol=0)
    assert_close(found.mean[[0, 3]], outside.mean[[0, 3]], rtol=0, atol=0)
    assert found.std.gt(0).tolist() == [False, True, True, False]


def test_the_stochastic_step_depends_on_the_kind_of_schedule() -> None:
    flow, sigma = even_flow(4), torch.linspace(0.9, 0.1, 4)
    diffusion = Schedule((1 - sigma**2).sqrt(), sigma, sigma)
    for schedule, step in ((flow, ancestral), (diffusion, ddim)):
        chosen = stochastic(schedule, eta=0.5)
        assert isinstance(chosen, partial)
        assert chosen.func is step
        assert chosen.keywords == {"eta": 0.5}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "EulerDiscreteScheduler"}, "is not one of a flow model"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "invert_sigmas"),
    ],
)
def test_schedulers_of_other_models_are_refused(config: dict[str, object], message: str) -> None:
    from rlhf_t2i.models.levels import FlowLevels

    with pytest.raises(ValueError, match=message):
        FlowLevels(config, device=torch.device("cpu"), shift=1.0)


def test_a_schedule_without_steps_is_refused() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    from rlhf_t2i.models.levels import FlowLevels

    levels = FlowLevels(FlowMatchEulerDiscreteScheduler().config, device=torch.device("cpu"), shift=1.0)
    with pytest.raises(ValueError, match="num_denoising_steps is 0; it must be at least 1"):
        levels.schedule(0)
