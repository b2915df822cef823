"""The log-likelihood of a prompt given its image, as a score (VisualGPTScore, arXiv:2306.01879)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from reward_model.types import Backbone, BackboneOutput


def check_language_head(backbone: Backbone) -> None:
    """Raise ValueError for a backbone that was loaded without its language-model head."""
    if getattr(backbone.model, "lm_head", None) is None:
        raise ValueError(
            f"The likelihood of prompts (readout prompt_likelihood, visual_gpt_score) needs a language-model head; "
            f"{type(backbone.model).__name__} is loaded without one. Use a LLaVA, Qwen2.5-VL or Qwen3-VL."
        )


def prompt_log_likelihood(output: BackboneOutput, ids: Int[Tensor, "B L"], backbone: Backbone) -> Float[Tensor, "B 1"]:
    """Return sum_t log p(token t | image, tokens before t) over the tokens behind the image, in nats.

    Of one prompt and two images the difference is, by Bayes' rule, the log-odds of which of them the prompt describes.
    The tokens of the chat template behind the image count too; they are nearly the same for each image. Raises
    ValueError for a chat template with the image at the end.
    """
    is_image = ids == backbone.prompt_tokenizer.image_token_id
    positions = torch.arange(ids.shape[1], device=ids.device)
    behind = output.hidden_mask & (positions > torch.where(is_image, positions, -1).amax(dim=1, keepdim=True))
    if not behind.any(dim=1).all():
        raise ValueError(
            "The likelihood of prompts needs a chat template with text behind the image; this one has none."
        )
    rows, columns = behind.nonzero(as_tuple=True)
    head: Any = backbone.model.lm_head
    logits = head(output.hidden[rows, columns - 1])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    each = F.cross_entropy(logits, ids[rows, columns], reduction="none")
    return -each.new_zeros(len(ids)).index_add(0, rows, each)[:, None]
