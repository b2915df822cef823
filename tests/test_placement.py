"""A reward with a batch size and a device of its own, and the reward that needs an optional package."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_t2i.rewards.load import load_reward
from rlhf_t2i.rewards.placement import Placed, placed
from rlhf_t2i.settings.paths import Rewards, resolve_paths

IMAGES = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
PROMPTS = list("abcde")


def recording(calls: list[Any]) -> Any:
    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        calls.append((images.device.type, "".join(prompts)))
        return images.flatten(1).sum(1)

    return reward


def test_a_batch_size_and_a_device_of_its_own_change_no_score_and_no_gradient() -> None:
    """In float64 on the CPU, where a batch cannot change the order of a sum."""
    calls: list[Any] = []
    reward = placed(lambda path: recording(calls), "models/x(batch_size=2, device='cpu')")
    images = IMAGES.double().requires_grad_()
    scores = reward(images, PROMPTS)
    assert torch.equal(scores, images.flatten(1).sum(1))
    assert calls == [("cpu", "ab"), ("cpu", "cd"), ("cpu", "e")]
    assert torch.equal(torch.autograd.grad(scores.sum(), images)[0], torch.ones_like(images))


def test_images_go_to_the_device_of_the_reward_and_scores_come_back() -> None:
    """To the meta device, which has shapes only."""
    devices: list[str] = []

    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        devices.append(images.device.type)
        return torch.arange(float(len(prompts)))

    scores = Placed(reward, None, torch.device("meta"))(IMAGES, PROMPTS)
    assert (devices, scores.tolist(), scores.device) == (["meta"], [0, 1, 2, 3, 4], IMAGES.device)


def test_a_path_without_arguments_or_with_parentheses_in_its_name_stays(tmp_path: Path) -> None:
    (odd := tmp_path / "model (1)").mkdir()
    for path in ("models/x", str(odd)):
        assert placed(lambda path: path, path) == path


@pytest.mark.parametrize("arguments", ["size=2", "batch_size=0", "batch_size='a'", "batch_size=True", "device=1"])
def test_other_arguments_are_refused(arguments: str) -> None:
    with pytest.raises(ValueError, match=r"are no placement of a reward; write PATH\(batch_size=8"):
        placed(lambda path: path, f"models/x({arguments})")


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"The device 'cuda:99' of a reward cannot be used: "):
        placed(lambda path: path, "models/x(device='cuda:99')")


def test_a_path_with_arguments_may_be_relative_to_its_file_of_options(tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    resolved = resolve_paths("clip:clip(batch_size=8)", Rewards(several=False), folder=tmp_path)
    assert resolved == f"clip:{tmp_path / 'clip'}(batch_size=8)"


# --- nudity -----------------------------------------------------------------------------------------


@pytest.fixture
def without_module(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The module of the reward is imported anew, and forgotten afterwards."""
    monkeypatch.setitem(sys.modules, "rlhf_t2i.rewards.nudity", ModuleType("nudity"))  # or it would stay afterwards
    monkeypatch.delitem(sys.modules, "rlhf_t2i.rewards.nudity")
    monkeypatch.setattr("rlhf_t2i.rewards.nudity", None, raising=False)
    return monkeypatch


def test_nudity_by_hand(without_module: pytest.MonkeyPatch) -> None:
    """Of what a detector finds, the highest score of a naked part counts; blue is the first channel."""
    given: list[np.ndarray] = []

    class Detector:
        def detect_batch(self, images: list[np.ndarray], batch_size: int) -> list[list[dict[str, Any]]]:
            given.extend(images)
            parts = [{"class": "FEET_EXPOSED", "score": 0.9}]
            naked = [{"class": "BUTTOCKS_EXPOSED", "score": 0.5}, {"class": "FEMALE_BREAST_EXPOSED", "score": 0.75}]
            return [[], parts, parts + naked]

    without_module.setitem(sys.modules, "nudenet", SimpleNamespace(NudeDetector=Detector))
    images = torch.zeros(3, 3, 2, 2)
    images[:, 0] = 1
    assert load_reward("nudity")(images, PROMPTS[:3]).tolist() == [1.0, 1.0, 0.25]
    assert given[0][0, 0].tolist() == [0, 0, 255]


def test_a_missing_package_is_named_with_its_command_when_the_reward_is_loaded(
    without_module: pytest.MonkeyPatch,
) -> None:
    without_module.setitem(sys.modules, "nudenet", None)
    with pytest.raises(ModuleNotFoundError, match=r"the reward 'nudity' needs: pip install 'rlhf-t2i\[safety\]'"):
        load_reward("nudity")


def test_the_detector_scores_an_image_alone_as_in_a_batch_and_finds_nothing_in_noise() -> None:
    pytest.importorskip("nudenet", reason="the extra safety is not installed")
    reward, images = load_reward("nudity"), torch.rand(3, 3, 40, 64, generator=torch.Generator().manual_seed(0))
    scores = reward(images, PROMPTS[:3])
    assert scores.tolist() == [reward(image[None], ["a"]).item() for image in images] == [1.0, 1.0, 1.0]


class Recording(torch.nn.Linear):
    """A network that notes the devices it is moved to."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        self.moves: list[str] = []

    def to(self, *args: Any, **kwargs: Any) -> Any:
        self.moves.append(str(args[0]))
        return super().to(*args, **kwargs)


class Scorer:
    """A reward as all of ours: its network follows the images."""

    def __init__(self) -> None:
        self.model = Recording()

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.model.to(images.device)
        self.model.moves.append("scores")
        return self.model(images.flatten(1).mean(1, keepdim=True))[:, 0]


def test_an_offloaded_reward_is_in_main_memory_between_its_calls_and_scores_alike() -> None:
    scorer, plain = SimpleNamespace(function=Scorer()), Scorer()
    plain.model.load_state_dict(scorer.function.model.state_dict())

    class Outer:
        """As a scorer of others is wrapped."""

        def __init__(self) -> None:
            self.function = scorer.function

        def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            return self.function(images, prompts)

    reward = placed(lambda path: Outer(), "models/x(batch_size=3, offload=True)")
    with torch.no_grad():
        assert torch.equal(reward(IMAGES, PROMPTS), plain(IMAGES, PROMPTS))
    assert scorer.function.model.moves == ["cpu", "scores", "cpu", "scores", "cpu"]


def test_a_reward_whose_gradient_is_used_stays_where_its_backward_pass_needs_it() -> None:
    reward = placed(lambda path: Scorer(), "models/x(offload=True)")
    reward(IMAGES.clone().requires_grad_(), PROMPTS)
    assert reward.function.model.moves == ["cpu", "scores"]


def test_offloading_a_reward_without_a_network_is_refused() -> None:
    reward = placed(lambda path: recording([]), "models/x(offload=True)")
    with pytest.raises(TypeError, match="holds no network"):
        reward(IMAGES, PROMPTS)
