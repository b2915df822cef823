"""Settings of a backbone, and what the families make of them alike."""

# transformers has no usable types.
# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from transformers import AutoTokenizer

from reward_model.backbones.prompts import PaddingSide, PromptTokenizer, find_chat_template

Template = Literal["family", "published"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneSettings:
    """How images and prompts are given to a model; a family says in its `OPTIONS` which of the bounds it has."""

    template: Template = "family"
    """The model's own chat template, or that of the published LLaVA-Reward code, with the sizes to which that resizes
    the images of Qwen2.5-VL."""
    min_pixels: int | None = None
    max_pixels: int | None = None
    """Bounds of the resized image of families that keep its aspect ratio; None is the model's own."""
    num_crops: int | None = None
    """Maximum number of crops of an image, for families that cut it into crops; None is the model's own."""
    padding_side: PaddingSide = "right"


def prompt_tokenizer(
    model: Any,
    source: str,
    settings: BackboneSettings,
    *,
    published: str,
    tokenizer: Any = None,
    image_token: str | None = None,
    image_text: str | None = None,
) -> PromptTokenizer:
    """Return the tokenizer of prompts for a model, loaded from `source` unless it is given.

    `published` is the chat template of the published code. `image_token` is the token in the place of an image, by
    default the one of the model's config; `image_text` is the text that stands for it in the chat template.
    """
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(source)
    image = tokenizer.convert_tokens_to_ids(image_token) if image_token else model.config.image_token_id
    chosen = published if settings.template == "published" else find_chat_template(source, tokenizer)
    length = max_tokens(model.config)
    return PromptTokenizer(tokenizer, image, chosen, length, settings.padding_side, image_text=image_text)


def max_tokens(config: Any) -> int:
    """Return the maximum number of tokens in a row.

    Under longrope the positions of a batch are scaled differently as soon as one of its rows is longer than the
    original model's limit, so that a longer row would change the scores of the others: that limit is the maximum.
    """
    text = config.get_text_config()
    if (text.rope_parameters or {}).get("rope_type") == "longrope":
        return min(text.max_position_embeddings, text.rope_parameters["original_max_position_embeddings"])
    return text.max_position_embeddings
