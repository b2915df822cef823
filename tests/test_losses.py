"""Losses by hand, against slow references, and their gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_t2i.losses import clipped_surrogate_loss, denoising_mse, diffusion_dpo_loss, negative_aware_loss
from tests import reference


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "expected"),
    [
        (0.0, 2.0, -2.0),  # on policy: minus the advantage
        (0.5, 1.0, -1.2),  # good image, already more likely: capped at 1 + c
        (-0.5, 1.0, -math.exp(-0.5)),  # good image, less likely: the full penalty
        (-0.5, -1.0, 0.8),  # bad image, already less likely: capped at 1 - c
        (0.5, -1.0, math.exp(0.5)),  # bad image, more likely: the full penalty
        (0.5, 0.0, 0.0),  # average image
    ],
)
def test_clipped_surrogate_by_hand(log_ratio: float, advantage: float, expected: float) -> None:
    loss = clipped_surrogate_loss(
        torch.tensor([log_ratio - 3.0]), torch.tensor([-3.0]), torch.tensor([advantage]), clip_range=0.2
    )
    assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("clip_range", [1e-4, 0.2])
def test_clipped_surrogate_equals_the_slow_reference(clip_range: float) -> None:
    generator = torch.Generator().manual_seed(0)
    old, advantage = torch.randn(2, 64, generator=generator)
    new = old + clip_range * 2 * torch.randn(64, generator=generator)

    loss = clipped_surrogate_loss(new, old, advantage, clip_range=clip_range)

    expected = reference.clipped_surrogate(new.tolist(), old.tolist(), advantage.tolist(), clip_range=clip_range)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_on_policy_gradient_is_reinforce() -> None:
    log_prob, advantage = torch.zeros(3, requires_grad=True), torch.tensor([1.0, -2.0, 0.5])
    clipped_surrogate_loss(log_prob, log_prob.detach(), advantage, clip_range=0.2).backward()
    assert_close(log_prob.grad, -advantage / 3)


def test_beyond_the_clip_range_only_a_change_in_the_wrong_direction_has_a_gradient() -> None:
    """Good and more likely, or bad and less likely: clipped. The other two cases keep their gradient."""
    log_prob = torch.tensor([0.5, -0.5, -0.5, 0.5], requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    clipped_surrogate_loss(log_prob, torch.zeros(4), advantage, clip_range=0.2).backward()
    assert_close(log_prob.grad, torch.tensor([0.0, 0.0, -math.exp(-0.5) / 4, math.exp(0.5) / 4]))


def test_a_wide_clip_range_leaves_the_importance_weighted_mean() -> None:
    log_prob, advantage = torch.tensor([0.7, -1.3, 0.2]), torch.tensor([1.0, -2.0, 0.5])
    loss = clipped_surrogate_loss(log_prob, torch.zeros(3), advantage, clip_range=1e6)
    assert_close(loss, -(log_prob.exp() * advantage).mean())


def test_the_loss_of_a_batch_is_the_mean_over_its_images() -> None:
    generator = torch.Generator().manual_seed(1)
    new, old, advantage = torch.randn(3, 8, generator=generator)
    batch = clipped_surrogate_loss(new, old, advantage, clip_range=0.1)
    parts = [
        clipped_surrogate_loss(new[i : i + 1], old[i : i + 1], advantage[i : i + 1], clip_range=0.1) for i in range(8)
    ]
    assert_close(batch, torch.stack(parts).mean())


def test_only_the_new_log_probability_gets_a_gradient() -> None:
    """A reward model with trainable parameters must not be trained by the policy's loss."""
    log_prob, old_log_prob, advantage = (torch.ones(4, requires_grad=True) for _ in range(3))
    clipped_surrogate_loss(log_prob, old_log_prob, advantage, clip_range=0.2).backward()
    assert log_prob.grad is not None
    assert old_log_prob.grad is None
    assert advantage.grad is None


# --- Diffusion-DPO ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("beta", "dpop_weight"), [(0.5, 0.0), (50.0, 0.0), (2000.0, 0.0), (50.0, 2.5)])
def test_diffusion_dpo_equals_the_slow_reference(beta: float, dpop_weight: float) -> None:
    errors = (1 + 0.1 / beta**0.5 * torch.randn(4, 32, generator=torch.Generator().manual_seed(0))).double()

    loss = diffusion_dpo_loss(*errors, beta=beta, dpop_weight=dpop_weight)

    expected = reference.diffusion_dpo(*errors.tolist(), beta=beta, dpop_weight=dpop_weight)
    assert loss.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dpop_weight", [0.0, 50.0])
