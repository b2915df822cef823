"""Soft-TIFA (GenEval 2, arXiv:2512.16853): probabilities of the answers to questions about an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from reward_model.backbones.load import load_backbone
from reward_model.scorers.vqa_score import first_token_log_probs
from reward_model.types import Backbone

ASK = "{} Answer in one word."
QUESTIONS = "vqa_list"
"""Field of a prompt's row: its questions with their answers, [["How many cats are in the image?", "two"], ...]."""
Aggregate = Literal["am", "gm"]
_NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class SoftTifa:
    """score = mean over questions of P(answer | image, question), in [0, 1]; differentiable.

        P(answer) = sum of P(token) over the answer's surface forms, at the first token of the model's turn

    `am` is the arithmetic mean and forgives a missing part of the prompt; `gm` the geometric one, which does not. The
    benchmark's model is Qwen/Qwen3-VL-8B-Instruct; any backbone of LLaVA-Reward serves, untrained.
    """

    backbone: Backbone
    aggregate: Aggregate = "am"
    batch_size: int = 16
    """Questions in one forward pass."""

    required_fields = (QUESTIONS,)

    @staticmethod
    def check_row(metadata: Mapping[str, Any]) -> None:
        """Raise ValueError for a row whose questions cannot be used."""
        questions = metadata[QUESTIONS]
        works = isinstance(questions, list) and questions and all(_is_question(each) for each in questions)
        if not works:
            raise ValueError(
                f"its {QUESTIONS} is {questions!r}; it must be a list of at least one [question, answer], both texts."
            )

    @property
    def model(self) -> Any:
        return self.backbone.model

    def __call__(
        self, images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Float[Tensor, " B"]:
        """Return one score per image; raises ValueError for an answer of which no form is a token of the model."""
        del prompts
        tokenizer = self.backbone.prompt_tokenizer.tokenizer
        asked = [(row, *pair) for row, one in enumerate(metadata) for pair in one[QUESTIONS]]
        parts: list[Tensor] = []
        for start in range(0, len(asked), self.batch_size):
            batch = asked[start : start + self.batch_size]
            rows, questions = [row for row, _, _ in batch], [ASK.format(question) for _, question, _ in batch]
            log_probs = first_token_log_probs(self.backbone, images[rows], questions)
            answers = [answer_ids(tokenizer, question, answer) for _, question, answer in batch]
            parts += [of_one[ids].logsumexp(0) for of_one, ids in zip(log_probs, answers, strict=True)]
        by_image = torch.stack(parts).split([len(one[QUESTIONS]) for one in metadata])
        match self.aggregate:
            case "am":
                return torch.stack([part.exp().mean() for part in by_image])
            case "gm":
                return torch.stack([part.mean().exp() for part in by_image])


def answer_ids(tokenizer: Any, question: str, answer: str) -> list[int]:
    """Return the ids of an answer's surface forms that are one token each.

    Forms are the word, plain and capitalised, with and without a blank before it; of a question "How many" also the
    digits. Raises ValueError if there is none.
    """
    word = answer.strip().lower()
    words = [word, word.capitalize()]
    if question.strip().lower().startswith("how many"):
        if word.isdecimal() and int(word) < len(_NUMBERS):
            word = _NUMBERS[int(word)]
        words = [word, word.capitalize(), *([str(_NUMBERS.index(word))] if word in _NUMBERS else [])]
    forms = [form for each in words for form in (each, *([] if each.isdecimal() else [f" {each}"]))]
    encoded = [tokenizer(form, add_special_tokens=False)["input_ids"] for form in forms]
    ids = sorted({one[0] for one in encoded if len(one) == 1 and one[0] != tokenizer.unk_token_id})
    if not ids:
        raise ValueError(f"No form of the answer {answer!r} is a token of this model: {', '.join(map(repr, forms))}.")
    return ids


def load_soft_tifa(source: str | Path, *, aggregate: str = "am") -> SoftTifa:
    """Load a multimodal LLM of a supported family; ValueError for an aggregate that is neither am nor gm."""
    known: dict[str, Aggregate] = {"am": "am", "gm": "gm"}
    if aggregate not in known:
        raise ValueError(f"The aggregate of soft_tifa is {aggregate!r}; it must be am or gm.")
    return SoftTifa(_loaded(str(source)), known[aggregate])


@cache
def _loaded(source: str) -> Backbone:
    backbone = load_backbone(source)
    backbone.prompt_tokenizer = replace(backbone.prompt_tokenizer, answering=True)
    return backbone


def _is_question(pair: Any) -> bool:
    return isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(t, str) and t.strip() for t in pair)
