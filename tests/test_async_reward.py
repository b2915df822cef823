"""Scoring in the background returns what scoring at once returns, and leaves no thread behind."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from rlhf_t2i.rewards.async_reward import AsyncReward
from rlhf_t2i.rewards.load import CheckedReward, WeightedSum
from tests.runs import redness

PROMPTS = [f"fox {i}" for i in range(10)]
IMAGES = torch.rand(10, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def slow_redness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    time.sleep(0.02 if prompts[0] == "fox 0" else 0)
    return redness(images, list(prompts))


def number(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return torch.tensor([float(prompt.split()[1]) for prompt in prompts])


def failing(images: Tensor, prompts: Sequence[str]) -> Tensor:
    if prompts[0] in ("fox 4", "fox 6"):
        raise KeyError(prompts[0])
    return number(images, prompts)


def sum_of(*rewards: object) -> WeightedSum:
    return WeightedSum(tuple((CheckedReward(each.__name__, each), 0.5) for each in rewards))  # type: ignore[attr-defined]


@pytest.mark.parametrize("sizes", [[10], [4, 4, 2], [1, 7, 2]])
def test_submissions_are_scored_as_one_batch_would_be(sizes: list[int]) -> None:
    reward = sum_of(slow_redness, number)
    with AsyncReward(reward, batch_size=3) as scoring:
        for _ in range(2):  # two training steps share one AsyncReward
            for rows in torch.arange(10).split(sizes):
                scoring.submit(IMAGES[rows], [PROMPTS[int(i)] for i in rows])
            total, scores = scoring.results()
            expected_total, expected = reward(IMAGES, PROMPTS)
            assert torch.equal(total, expected_total)
            assert list(scores) == list(expected) == ["slow_redness", "number"]
            assert all(torch.equal(scores[name], expected[name]) for name in expected)


def test_submit_returns_while_a_reward_is_still_computed() -> None:
    submitted = threading.Event()

    def patient(images: Tensor, prompts: Sequence[str]) -> Tensor:
        assert submitted.wait(20), "submit waited for the reward"
        return number(images, prompts)

    with AsyncReward(sum_of(patient)) as scoring:
        scoring.submit(IMAGES, PROMPTS)
        submitted.set()
        assert scoring.results()[0].tolist() == [0.5 * i for i in range(10)]


def test_the_first_failure_is_raised_with_its_traceback() -> None:
    with AsyncReward(sum_of(failing)) as scoring:
        for i in range(0, 10, 2):
            scoring.submit(IMAGES[i : i + 2], PROMPTS[i : i + 2])
        with pytest.raises(KeyError, match="fox 4") as caught:
            scoring.results()
        assert "failing" in "".join(traceback.format_exception(caught.value))
        scoring.submit(IMAGES[:2], PROMPTS[:2])
        assert scoring.results()[0].tolist() == [0, 0.5]


def test_an_exception_in_the_caller_cancels_what_has_not_started_and_leaves_no_thread() -> None:
    scored: list[str] = []
    began, failed = threading.Event(), threading.Event()

    def slow(images: Tensor, prompts: Sequence[str]) -> Tensor:
        began.set()
        assert failed.wait(20)
        scored.append(prompts[0])
        return number(images, prompts)

    def sample(scoring: AsyncReward) -> None:
        for i in range(5):
            scoring.submit(IMAGES[i : i + 1], PROMPTS[i : i + 1])
        assert began.wait(20)
        threading.Timer(0.2, failed.set).start()
        raise ZeroDivisionError

    before = threading.active_count()
    with pytest.raises(ZeroDivisionError), AsyncReward(sum_of(slow)) as scoring:
        sample(scoring)
    assert scored == ["fox 0"]
    assert threading.active_count() == before


def test_scores_have_no_gradient() -> None:
    images = IMAGES.clone().requires_grad_()
    with AsyncReward(sum_of(redness)) as scoring:
        scoring.submit(images, PROMPTS)
        assert not scoring.results()[0].requires_grad


def test_results_without_a_submission_are_refused() -> None:
    with AsyncReward(sum_of(redness)) as scoring, pytest.raises(ValueError, match="No images were submitted"):
        scoring.results()
