"""The gradient of a reward: its value, its way to the images, and the refusal of rewards that have none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlhf_t2i.rewards.gradient import require_gradient, score_with_gradient
from rlhf_t2i.rewards.load import CheckedReward, WeightedSum, load_rewards

PROMPTS = ["a red circle on a blue background", "a blue square on a red background"]


def contrast(images: Tensor, prompts: list[str]) -> Tensor:
    return images.square().mean(dim=(1, 2, 3))


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    return images.mean(dim=(1, 2, 3))


def detached(images: Tensor, prompts: list[str]) -> Tensor:
    return images.detach().mean(dim=(1, 2, 3))


def constant_of_a_parameter(images: Tensor, prompts: list[str]) -> Tensor:
    return torch.ones(len(images), requires_grad=True) * 2


def steep_at_black(images: Tensor, prompts: list[str]) -> Tensor:
    return images.mean(dim=(1, 2, 3)).sqrt()


def sum_of(*parts: tuple[str, float]) -> WeightedSum:
    return WeightedSum(tuple((CheckedReward(name, globals()[name]), weight) for name, weight in parts))


def random_images(*, low: float = -0.5, high: float = 1.5) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (low + (high - low) * torch.rand(2, 3, 8, 8, generator=generator)).requires_grad_()


def test_several_rewards_sum_with_their_weights_and_so_do_their_gradients() -> None:
    images = random_images()
    scored = score_with_gradient(sum_of(("contrast", 2.0), ("brightness", -0.5)), images, PROMPTS)
    shown = images.detach().clamp(0, 1)
    assert_close(scored.rewards, 2 * contrast(shown, PROMPTS) - 0.5 * brightness(shown, PROMPTS))
    assert_close(scored.scores, {"contrast": contrast(shown, PROMPTS), "brightness": brightness(shown, PROMPTS)})
    expected = (4 * shown - 0.5) / (3 * 8 * 8)
    assert_close(scored.pixel_gradient, expected)
    (found,) = torch.autograd.grad((torch.tensor([1.0, -3.0]) * scored.rewards).sum(), images)
    assert_close(found, torch.tensor([1.0, -3.0])[:, None, None, None] * expected)


def test_a_pixel_above_one_is_scored_as_one_and_keeps_its_gradient() -> None:
    images = torch.full((1, 3, 4, 4), 1.7, requires_grad=True)
    scored = score_with_gradient(sum_of(("contrast", 1.0)), images, PROMPTS[:1])
    assert scored.rewards.item() == 1
    scored.rewards.sum().backward()
    assert images.grad is not None
    assert_close(images.grad, torch.full_like(images, 2 / 48))


def test_the_gradient_of_the_built_in_reward_model_equals_finite_differences() -> None:
    images = random_images(low=0.2, high=0.8)
    images = torch.nn.functional.interpolate(images.detach(), (32, 32), mode="bilinear").requires_grad_()
    reward = load_rewards("llava_reward")
    scored = score_with_gradient(reward, images, PROMPTS)
    length = scored.pixel_gradient.flatten(1).norm(dim=1)[:, None, None, None]
    # The score is steep: with a step of 1e-3 its curvature adds 3 %.
    step = 2e-4 * scored.pixel_gradient / length
    with torch.no_grad():
        ends = [reward(images + sign * step, PROMPTS)[0] for sign in (1, -1)]
    assert_close((ends[0] - ends[1]) / 4e-4, length.flatten(), rtol=2e-2, atol=0)


def test_a_reward_may_normalise_in_place() -> None:
    def stretched(images: Tensor, prompts: list[str]) -> Tensor:
        images.sub_(0.5).mul_(2)
        return images.square().mean(dim=(1, 2, 3))

    reward = WeightedSum(((CheckedReward("stretched", stretched), 1.0), (CheckedReward("contrast", contrast), 1.0)))
    images = random_images()
    require_gradient(reward, prompt=PROMPTS[0])
    scored, alone = (score_with_gradient(each, images, PROMPTS) for each in (reward, sum_of(("contrast", 1.0))))
    assert torch.equal(scored.scores["contrast"], alone.scores["contrast"])
    clamped = images.detach().clamp(0, 1)
    assert_close(scored.pixel_gradient - alone.pixel_gradient, 4 * (2 * clamped - 1) / clamped[0].numel())


# --- refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["oracle", "oracle_pass", "jpeg_compressibility", "jpeg_incompressibility"])
def test_built_in_rewards_without_a_gradient_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"'{name}' has no gradient .* recipes/ddpo\.py, which takes any reward"):
        require_gradient(load_rewards(f"llava_reward,{name}=0.1"), prompt=PROMPTS[0])


@pytest.mark.parametrize("name", ["detached", "constant_of_a_parameter"])
def test_a_users_reward_without_a_gradient_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"'{name}' has no gradient with respect to the pixels"):
        require_gradient(sum_of(("contrast", 1.0), (name, 1.0)), prompt=PROMPTS[0])
    with pytest.raises(ValueError, match=rf"'{name}' has no gradient"):
        score_with_gradient(sum_of((name, 1.0)), random_images(), PROMPTS)


def test_differentiable_rewards_are_accepted() -> None:
    require_gradient(load_rewards("llava_reward,tests.test_reward_gradient:contrast=0.5"), prompt=PROMPTS[0])


def test_a_gradient_that_is_not_finite_names_the_reward_and_the_prompt() -> None:
    images = torch.stack([torch.ones(3, 4, 4), torch.zeros(3, 4, 4)])
    with pytest.raises(
        ValueError, match=r"gradient of the reward 'steep_at_black' is not finite for the prompt 'a blue"
    ):
        score_with_gradient(sum_of(("contrast", 1.0), ("steep_at_black", 1.0)), images, PROMPTS)
