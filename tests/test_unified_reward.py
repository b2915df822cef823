"""UnifiedReward: ratings by hand, and the question."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from reward_model.scorers import unified_reward
from reward_model.scorers.unified_reward import load_unified_reward, rating
from rlhf_t2i.rewards.load import load_reward
from rlhf_t2i.rewards.table import find_reward
from tests.reward_models import backbone_folder

LINES = "Alignment Score (1-5): {}\nCoherence Score (1-5): {}\nStyle Score (1-5): {}"


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (LINES.format(5, 5, 5), 1.0),
        (LINES.format(1, 1, 1), 0.0),
        (LINES.format(2.5, "3.125 ", "4\n"), (9.625 / 3 - 1) / 4),
        (f"Word-wise Scores: [...]\n{LINES.format(1, 2, 3)}\nReason: it is red.", 0.25),
    ],
)
def test_ratings_by_hand(answer: str, score: float) -> None:
    assert rating(answer, "a fox") == pytest.approx(score)


@pytest.mark.parametrize("answer", ["", "red", LINES.format(6, 1, 1), LINES.format(0, 1, 1), LINES[:40].format(3)])
def test_an_answer_without_three_ratings_is_an_error_with_its_prompt(answer: str) -> None:
    with pytest.raises(ValueError, match=r"for the prompt 'a fox' has no Alignment, Coherence, Style between 1 and 5"):
        rating(answer, "a fox")


def test_the_score_is_the_rating_of_the_answer_to_the_question_it_was_trained_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []

    def answers(_: Any, images: torch.Tensor, questions: list[str], **__: int) -> list[str]:
        asked.extend(questions)
        return [LINES.format(*(int(1 + 4 * image.mean().round()),) * 3) for image in images]

    monkeypatch.setattr(unified_reward, "greedy_answers", answers)
    reward = load_reward(f"unified_reward:{backbone_folder('qwen3_vl')}(batch_size=2)")
    images = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4), torch.ones(3, 4, 4)])
    assert_close(reward(images, ["a", "b", "c"]), torch.tensor([0.0, 1.0, 1.0]))
    assert [question[-17:] for question in asked] == [f"Text Caption: [{each}]" for each in "abc"]
    assert find_reward("unified_reward:x")[0].differentiable is False


def test_a_model_of_another_family_is_refused() -> None:
    with pytest.raises(ValueError, match=r"type 'llava'; UnifiedReward 2\.0 is one of qwen2_5_vl, qwen3_vl"):
        load_unified_reward(str(backbone_folder("llava")))
