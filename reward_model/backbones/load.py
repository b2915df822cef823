"""Loading of a backbone from the path or Hub id of a multimodal LLM, and the table of the families."""

# transformers has no usable types.
# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false
from __future__ import annotations

from typing import Any, Literal

import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer, PreTrainedConfig

from reward_model.backbones import llava, llava_next, phi3_v, qwen2_5_vl, qwen3_vl
from reward_model.backbones.patches import load_patch_preprocessor
from reward_model.backbones.prompts import PaddingSide, PromptTokenizer, find_chat_template
from reward_model.types import Backbone

Template = Literal["family", "published"]
FAMILIES = {
    "llava": "LLaVA-1.5",
    "llava_next": "LLaVA-NeXT",
    "phi3_v": "Phi-3.5-vision",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
}
"""Supported families by the `model_type` of their config.json."""
_WITH_PIXEL_BOUNDS, _WITH_CROPS = ("qwen2_5_vl", "qwen3_vl"), ("llava_next", "phi3_v")
"""Families that have min_pixels and max_pixels, and families that have num_crops."""
LORA_TARGETS = (
    "q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj",
)  # fmt: skip
"""Names of the linear layers of the language models, which carry the LoRA; as published."""


def load_backbone(
    source: str,
    *,
    dtype: torch.dtype = torch.float32,
    template: Template = "family",
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    num_crops: int | None = None,
    padding_side: PaddingSide = "right",
) -> Backbone:
    """Load a model, frozen and in evaluation mode. No remote code is run.

    `template` selects the model's own chat template or that of the published LLaVA-Reward code. `min_pixels` and
    `max_pixels` bound the resized image of families that keep its aspect ratio (Qwen), `num_crops` the number of its
    crops (LLaVA-NeXT, Phi-3.5-vision); None is the model's own. Raises ValueError for an unsupported family, or a
    setting that the family does not have.
    """
    kind = PreTrainedConfig.get_config_dict(source)[0].get("model_type")
    if kind not in FAMILIES:
        raise ValueError(_unsupported(source, kind))
    if kind == "phi3_v":
        from reward_model.backbones.phi3_v_model import load_phi3_v

        model = load_phi3_v(source, dtype=dtype)
    else:
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype)
    return adapt(
        model.eval().requires_grad_(False), source,
        template=template, min_pixels=min_pixels, max_pixels=max_pixels, num_crops=num_crops, padding_side=padding_side,
    )  # fmt: skip


def _unsupported(source: str, kind: str | None) -> str:
    """Return the error message for a family without a backbone class."""
    known = ", ".join(f"{kind} ({name})" for kind, name in FAMILIES.items())
    return (
        f"{source!r} is a model of type {kind!r}, which is not supported; there are {known}. A new family is a "
        f"class that implements reward_model.types.Backbone, in a file of reward_model/backbones/: `prepare` "
        f"(pixels and token ids), `encode_image` (vision features), `forward` (visual tokens and last hidden states), "
        f"`num_visual_tokens`, `width`, `projector`, `language_model`; and a case in reward_model/backbones/load.py. "
        f"The linear layers of its language model must be among LORA_TARGETS there."
    )


def adapt(
    model: Any,
    source: str,
    *,
    template: Template = "family",
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    num_crops: int | None = None,
    padding_side: PaddingSide = "right",
) -> Backbone:
    """Return the backbone of a model in memory; tokenizer and image settings are loaded from `source`."""
    config, family = model.config, FAMILIES[model.config.model_type]
    if config.model_type not in _WITH_PIXEL_BOUNDS and (min_pixels is not None or max_pixels is not None):
        raise ValueError(f"min_pixels and max_pixels do not apply to {family}, only to Qwen2.5-VL and Qwen3-VL.")
    if config.model_type not in _WITH_CROPS and num_crops is not None:
        raise ValueError(f"num_crops does not apply to {family}, only to LLaVA-NeXT and Phi-3.5-vision.")

    def tokenizer_for(
        published: str, tokenizer: Any = None, *, image_token: str | None = None, image_text: str | None = None
    ) -> PromptTokenizer:
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(source)
        image = tokenizer.convert_tokens_to_ids(image_token) if image_token else config.image_token_id
        chosen = published if template == "published" else find_chat_template(source, tokenizer)
        return PromptTokenizer(tokenizer, image, chosen, max_tokens(config), padding_side, image_text=image_text)

    match config.model_type:
        case "llava":
            from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

            prompt_tokenizer = tokenizer_for(llava.PUBLISHED_TEMPLATE)
            return llava.Llava(model, prompt_tokenizer, CLIPImageProcessorPil.from_pretrained(source))
        case "llava_next":
            from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

            processor = LlavaNextImageProcessorPil.from_pretrained(source)
            llava_next.bound_crops(model, processor, num_crops)
            prompt_tokenizer = tokenizer_for(llava.PUBLISHED_TEMPLATE)
            return llava_next.LlavaNext(model, prompt_tokenizer, processor)
        case "phi3_v":
            tokenizer = phi3_v.load_tokenizer(source)
            prompt_tokenizer = tokenizer_for(
                phi3_v.PUBLISHED_TEMPLATE, tokenizer, image_token=phi3_v.IMAGE_TOKEN, image_text=phi3_v.IMAGE_TEXT
            )
            return phi3_v.Phi3Vision(model, prompt_tokenizer, **phi3_v.image_settings(source, num_crops))
        case "qwen2_5_vl":
            prompt_tokenizer = tokenizer_for(qwen2_5_vl.PUBLISHED_TEMPLATE)
            return qwen2_5_vl.Qwen25VL(model, prompt_tokenizer, load_patch_preprocessor(source, min_pixels, max_pixels))
        case "qwen3_vl":
            prompt_tokenizer = tokenizer_for(qwen2_5_vl.PUBLISHED_TEMPLATE)
            return qwen3_vl.Qwen3VL(model, prompt_tokenizer, load_patch_preprocessor(source, min_pixels, max_pixels))
        case other:
            raise ValueError(_unsupported(source, other))


def max_tokens(config: Any) -> int:
    """Return the maximum number of tokens in a row.

    Under longrope the positions of a batch are scaled differently as soon as one of its rows is longer than the
    original model's limit, so that a longer row would change the scores of the others: that limit is the maximum.
    """
    text = config.get_text_config()
    if (text.rope_parameters or {}).get("rope_type") == "longrope":
        return min(text.max_position_embeddings, text.rope_parameters["original_max_position_embeddings"])
    return text.max_position_embeddings