def test_diffusion_dpo_starts_at_log_two(dpop_weight: float) -> None:
    """A policy equal to its reference has no preference, whatever the pair."""
    winner, loser = torch.tensor([0.3, 1.0]), torch.tensor([0.1, 1.5])
    loss = diffusion_dpo_loss(winner, loser, winner, loser, beta=5000.0, dpop_weight=dpop_weight)
    assert loss.item() == torch.tensor(2.0).log().item()


def test_the_gradient_of_diffusion_dpo_at_the_reference_is_a_quarter_of_beta() -> None:
    """d loss / d winner_error = beta / 2 * sigmoid(0) / B, and the negative of it for the loser's error."""
    winner, loser, *reference_errors = (torch.ones(4, requires_grad=True) for _ in range(4))
    diffusion_dpo_loss(winner, loser, *reference_errors, beta=8.0).backward()
    assert_close(winner.grad, torch.full((4,), 8.0 / 2 / 2 / 4))
    assert_close(loser.grad, -torch.full((4,), 8.0 / 2 / 2 / 4))
    assert [errors.grad for errors in reference_errors] == [None, None]


def test_the_logarithm_is_taken_before_the_mean() -> None:
    """A pair far on the right side does not compensate for one far on the wrong side."""
    moved = torch.tensor([-1.0, 1.0])
    loss = diffusion_dpo_loss(moved, torch.zeros(2), torch.zeros(2), torch.zeros(2), beta=20.0)
    assert loss.item() == pytest.approx((math.log1p(math.exp(-10)) + math.log1p(math.exp(10))) / 2)


def test_the_dpop_penalty_raises_the_loss_if_both_errors_rise() -> None:
    """The plain loss is below log 2 if the loser's error rises more; with the penalty it is above."""
    winner, loser = torch.tensor([0.1], requires_grad=True), torch.tensor([0.3])
    zero = torch.zeros(1)
    plain = diffusion_dpo_loss(winner, loser, zero, zero, beta=10.0)
    penalised = diffusion_dpo_loss(winner, loser, zero, zero, beta=10.0, dpop_weight=5.0)
    assert plain.item() < math.log(2) < penalised.item()
    (slope,) = torch.autograd.grad(plain, winner)
    (penalised_slope,) = torch.autograd.grad(penalised, winner)
    assert penalised_slope.item() > 6 * slope.item()


def test_the_dpop_penalty_is_zero_if_the_winners_error_fell() -> None:
    winner, loser, zero = torch.tensor([-0.1, 0.0]), torch.tensor([0.3, 0.2]), torch.zeros(2)
    plain = diffusion_dpo_loss(winner, loser, zero, zero, beta=10.0)
    assert diffusion_dpo_loss(winner, loser, zero, zero, beta=10.0, dpop_weight=5.0).item() == plain.item()


def test_the_gradient_of_a_huge_margin_is_finite() -> None:
    far, zero = torch.tensor([1e4], requires_grad=True), torch.zeros(1)
    diffusion_dpo_loss(far, zero, zero, zero, beta=5000.0).backward()
    assert far.grad is not None
    assert far.grad.item() == 2500.0


def test_denoising_mse_is_a_mean_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted, target = torch.randn(2, 3, 4, 8, 8, generator=generator).bfloat16()
    found = denoising_mse(predicted, target)
    assert found.dtype == torch.float32
    expected = reference.mean_squared_error(predicted.float().numpy(), target.float().numpy())
    assert_close(found, torch.tensor(expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_the_negative_aware_loss_equals_the_slow_reference(beta: float) -> None:
    new, old, clean = torch.randn(3, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    optimality = torch.tensor([0.0, 0.3, 0.8, 1.0])
    expected = reference.negative_aware(
        *(latents.double().numpy() for latents in (new, old, clean)), optimality.tolist(), beta=beta
    )
    loss = negative_aware_loss(new, old, clean, optimality, beta=beta)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_on_policy_the_negative_aware_gradient_is_weighted_by_the_advantage(beta: float) -> None:
    """With new = old the errors of positive and negative are equal: the gradient is 2 r - 1 times that of the error."""
    old, clean = torch.randn(2, 3, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    new, optimality = old.clone().requires_grad_(), torch.tensor([0.1, 0.5, 0.9])
    negative_aware_loss(new, old, clean, optimality, beta=beta).backward()
    scale = 2 / 18 / (old - clean).abs().mean(dim=(1, 2, 3)) / 3
    expected = ((2 * optimality - 1) * scale)[:, None, None, None] * (old - clean)
    assert_close(new.grad, expected, rtol=1e-4, atol=1e-6)
