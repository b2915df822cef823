"""Losses and probabilities of the reward model: by hand, in the limits, and against formulas in Python floats."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from reward_model.heads import Head, HeadKind, preference_logits
from reward_model.losses import decided_logits, label_losses, preference_losses, win_probability

LOGITS = [-3.0, -0.7, 0.0, 0.4, 2.5]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def outcomes(logits: Tensor, *, tie_width: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return P(first wins), P(tie), P(second wins) from the losses."""
    no, yes = torch.zeros(len(logits), dtype=torch.bool), torch.ones(len(logits), dtype=torch.bool)
    return (
        torch.exp(-preference_losses(logits, no, tie_width=tie_width)),
        torch.exp(-preference_losses(logits, yes, tie_width=tie_width)),
        torch.exp(-preference_losses(-logits, no, tie_width=tie_width)),
    )


# --- heads ----------------------------------------------------------------------------------------


def test_logits_of_scores_are_their_differences_over_the_temperature() -> None:
    first, second = torch.tensor([[0.3], [1.0]]), torch.tensor([[0.1], [1.5]])
    logits = preference_logits(first, second, kind="scalar", temperature=0.1)
    assert_close(logits, torch.tensor([2.0, -5.0]))


def test_logits_of_vectors_are_their_cross_product_over_the_temperature() -> None:
    first, second = torch.tensor([[1.0, 2.0], [0.5, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    logits = preference_logits(first, second, kind="general_preference", temperature=0.5)
    assert_close(logits, torch.tensor([(1 * 4 - 2 * 3) / 0.5, 0.5 / 0.5]))


@pytest.mark.parametrize(("kind", "size"), [("scalar", 1), ("general_preference", 2)])
def test_swapping_two_images_only_changes_the_sign(kind: HeadKind, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(50, size, generator=generator) for _ in range(2))
    there = preference_logits(first, second, kind=kind, temperature=0.3)
    back = preference_logits(second, first, kind=kind, temperature=0.3)
    assert torch.equal(there, -back)
    assert torch.all(preference_logits(first, first, kind=kind, temperature=0.3) == 0)


def test_general_preference_may_be_intransitive() -> None:
    """Three vectors a third of a turn apart: each beats the next."""
    angle = torch.tensor([0.0, 1.0, 2.0]) * 2 * math.pi / 3
    vectors = torch.stack([angle.cos(), angle.sin()], dim=1)
    logits = preference_logits(vectors, vectors.roll(-1, dims=0), kind="general_preference", temperature=1.0)
    assert torch.all(logits > 0.8)


@pytest.mark.parametrize(("kind", "size"), [("scalar", 1), ("general_preference", 2)])
def test_a_head_is_one_matrix_in_float32(kind: HeadKind, size: int) -> None:
    torch.manual_seed(0)
    head, width = Head(512, kind), 512
    assert head.weight.shape == (size, width)
    assert head.weight.std().item() == pytest.approx(1 / (width + 1), rel=0.1)  # as published
    assert head.bias is None
    coarse = torch.randn(3, width, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = head(coarse)
    assert out.dtype == torch.float32
    assert torch.equal(out, coarse.float() @ head.weight.T)


# --- comparisons ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("winner", "loser", "temperature", "margin", "expected"),
    [
        (0.0, 0.0, 0.1, 0.0, math.log(2)),  # indifferent
        (0.2, 0.1, 0.1, 0.0, math.log1p(math.exp(-1))),
        (0.2, 0.1, 0.5, 0.0, math.log1p(math.exp(-0.2))),  # a higher temperature makes the same gap less certain
        (0.1, 0.3, 0.1, 0.0, math.log1p(math.exp(2))),
        (0.4, 0.1, 0.1, 3.0, math.log(2)),  # ahead by exactly the margin
        (0.0, 0.0, 0.1, 1.5, math.log1p(math.exp(1.5))),
    ],
)
def test_bradley_terry_by_hand(winner: float, loser: float, temperature: float, margin: float, expected: float) -> None:
    first, second = torch.tensor([[winner]]), torch.tensor([[loser]])
    logits = preference_logits(first, second, kind="scalar", temperature=temperature)
    losses = preference_losses(logits, torch.tensor([False]), margin=torch.tensor([margin]))
    assert losses.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("tie_width", [0.01, 0.3, 1.0, 4.0])
def test_the_three_outcomes_follow_rao_and_kupper_and_sum_to_one(tie_width: float) -> None:
    logits = torch.tensor(LOGITS, dtype=torch.float64)
    won, tied, lost = outcomes(logits, tie_width=tie_width)
    assert_close(won + tied + lost, torch.ones_like(logits), rtol=0, atol=1e-12)
    # In the form of the paper, with theta = exp(tie_width) and strengths pi: pi_1 / (pi_1 + theta pi_2) and so on.
    theta, strength = math.exp(tie_width), logits.exp()
    assert_close(won, strength / (strength + theta))
    assert_close(lost, 1 / (1 + theta * strength))
    assert_close(tied, (theta**2 - 1) * strength / ((strength + theta) * (1 + theta * strength)))


def test_tie_width_zero_is_bradley_terry() -> None:
    logits = torch.tensor(LOGITS, dtype=torch.float64)
    won, tied, lost = outcomes(logits, tie_width=1e-9)
    assert_close(won, torch.sigmoid(logits), rtol=0, atol=1e-8)
    assert_close(lost, torch.sigmoid(-logits), rtol=0, atol=1e-8)
    assert tied.max() < 1e-8
    assert torch.all(outcomes(logits, tie_width=0.0)[1] == 0)  # a tie is impossible, its loss infinite


def test_the_loss_of_a_tie_is_symmetric_and_least_between_equals() -> None:
    logits = torch.arange(-40, 41, dtype=torch.float64) / 10
    losses = preference_losses(logits, torch.ones(81, dtype=torch.bool), tie_width=0.5)
    assert losses.argmin() == 40  # where the logit is 0
    assert_close(losses, losses.flip(0))
    # By hand: two equal images tie with probability (e^t - 1) / (e^t + 1) = tanh(t / 2).
    assert losses[40].item() == pytest.approx(-math.log(math.tanh(0.25)))


def test_a_larger_tie_width_makes_ties_likelier_and_wins_rarer() -> None:
    logits = torch.tensor(LOGITS)
    for narrow, wide in pairwise((0.1, 0.5, 2.0)):
        before, after = outcomes(logits, tie_width=narrow), outcomes(logits, tie_width=wide)
        assert torch.all(after[0] < before[0])
        assert torch.all(after[1] > before[1])
        assert torch.all(after[2] < before[2])


def test_a_tie_has_no_margin_and_every_row_its_own_outcome() -> None:
    logits, tie = torch.tensor([0.5, 0.5, -1.0]), torch.tensor([False, True, True])
    losses = preference_losses(logits, tie, margin=torch.tensor([0.2, 9.0, 9.0]), tie_width=0.3)
    by_hand = [
        -math.log(sigmoid(0.5 - 0.3 - 0.2)),
        -math.log(1 - sigmoid(0.5 - 0.3) - sigmoid(-0.5 - 0.3)),
        -math.log(1 - sigmoid(-1.0 - 0.3) - sigmoid(1.0 - 0.3)),
    ]
    assert_close(losses, torch.tensor(by_hand))


@pytest.mark.parametrize("tie_width", [0.0, 0.4])
def test_gradients_equal_finite_differences(tie_width: float) -> None:
    logits = torch.tensor([*LOGITS, *LOGITS], dtype=torch.float64, requires_grad=True)
    tie = torch.arange(10) >= (5 if tie_width else 10)
    margin = torch.linspace(0, 1, 10, dtype=torch.float64)

    def losses(at: Tensor) -> Tensor:
        return preference_losses(at, tie, margin=margin, tie_width=tie_width)

    losses(logits).sum().backward()
    step = 1e-5
    with torch.no_grad():
        slopes = (losses(logits + step) - losses(logits - step)) / (2 * step)
    assert_close(logits.grad, slopes, rtol=0, atol=1e-9)


@pytest.mark.parametrize("logit", [-1e4, -88.0, 0.0, 88.0, 1e4])
@pytest.mark.parametrize("tie_width", [0.0, 0.2])
def test_gradients_are_finite_for_impossible_ties_and_extreme_logits(logit: float, tie_width: float) -> None:
    """The unused branch of `where` must not leak nan into the other."""
    logits = torch.tensor([logit, 0.3], requires_grad=True)
    tie = torch.tensor([tie_width > 0, False])
    losses = preference_losses(logits, tie, tie_width=tie_width)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert logits.grad.isfinite().all()
    if tie_width == 0:
        assert losses[0].item() == pytest.approx(max(0.0, -logit) if abs(logit) > 50 else math.log(2), abs=1e-6)
        assert logits.grad[0].item() == pytest.approx(-sigmoid(-max(min(logit, 700), -700)))


# --- probabilities -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie_width", [0.0, 0.3, 2.0])
def test_win_probabilities_of_both_orders_sum_to_one(tie_width: float) -> None:
    logits = torch.cat([torch.tensor([*LOGITS, -1e4, 1e4]), torch.linspace(-9, 9, 50)])
    there, back = win_probability(logits, tie_width=tie_width), win_probability(-logits, tie_width=tie_width)
    assert_close(there + back, torch.ones_like(logits), rtol=0, atol=1e-6)
    assert torch.all((there >= 0) & (there <= 1))


def test_a_win_probability_counts_a_tie_for_half() -> None:
    logits = torch.tensor(LOGITS, dtype=torch.float64)
    won, tied, _ = outcomes(logits, tie_width=0.6)
    assert_close(win_probability(logits, tie_width=0.6), won + tied / 2)
    assert_close(win_probability(logits), torch.sigmoid(logits))


# --- labels ---------------------------------------------------------------------------------------


def test_label_losses_by_hand() -> None:
    scores, labels = torch.tensor([0.0, 2.0, 2.0, -3.0]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    expected = [-math.log(0.5), -math.log(sigmoid(2)), -math.log(1 - sigmoid(2)), -math.log(1 - sigmoid(-3))]
    assert_close(label_losses(scores, labels), torch.tensor(expected))


def test_the_gradient_of_a_label_loss_is_the_error_of_the_probability() -> None:
    scores, labels = torch.tensor([0.4, -1e4, 1e4], requires_grad=True), torch.tensor([1.0, 1.0, 0.0])
    losses = label_losses(scores, labels)
    losses.sum().backward()
    assert_close(losses.detach(), torch.tensor([math.log1p(math.exp(-0.4)), 1e4, 1e4]))
    assert_close(scores.grad, torch.tensor([sigmoid(0.4) - 1, -1.0, 1.0]))


@pytest.mark.parametrize("tie_width", [0.0, 0.5, 2.0])
def test_decided_logits_are_the_log_odds_given_no_tie(tie_width: float) -> None:
    logits = torch.tensor(LOGITS, dtype=torch.float64)
    first, _, second = outcomes(logits, tie_width=tie_width)
    assert_close(torch.sigmoid(decided_logits(logits, tie_width=tie_width)), first / (first + second))
    if tie_width == 0:
        assert_close(decided_logits(logits, tie_width=0.0), logits)
