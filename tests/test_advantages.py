"""Advantages by hand, in the limits, and against the slow reference."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor
from torch.testing import assert_close

from rlhf_t2i.advantages import (
    PerPromptHistory,
    group_relative_advantages,
    num_degenerate_groups,
    whole_batch_advantages,
)
from tests import reference


def random_steps(num_steps: int, *, prompts: str = "abcde", seed: int = 0) -> list[tuple[list[str], Tensor]]:
    """Return three of the prompts and the rewards of their four images each, for every step."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [[prompts[i] for i in torch.randperm(len(prompts), generator=generator)[:3]] for _ in range(num_steps)]
    return [(own, torch.randn(3, 4, generator=generator) * 2 + 1) for own in chosen]


def full_history(rewards: Tensor) -> Tensor:
    """A history that is used at once and holds only this step: the same as the group."""
    size = rewards.shape[1]
    return PerPromptHistory(size=size, min_count=size)([str(i) for i in range(len(rewards))], rewards)


def short_history(rewards: Tensor) -> Tensor:
    """A history that is never long enough: the same as the whole batch."""
    return PerPromptHistory(size=1000, min_count=1000)([str(i) for i in range(len(rewards))], rewards)


METHODS = pytest.mark.parametrize(
    "method", [group_relative_advantages, whole_batch_advantages, full_history, short_history]
)
Method = Callable[[Tensor], Tensor]


def test_tests_check_the_shapes_that_annotations_state() -> None:
    with pytest.raises(TypeCheckError, match="rewards"):
        group_relative_advantages(torch.zeros(4))


def test_a_group_by_hand() -> None:
    rewards = torch.tensor([[0.0, 2.0], [5.0, 5.0], [1.0, -3.0]])
    assert_close(group_relative_advantages(rewards), torch.tensor([[-1.0, 1.0], [0.0, 0.0], [1.0, -1.0]]))


def test_the_whole_batch_by_hand() -> None:
    """Mean 2, mean square distance (4 + 0 + 0 + 4) / 4 = 2."""
    advantages = whole_batch_advantages(torch.tensor([[0.0, 2.0], [2.0, 4.0]]))
    assert_close(advantages, torch.tensor([[-math.sqrt(2), 0.0], [0.0, math.sqrt(2)]]))


def test_a_history_by_hand() -> None:
    """The second step is compared with 0, 2, 4, 6: mean 3, variance 5."""
    history = PerPromptHistory(size=4, min_count=4)
    history(["a fox"], torch.tensor([[0.0, 2.0]]))
    advantages = history(["a fox"], torch.tensor([[4.0, 6.0]]))
    assert_close(advantages, torch.tensor([[1 / math.sqrt(5), 3 / math.sqrt(5)]]))


@METHODS
def test_equals_the_slow_reference(method: Method) -> None:
    rewards = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)) * 30 + 100
    rewards[2] = 4.5
    slow = reference.group_relative if method in (group_relative_advantages, full_history) else reference.whole_batch
    assert_close(method(rewards), torch.tensor(slow(rewards.tolist())), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("size", "min_count"), [(4, 1), (6, 6), (32, 9)])
def test_a_history_equals_the_slow_reference_at_every_step(size: int, min_count: int) -> None:
    steps, history = random_steps(12), PerPromptHistory(size=size, min_count=min_count)
    expected = reference.per_prompt_history([(p, r.tolist()) for p, r in steps], size=size, min_count=min_count)
    for (prompts, rewards), slow in zip(steps, expected, strict=True):
        assert_close(history(prompts, rewards), torch.tensor(slow), rtol=1e-4, atol=1e-5)


def test_the_advantages_of_a_group_sum_to_zero() -> None:
    rewards = torch.rand(6, 16, generator=torch.Generator().manual_seed(0)) * 50
    advantages = group_relative_advantages(rewards)
    assert_close(advantages.sum(1), torch.zeros(6), rtol=0, atol=1e-4)
    assert_close(advantages.square().mean(1), torch.ones(6), rtol=1e-4, atol=0)


@METHODS
def test_the_advantages_of_a_batch_sum_to_zero(method: Method) -> None:
    rewards = torch.rand(6, 16, generator=torch.Generator().manual_seed(0))
    assert method(rewards).sum().item() == pytest.approx(0, abs=1e-3)


@METHODS
@pytest.mark.parametrize("reward", [0.0, 0.1, 1.0, -63.217, 10_000.3])
@pytest.mark.parametrize("images_per_prompt", [1, 7, 12])
def test_equal_rewards_give_exact_zeros(method: Method, reward: float, images_per_prompt: int) -> None:
    """For rewards of any size: the float32 mean of equal numbers can differ from the number."""
    advantages = method(torch.full((2, images_per_prompt), reward))
    assert advantages.tolist() == [[0.0] * images_per_prompt] * 2


@METHODS
def test_offset_and_scale_of_rewards_do_not_matter(method: Method) -> None:
    rewards = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    assert_close(method(5 * rewards - 3), method(rewards), rtol=1e-4, atol=1e-4)


@METHODS
@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_equal_is_relative_to_the_size_of_rewards(method: Method, scale: float) -> None:
    """A reward in other units teaches the same, and what rounding makes of equal rewards teaches nothing."""
    rewards = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    assert_close(method(scale * rewards), method(rewards), rtol=1e-4, atol=1e-4)
    equal = torch.full((4, 6), 0.3 * scale)
    equal[:, 0] *= 1 + 2e-7
    assert method(equal).eq(0).all()
    assert num_degenerate_groups(scale * rewards) == 0
    assert num_degenerate_groups(equal) == 4


