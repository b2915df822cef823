"""A trained reward model as a reward of the recipes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch.testing import assert_close

from reward_model.scoring import LlavaReward
from rlhf_t2i.rewards.llava_reward import LlavaRewardFunction
from rlhf_t2i.rewards.load import load_reward, load_rewards
from rlhf_t2i.shapes.names import TOY_REWARD_MODEL_FOLDER
from tests.reward_models import reward_model_folder

PROMPTS = ["a red fox", "a blue fox", "a red fox"]
IMAGES = torch.rand(3, 3, 28, 28, generator=torch.Generator().manual_seed(0))


def test_the_reward_is_the_score() -> None:
    folder = reward_model_folder("llava")
    reward, expected = load_reward(f"llava_reward:{folder}"), LlavaReward.from_pretrained(folder).score(IMAGES, PROMPTS)
    assert torch.equal(reward(IMAGES, PROMPTS), expected)
    assert expected.unique().numel() == 3


def test_it_is_weighted_and_named_like_any_other_reward() -> None:
    folder = reward_model_folder("llava")
    total, each = load_rewards(f"llava_reward:{folder}=0.5,jpeg_compressibility")(IMAGES, PROMPTS)
    assert list(each) == [f"llava_reward:{folder}", "jpeg_compressibility"]
    assert torch.equal(total, 0.5 * each[f"llava_reward:{folder}"] + each["jpeg_compressibility"])


def test_its_gradient_reaches_the_pixels() -> None:
    images = IMAGES.clone().requires_grad_(True)
    LlavaRewardFunction(reward_model_folder("llava"))(images, PROMPTS).sum().backward()
    assert images.grad is not None
    assert (images.grad.abs().amax((1, 2, 3)) > 0).all()


def test_a_reward_model_without_scores_is_refused() -> None:
    with pytest.raises(ValueError, match="general-preference head"):
        load_reward(f"llava_reward:{reward_model_folder('llava', head='general_preference')}")


def test_a_missing_reward_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_reward(f"llava_reward:{tmp_path / 'nowhere'}")


def test_llava_reward_without_a_path_is_the_built_in_one() -> None:
    reward = load_reward("llava_reward").function
    assert isinstance(reward, LlavaRewardFunction)
    own = LlavaReward.from_pretrained(TOY_REWARD_MODEL_FOLDER)
    prompts = ["a red circle on a blue background"] * 3
    assert torch.equal(reward(IMAGES, prompts), own.score(IMAGES, prompts))


@pytest.mark.parametrize(("accelerator", "expected"), [(None, "cpu"), (torch.device("meta"), "meta")])
def test_a_reward_model_is_loaded_to_the_accelerator_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, accelerator: torch.device | None, expected: str
) -> None:
    """The meta device stands for a GPU."""
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available=False: accelerator if check_available else None
    )
    folder = reward_model_folder("llava")
    assert LlavaReward.from_pretrained(folder).device.type == expected
    assert LlavaReward.from_pretrained(folder, device="cpu").device.type == "cpu"
    assert load_reward(f"llava_reward:{folder}").function.reward_model.device.type == "cpu"  # type: ignore[attr-defined]


def test_a_reward_model_moves_and_is_described_in_one_line() -> None:
    reward_model = LlavaReward.from_pretrained(reward_model_folder("llava"), device="cpu")
    assert repr(reward_model) == "LlavaReward(alignment (scalar); llava, cpu)"
    assert reward_model.to("meta") is reward_model
    assert reward_model.device.type == "meta"


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "phi3_v"])
def test_a_merged_lora_scores_alike_and_is_gone(family: str) -> None:
    """The weights of the LoRA are random here, so that it matters."""
    model, expected = (LlavaReward.from_pretrained(reward_model_folder(family), device="cpu") for _ in range(2))
    before = expected.score(IMAGES, PROMPTS)
    for layer in (m for m in model.model.modules() if isinstance(m, LoraLayer)):
        layer.scaling = dict.fromkeys(layer.scaling, 0.0)
    assert not torch.allclose(model.score(IMAGES, PROMPTS), before, atol=1e-4)
    merged = expected.merge_lora().merge_lora()
    assert not any(isinstance(m, LoraLayer) for m in merged.model.modules())
    assert_close(merged.score(IMAGES, PROMPTS), before, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="cannot be added to a backbone that a LoRA was merged into"):
        merged.add(reward_model_folder(family), name="other")


def test_several_perspectives_are_not_merged() -> None:
    model = LlavaReward.from_pretrained(reward_model_folder("llava"), device="cpu")
    model.add(reward_model_folder("llava", seed=1), name="other")
    with pytest.raises(ValueError, match="There are 2 perspectives"):
        model.merge_lora()


def test_a_reward_is_merged_by_an_argument(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(reward_model_folder("llava"), tmp_path / "model"))  # loaded once a process
    reward = load_reward(f"llava_reward:{folder}(merge=True)")
    expected = LlavaReward.from_pretrained(folder, device="cpu").score(IMAGES, PROMPTS)
    assert_close(reward(IMAGES, PROMPTS), expected, rtol=1e-5, atol=1e-5)
    assert reward.function.reward_model.model.is_merged  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="merge is 1; it must be True or False"):
        load_reward(f"llava_reward:{folder}(merge=1)")
