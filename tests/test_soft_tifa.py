"""Soft-TIFA: probabilities of answers to the questions of a prompt, by a tiny random multimodal LLM."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from reward_model.scorers.soft_tifa import answer_ids, load_soft_tifa
from reward_model.scorers.vqa_score import first_token_log_probs
from rlhf_t2i.prompt_rows import Prompt
from rlhf_t2i.rewards.load import load_reward, load_rewards
from rlhf_t2i.rewards.rows import check_prompts
from tests.reward_models import backbone_folder, bytes_of
from tests.servers import served

IMAGES = torch.stack([bytes_of(28, 28, seed=seed) for seed in range(2)]).float() / 255
QUESTIONS = [[["a red fox", "red"], ["How many cat", "fox"]], [["a blue cat", "a"]]]
ROWS = [Prompt(f"prompt {i}", {"prompt": f"prompt {i}", "vqa_list": each}) for i, each in enumerate(QUESTIONS)]


class Vocabulary:
    """A tokenizer with one token for each of these texts, and several for others."""

    unk_token_id = None

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [self.texts.index(text)] if text in self.texts else [90, 91]}


@pytest.mark.parametrize(
    ("question", "answer", "forms"),
    [
        ("How many foxes are there?", "seven", ["seven", "Seven", " seven", " Seven", "7"]),
        ("how many foxes are there?", "7", ["seven", "Seven", " seven", " Seven", "7"]),
        ("Is there a fox?", "Yes", ["yes", "Yes", " yes", " Yes"]),
        ("Are there seven?", "yes", ["yes", "Yes", " yes", " Yes"]),
    ],
)
def test_the_surface_forms_of_an_answer_by_hand(question: str, answer: str, forms: list[str]) -> None:
    vocabulary = Vocabulary("7", "seven", "Seven", " seven", " Seven", "no", "yes", "Yes", " yes", " Yes", " 7")
    assert answer_ids(vocabulary, question, answer) == sorted(vocabulary.texts.index(form) for form in forms)


def test_an_answer_without_a_token_is_refused() -> None:
    with pytest.raises(ValueError, match=r"No form of the answer 'crimson' is a token of this model: 'crimson', "):
        answer_ids(Vocabulary("red"), "Which colour?", "crimson")


@pytest.mark.parametrize(("aggregate", "first"), [("am", lambda p: p.mean()), ("gm", lambda p: p.prod().sqrt())])
def test_the_score_is_the_mean_of_the_summed_probabilities(aggregate: str, first: Any) -> None:
    """The red of the tiny vocabulary has two forms, with and without a blank; question by question, not in a batch."""
    reward = load_reward(f"soft_tifa:{backbone_folder('qwen3_vl')}(aggregate='{aggregate}')")
    scorer: Any = reward.function
    expected: list[list[Tensor]] = []
    for image, questions in zip(IMAGES, QUESTIONS, strict=True):
        expected.append([])
        for question, answer in questions:
            log_probs = first_token_log_probs(scorer.backbone, image[None], [f"{question} Answer in one word."])[0]
            tokens = [answer, f"Ġ{answer}"]
            ids = scorer.backbone.prompt_tokenizer.tokenizer.convert_tokens_to_ids(tokens)
            expected[-1].append(log_probs[ids].exp().sum())
    scores = reward(IMAGES, ROWS)
    assert_close(scores, torch.stack([first(torch.stack(expected[0])), expected[1][0]]), rtol=1e-4, atol=1e-7)
    assert_close(reward(IMAGES[1:], ROWS[1:]), scores[1:], rtol=1e-4, atol=1e-7)


def test_batches_of_images_and_of_questions_and_a_server_change_no_score() -> None:
    source = backbone_folder("qwen3_vl")
    together = load_reward(f"soft_tifa:{source}")(IMAGES, ROWS)
    with served(load_rewards(f"soft_tifa:{source}")) as address:
        assert torch.equal(load_reward(address)(IMAGES, ROWS), together)
    assert_close(load_reward(f"soft_tifa:{source}(batch_size=1)")(IMAGES, ROWS), together, rtol=1e-4, atol=1e-7)
    one_by_one = replace(load_soft_tifa(source), batch_size=1)
    rows = [row.metadata for row in ROWS]
    assert_close(one_by_one(IMAGES, ROWS, rows), together, rtol=1e-4, atol=1e-7)


def test_the_gradient_reaches_the_pixels_of_each_image() -> None:
    images = IMAGES.clone().requires_grad_()
    load_reward(f"soft_tifa:{backbone_folder('qwen3_vl')}")(images, ROWS).sum().backward()
    assert images.grad is not None
    assert (images.grad.abs().amax((1, 2, 3)) > 0).all()


@pytest.mark.parametrize("questions", [[], "How many?", [["How many?"]], [["How many?", 7]], [["", "yes"]]])
def test_a_row_without_questions_that_can_be_used_is_refused_before_a_model_is_loaded(questions: Any) -> None:
    rows = [ROWS[0], Prompt("b", {"prompt": "b", "vqa_list": questions}, "prompts.jsonl:2")]
    with pytest.raises(ValueError, match=r"prompts\.jsonl:2: .* its vqa_list is .*; it must be a list of at least one"):
        check_prompts("soft_tifa:nowhere", rows)
    with pytest.raises(ValueError, match=r"prompt 0 has no 'vqa_list', which the reward 'soft_tifa:nowhere' needs"):
        check_prompts("soft_tifa:nowhere", ["a fox"])


def test_another_aggregate_is_refused() -> None:
    with pytest.raises(ValueError, match="aggregate of soft_tifa is 'max'; it must be am or gm"):
        load_reward("soft_tifa:nowhere(aggregate='max')")
