"""VQAScore (arXiv:2404.01291): how surely a multimodal LLM says that an image shows what its prompt says."""

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
from reward_model.types import Backbone

QUESTION = 'Does this figure show "{}"? Please answer yes or no.'
ANSWER = "Yes"


@dataclass(frozen=True, slots=True)
class VqaScore:
    """score = P(answer | image, question) at the first word of the model's turn; in [0, 1], differentiable.

    Any backbone that LLaVA-Reward can stand on answers, untrained. The paper's own model (CLIP-FlanT5, an encoder and
    decoder) is none of these, so its numbers are not these models'.
    """

    backbone: Backbone
    answer_id: int
    log_odds_unit: float = 1.0
    """A difference of two probabilities is no log-odds; the number is for the order of images only."""

    @property
    def model(self) -> Any:
        return self.backbone.model

    def __call__(self, images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> Float[Tensor, " B"]:
        self.model.to(images.device)
        asked = [QUESTION.format(prompt) for prompt in prompts]
        inputs = self.backbone.prepare(list(images.to(self.model.dtype)), asked)
        output = self.backbone.forward({key: tensor.to(images.device) for key, tensor in inputs.items()})
        last = last_real_token(output.hidden, output.hidden_mask)
        logits = F.linear(last, self.model.lm_head.weight)
        return torch.log_softmax(logits, dim=-1)[:, self.answer_id].exp()


@cache
def load_vqa_score(source: str | Path, *, answer: str = ANSWER) -> VqaScore:
    """Load a multimodal LLM of a known family from a folder or Hub id; ValueError if its answer is no single token."""
    backbone = load_backbone(str(source))
    backbone.prompt_tokenizer = replace(backbone.prompt_tokenizer, answering=True)
    ids = backbone.prompt_tokenizer.tokenizer(answer, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == backbone.prompt_tokenizer.tokenizer.unk_token_id:
        raise ValueError(
            f"The tokenizer of {str(source)!r} makes {ids} of the answer {answer!r}; it must be one token of its own."
        )
    return VqaScore(backbone, ids[0])
