"""UnifiedReward: ratings by hand, and greedy answers of a tiny random multimodal LLM."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from reward_model.scorers import unified_reward
from reward_model.scorers.unified_reward import UnifiedReward, load_unified_reward, rating
from reward_model.scorers.vqa_score import first_token_log_probs
from rlhf_t2i.rewards.load import load_reward
from rlhf_t2i.rewards.table import find_reward
from tests.reward_models import backbone_folder, bytes_of

IMAGES = torch.stack([bytes_of(64, 64, seed=seed) for seed in range(3)]).float() / 255
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


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_answers_are_greedy_and_the_same_alone_and_in_a_batch_of_rows_of_other_lengths(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first token is the likeliest of a plain forward pass."""
    monkeypatch.setattr(unified_reward, "MAX_TOKENS", 4)
    scorer = load_unified_reward(str(backbone_folder(family)))
    questions = ["a red fox", "red", "a blue cat on a fox"]
    together = scorer.answers(IMAGES, questions)
    assert together == [scorer.answers(IMAGES[i : i + 1], questions[i : i + 1])[0] for i in range(3)]
    monkeypatch.setattr(unified_reward, "MAX_TOKENS", 1)
    tokenizer = scorer.backbone.prompt_tokenizer.tokenizer
    likeliest = first_token_log_probs(scorer.backbone, IMAGES, questions).argmax(1)
    assert scorer.answers(IMAGES, questions) == tokenizer.batch_decode(likeliest[:, None], skip_special_tokens=True)


def test_the_score_is_the_rating_of_the_answer_to_the_question_it_was_trained_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []

    def answers(self: UnifiedReward, images: torch.Tensor, questions: list[str]) -> list[str]:
        asked.extend(questions)
        return [LINES.format(*(int(1 + 4 * image.mean().round()),) * 3) for image in images]

    monkeypatch.setattr(UnifiedReward, "answers", answers)
    reward = load_reward(f"unified_reward:{backbone_folder('qwen3_vl')}(batch_size=2)")
    images = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4), torch.ones(3, 4, 4)])
    assert_close(reward(images, ["a", "b", "c"]), torch.tensor([0.0, 1.0, 1.0]))
    assert [question[-17:] for question in asked] == [f"Text Caption: [{each}]" for each in "abc"]
    assert find_reward("unified_reward:x")[0].differentiable is False


def test_a_model_of_another_family_is_refused() -> None:
    with pytest.raises(ValueError, match=r"type 'llava'; UnifiedReward 2\.0 is one of qwen2_5_vl, qwen3_vl"):
        load_unified_reward(str(backbone_folder("llava")))
