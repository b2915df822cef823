"""The surrogate is pessimistic, and only the new density learns from it."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from torch.testing import assert_close

from rlhf_t2i.losses import clipped_surrogate_loss


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "expected"),
    [
        (0.0, 2.0, -2.0),  # on policy: minus the advantage
        (0.5, 1.0, -1.2),  # good image, already more likely: capped at 1 + c
        (-0.5, 1.0, -math.exp(-0.5)),  # good image, less likely: all that was lost
        (-0.5, -1.0, 0.8),  # bad image, already less likely: capped at 1 - c
        (0.5, -1.0, math.exp(0.5)),  # bad image, more likely: the full penalty
        (0.5, 0.0, 0.0),  # neither good nor bad
    ],
)
def test_clipped_surrogate_by_hand(log_ratio: float, advantage: float, expected: float) -> None:
    loss = clipped_surrogate_loss(
        torch.tensor([log_ratio - 3.0]), torch.tensor([-3.0]), torch.tensor([advantage]), clip_range=0.2
    )
    assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("clip_range", [1e-4, 0.2])
def test_clipped_surrogate_agrees_with_the_slow_reference(clip_range: float) -> None:
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


def test_beyond_the_clip_range_only_a_mistake_has_a_gradient() -> None:
    """Good and likelier, bad and unlikelier: enough. Good and unlikelier, bad and likelier: still to be mended."""
    log_prob = torch.tensor([0.5, -0.5, -0.5, 0.5], requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    clipped_surrogate_loss(log_prob, torch.zeros(4), advantage, clip_range=0.2).backward()
    assert_close(log_prob.grad, torch.tensor([0.0, 0.0, -math.exp(-0.5) / 4, math.exp(0.5) / 4]))


def test_a_wide_clip_range_leaves_the_importance_weighted_mean() -> None:
    log_prob, advantage = torch.tensor([0.7, -1.3, 0.2]), torch.tensor([1.0, -2.0, 0.5])
    loss = clipped_surrogate_loss(log_prob, torch.zeros(3), advantage, clip_range=1e6)
    assert_close(loss, -(log_prob.exp() * advantage).mean())


def test_a_batch_is_the_mean_of_its_images() -> None:
    generator = torch.Generator().manual_seed(1)
    new, old, advantage = torch.randn(3, 8, generator=generator)
    whole = clipped_surrogate_loss(new, old, advantage, clip_range=0.1)
    parts = [
        clipped_surrogate_loss(new[i : i + 1], old[i : i + 1], advantage[i : i + 1], clip_range=0.1) for i in range(8)
    ]
    assert_close(whole, torch.stack(parts).mean())


def test_gradients_reach_only_the_new_density() -> None:
    """A judge whose parameters learn must not be trained by the painter's loss."""
    log_prob, old_log_prob, advantage = (torch.ones(4, requires_grad=True) for _ in range(3))
    clipped_surrogate_loss(log_prob, old_log_prob, advantage, clip_range=0.2).backward()
    assert log_prob.grad is not None
    assert old_log_prob.grad is None
    assert advantage.grad is None
