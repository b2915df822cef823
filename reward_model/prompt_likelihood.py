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
    rows, _, each = _tokens_behind_image(output, ids, backbone)
    return each.new_zeros(len(ids)).index_add(0, rows, each)[:, None]


@torch.no_grad()
def token_contributions(
    backbone: Backbone, first: Float[Tensor, "3 Y X"], second: Float[Tensor, "3 Z W"], prompt: str
) -> list[tuple[str, float]]:
    """Return each token behind the image and its contribution to the log-odds of the first image, in nats.

    That is log p(token | first, tokens before) - log p(token | second, tokens before); the sum is the difference of the
    images' `prompt_log_likelihood`. The tokens of the chat template behind the image are among them.
    """
    device = next(backbone.model.parameters()).device
    inputs = backbone.prepare([first.to(device), second.to(device)], [prompt, prompt])
    inputs = {key: value.to(device) for key, value in inputs.items()}
    rows, ids, each = _tokens_behind_image(backbone.forward(inputs), inputs["input_ids"], backbone)
    tokenizer = backbone.prompt_tokenizer.tokenizer
    texts = [_text_of_token(i, tokenizer) for i in ids[rows == 0].tolist()]
    return list(zip(texts, (each[rows == 0] - each[rows == 1]).tolist(), strict=True))


def _text_of_token(token: int, tokenizer: Any) -> str:
    """Return the text of a token, or its name for white space and for a part of a character."""
    text = str(tokenizer.decode([token])).removesuffix("</w>").strip()  # CLIP's mark of the end of a word
    return str(tokenizer.convert_ids_to_tokens(token)) if not text or "\N{REPLACEMENT CHARACTER}" in text else text


def _tokens_behind_image(
    output: BackboneOutput, ids: Int[Tensor, "B L"], backbone: Backbone
) -> tuple[Int[Tensor, " T"], Int[Tensor, " T"], Float[Tensor, " T"]]:
    """Return row and id of all tokens behind their row's image, and their log-probabilities."""
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
    chosen = ids[rows, columns]
    return rows, chosen, -F.cross_entropy(logits, chosen, reduction="none")
