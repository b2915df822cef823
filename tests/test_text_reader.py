"""Greedy answers of tiny random multimodal LLMs, and such a model as the reader of the OCR reward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from reward_model.scorers import text_reader
from reward_model.scorers.greedy_answers import FAMILIES, greedy_answers, load_answering
from reward_model.scorers.text_reader import QUESTION
from reward_model.scorers.vqa_score import first_token_log_probs
from rlhf_t2i.rewards.load import load_reward
from rlhf_t2i.rewards.rows import check_prompts
from tests.reward_models import backbone_folder, bytes_of

IMAGES = torch.stack([bytes_of(64, 64, seed=seed) for seed in range(3)]).float() / 255


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_greedy_and_the_same_alone_and_in_a_batch_of_rows_of_other_lengths(family: str) -> None:
    """The first token is the likeliest of a plain forward pass."""
    backbone = load_answering(str(backbone_folder(family)))
    questions = ["a red fox", "red", "a blue cat on a fox"]
    together = greedy_answers(backbone, IMAGES, questions, max_tokens=4, batch_size=2)
    assert together == greedy_answers(backbone, IMAGES, questions, max_tokens=4, batch_size=1)
    likeliest = first_token_log_probs(backbone, IMAGES, questions).argmax(1)
    first = backbone.prompt_tokenizer.tokenizer.batch_decode(likeliest[:, None], skip_special_tokens=True)
    assert greedy_answers(backbone, IMAGES, questions, max_tokens=1, batch_size=3) == first


def test_the_score_of_ocr_is_that_of_the_text_which_the_model_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dark images are answered with a word, light ones with none."""
    pytest.importorskip("rapidfuzz", reason="the extra ocr is not installed")
    asked: list[Any] = []

    def answers(_: Any, images: torch.Tensor, questions: list[str], **__: int) -> list[str]:
        asked.extend(questions)
        return ["The text is:\nF o X" if image.mean() < 0.5 else "" for image in images]

    monkeypatch.setattr(text_reader, "greedy_answers", answers)
    reward = load_reward(f"ocr:{backbone_folder('qwen3_vl')}(batch_size=2)")
    images = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4), torch.zeros(3, 4, 4)])
    prompts = ['a sign that says "FOX"', 'a sign that says "FOX"', 'a sign that says "foe"']
    assert_close(reward(images, prompts), torch.tensor([1.0, 0.0, 0.0]))
    assert asked == [QUESTION] * 3


def test_a_model_that_cannot_write_and_a_prompt_without_text_are_refused() -> None:
    with pytest.raises(ValueError, match="a model of type 'phi3_v'; one that writes is of llava, llava_next, qwen2_5_"):
        load_reward(f"ocr:{backbone_folder('phi3_v')}")
    with pytest.raises(ValueError, match="the reward 'ocr:nowhere' cannot use this row: it has no 'text'"):
        check_prompts("ocr:nowhere", ["a fox"])
