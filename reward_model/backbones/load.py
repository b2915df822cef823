"""From the path or Hub id of a multimodal LLM to a backbone; the one place that knows which families there are."""

# transformers has no usable types.
# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false
from __future__ import annotations

from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from reward_model.backbones import llava, qwen2_5_vl
from reward_model.backbones.text import PaddingSide, PromptReader, find_chat_template
from reward_model.types import Backbone

Template = Literal["family", "published"]
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of the language models known here; published targets."""


def load_backbone(
    source: str,
    *,
    dtype: torch.dtype = torch.float32,
    template: Template = "family",
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    padding_side: PaddingSide = "right",
) -> Backbone:
    """Load a model with random or trained weights, frozen and ready to read.

    `template` is how a prompt is shown: by the model's own chat template, or as the published LLaVA-Reward code did.
    `min_pixels` and `max_pixels` bound a picture where the family keeps its shape (Qwen2.5-VL); None takes the model's
    own. Raises ValueError for a family without an adapter, or a setting that the family does not have.
    """
    config = AutoConfig.from_pretrained(source)
    if config.model_type not in ("llava", "qwen2_5_vl"):
        raise ValueError(
            f"{source!r} is a model of type {config.model_type!r}, for which there is no adapter; there are llava and "
            f"qwen2_5_vl. One needs `prepare` (pixels and token ids), `see` (vision features), `read` (visual tokens "
            f"and last hidden states), and a line in reward_model/backbones/load.py."
        )
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype).eval().requires_grad_(False)
    return adapt(
        model, source, template=template, min_pixels=min_pixels, max_pixels=max_pixels, padding_side=padding_side
    )


def adapt(
    model: Any,
    source: str,
    *,
    template: Template = "family",
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    padding_side: PaddingSide = "right",
) -> Backbone:
    """The backbone around a model that is in memory; tokenizer and image settings come from `source`."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    config = model.config

    def reader(published: str) -> PromptReader:
        own = published if template == "published" else find_chat_template(source, tokenizer)
        places = config.text_config.max_position_embeddings
        return PromptReader(tokenizer, config.image_token_id, own, places, padding_side)

    match config.model_type:
        case "llava":
            from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

            if min_pixels is not None or max_pixels is not None:
                raise ValueError("min_pixels and max_pixels mean nothing to LLaVA: all its pictures have one size.")
            processor = CLIPImageProcessorPil.from_pretrained(source)
            return llava.Llava(model, reader(llava.PUBLISHED_TEMPLATE), processor)
        case "qwen2_5_vl":
            from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

            processor = Qwen2VLImageProcessorPil.from_pretrained(source)
            low = processor.size["shortest_edge"] if min_pixels is None else min_pixels
            high = processor.size["longest_edge"] if max_pixels is None else max_pixels
            if not 0 < low <= high:
                raise ValueError(f"min_pixels ({low}) must be positive and at most max_pixels ({high}).")
            return qwen2_5_vl.Qwen25VL(model, reader(qwen2_5_vl.PUBLISHED_TEMPLATE), processor, low, high)
        case other:
            raise ValueError(f"There is no adapter for models of type {other!r}.")
