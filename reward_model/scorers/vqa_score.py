"""VQAScore (arXiv:2404.01291): a multimodal LLM's probability of "Yes" when asked if an image shows its prompt."""

# transformers has no usable types.
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from reward_model.backbones.load import load_backbone
from reward_model.model import last_real_token
from reward_model.types import Backbone, Inputs

QUESTION = 'Does this figure show "{}"? Please answer yes or no.'
ANSWER = "Yes"


@dataclass(frozen=True, slots=True)
class VqaScore:
    """score = P(answer | image, question) at the first token of the model's turn; in [0, 1], differentiable.

    Any backbone of LLaVA-Reward serves, untrained. The paper's own model (CLIP-FlanT5, an encoder-decoder) is not
    among them, so its published numbers are of another model.
    """

    backbone: Backbone
    answer_id: int
    log_odds_unit: float = 1.0
    """Arbitrary: a difference of two probabilities is no log-odds, and only the order of images has a meaning."""

    @property
    def model(self) -> Any:
        return self.backbone.model

    def __call__(self, images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> Float[Tensor, " B"]:
        questions = [QUESTION.format(prompt) for prompt in prompts]
        return first_token_log_probs(self.backbone, images, questions)[:, self.answer_id].exp()


def first_token_log_probs(
    backbone: Backbone, images: Float[Tensor, "B 3 Y X"], questions: Sequence[str]
) -> Float[Tensor, "B V"]:
    """Return the log-probability of each token of the vocabulary as the first of the model's answer."""
    output = backbone.forward(inputs_on_device(backbone, images, questions))
    last = last_real_token(output.hidden, output.hidden_mask)
    head: Any = backbone.model.lm_head
    return torch.log_softmax(F.linear(last, head.weight), dim=-1)


def inputs_on_device(backbone: Backbone, images: Float[Tensor, "B 3 Y X"], texts: Sequence[str]) -> Inputs:
    """Move a backbone to the device of the images, and return its inputs there."""
    model: Any = backbone.model
    model.to(images.device)
    inputs = backbone.prepare(list(images.to(model.dtype)), texts)
    return {key: tensor.to(images.device) for key, tensor in inputs.items()}


@cache
def load_vqa_score(source: str | Path, *, answer: str = ANSWER) -> VqaScore:
    """Load a multimodal LLM of a supported family; ValueError if `answer` is not a single token."""
    backbone = load_backbone(str(source))
    backbone.prompt_tokenizer = replace(backbone.prompt_tokenizer, answering=True)
    ids = backbone.prompt_tokenizer.tokenizer(answer, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == backbone.prompt_tokenizer.tokenizer.unk_token_id:
        raise ValueError(
            f"The tokenizer of {str(source)!r} encodes the answer {answer!r} as {ids}; it must be one token of its own."
        )
    return VqaScore(backbone, ids[0])
