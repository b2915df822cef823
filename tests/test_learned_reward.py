"""A trained judge as a reward of a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from reward_model.scoring import LlavaReward
from rlhf_t2i.rewards.learned import BUILT_IN_JUDGE, LearnedReward
from rlhf_t2i.rewards.load import load_reward, load_rewards
from tests.judges import judge_folder

PROMPTS = ["a red fox", "a blue fox", "a red fox"]
PICTURES = torch.rand(3, 3, 28, 28, generator=torch.Generator().manual_seed(0))


def test_a_judge_rewards_with_its_own_scores() -> None:
    folder = judge_folder("llava")
    reward, expected = load_reward(f"judge:{folder}"), LlavaReward.from_pretrained(folder).score(PICTURES, PROMPTS)
    assert torch.equal(reward(PICTURES, PROMPTS), expected)
    assert expected.unique().numel() == 3


def test_it_is_weighted_and_named_like_any_other() -> None:
    folder = judge_folder("llava")
    total, each = load_rewards(f"judge:{folder}=0.5,jpeg_compressibility")(PICTURES, PROMPTS)
    assert list(each) == [f"judge:{folder}", "jpeg_compressibility"]
    assert torch.equal(total, 0.5 * each[f"judge:{folder}"] + each["jpeg_compressibility"])


def test_its_gradient_reaches_the_pixels() -> None:
    pictures = PICTURES.clone().requires_grad_(True)
    LearnedReward(judge_folder("llava"))(pictures, PROMPTS).sum().backward()
    assert pictures.grad is not None
    assert (pictures.grad.abs().amax((1, 2, 3)) > 0).all()


def test_a_judge_without_scores_is_refused_before_anything_is_painted() -> None:
    with pytest.raises(ValueError, match="general-preference head"):
        load_reward(f"judge:{judge_folder('llava', head='general_preference')}")


def test_a_judge_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_reward(f"judge:{tmp_path / 'nowhere'}")


def test_the_name_judge_is_the_built_in_one() -> None:
    reward = load_reward("judge").function
    assert isinstance(reward, LearnedReward)
    own = LlavaReward.from_pretrained(BUILT_IN_JUDGE)
    prompts = ["a red circle on a blue background"] * 3
    assert torch.equal(reward(PICTURES, prompts), own.score(PICTURES, prompts))