@pytest.mark.parametrize("num_good", [1, 3, 7])
def test_the_advantages_of_binary_rewards_by_hand(num_good: int) -> None:
    """With a fraction p of ones, 1 becomes sqrt((1 - p) / p) and 0 becomes -sqrt(p / (1 - p))."""
    rewards = torch.zeros(1, 8)
    rewards[0, :num_good] = 1
    p = num_good / 8
    advantages = group_relative_advantages(rewards)[0]
    assert_close(advantages[:num_good], torch.full((num_good,), math.sqrt((1 - p) / p)))
    assert_close(advantages[num_good:], torch.full((8 - num_good,), -math.sqrt(p / (1 - p))))


def test_rewards_of_another_prompt_change_whole_batch_but_not_group_advantages() -> None:
    rewards = torch.tensor([[0.0, 1.0, 2.0], [4.0, 6.0, 11.0]])
    raised = rewards + torch.tensor([[0.0], [100.0]])
    assert_close(group_relative_advantages(raised)[0], group_relative_advantages(rewards)[0])
    assert (whole_batch_advantages(raised)[0] < -0.9).all()


@METHODS
def test_the_order_of_prompts_and_images_does_not_matter(method: Method) -> None:
    rewards = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    prompts, images = torch.tensor([2, 0, 3, 1]), torch.tensor([5, 3, 0, 1, 4, 2])
    assert_close(method(rewards[prompts][:, images]), method(rewards)[prompts][:, images])


def test_a_history_belongs_to_the_prompt_not_to_its_row() -> None:
    orders = [[0, 1, 2], [2, 0, 1], [1, 2, 0]]
    steps = random_steps(3, prompts="abc")
    straight, shuffled = (PerPromptHistory(size=8, min_count=5) for _ in range(2))
    for (prompts, rewards), order in zip(steps, orders, strict=True):
        expected = straight(prompts, rewards)
        assert_close(shuffled([prompts[i] for i in order], rewards[order]), expected[order])


def test_below_min_count_a_prompt_is_compared_with_the_whole_batch() -> None:
    """With four images per step the history has eight rewards after the second step."""
    history = PerPromptHistory(size=32, min_count=8)
    first, second = (torch.rand(2, 4, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    assert_close(history(["a", "b"], first), whole_batch_advantages(first))
    both = torch.cat([first, second], dim=1)
    assert_close(history(["a", "b"], second), group_relative_advantages(both)[:, 4:])


def test_only_prompts_below_min_count_are_compared_with_the_whole_batch() -> None:
    history = PerPromptHistory(size=32, min_count=8)
    first, second = (torch.rand(2, 4, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    history(["old", "other"], first)
    advantages = history(["new", "old"], second)
    assert_close(advantages[0], whole_batch_advantages(second)[0])
    assert_close(advantages[1:], group_relative_advantages(torch.cat([first[:1], second[1:]], dim=1))[:, 4:])


def test_a_history_drops_rewards_beyond_its_size() -> None:
    with_old_rewards, without = (PerPromptHistory(size=8, min_count=8) for _ in range(2))
    with_old_rewards(["a fox"], torch.full((1, 5), 1000.0))
    for seed in (0, 1):
        rewards = torch.rand(1, 4, generator=torch.Generator().manual_seed(seed))
        advantages = with_old_rewards(["a fox"], rewards), without(["a fox"], rewards)
    assert_close(*advantages)


def test_a_prompt_that_occurs_twice_in_a_step_is_compared_with_both_its_rows() -> None:
    rewards = torch.tensor([[0.0, 1.0], [2.0, 5.0]])
    advantages = PerPromptHistory(size=4, min_count=4)(["a fox", "a fox"], rewards)
    assert_close(advantages, whole_batch_advantages(rewards))


def test_a_restored_history_gives_the_same_advantages() -> None:
    steps, history = random_steps(9), PerPromptHistory(size=6, min_count=5)
    for prompts, rewards in steps[:5]:
        history(prompts, rewards)
    restored = PerPromptHistory(size=6, min_count=5)
    restored.load_state_dict(history.state_dict())
    for prompts, rewards in steps[5:]:
        assert_close(restored(prompts, rewards), history(prompts, rewards), rtol=0, atol=0)


def test_a_stored_state_does_not_change_afterwards() -> None:
    history = PerPromptHistory(size=6, min_count=1)
    history(["a fox"], torch.tensor([[1.0, 2.0]]))
    state = history.state_dict()
    history(["a fox"], torch.tensor([[3.0, 4.0]]))
    assert state == {"a fox": [1.0, 2.0]}


def test_the_rewards_are_not_modified() -> None:
    rewards = torch.tensor([[0.0, 1.0], [2.0, 5.0]])
    PerPromptHistory(size=4, min_count=1)(["a", "b"], rewards)
    assert rewards.tolist() == [[0.0, 1.0], [2.0, 5.0]]


@pytest.mark.parametrize(("size", "min_count"), [(8, 9), (8, 0), (0, 0), (8, -1)])
def test_a_min_count_that_is_never_reached_is_refused_with_both_numbers(size: int, min_count: int) -> None:
    with pytest.raises(ValueError, match=rf"history_min_count \({min_count}\) .*history_size \({size}\)"):
        PerPromptHistory(size=size, min_count=min_count)


def test_the_numbers_of_prompts_and_rows_must_agree() -> None:
    with pytest.raises(ValueError, match="zip"):
        PerPromptHistory(size=4, min_count=1)(["a", "b"], torch.zeros(3, 2))
