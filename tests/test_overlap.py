"""Judging in the background gives what judging at once gives, and leaves nothing behind."""

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

PROMPTS = [f"fox {i}" for i in range(10)]
IMAGES = torch.rand(10, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def redness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    time.sleep(0.02 if prompts[0] == "fox 0" else 0)
    return images[:, 0].mean((1, 2))


def number(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return torch.tensor([float(prompt.split()[1]) for prompt in prompts])


def a_judge_that_fails(images: Tensor, prompts: Sequence[str]) -> Tensor:
    if prompts[0] in ("fox 4", "fox 6"):
        raise KeyError(prompts[0])
    return number(images, prompts)


def sum_of(*judges: object) -> WeightedSum:
    return WeightedSum(tuple((CheckedReward(judge.__name__, judge), 0.5) for judge in judges))  # type: ignore[attr-defined]


@pytest.mark.parametrize("sizes", [[10], [4, 4, 2], [1, 7, 2]])
def test_what_is_submitted_in_parts_is_judged_as_the_whole(sizes: list[int]) -> None:
    reward = sum_of(redness, number)
    with AsyncReward(reward, batch_size=3) as judges:
        for _ in range(2):  # for each step of a training again
            for rows in torch.arange(10).split(sizes):
                judges.submit(IMAGES[rows], [PROMPTS[int(i)] for i in rows])
            totals, verdicts = judges.results()
            expected, each = reward(IMAGES, PROMPTS)
            assert torch.equal(totals, expected)
            assert list(verdicts) == list(each) == ["redness", "number"]
            assert all(torch.equal(verdicts[name], each[name]) for name in each)


def test_the_painter_goes_on_while_a_judge_still_looks() -> None:
    painted = threading.Event()

    def patient(images: Tensor, prompts: Sequence[str]) -> Tensor:
        assert painted.wait(20), "submit did not return before the judge was done"
        return number(images, prompts)

    with AsyncReward(sum_of(patient)) as judges:
        judges.submit(IMAGES, PROMPTS)
        painted.set()
        assert judges.results()[0].tolist() == [0.5 * i for i in range(10)]


def test_the_first_failure_is_raised_as_it_was() -> None:
    with AsyncReward(sum_of(a_judge_that_fails)) as judges:
        for i in range(0, 10, 2):
            judges.submit(IMAGES[i : i + 2], PROMPTS[i : i + 2])
        with pytest.raises(KeyError, match="fox 4") as caught:
            judges.results()
        assert "a_judge_that_fails" in "".join(traceback.format_exception(caught.value))
        judges.submit(IMAGES[:2], PROMPTS[:2])
        assert judges.results()[0].tolist() == [0, 0.5]


def test_nothing_is_left_when_the_caller_fails() -> None:
    """What has begun is waited for, what has not is dropped, and no thread remains."""
    seen: list[str] = []
    began, failed = threading.Event(), threading.Event()

    def slow(images: Tensor, prompts: Sequence[str]) -> Tensor:
        began.set()
        assert failed.wait(20)
        seen.append(prompts[0])
        return number(images, prompts)

    def paint(judges: AsyncReward) -> None:
        for i in range(5):
            judges.submit(IMAGES[i : i + 1], PROMPTS[i : i + 1])
        assert began.wait(20)
        threading.Timer(0.2, failed.set).start()
        raise ZeroDivisionError

    before = threading.active_count()
    with pytest.raises(ZeroDivisionError), AsyncReward(sum_of(slow)) as judges:
        paint(judges)
    assert seen == ["fox 0"]
    assert threading.active_count() == before


def test_no_gradient_is_kept() -> None:
    images = IMAGES.clone().requires_grad_()
    with AsyncReward(sum_of(redness)) as judges:
        judges.submit(images, PROMPTS)
        assert not judges.results()[0].requires_grad


def test_results_of_nothing_are_refused() -> None:
    with AsyncReward(sum_of(redness)) as judges, pytest.raises(ValueError, match="No images were submitted"):
        judges.results()
